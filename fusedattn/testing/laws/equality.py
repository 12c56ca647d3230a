"""Laws that compare one call with the reference or with what any softmax average must be."""

from __future__ import annotations

import numpy as np

from fusedattn.testing.cases import Case
from fusedattn.testing.compare import assert_within
from fusedattn.testing.kernel import Kernel
from fusedattn.testing.laws.common import assert_equals_reference
from fusedattn.testing.roundoff import smallest_normal, smallest_subnormal, unit_roundoff
from fusedattn.testing.rows import Bool, any_over, attended, kv_heads
from fusedattn.testing.tolerance import working_roundoff


def equals_reference(kernel: Kernel, case: Case) -> None:
    """Out and lse equal the float64 reference within the a-priori budget.

    If this does not hold the kernel computes something else than attention, or loses more digits
    than its arithmetic has to. The lse is ``-inf`` exactly where the reference says so.
    """
    assert_equals_reference(kernel(case), case)


def finite_in_finite_out(kernel: Kernel, case: Case) -> None:
    """Finite inputs inside the domain give finite outputs, at any magnitude.

    Domain: ``max(1, |scale|) sum_d |q_d k_d| + |bias| + |alibi| <= max / 4`` of the accumulator; V
    up to the largest number of its type with ``full_range``, else ``max / (4 seqlen_k)``. If this
    does not hold, one outlier in an activation turns a whole output into NaN.
    """
    answer, expected = kernel(case), case.expected
    bad = ~np.isfinite(answer.out)
    assert not bad.any(), f"out has {int(bad.sum())} non-finite elements for finite inputs"
    if answer.lse is not None and expected.lse is not None:
        bad = ~np.isfinite(answer.lse) & np.isfinite(expected.lse)
        assert not bad.any(), f"lse has {int(bad.sum())} non-finite elements in rows with keys"
    assert_equals_reference(answer, case)


def in_hull(kernel: Kernel, case: Case) -> None:
    """Every output lies between the smallest and the largest attended value of its column.

    With sinks 0 counts as a value. Domain: no dropout. If this does not hold the weights do not sum
    to 1, or something that should be hidden has weight; it says so where logits are too large for
    any budget.
    """
    problem, answer = case.problem, kernel(case)
    heads = kv_heads(problem, slice(0, problem.num_heads))
    v = case.v.astype(np.float64)[..., heads, :, :][..., None, :, :]
    seen = attended(problem)[..., None]
    low = np.where(seen, v, np.inf).min(-2, initial=np.inf)
    high = np.where(seen, v, -np.inf).max(-2, initial=-np.inf)
    if problem.sinks is not None:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    empty: Bool = np.greater(low, high)
    low, high = np.where(empty, 0.0, low), np.where(empty, 0.0, high)
    size = np.maximum(np.abs(low), np.abs(high))
    # A weighted mean with positive weights, except for the roundings of its two sums.
    n = seen.sum(-2) + 1
    u = working_roundoff(problem)
    roundings = 2 * np.expm1((6 * n + 6) * u)
    # Up to this size of the lse a kernel may normalise by exp(-lse), rounding errors and all.
    lse = np.asarray(case.expected.lse, np.float64)[..., None]
    lse = np.where(empty, 0.0, np.abs(lse))
    roundings = roundings + np.minimum(8 * u * (lse + 2), 2.0**-10)
    half = unit_roundoff(case.q.dtype) if case.half_weights else 0.0
    slack = size * (roundings + 2 * half + unit_roundoff(problem.out_dtype))
    slack = slack + smallest_subnormal(problem.out_dtype)
    slack = slack + 4 * n * smallest_normal(problem.accumulator) * (1 + size)
    outside = np.maximum(low - answer.out, answer.out - high).clip(0.0)
    outside = np.where(np.isnan(answer.out.astype(np.float64)), np.nan, outside)
    assert_within(outside, np.zeros_like(size), np.where(empty, 0.0, slack), name="beyond the hull")


