"""No finite input of the promised domain overflows: scores up to a quarter of the range, any V."""

import ml_dtypes  # noqa: F401  (registers the name bfloat16)
import numpy as np
import pytest
from cpu_backend import (
    DTYPES,
    ISAS,
    attention_on,
    bits,
    each_isa,
    kernel_on,
    normal,
    on_every_unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedattn import attention
from fusedattn.testing import EVERYTHING, Case, attention_problems
from fusedattn.testing.kernel import quietly
from fusedattn.testing.laws.equality import equals_reference, finite_in_finite_out, in_hull
from fusedattn.testing.roundoff import largest

EXAMPLES = settings().max_examples
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_the_end_of_the_range_stays_finite_and_in_the_hull(dtype, data):
    case = data.draw(attention_problems(EVERYTHING, (dtype,), extreme=True))
    finite_and_right(kernel_on(ISAS[0]), case)


def finite_and_right(kernel, case):
    finite_in_finite_out(kernel, case)  # and equal to the reference
    if "dropout_p" not in case.keywords:
        quietly(in_hull, kernel, case)


@pytest.mark.deep
@settings(max_examples=20 * EXAMPLES)
@given(case=attention_problems(EVERYTHING, DTYPES, extreme=True))
def test_the_end_of_the_range_on_every_vector_unit(case):
    on_every_unit(finite_and_right, case)


@each_isa
@each_dtype
@pytest.mark.parametrize("sinks", [None, -1000.0, -100.0, -1.0, 2.0])
def test_values_at_the_end_of_the_range_average_to_themselves(isa, dtype, sinks):
    """All signs alike: the mean is that value, or below it where a sink takes weight."""
    top = largest(dtype)
    q, k = normal(0, 1, 37, 8, dtype=dtype), normal(1, 1, 211, 8, dtype=dtype)
    v = np.full((1, 211, 19), top, dtype)
    v[..., 1::2] = -v[..., 1::2]
    options = {} if sinks is None else {"sinks": np.array([sinks])}
    for causal in (False, True):
        case = Case(q, k, v, {**options, "causal": causal, "return_lse": True})
        equals_reference(kernel_on(isa), case)
        out = np.abs(attention_on(isa)(q, k, v, causal=causal, **options).astype(np.float64))
        assert (out <= top).all()
        if sinks is None or sinks <= -100:
            assert (out >= top * (1 - 2.0**-6)).all()


def scores_of_size(size, dtype, rows=21, keys=203, dim=6):
    """q and k with ``sum_d |q_d k_d|`` up to ``size``, reached with either sign in each row."""
    rng = np.random.default_rng(7)
    # Powers of two, a few times the root of the share of one product.
    root = 2.0 ** np.floor(np.log2(size / dim) / 2)
    wide = min(root, largest(dtype) / 2)
    q = np.full((1, rows, dim), wide)
    k = np.full((1, keys, dim), min(size / dim / wide, largest(dtype) / 2))
    signs = rng.choice([-1.0, 1.0], (1, keys, 1)) * np.where(
        rng.random((1, keys, dim)) < 0.2, -1, 1
    )
    shrink = rng.choice([1.0, 0.5, 1e-3, 1e-30, 0.0], (1, keys, 1))
    return (q * rng.choice([-1, 1], (1, rows, 1))).astype(dtype), (k * signs * shrink).astype(dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("options", [{}, {"softcap": 1e4}, {"sinks": np.array([0.0])}, {"bias": 0}])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3, 1e-20, 1e9, -1e-30])
