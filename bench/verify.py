"""Answers are held to the float64 reference before anything is timed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fusedattn
from bench.cases import Array, Case
from fusedattn.dispatch import load
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.tolerance import forward_budget

# At most so many items of the batch, heads and rows of each are compared, spread over all; fewer
# where that would be more keys, in numbers, or more scores. Two rows would not do: the first of a
# causal mask has an error of its own.
BATCHES, HEADS, ROWS, FEWEST_ROWS = 4, 8, 32, 16
KEYS, SCORES = 2**23, 2**18
# We keep the derived error budget of the test kit. A library that promises none may miss it by
# this factor, and may round its weights to the storage type: enough for any honest order of
# operations, and a small part of what a wrong mask, scale or head does.
LOOSE = 8.0


Indices = NDArray[np.int64]


class Sample(NamedTuple):
    """Indices of the rows that are compared."""

    batches: Indices
    heads: Indices
    rows: Indices

    def of(self, answer: Array) -> Array:
        """Return these rows of (batch, heads, seqlen_q, head_dim)."""
        return answer[np.ix_(self.batches, self.heads, self.rows)]


class Truth(NamedTuple):
    """The float64 answer in some rows, and how far ours and another's may be from it."""

    sample: Sample
    out: NDArray[np.float64]
    budget: NDArray[np.float64]
    loose: NDArray[np.float64]


class Verdict(NamedTuple):
    """What is wrong with an answer, if anything, and its error."""

    fault: str | None
    rms: float | None  # root of the mean square of the error
    of_bound: float | None  # largest error as a part of what is permitted


def _spread(length: int, most: int) -> Indices:
    return np.linspace(0, length - 1, min(length, max(2, most))).astype(np.int64)


def sample(case: Case) -> Sample:
    """Choose rows to compare; of gradients, those of q, k and v behind one another."""
    if case.is_gradient:  # every row has a share in those of k and v, so few heads are enough
        indices = _spread(3 * case.seqlen_q, 3 * ROWS)
        return Sample(_spread(case.batch, 2), _spread(case.heads, 2), indices)
    batches = _spread(case.batch, BATCHES)
    keys = len(batches) * case.seqlen_k
    most = min(KEYS // (keys * case.head_dim), SCORES // (keys * FEWEST_ROWS))
    heads = _spread(case.heads, min(HEADS, most))
    rows = min(ROWS, max(FEWEST_ROWS, SCORES // (keys * len(heads))))
    return Sample(batches, heads, _spread(case.seqlen_q, rows))


def truth(case: Case) -> Truth:
    """Compute the reference in some rows, which see what the case lets them see."""
    chosen = sample(case)
    if case.is_gradient:
        return _gradients(case, chosen)
    q, k, v, mask, bias = case.inputs()
    q = chosen.of(q)
    heads_kv = chosen.heads // (case.heads // case.heads_kv)
    k, v = (x[np.ix_(chosen.batches, heads_kv)] for x in (k, v))
    seen = case.visible(chosen.rows, mask)
    if seen is not None and len(seen) > 1:
        seen = seen[chosen.batches]
    if bias is not None:
        bias = bias[:, chosen.heads][:, :, chosen.rows]
    options: dict[str, Any] = {"mask": seen, "bias": bias}
    problem = fusedattn.make_problem(q, k, v, **options)
    wide = fusedattn.make_problem(*(x.astype(np.float64) for x in (q, k, v)), **options)
    budget = forward_budget(problem).out
    loose = budget
    if case.dtype != "float32":
        loose = forward_budget(problem, rounds_weights_to=problem.dtype).out
    return Truth(chosen, load("reference").forward(wide).out, budget, LOOSE * loose)


def _gradients(case: Case, chosen: Sample) -> Truth:
    """Compute the gradients of whole heads."""
    place = np.ix_(chosen.batches, chosen.heads)
    q, k, v = (np.ascontiguousarray(x[place]) for x in case.inputs()[:3])
    d_out = case.d_out()[place]
    problem = fusedattn.make_problem(q, k, v, causal=case.causal)
    wide = fusedattn.make_problem(*(x.astype(np.float64) for x in (q, k, v)), causal=case.causal)
    out, lse = load("reference").forward(dataclasses.replace(wide, return_lse=True))
    assert lse is not None
    wide_d_out = d_out.astype(np.float64)
    found = load("reference").backward(wide, wide_d_out, out, lse, None, bias_grad=False)
    allowed = backward_budget(problem, d_out)
    expected, budget = (
        np.concatenate(gradients[:3], axis=2)[:, :, chosen.rows] for gradients in (found, allowed)
    )
    return Truth(chosen, expected, budget, LOOSE * budget)


def judge(answer: Array | str, expected: Truth, *, ours: bool) -> Verdict:
    """Compare an answer, or the reason why there is none."""
    if isinstance(answer, str):
        return Verdict(answer, None, None)
    if answer.shape != expected.out.shape:
        return Verdict(f"wrong: shape {answer.shape}, not {expected.out.shape}", None, None)
    bound = expected.budget if ours else expected.loose
    error = np.abs(answer.astype(np.float64) - expected.out)
    worst = float((error / bound).max())
    rms = float(np.sqrt(np.mean(error**2)))
    if not worst <= 1.0:  # NaN fails too
        return Verdict(f"wrong: an error of {worst:.3g} times the bound", rms, worst)
    return Verdict(None, rms, worst)