def rows_without_keys(kernel: Kernel, case: Case) -> None:
    """A row that sees no key gives exactly 0 and an lse of ``-inf``, or its sink.

    If this does not hold, padding rows carry NaN or the mean of V into whatever reads them next.
    """
    case = hide_rows(case, kernel)
    answer, problem = kernel(case), case.problem
    empty = ~any_over(attended(problem), -1)
    out = np.where(empty[..., None], answer.out.astype(np.float64), 0.0)
    bad = out != 0
    assert not bad.any(), f"{int(bad.any(-1).sum())} rows without keys are not 0: {out[bad][0]}"
    if answer.lse is not None and case.expected.lse is not None:
        want = np.where(empty, case.expected.lse, 0.0)
        got = np.where(empty, answer.lse, 0.0)
        assert_within(got, want, case.budget.lse, name="lse of rows without keys")
    assert_equals_reference(answer, case)


def hide_rows(case: Case, kernel: Kernel) -> Case:
    """Hide all keys from some rows by whatever the kernel can do."""
    problem, rng = case.problem, case.rng
    ways = [
        name
        for name, needs in (
            ("mask", {"mask"}),
            ("bias", {"bias"}),
            ("seqused_k", {"seqused_k"}),
            ("window_size", {"window_size", "q_offset"}),
            ("causal", {"causal", "q_offset"}),
        )
        if kernel.can(*needs)
    ]
    if not ways:
        return case
    way = ways[int(rng.integers(len(ways)))]
    rows = rng.random(problem.seqlen_q) < 0.6
    shape = (problem.seqlen_q, problem.seqlen_k)
    if way == "mask":
        return case.change(mask=np.broadcast_to(~rows[:, None], shape).copy())
    if way == "bias":
        bias = np.where(rows[:, None], -np.inf, np.zeros(shape)).astype(np.float32)
        return case.change(bias=bias)
    if way == "seqused_k":
        return case.change(seqused_k=0)
    if way == "causal":
        return case.change(causal=True, q_offset=-1 - int(rng.integers(0, problem.seqlen_q + 1)))
    return case.change(window_size=(1, 0), q_offset=problem.seqlen_k)


def nan_reaches_the_output(kernel: Kernel, case: Case) -> None:
    """A NaN in an attended query, key or value reaches the output; it is never turned into 0.

    Domain: NaN only, no dropout, logits of moderate size. A NaN value may spoil the whole row or
    its own column. If this does not hold, a broken layer upstream is silently averaged away.
    """
    rng = case.rng
    name = "qkv"[int(rng.integers(3))]
    array = getattr(case, name).copy()
    if array.size == 0:
        return
    place = tuple(int(rng.integers(n)) for n in array.shape)
    array[place] = np.nan
    case = case.change(**{name: array})
    answer, expected = kernel(case), case.expected
    must = np.isnan(expected.out)
    lost = must & ~np.isnan(answer.out)
    assert not lost.any(), (
        f"{name}{list(place)} is NaN and attended, but {int(lost.sum())} of {int(must.sum())} "
        f"outputs that it enters are numbers, such as {answer.out[lost][0]}"
    )
    if answer.lse is not None and expected.lse is not None:
        lost = np.isnan(expected.lse) & ~np.isnan(answer.lse)
        assert not lost.any(), f"{name} holds an attended NaN, but the lse is {answer.lse[lost][0]}"
    if kernel.can("hidden_nan") or name == "q":
        # Rows that do not attend it are as the reference says; others may be NaN altogether.
        spoilt = any_over(must, -1)
        if not kernel.can("hidden_nan"):
            spoilt = spoilt | any_over(np.isnan(case.q), -1)
        out = np.where(spoilt[..., None], 0.0, answer.out.astype(np.float64))
        want = np.where(spoilt[..., None], 0.0, expected.out)
        assert_within(out, want, case.budget.out, name="out of rows that see no NaN")
