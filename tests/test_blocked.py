"""The blocked algorithm against the specification, with tiles small enough that all paths run."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedattn import attention, blocked, dispatch, merge, reference
from fusedattn.problem import make_problem
from fusedattn.testing.compare import assert_within
from fusedattn.testing.strategies import attention_problems

DTYPES = ("float32", "float64", "float16", "bfloat16")
BLOCKS = st.tuples(st.sampled_from([1, 2, 5, 16, 64]), st.sampled_from([1, 3, 4, 10, 128]))


@given(attention_problems(dtypes=DTYPES), BLOCKS)
def test_any_tiles_equal_the_specification_within_the_budget(case, blocks):
    block_q, block_k = blocks
    out, lse = blocked.forward(case.problem, block_q=block_q, block_k=block_k)
    assert_within(out, case.expected.out, case.budget.out, name="out")
    assert_within(lse, case.expected.lse, case.budget.lse, name="lse")


@given(attention_problems(dtypes=DTYPES, extreme=True, without=("dropout_p",)), BLOCKS)
def test_finite_inputs_give_finite_outputs_at_any_magnitude(case, blocks):
    block_q, block_k = blocks
    out, lse = blocked.forward(case.problem, block_q=block_q, block_k=block_k)
    assert np.isfinite(out.astype(np.float64)).all()
    assert not (np.isnan(lse) | np.isposinf(lse)).any()


@pytest.mark.parametrize("backend", ["blocked", "cpu"])
@pytest.mark.parametrize("seqlen_k", [0, 3])
def test_a_sink_that_is_not_finite_makes_rows_nan_whether_they_see_keys_or_not(backend, seqlen_k):
    q = k = np.ones((4, 3, 2), np.float32)
    options = {"sinks": np.array([np.nan, np.inf, -np.inf, 1], np.float32), "return_lse": True}
    options |= {"seqused_k": seqlen_k, "causal": True, "seqused_q": 2}
    got = attention(q, k, k, backend=backend, **options)
    expected = attention(q, k, k, backend="reference", **options)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.isnan(got[1]).sum() == 4


def operands(dtype=np.float64, seqlen_q=9, seqlen_k=13):
    rng = np.random.default_rng(0)
    shapes = (4, seqlen_q, 8), (2, seqlen_k, 8), (2, seqlen_k, 3)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def run(q, k, v, **options):
    return blocked.forward(make_problem(q, k, v, return_lse=True, **options), block_q=4, block_k=4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_changes_no_bit_of_a_row_that_does_not_see_it(dtype, bad):
    q, k, v = operands(dtype)
    mask = np.random.default_rng(1).random((9, 13)) < 0.6
    mask[:, 5] = np.arange(9) % 2 == 0
    clean = run(q, k, v, mask=mask)
    v[:, 5] = bad
    out, lse = run(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[:, 1::2], clean.out[:, 1::2])
    np.testing.assert_array_equal(lse, clean.lse)
    assert not np.isfinite(out[:, ::2]).any()


def test_a_bad_key_changes_no_bit_of_a_row_that_does_not_see_it():
    q, k, v = operands(np.float32)
    clean = run(q, k, v, causal=True)
    k[:, -1] = np.nan
    out, lse = run(q, k, v, causal=True)
    np.testing.assert_array_equal(out[:, :-1], clean.out[:, :-1])
    np.testing.assert_array_equal(lse[:, :-1], clean.lse[:, :-1])
    assert np.isnan(out[:, -1]).all()
    assert np.isnan(lse[:, -1]).all()


def test_a_row_without_keys_stays_zero_beside_bad_values():
    q, k, v = operands()
    q[:, -2:], v[:, 0] = np.nan, np.nan
    out, lse = run(q, k, v, window_size=(None, 0), q_offset=-3, seqused_q=7)
    assert (out[:, :3] == 0).all()
    assert (out[:, 7:] == 0).all()
    assert np.isneginf(lse[:, :3]).all()
    assert np.isneginf(lse[:, 7:]).all()
    assert np.isnan(out[:, 3:7]).all()


def test_bad_numbers_appear_just_where_the_specification_has_them():
    rng = np.random.default_rng(2)
    for trial in range(30):
        q, k, v = operands(np.float32)
        for array in (q, k, v):
            flat = array.reshape(-1)
            flat[rng.integers(0, flat.size, 2)] = rng.choice([np.nan, np.inf, -np.inf], 2)
        options = {"mask": rng.random((9, 13)) < 0.7, "causal": bool(trial % 2)}
        options |= {"dropout_p": 0.4, "seed": trial} if trial % 3 == 0 else {}
        result = run(q, k, v, **options)
        expected = reference.forward(make_problem(q, k, v, return_lse=True, **options))
        for ours, theirs in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_at_the_largest_number_keep_their_mean(dtype, sign):
    q, k, _ = operands(dtype, seqlen_q=40, seqlen_k=50)
    largest = sign * np.finfo(dtype).max
    out, _ = run(q, k, np.full((2, 50, 3), largest, dtype))
    np.testing.assert_allclose(out / largest, 1.0, rtol=4 * np.finfo(dtype).eps)


def test_dropout_draws_the_words_of_the_specification():
    q, k = np.zeros((2, 3, 9, 4)), np.zeros((2, 3, 13, 4))
    v = np.broadcast_to(np.eye(13), (2, 3, 13, 13))
    problem = make_problem(q, k, v, dropout_p=0.5, seed=2**63 + 12345)
    out, _ = blocked.forward(problem, block_q=4, block_k=3)
    np.testing.assert_array_equal(out > 0, reference.keep_mask((2, 3, 9, 13), 0.5, problem.seed))


def test_parts_of_the_keys_merge_into_the_whole():
    q, k, v = operands()
    whole = run(q, k, v, causal=True)
    parts = [
        run(q, k[:, lo:hi], v[:, lo:hi], causal=True, q_offset=4 - lo)
        for lo, hi in ((0, 5), (5, 5), (5, 13))
    ]
    out, lse = merge(*parts)
    np.testing.assert_allclose(out, whole.out, atol=1e-14)
    np.testing.assert_allclose(lse, whole.lse, atol=1e-14)


def test_the_result_is_written_into_out():
    q, k, v = operands()
    out = np.full((9, 4, 3), np.nan)
    arguments = (x.swapaxes(0, 1) for x in (q, k, v))
    result = blocked.forward(make_problem(*arguments, layout="bshd", out=out))
    assert np.shares_memory(result.out, out)
    assert result.lse is None
    np.testing.assert_array_equal(out.swapaxes(0, 1), blocked.forward(make_problem(q, k, v)).out)


def test_no_memory_grows_with_the_square_of_the_length():
    n = 1536
    q, k, v = (np.zeros((1, n, 8), np.float32) for _ in range(3))
    mask = np.broadcast_to(np.arange(n) % 3 > 0, (n, n))
    v[0, 0] = np.nan  # most rows are recomputed alone
    problem = make_problem(q, k, v, mask=mask, causal=True)
    tracemalloc.start()
    blocked.forward(problem)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - problem.q.nbytes < n * n / 4


def test_the_backend_runs_everything_and_says_how():
    problem = make_problem(*operands())
    assert dispatch.choose(problem, "blocked") is blocked.BLOCKED
    assert blocked.BLOCKED.unsupported(problem) == []
    assert "tiles" in str(dispatch.explain(problem, "blocked"))
