"""Laws that relate two calls of the same kernel; no oracle is needed for them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from fusedattn.testing.cases import Answer, Case
from fusedattn.testing.compare import assert_within
from fusedattn.testing.functions import moved
from fusedattn.testing.kernel import Kernel
from fusedattn.testing.laws.common import (
    Array,
    assert_close,
    assert_same,
    take_keys,
)
from fusedattn.testing.tolerance import merge_budget


def shift_of_all_logits(kernel: Kernel, case: Case) -> None:
    """Adding c to all logits and sinks leaves out unchanged and adds c to lse.

    Domain: c enters through the bias, which comes after softcap, and through the sinks, both whole
    numbers so that the sum is exact. If this does not hold, a finite number stands in for ``-inf``,
    logits are clipped, or the maximum is not subtracted.
    """
    rng, problem = case.rng, case.problem
    shift = float(rng.choice([1.0, -16.0, 200.0, -1000.0, 2.0**13, -(2.0**15)]))
    shape = (problem.seqlen_q, problem.seqlen_k)
    bias = rng.integers(-3, 4, shape).astype(np.float32)
    first: dict[str, Any] = {"bias": bias}
    second: dict[str, Any] = {"bias": bias + np.float32(shift)}
    if "sinks" in case.keywords:
        sinks = rng.integers(-3, 4, problem.num_heads).astype(np.float32)
        first["sinks"], second["sinks"] = sinks, sinks + np.float32(shift)
    one, two = case.change(**first), case.change(**second)
    before, after = kernel(one), kernel(two)
    assert_close(after.out, before.out, one.budget.out + two.budget.out, "out after the shift")
    if before.lse is not None and after.lse is not None:
        budget = one.budget.lse + two.budget.lse
        expected = before.lse.astype(np.float64) + shift
        assert_close(after.lse, expected, budget, f"lse after a shift by {shift}")


def order_of_keys(kernel: Kernel, case: Case) -> None:
    """Permuting the keys, with their values, masks and biases, changes nothing beyond the budget.

    Domain: no causal, window, ALiBi, lengths or dropout. If this does not hold, a block of keys is
    dropped, or the running maximum is not carried from one block to the next.
    """
    perm = case.rng.permutation(case.k.shape[-2])
    moved = take_keys(case, perm)
    before, after = kernel(case), kernel(moved)
    assert_same(kernel, after, before, case, bitwise=False)


def every_key_twice(kernel: Kernel, case: Case) -> None:
    """Duplicating every key adds log 2 to lse and leaves out unchanged.

    Sinks gain log 2 too. Domain: as for the order of keys. If this does not hold the row sum is not
    the sum over all keys: something was added to it or left out.
    """
    length = case.k.shape[-2]
    twice = np.concatenate([np.arange(length), np.arange(length)])
    if case.rng.random() < 0.5:
        twice = np.repeat(np.arange(length), 2)
    doubled = take_keys(case, twice)
    if "sinks" in case.keywords:
        sinks = case.keywords["sinks"].astype(np.float64)
        # Stored wide, so that the kernel's own rounding of its sinks is all there is.
        case = case.change(sinks=sinks)
        doubled = doubled.change(sinks=sinks + math.log(2.0))
    before, after = kernel(case), kernel(doubled)
    out = case.budget.out + doubled.budget.out
    assert_close(after.out, before.out, out, "out with every key twice")
    if before.lse is not None and after.lse is not None:
        expected = before.lse.astype(np.float64) + math.log(2.0)
        budget = case.budget.lse + doubled.budget.lse
        assert_close(after.lse, expected, budget, "lse with every key twice")


def split_and_merge(kernel: Kernel, case: Case) -> None:
    """Any split of the keys merges back, in any order and with empty parts.

    ``q_offset`` is shifted for each part, mask and bias are sliced, the sink goes into one part.
    Domain: no dropout; the kernel reports its lse. If this does not hold the lse is not the
    logarithm of the row sum, and context parallelism, split-K and chunked prefill are wrong.
    """
    rng, problem = case.rng, case.problem
    length = problem.seqlen_k
    cuts = np.sort(rng.integers(0, length + 1, int(rng.integers(1, 4))))
    if not kernel.can("zero_size"):
        cuts = np.unique(cuts[(cuts > 0) & (cuts < length)])
    edges = [0, *cuts.tolist(), length]
    spans = list(itertools.pairwise(edges))
    rng.shuffle(spans)
    keywords: dict[str, Any] = {"return_lse": True} if kernel.can("return_lse") else {}
    if kernel.can("out_dtype") and case.q.dtype.itemsize == 2:
        keywords["out_dtype"] = np.float32
    parts, budgets = [], []
    for turn, (start, stop) in enumerate(spans):
        part = _part(case, start, stop).change(**keywords)
        if turn > 0:
            part = part.without("sinks")
        answer = kernel(part)
        assert answer.lse is not None
        parts.append((answer.out, answer.lse))
        budgets.append(part.budget)
    whole = kernel(case.change(**keywords))
    assert whole.lse is not None
    out, lse = _merge(parts)
    budget = merge_budget(parts, budgets)
    case = case.change(**keywords)
    assert_within(out, whole.out.astype(np.float64), budget.out + case.budget.out, name="merged")
    assert_within(lse, whole.lse.astype(np.float64), budget.lse + case.budget.lse, name="lse")


def _part(case: Case, start: int, stop: int) -> Case:
    part = take_keys(case, slice(start, stop))
    if case.problem.seqlen_k == 0:
        return part
    keywords: dict[str, Any] = {}
    if {"causal", "window_size", "alibi_slopes"} & case.keywords.keys():
        offset = case.problem.q_offset - start
        keywords["q_offset"] = offset.reshape(case.problem.batch_shape)
    if "seqused_k" in case.keywords:
        used = np.clip(case.problem.seqused_k - start, 0, stop - start)
        keywords["seqused_k"] = used.reshape(case.problem.batch_shape)
    # 0-d arrays stand for the single item of a call without leading axes.
    keywords = {k: int(v) if v.ndim == 0 else v for k, v in keywords.items()}
    return part.change(**keywords)


def _merge(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge partial results in float64."""
    out = np.stack([part[0].astype(np.float64) for part in parts])
    lse = np.stack([part[1].astype(np.float64) for part in parts])
    with np.errstate(all="ignore"):
        row_max = lse.max(0)
        shift = np.where(np.isfinite(row_max), row_max, 0.0)
        weights = np.exp(lse - shift)
        total = weights.sum(0)
        share = weights / np.where(total > 0, total, 1.0)
        # Where a part is empty its zero does not count, and a sum of huge numbers stays in range.
        return (share[..., None] * out).sum(0), np.log(total) + shift


