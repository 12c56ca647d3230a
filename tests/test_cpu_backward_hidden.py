"""What a row may not see changes no bit of any gradient; a NaN that is seen reaches them."""

import numpy as np
import pytest
from cpu_backend import (
    assert_same_bits,
    came_back,
    each_isa,
    gradient_on,
    normal,
)
from cpu_hiding import HIDING as HIDING_ALONE
from cpu_hiding import KEYS, ROWS

from fusedattn import attention, attention_backward, dropout_mask, reference
from fusedattn.problem import make_problem

# A softcap has a slope of its own.
CAPPED = {"window": {"softcap": 3.0}, "mask": {"softcap": 2.0}}
HIDING = {
    name: ({**options, **CAPPED.get(name, {})}, seen)
    for name, (options, seen) in HIDING_ALONE.items()
}
POISON = (np.nan, np.inf, -np.inf)


def arrays_of(dtype="float32"):
    return [normal(i, 1, n, 24, dtype=dtype) for i, n in enumerate((ROWS, KEYS, KEYS))]


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hiding", HIDING)
def test_a_poisoned_key_reaches_only_the_rows_that_see_it(isa, dtype, hiding):
    options, seen = HIDING[hiding]
    fn = gradient_on(isa)
    given, keywords = came_back(*arrays_of(dtype), **options)
    clean = fn(*given, **keywords)
    for j in (0, 40, 96, KEYS - 1):
        blind, others = ~seen[:, j], np.arange(KEYS) != j
        if not blind.any():
            continue
        for value in POISON[:2]:
            for index in (2, 3):
                poisoned = [x.copy() for x in given]
                poisoned[index][:, j, 5:7] = value
                found = fn(*poisoned, **keywords)
                assert_same_bits(found.d_q[:, blind], clean.d_q[:, blind])
                if clean.d_bias is not None:
                    assert_same_bits(found.d_bias[blind], clean.d_bias[blind])
                if blind.all():  # nobody sees it: no gradient changes, its own included
                    assert_same_bits(found, clean)
                else:
                    assert not np.isfinite(found.d_q[:, ~blind].astype(np.float32)).all()
                    # Keys seen by none of the rows that see this one are as they were.
                    far = others & ~(seen[~blind].any(axis=0))
                    assert_same_bits(found.d_k[:, far], clean.d_k[:, far])


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hiding", HIDING)
def test_a_poisoned_row_reaches_only_the_keys_that_it_sees(isa, dtype, hiding):
    """Whatever stands in q, in what comes back, or in the results of a row: only its keys learn."""
    options, seen = HIDING[hiding]
    fn = gradient_on(isa)
    given, keywords = came_back(*arrays_of(dtype), **options)
    clean = fn(*given, **keywords)
    for i in (0, 50, 69, 70, ROWS - 1):
        blind, others = ~seen[i], np.arange(ROWS) != i
        for value in POISON[:2]:
            for name in ("d_out", "q", "d_lse", "all"):
                poisoned = [x.copy() for x in given]
                d_lse = keywords["d_lse"].copy()
                if name in ("d_out", "all"):
                    poisoned[0][:, i, 3] = value
                if name in ("q", "all"):
                    poisoned[1][:, i, 3:6] = value
                if name in ("d_lse", "all"):
                    d_lse[:, i] = value
                found = fn(*poisoned, **{**keywords, "d_lse": d_lse})
                assert_same_bits(found.d_q[:, others], clean.d_q[:, others])
                assert_same_bits(found.d_k[:, blind], clean.d_k[:, blind])
                assert_same_bits(found.d_v[:, blind], clean.d_v[:, blind])
                if clean.d_bias is not None:
                    assert_same_bits(found.d_bias[others], clean.d_bias[others])
                if blind.all():
                    assert_same_bits(found, clean)
                else:
                    assert not np.isfinite(found.d_k[:, ~blind].astype(np.float32)).all()


@each_isa
def test_poison_that_is_dropped_changes_no_bit(isa):
    kept = dropout_mask((1, ROWS, KEYS), 0.5, 9)[0]
    fn = gradient_on(isa)
    given, keywords = came_back(*arrays_of(), dropout_p=0.5, seed=9, causal=True)
    clean = fn(*given, **keywords)
    visible = np.tri(ROWS, KEYS, KEYS - ROWS, dtype=bool)
    for j in (0, 50, 96):
        used = kept[:, j] & visible[:, j]
        poisoned = [x.copy() for x in given]
        poisoned[3][:, j, 3] = np.nan
        found = fn(*poisoned, **keywords)
        assert_same_bits(found.d_q[:, ~used], clean.d_q[:, ~used])
        assert np.isnan(found.d_q[:, used]).all()
    for i in (3, 129):
        poisoned = [x.copy() for x in given]
        poisoned[0][:, i, 3] = np.nan
        found, used = fn(*poisoned, **keywords), kept[i] & visible[i]
        assert_same_bits(found.d_v[:, ~used], clean.d_v[:, ~used])
        assert np.isnan(found.d_v[:, used, 3]).all()
        assert np.isnan(found.d_k[:, visible[i]]).all()  # by way of delta


