"""Gradients of large logits are as exact as those of small ones, and finite in their domain."""

import numpy as np
import pytest
from cpu_backend import came_back, each_isa, gradient_on, normal

from fusedattn import attention, attention_backward, reference
from fusedattn.problem import Gradients, make_problem
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import backward_budget

ROWS, KEYS, DIM = 70, 130, 8


def exact_operands(dtype="float32"):
    """q and k whose products have few bits, so that a large number can be added exactly."""
    rng = np.random.default_rng(5)
    q = rng.integers(-3, 4, (2, 2, ROWS, DIM)) / 4
    k = rng.integers(-3, 4, (2, 1, KEYS, DIM)) / 2
    return q.astype(dtype), k.astype(dtype), normal(6, 2, 1, KEYS, 5, dtype=dtype)


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "mask": {"mask": np.random.default_rng(1).random((ROWS, KEYS)) < 0.5},
    "sinks": {"sinks": np.array([0.5, 3.0])},
    "dropout": {"dropout_p": 0.3, "seed": 2},
}


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("forward", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adding_a_constant_to_all_logits_leaves_the_gradients(isa, dtype, forward, options):
    """Although an lse so large no longer tells the weights: its last bit is worth many percents."""
    if "sinks" in options and (forward == "cpu" or dtype == "float64"):
        pytest.skip("log2(e) times a sink so large is rounded: its weight, and out, change")
    shift = 2.0**46 if dtype == "float64" else 2.0**17
    q, k, v = exact_operands(dtype)
    options = {"scale": 1.0, "bias": np.zeros(1), **options}
    problem = make_problem(q, k, v, **options)
    d_out, d_lse = normal(7, *problem.out_shape, dtype=dtype), normal(8, *problem.lse_shape)
    d_lse = d_lse.astype(problem.accumulator)
    wide = make_problem(*(x.astype(np.float64) for x in (q, k, v)), **options)
    expected = reference.backward(wide, d_out, None, None, d_lse)
    budget = backward_budget(problem, d_out, d_lse)
    for constant in (shift, -shift):
        moved = {**options, "bias": np.array([constant])}
        if "sinks" in options:
            moved["sinks"] = options["sinks"] + constant
        out, lse = attention(q, k, v, **moved, return_lse=True, backend=forward)
        found = gradient_on(isa)(d_out, q, k, v, out, lse, d_lse=d_lse, **moved)
        for name, got, want, allowed in zip(
            Gradients._fields, found, expected, budget, strict=True
        ):
            if want is not None:
                assert_within(got, want, allowed, name=name)


def test_a_coarse_lse_of_more_keys_is_believed():
    """Shares of the gradient, as keys spread over workers give them, add up at any magnitude."""
    q, k, v = exact_operands()
    for constant in (0.0, 2.0**13):
        options = {"scale": 1.0, "bias": np.full((ROWS, KEYS), constant, np.float32)}
        given, keywords = came_back(q, k, v, **options)
        whole = attention_backward(*given, **keywords)
        parts = []
        for keys in (slice(0, 40), slice(40, KEYS)):
            keywords["bias"] = options["bias"][:, keys]
            d_out, *_, out, lse = given
            part = attention_backward(
                d_out, q, k[..., keys, :], v[..., keys, :], out, lse, **keywords
            )
            parts.append(part)
        tolerance = 4e-6 + 2.0**-23 * constant
        d_k = np.concatenate([part.d_k for part in parts], axis=-2)
        np.testing.assert_allclose(d_k, whole.d_k, atol=tolerance * np.abs(whole.d_k).max())
        d_q = parts[0].d_q + parts[1].d_q
        np.testing.assert_allclose(d_q, whole.d_q, atol=8 * tolerance * np.abs(whole.d_q).max())


@each_isa
@pytest.mark.parametrize("size", [2.0**4, 2.0**12, 2.0**20, 2.0**40, 2.0**58])
@pytest.mark.parametrize("forward", ["cpu", "reference"])
def test_large_scores_equal_the_reference(isa, size, forward):
    q = normal(0, 1, ROWS, DIM) * np.float32(size)
    k, v = normal(1, 1, KEYS, DIM), normal(2, 1, KEYS, 5)
    for options in ({}, {"causal": True}, {"softcap": 50.0}, {"sinks": np.array([size])}):
        problem = make_problem(q, k, v, **options)
        out, lse = attention(q, k, v, **options, return_lse=True, backend=forward)
        d_out = normal(3, *out.shape)
        found = gradient_on(isa)(d_out, q, k, v, out, lse, **options)
        expected = reference.backward(problem, d_out)
        budget = backward_budget(problem, d_out)
        for name, got, want, allowed in zip(
            Gradients._fields, found, expected, budget, strict=True
        ):
            if want is not None:
                assert np.isfinite(got).all()
                assert_within(got, want, allowed, name=name)


@each_isa
@pytest.mark.parametrize("size", [2.0**15, 2.0**30, 2.0**50])
def test_large_products_that_cancel_leave_the_gradients_finite(isa, size):
    """The logits are small, but off by any number: the lse of exact ones cannot bound them."""
    q, k, v = normal(0, 1, ROWS, DIM), normal(1, 1, KEYS, DIM), normal(2, 1, KEYS, 5)
    q[..., :4], k[..., :4] = size * q[..., :4], size * k[..., :4]
    q[..., 4:], k[..., 4:] = q[..., :4], -k[..., :4]
    k[..., 4:] *= 1 + 2.0**-20
    for options in ({}, {"causal": True}):
        problem = make_problem(q, k, v, **options)
        out, lse = attention(q, k, v, **options, return_lse=True, backend="reference")
        d_out = normal(3, *out.shape)
        found = gradient_on(isa)(d_out, q, k, v, out, lse, **options)
        expected, budget = reference.backward(problem, d_out), backward_budget(problem, d_out)
        for got, want, allowed in zip(found[:3], expected[:3], budget[:3], strict=True):
            assert np.isfinite(got).all()
            assert_within(got, want, allowed)


def fullness(q, k, v, d_out, out, d_lse, scale):
    """How much of the stated domain is used; gradients are finite up to 1."""
    a = [np.abs(x.astype(np.float64)) for x in (q, k, v, d_out, out, d_lse)]
    q, k, v, d_out, out, d_lse = a
    t = (d_out @ v.swapaxes(-1, -2)).max(-1) + (d_out * out).sum(-1) + d_lse
    sums = [
        max(1.0, scale) * (t * k.max()).max(),
        max(1.0, scale) * (t[..., None] * q).sum(-2).max(),
        d_out.sum(-2).max(),
        t.sum(-1).max(),
    ]
    return max(sums) / (np.finfo(np.float32).max / 4)


@each_isa
@pytest.mark.parametrize("stretched", ["q", "k", "v", "d_out", "d_lse"])
def test_gradients_are_finite_in_their_domain(isa, stretched):
    """One operand at a time is made so large that the domain is just full."""
    arrays = {"q": normal(0, 1, ROWS, DIM), "k": normal(1, 1, KEYS, DIM)}
    arrays |= {"v": normal(2, 1, KEYS, 5), "d_out": normal(3, 1, ROWS, 5)}
    arrays["d_lse"] = normal(4, 1, ROWS)
    bias = normal(5, ROWS, KEYS)
    scale, power = 0.25, 0
    while True:  # the largest power of two that stays inside
        bigger = {**arrays, stretched: np.ldexp(arrays[stretched], power + 1)}
        # Scores stay as they are.
        factor = scale * 2.0 ** -(power + 1 if stretched in "qk" else 0)
        q, k, v, d_out, d_lse = bigger.values()
        options = {"bias": bias, "scale": factor}
        out, lse = attention(q, k, v, **options, return_lse=True)
        if fullness(q, k, v, d_out, out, d_lse, factor) > 1.0:
            break
        power, inside = power + 1, (d_out, q, k, v, out, lse, d_lse, options)
    assert power > 100
    d_out, q, k, v, out, lse, d_lse, options = inside
    found = gradient_on(isa)(d_out, q, k, v, out, lse, d_lse=d_lse, **options)
    problem = make_problem(q, k, v, **options)
    expected = reference.backward(problem, d_out, None, None, d_lse)
    budget = backward_budget(problem, d_out, d_lse)
    for name, got, want, allowed in zip(
        Gradients._fields[:4], found, expected, budget, strict=False
    ):
        assert np.isfinite(got).all(), name
        assert_within(got, want, allowed, name=name)


def test_what_a_half_type_cannot_hold_is_infinite():
    q, k, v = (2 * normal(i, 1, 100, 8, dtype=np.float16) for i in range(3))
    given, keywords = came_back(q, k, v)
    d_out = (given[0].astype(np.float32) * 60000).clip(-65504, 65504).astype(np.float16)
    found = attention_backward(d_out, *given[1:], **keywords)
    expected = reference.backward(make_problem(q, k, v), d_out, None, None, keywords["d_lse"])
    for got, want in zip(found[:3], expected[:3], strict=True):
        assert not np.isnan(got).any()
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    assert np.isinf(found.d_k).any()
    assert np.isfinite(found.d_k).any()