def groups_equal_repeated_heads(kernel: Kernel, case: Case) -> None:
    """GQA and MQA equal attention over repeated KV heads.

    If this does not hold, query heads read the wrong KV head: ``h % n`` instead of ``h // group``.
    """
    group = case.problem.group_size
    repeated = case.change(k=np.repeat(case.k, group, -3), v=np.repeat(case.v, group, -3))
    assert_same(kernel, kernel(case), kernel(repeated), case)


def linear_in_v(kernel: Kernel, case: Case) -> None:
    """The output is linear in V.

    Domain: finite V and a combination in range; here whole numbers, so that it is exact. If this
    does not hold, V enters the weights, or outputs are clipped.
    """
    rng = case.rng
    v1 = rng.integers(-4, 5, case.v.shape).astype(np.float64)
    v2 = rng.integers(-4, 5, case.v.shape).astype(np.float64)
    a, b = float(rng.choice([2, -1, 3])), float(rng.choice([1, -2, 4]))
    dtype = case.v.dtype
    cases = [case.change(v=v.astype(dtype)) for v in (v1, v2, a * v1 + b * v2)]
    first, second, both = (kernel(c) for c in cases)
    combined = a * first.out.astype(np.float64) + b * second.out.astype(np.float64)
    budgets = [c.budget.out for c in cases]
    budget = abs(a) * budgets[0] + abs(b) * budgets[1] + budgets[2]
    assert_close(both.out.astype(np.float64), combined, budget, "out of the combination")


def later_keys_change_nothing(kernel: Kernel, case: Case) -> None:
    """Causal: keys after a query's position change nothing for it.

    Domain: ``q_offset`` fixed explicitly, where the kernel has it. If this does not hold, a model
    reads the future while it is trained.
    """
    problem, rng = case.problem, case.rng
    keywords: dict[str, Any] = {"causal": True}
    if kernel.can("q_offset"):
        keywords["q_offset"] = problem.q_offset.reshape(problem.batch_shape)
        if not problem.batch_shape:
            keywords["q_offset"] = int(problem.q_offset[0])
    case = case.change(**keywords)
    cut = int(rng.integers(0, problem.seqlen_k + 1))
    later = (np.arange(problem.seqlen_k) >= cut)[:, None]
    other = case.change(
        k=np.where(later, -case.k[..., ::-1, :], case.k),
        v=np.where(later, case.v[..., ::-1, :] * 2 + np.asarray(1, case.v.dtype), case.v),
    )
    offsets = problem.q_offset.reshape(*problem.batch_shape, 1, 1)
    earlier = np.arange(problem.seqlen_q) + offsets < cut
    rows = np.broadcast_to(earlier, problem.lse_shape)
    assert_same(kernel, kernel(other), kernel(case), case, rows)


def rows_are_independent(kernel: Kernel, case: Case) -> None:
    """A row of the output depends on its own query only.

    Calling with a run of the rows gives those rows, within the budget. Domain: no dropout. If this
    does not hold, chunked prefill differs from prefill, or rows of a tile share their maximum.
    """
    problem, rng = case.problem, case.rng
    start = int(rng.integers(0, problem.seqlen_q))
    stop = int(rng.integers(start + 1, problem.seqlen_q + 1))
    rows = slice(start, stop)
    changes: dict[str, Any] = {"q": np.ascontiguousarray(case.q[..., rows, :])}
    for name in ("mask", "bias"):
        if name in case.keywords:
            array = case.keywords[name]
            if array.ndim > 1 and array.shape[-2] == problem.seqlen_q:
                changes[name] = np.ascontiguousarray(array[..., rows, :])
    if {"causal", "window_size", "alibi_slopes"} & case.keywords.keys():
        offset = (problem.q_offset + start).reshape(problem.batch_shape)
        changes["q_offset"] = offset if offset.ndim else int(offset)
    if "seqused_q" in case.keywords:
        used = np.clip(problem.seqused_q - start, 0, stop - start).reshape(problem.batch_shape)
        changes["seqused_q"] = used if used.ndim else int(used)
    changes |= moved(case.keywords, rows=rows)
    chunk = case.change(**changes)
    whole = kernel(case)
    part = Answer(whole.out[..., rows, :], None if whole.lse is None else whole.lse[..., rows])
    assert_same(kernel, kernel(chunk), part, chunk, bitwise=False)
