"""The budgets hold for every exact kernel and are tight enough to catch an inexact one."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedattn import reference
from fusedattn.problem import make_problem
from fusedattn.testing import (
    assert_within,
    attention_problems,
    backward_budget,
    forward_budget,
    merge_budget,
)
from fusedattn.testing.laws import SMALL
from fusedattn.testing.rows import attended

F32 = np.float32
NO_EXTRAS = {"scale", "causal", "mask", "gqa", "head_dim_v", "return_lse", "full_range"}


def dot_in_order(q, k, order):
    """Sum the products one after the other in float32."""
    total = np.zeros((*q.shape[:-1], k.shape[-2]), F32)
    for d in order:
        total = total + q[..., :, None, d] * k[..., None, :, d]
    return total


def streaming_attention(case, rng):
    """Online softmax, one key at a time in a random order, all of it in float32."""
    problem = case.problem
    q, k, v = (x.astype(F32) for x in (case.q, case.k, case.v))
    k, v = (np.repeat(x, problem.group_size, -3) for x in (k, v))
    scores = dot_in_order(q, k, rng.permutation(problem.head_dim)) * F32(problem.scale)
    seen = attended(problem)
    row_max = np.full(scores.shape[:-1], -np.inf, F32)
    row_sum = np.zeros_like(row_max)
    acc = np.zeros((*row_max.shape, problem.head_dim_v), F32)
    with np.errstate(all="ignore"):
        for j in rng.permutation(problem.seqlen_k):
            s = np.where(seen[..., j], scores[..., j], F32(-np.inf))
            new = np.maximum(row_max, s)
            shift = np.where(np.isneginf(new), F32(0), new)
            p, factor = np.exp(s - shift), np.exp(row_max - shift)
            row_sum = row_sum * factor + p
            acc = acc * factor[..., None] + p[..., None] * v[..., j, None, :]
            row_max = new
        out = acc / np.where(row_sum == 0, F32(1), row_sum)[..., None]
        lse = np.where(row_sum == 0, F32(-np.inf), np.log(row_sum) + row_max)
    return out.astype(problem.out_dtype), lse


@given(attention_problems(NO_EXTRAS, ("float32", "float16", "bfloat16"), sizes=SMALL), st.data())
def test_any_order_of_summation_stays_within(case, data):
    limit = np.finfo(F32).max / (4 * max(1, case.problem.seqlen_k))
    if np.abs(case.v.astype(float)).max() > limit:
        case = case.change(v=np.clip(case.v.astype(float), -1e30, 1e30).astype(case.v.dtype))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    out, lse = streaming_attention(case, rng)
    assert_within(out, case.expected.out, case.budget.out)
    assert_within(lse, case.expected.lse, case.budget.lse, name="lse")


def test_the_root_law_of_random_errors_is_no_bound():
    # The derivation says why the worst case is promised; this is the row that it speaks of.
    worst = 0.0
    for a in np.linspace(0.1, 1.0, 40, dtype=F32):
        q, k = np.full((1, 1, 256), a), np.full((1, 2, 256), F32(0.3))
        v = np.ones((1, 2, 1), F32)
        problem = make_problem(q, k, v, scale=1.0)
        got = dot_in_order(q, k, range(256))[..., 0] + np.log(F32(2))
        want = reference.forward(
            make_problem(*(x.astype(float) for x in (q, k, v)), scale=1.0, return_lse=True)
        ).lse
        error = np.abs(got - want)
        assert (error <= forward_budget(problem).lse).all()
        worst = max(worst, float((error / (2.0**-24 * np.abs(want))).max()))
    assert worst > np.sqrt(256) + 5


@given(attention_problems(NO_EXTRAS, ("float32", "float64"), sizes=SMALL), st.floats(1.01, 4))
def test_an_error_above_the_budget_is_caught(case, times):
    out, budget = case.expected.out, case.budget.out
    inside, outside = out + 0.9 * budget, out + times * budget
    assert_within(inside, out, budget)
    finite = np.isfinite(outside) & (budget > 0) & (outside - out > budget)
    if finite.any():
        with pytest.raises(AssertionError, match="times the budget"):
            assert_within(np.where(finite, outside, out), out, budget)


@pytest.mark.parametrize(
    ("got", "want"),
    [(np.nan, 0.0), (0.0, np.nan), (np.inf, 0.0), (0.0, -np.inf), (np.inf, -np.inf)],
)
def test_a_non_finite_mismatch_is_caught_whatever_the_budget(got, want):
    budget = np.array([1e300])
    with pytest.raises(AssertionError):
        assert_within(np.array([got]), np.array([want]), budget)


def test_matching_non_finite_values_are_accepted():
    values = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert_within(values, values.copy(), np.zeros(4))


def test_a_nan_budget_is_never_passed():
    with pytest.raises(AssertionError):
        assert_within(np.array([1.0]), np.array([2.0]), np.array([np.nan]))


def test_hidden_rows_must_be_exact():
    q = np.ones((1, 3, 4), F32)
    mask = np.array([[True, True], [False, False], [True, False]])
    budget = forward_budget(make_problem(q, q[:, :2], q[:, :2], mask=mask))
    assert (budget.out[0, 1] == 0).all()
    assert budget.lse[0, 1] == 0
    assert (budget.out[0, 0] > 0).all()


def test_a_lone_key_owes_nothing_to_the_error_of_its_logit():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 64)).astype(F32) for _ in range(3))
    problem = make_problem(q, k, v, return_lse=True)
    lse = float(np.abs(reference.forward(problem).lse[0, 0]))
    budget = forward_budget(problem).out
    assert (budget <= (20 + 4 * lse) * 2.0**-24 * np.abs(v)).all()


def test_a_stated_block_tightens_long_sums():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8)).astype(F32) for n in (2, 4096, 4096))
    problem = make_problem(q, k, v)
    free, blocked = forward_budget(problem).out, forward_budget(problem, block_k=96).out
    assert (blocked < free / 8).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounded_weights_need_to_be_declared(dtype):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 40, 8)).astype(dtype) for _ in range(3))
    problem = make_problem(q, k, v, out_dtype=F32)
    weights = reference.weights(problem)
    rounded = (weights / weights.max(-1, keepdims=True)).astype(dtype).astype(float)
    out = rounded @ v.astype(float) * weights.max(-1, keepdims=True)
    want = weights @ v.astype(float)
    assert_within(out, want, forward_budget(problem, rounds_weights_to=dtype).out)
    with pytest.raises(AssertionError):
        assert_within(out, want, forward_budget(problem).out)


def test_half_accumulation_is_outside():
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 8, 16)).astype(np.float16) for _ in range(3))
    scores = (q @ k.swapaxes(-1, -2)) * np.float16(0.25)
    weights = np.exp(scores - scores.max(-1, keepdims=True)).astype(np.float16)
    out = (weights / weights.sum(-1, keepdims=True, dtype=np.float16)) @ v
    problem = make_problem(q, k, v)
    with pytest.raises(AssertionError):
        assert_within(out, reference.forward(problem).out, forward_budget(problem).out)


@given(attention_problems(sizes=SMALL))
def test_budgets_are_numbers_of_the_right_shape(case):
    out, lse = case.budget
    assert out.shape == case.problem.out_shape
    assert lse.shape == case.problem.lse_shape
    assert (out >= 0).all()
    assert np.isfinite(lse).all()


@given(st.integers(1, 4), st.integers(0, 2**16))
def test_a_float32_merge_stays_within(parts, seed):
    rng = np.random.default_rng(seed)
    shape = (parts, 5, 3)
    out = rng.standard_normal(shape).astype(F32)
    lse = (rng.standard_normal(shape[:-1]) * 10.0 ** rng.integers(-2, 3)).astype(F32)
    lse[rng.random(lse.shape) < 0.2] = -np.inf
    out[np.isneginf(lse)] = 0
    wide_out, wide_lse = merged(out.astype(float), lse.astype(float))
    got_out, got_lse = merged(out, lse)
    budget = merge_budget(list(zip(out, lse, strict=True)))
    assert_within(got_out, wide_out, budget.out)
    assert_within(got_lse, wide_lse, budget.lse, name="lse")


def merged(out, lse):
    with np.errstate(all="ignore"):
        top = lse.max(0)
        shift = np.where(np.isneginf(top), lse.dtype.type(0), top)
        weights = np.exp(lse - shift)
        total = weights.sum(0)
        safe = np.where(total > 0, total, lse.dtype.type(1))
        return (weights[..., None] * out).sum(0) / safe[..., None], np.log(total) + shift


@settings(max_examples=30)
@given(attention_problems(NO_EXTRAS | {"bias", "softcap"}, sizes=SMALL, tame=True))
def test_float32_gradients_stay_within(case):
    problem = case.problem
    rng = case.rng
    d_out = rng.standard_normal(problem.out_shape).astype(F32)
    got = float32_gradients(case, d_out)
    wide = case.change(**{n: getattr(case, n).astype(np.float64) for n in "qkv"})
    want = reference.backward(wide.problem, d_out)
    budget = backward_budget(problem, d_out)
    for name, found, expected, allowed in zip("qkv", got, want, budget, strict=False):
        assert_within(found, expected, allowed, name=f"d_{name}")


def float32_gradients(case, d_out):
    problem = case.problem
    q = case.q
    k, v = (np.repeat(x, problem.group_size, -3) for x in (case.k, case.v))
    seen = attended(problem)
    with np.errstate(all="ignore"):
        raw = (q @ k.swapaxes(-1, -2)) * F32(problem.scale)
        bend = F32(1)
        if problem.softcap is not None:
            tanh = np.tanh(raw / F32(problem.softcap))
            raw, bend = tanh * F32(problem.softcap), F32(1) - tanh * tanh
        scores = raw if problem.bias is None else raw + problem.bias.astype(F32)
        scores = np.where(seen, scores, F32(-np.inf))
        top = scores.max(-1, keepdims=True)
        top = np.where(np.isneginf(top), F32(0), top)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total > 0, total, F32(1))
        out = weights @ v
        d_w = d_out @ v.swapaxes(-1, -2)
        delta = (d_out * out).sum(-1, keepdims=True)
        d_s = weights * (d_w - delta) * bend * F32(problem.scale)
    groups = (*problem.batch_shape, problem.num_heads_kv, problem.group_size)
    d_k, d_v = (
        x.reshape(*groups, *x.shape[-2:]).sum(-3)
        for x in (d_s.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d_out)
    )
    return d_s @ k, d_k, d_v