@each_isa
def test_a_nan_bias_under_a_mask_never_matters(isa):
    mask = np.random.default_rng(0).random((ROWS, KEYS)) < 0.5
    given, keywords = came_back(*arrays_of(), mask=mask, bias=np.where(mask, 0.5, 0.0), softcap=2.0)
    expected = gradient_on(isa)(*given, **keywords)
    for value in POISON:
        keywords["bias"] = np.where(mask, 0.5, value)
        assert_same_bits(gradient_on(isa)(*given, **keywords), expected)


@each_isa
def test_a_row_without_keys_gives_its_d_lse_to_the_sink_and_nothing_else(isa):
    """Whatever its d_out is; hidden by an interval, by the mask or by the bias."""
    q, k, v = (normal(i, 2, n, 8) for i, n in enumerate((20, 30, 30)))
    mask = np.ones((20, 30), bool)
    mask[3] = mask[11] = False
    bias = np.where(mask, 0.5, -np.inf)
    for options in ({"mask": mask}, {"bias": bias}, {"causal": True, "q_offset": -4}):
        sinks = np.array([0.5, -1.0])
        given, keywords = came_back(q, k, v, sinks=sinks, **options)
        problem = make_problem(q, k, v, sinks=sinks, **options)
        blind = [3, 11] if "causal" not in options else [0, 1, 2, 3]
        expected = reference.backward(problem, given[0], None, None, keywords["d_lse"])
        clean = gradient_on(isa)(*given, **keywords)
        np.testing.assert_allclose(clean.d_sinks, expected.d_sinks, rtol=1e-5)
        for value in POISON:
            poisoned = given[0].copy()
            poisoned[:, blind] = value
            found = gradient_on(isa)(poisoned, *given[1:], **keywords)
            assert_same_bits(found, clean)


@each_isa
@pytest.mark.parametrize("name", ["d_out", "q", "k", "v", "out", "lse"])
def test_an_attended_nan_reaches_every_gradient_that_it_should(isa, name):
    """Compared with the reference, given the same results of the forward pass."""
    q, k, v = (normal(i, 1, n, 9) for i, n in enumerate((60, 101, 101)))
    for options in ({}, {"causal": True}, {"softcap": 2.0}, {"window_size": (30, 4)}):
        given, keywords = came_back(q, k, v, **options)
        arrays = dict(zip(("d_out", "q", "k", "v", "out", "lse"), given, strict=True))
        arrays[name] = arrays[name].copy()
        arrays[name][0, 37, ...] = np.nan
        if name in "qkv":  # results of what is differentiated
            found = attention(arrays["q"], arrays["k"], arrays["v"], **options, return_lse=True)
            arrays["out"], arrays["lse"] = found
        problem = make_problem(arrays["q"], arrays["k"], arrays["v"], **options)
        results = arrays["d_out"], arrays["out"], arrays["lse"], keywords["d_lse"]
        expected = reference.backward(problem, *results)
        found = gradient_on(isa)(*arrays.values(), **keywords)
        for got, want in zip(found[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def test_garbage_beyond_the_lengths_is_never_read():
    used = np.array([0, 1, 96, 97, 150])
    q, k, v = normal(0, 5, 2, 60, 16), normal(1, 5, 1, 150, 16), normal(2, 5, 1, 150, 16)
    given, keywords = came_back(q, k, v, seqused_k=used, seqused_q=np.array([60, 3, 0, 60, 59]))
    clean = attention_backward(*given, **keywords)
    for i, n in enumerate(used):
        k[i, :, n:], v[i, :, n:] = np.nan, np.inf
    for i, n in enumerate(keywords["seqused_q"]):
        given[0][i, :, n:], q[i, :, n:] = np.nan, np.inf
    assert_same_bits(attention_backward(*given, **keywords), clean)


def test_padding_full_of_garbage_is_repaired_in_a_large_call():
    """Every row and key of it needs another look, on several threads."""
    q, k, v = (normal(i, 4, 300, 16) for i in range(3))
    mask = np.ones((300, 300), bool)
    mask[:, ::7] = False
    mask[::5] = False
    given, keywords = came_back(q, k, v, causal=True, mask=mask)
    clean = attention_backward(*given, **keywords)
    k[:, ::7] = v[:, ::7] = q[:, ::5] = given[0][:, ::5] = np.nan
    assert_same_bits(attention_backward(*given, **keywords), clean)
