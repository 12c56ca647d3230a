"""The blocked gradients against the specification, with tiles small enough that all paths run."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusedattn import blocked, reference
from fusedattn.problem import make_problem
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.laws import SMALL
from fusedattn.testing.strategies import attention_problems

DTYPES = ("float32", "float64", "float16", "bfloat16")
BLOCKS = st.tuples(st.sampled_from([1, 2, 5, 16, 64]), st.sampled_from([1, 3, 4, 10, 128]))


def wide(problem):
    """Same problem with operands of float64, whose gradients are not rounded to less."""
    names = ("q", "k", "v", "bias", "sinks")
    arrays = {name: getattr(problem, name) for name in names}
    return dataclasses.replace(
        problem, **{n: None if x is None else x.astype(np.float64) for n, x in arrays.items()}
    )


def assert_equals_reference(problem, found, d_out, d_lse):
    expected = reference.backward(wide(problem), d_out, None, None, d_lse)
    budget = backward_budget(problem, d_out, d_lse)
    for name, got, want, allowed in zip(found._fields, found, expected, budget, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_within(got, want, allowed, name=name)


@given(
    attention_problems(dtypes=DTYPES, without=("layout", "out", "score_mod"), sizes=SMALL), BLOCKS
)
def test_any_tiles_equal_the_specification_within_the_budget(case, blocks):
    problem = case.problem
    given_arrays = [case.q, case.k, case.v, problem.bias, problem.sinks]
    sizes = [np.abs(x.astype(np.float64)) for x in given_arrays if x is not None]
    assume(all(x[np.isfinite(x)].max(initial=0.0) <= 2.0**20 for x in sizes))
    out, lse = reference.forward(problem)
    d_out = case.rng.standard_normal(problem.out_shape).astype(problem.out_dtype)
    d_lse = case.rng.standard_normal(problem.lse_shape).astype(problem.accumulator)
    block_q, block_k = blocks
    found = blocked.backward(problem, d_out, out, lse, d_lse, block_q=block_q, block_k=block_k)
    assert_equals_reference(problem, found, d_out, d_lse)


def operands(dtype=np.float32, seqlen_q=9, seqlen_k=13):
    rng = np.random.default_rng(0)
    shapes = (4, seqlen_q, 8), (2, seqlen_k, 8), (2, seqlen_k, 3)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v, rng.standard_normal((4, seqlen_q, 3)).astype(dtype)


def gradients(q, k, v, d_out, d_lse=None, **options):
    problem = make_problem(q, k, v, return_lse=True, **options)
    out, lse = blocked.forward(problem, block_q=4, block_k=4)
    return blocked.backward(problem, d_out, out, lse, d_lse, block_q=4, block_k=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_bad_key_or_value_does_not_leak_into_what_does_not_see_it(name, bad):
    q, k, v, d_out = operands()
    mask = np.random.default_rng(1).random((9, 13)) < 0.6
    mask[:, 5] = np.arange(9) % 2 == 0
    mask[:, 8] = False
    clean = gradients(q, k, v, d_out, mask=mask)
    broken = {"k": k.copy(), "v": v.copy()}
    broken[name][:, 5] = bad
    broken[name][:, 8] = bad
    found = gradients(q, d_out=d_out, mask=mask, **broken)
    # Odd rows do not see key 5, and no row sees key 8.
    np.testing.assert_array_equal(found.d_q[:, 1::2], clean.d_q[:, 1::2])
    assert np.isnan(found.d_q[:, ::2]).all()
    assert (found.d_k[:, 8] == 0).all()
    assert (found.d_v[:, 8] == 0).all()


@pytest.mark.parametrize("name", ["q", "d_out", "d_lse"])
def test_a_bad_row_does_not_leak_into_keys_that_it_does_not_see(name):
    q, k, v, d_out = operands()
    d_lse = np.ones((4, 9), np.float32)
    mask = np.random.default_rng(1).random((9, 13)) < 0.6
    mask[4] = np.arange(13) % 2 == 0
    arrays = {"q": q, "d_out": d_out, "d_lse": d_lse}
    clean = gradients(k=k, v=v, mask=mask, bias=np.zeros((9, 13)), **arrays)
    arrays[name] = arrays[name].copy()
    arrays[name][:, 4] = np.nan
    found = gradients(k=k, v=v, mask=mask, bias=np.zeros((9, 13)), **arrays)
    np.testing.assert_array_equal(found.d_k[:, 1::2], clean.d_k[:, 1::2])
    np.testing.assert_array_equal(found.d_v[:, 1::2], clean.d_v[:, 1::2])
    assert np.isnan(found.d_k[:, ::2]).all()
    np.testing.assert_array_equal(np.isnan(found.d_bias), mask & (np.arange(9) == 4)[:, None])


def test_rows_without_keys_ignore_what_comes_back_through_them():
    q, k, v, d_out = operands()
    d_lse = np.ones((4, 9), np.float32)
    options = dict(bias=np.zeros((1, 13)), sinks=np.zeros(4, np.float32), causal=True)
    options |= dict(q_offset=-2, seqused_q=8)  # rows 0 and 1 see no key, row 8 does not count
    clean = gradients(q, k, v, d_out, d_lse, **options)
    bad_out, bad_lse = d_out.copy(), d_lse.copy()
    bad_out[:, [0, 1, 8]] = np.nan
    bad_lse[:, 8] = np.nan
    found = gradients(q, k, v, bad_out, bad_lse, **options)
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [2.0**14, 2.0**21])
def test_weights_stay_exact_where_the_lse_is_coarse(size):
    # All scores are around `size`: the rounding of a float32 lse is up to a sixteenth there.
    q, k, v, d_out = operands()
    bias = np.full((1, 1), size, np.float32)
    problem = make_problem(q, k, v, bias=bias, return_lse=True)
    out, lse = reference.forward(problem)
    found = blocked.backward(problem, d_out, out, lse)
    # The scores themselves are rounded to multiples of size * 2**-23 and so far known.
    scores = (q @ np.repeat(k, 2, 0).swapaxes(-1, -2)) * np.float32(8**-0.5) + np.float32(size)
    exact = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    weights = exact / exact.sum(-1, keepdims=True)
    d_v = (weights.swapaxes(-1, -2) @ d_out).reshape(2, 2, 13, 3).sum(1)
    np.testing.assert_allclose(found.d_v, d_v, rtol=1e-5, atol=1e-6)


def test_working_memory_does_not_grow_with_the_square_of_the_length():
    def peak(seqlen):
        rng = np.random.default_rng(0)
        q, k, v, d_out = rng.standard_normal((4, 1, seqlen, 4)).astype(np.float32)
        bias = np.zeros((1, seqlen), np.float32)
        problem = make_problem(q, k, v, causal=True, bias=bias, return_lse=True)
        out, lse = blocked.forward(problem)
        tracemalloc.start()
        blocked.backward(problem, d_out, out, lse)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(4096) < 2**20  # the scores alone would take 64 MiB


def test_dropped_entries_are_skipped():
    q, k, v, d_out = operands(np.float64)
    keep = reference.keep_mask((4, 9, 13), 0.5, 3)
    clean = gradients(q, k, v, d_out, dropout_p=0.5, seed=3)
    v = v.copy()
    row = int(np.flatnonzero(~keep[:2, :, 5].any(axis=0))[0])
    v[0, 5] = np.nan  # a key that this row drops in both heads, although it sees it
    found = gradients(q, k, v, d_out, dropout_p=0.5, seed=3)
    np.testing.assert_array_equal(found.d_q[:2, row], clean.d_q[:2, row])