def test_scores_up_to_a_quarter_of_the_range(isa, dtype, options, scale):
    accumulator = "float64" if dtype == "float64" else "float32"
    room = largest(accumulator) / 4 / max(1.0, abs(scale)) * (1 - 2.0**-10)
    options = dict(options)
    if "bias" in options:
        room /= 2
        far = largest(accumulator) / 8 * normal(3, 203, dtype=accumulator).clip(-1, 1)
        options["bias"] = far.astype(accumulator)
    q, k = scores_of_size(room, dtype)
    v = normal(5, 1, 203, 9, dtype=dtype)
    for causal in (False, True):
        keywords = {**options, "scale": scale, "causal": causal, "return_lse": True}
        case = Case(q, k, v, keywords)
        equals_reference(kernel_on(isa), case)
        quietly(in_hull, kernel_on(isa), case)


@each_isa
def test_alibi_up_to_a_quarter_of_the_range(isa):
    q, k, v = normal(0, 2, 20, 4), normal(1, 2, 300, 4), normal(2, 2, 300, 4)
    slopes = np.array([1.0, -1.0], np.float32) * np.float32(largest("float32") / 8 / 400)
    case = Case(q, k, v, {"alibi_slopes": slopes, "return_lse": True})
    equals_reference(kernel_on(isa), case)


@each_isa
@pytest.mark.parametrize("power", [101, 120, -101, -140, 99, -99])
def test_a_scale_near_the_ends_of_the_range_is_exact(isa, power):
    """Such a factor would overflow, or lose its bits, on its own: rows go through float64."""
    q = normal(0, 1, 30, 5) * np.float32(2.0 ** (-power // 2))
    k = normal(1, 1, 111, 5) * np.float32(2.0 ** (-power - -power // 2))
    v = normal(2, 1, 111, 5)
    for sign in (1, -1):
        keywords = {"scale": sign * 2.0**power, "causal": True, "return_lse": True}
        equals_reference(kernel_on(isa), Case(q, k, v, keywords))


@each_isa
def test_numbers_that_are_subnormal_are_numbers(isa):
    tiny = np.float32(1e-41)
    q, k, v = normal(0, 1, 30, 5) * tiny, normal(1, 1, 111, 5), normal(2, 1, 111, 5) * tiny
    assert np.abs(v).max() > 0
    equals_reference(kernel_on(isa), Case(q, k, v, {"scale": 1e30, "return_lse": True}))


HIDING = {
    "mask": {"mask": np.arange(30)[:, None] % 3 != 0},
    "all of the mask": {"mask": np.zeros((1, 1), bool)},
    "bias": {"bias": np.where(np.arange(30)[:, None] % 3 == 0, -np.inf, 0.5)},
    "causal": {"causal": True, "q_offset": -7},
    "window": {"window_size": (2, 1), "q_offset": 95},
    "lengths": {"seqused_q": 11},
    "no keys": {"seqused_k": 0},
}


@each_isa
@each_dtype
@pytest.mark.parametrize("options", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("sinks", [None, 1.5])
def test_rows_that_see_nothing_are_zero_and_minus_infinity(isa, dtype, options, sinks):
    q, k, v = normal(0, 2, 30, 8, dtype=dtype), *normal(1, 2, 2, 100, 8, dtype=dtype)
    options = dict(options) if sinks is None else {**options, "sinks": np.full(2, sinks)}
    case = Case(q, k, v, {**options, "return_lse": True})
    out, lse = attention_on(isa)(q, k, v, **options, return_lse=True)
    blind = np.isneginf(
        Case(q, k, v, {k: o for k, o in options.items() if k != "sinks"}).expected.lse
    )
    assert blind.any()
    assert (bits(out[blind]) == 0).all()
    np.testing.assert_array_equal(lse[blind], case.expected.lse[blind])
    equals_reference(kernel_on(isa), case)


def test_nothing_at_all_is_an_answer_too():
    for shape in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4)]:
        x = np.zeros(shape, np.float32)
        out, lse = attention(x, x, x, return_lse=True)
        assert (out.shape, lse.shape) == (shape, shape[:-1])
    q, k = np.ones((2, 3, 4), np.float32), np.ones((2, 0, 4), np.float32)
    out, lse = attention(q, k, k, return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()
