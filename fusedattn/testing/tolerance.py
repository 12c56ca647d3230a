r"""A-priori error budgets: how far an exact kernel may be from the reference, element by element.

Every budget follows from the inputs, the reference weights and the unit roundoff ``u`` of the
accumulator (``2**-24`` for float32, which float16 and bfloat16 inputs use too). Nothing here is
measured and nothing is tuned: a kernel that does each operation of the formula once, in any order
of summation, with any of the usual foldings, stays within; the derivation counts its roundings.
``u`` includes ``2**-53``, the roundoff of the float64 reference itself, which doubles the
budgets of float64 kernels.

**Notation.** For one row: keys ``j`` that it attends, ``n`` of them (a sink counts as one more),
logits ``s_j``, maximum ``m`` (sink included), weights ``w_j = exp(s_j - lse)``, and the factor
``c_j`` that multiplies ``w_j v_j``: 1, or with dropout 0 or ``1/(1-p)``. Operations are modelled as
``fl(x op y) = (x op y)(1 + d)`` with ``|d| <= u``; exp, log and tanh are allowed 2 ulp, ``4u``.

**Logits.** A dot product of ``D`` terms, its scale folded in before or after, costs at most
``D + 4`` roundings of ``S_j = |scale| sum_d |q_d k_d|``: D for products and sums in any order; the
rounding of the scale and its product; two more when the kernel works in base 2 or gives ``q`` and
``k`` a square root of the scale each. A score_mod f (see `fusedattn.testing.functions`) has a slope
of at most 1, so the error of its argument x is that of its result, and its own four roundings add
``4u (|x| + |f(x)|)``. Softcap divides (inside the 4), takes tanh and multiplies:
the error ``d`` of its argument becomes ``max(cap(x + d) - cap(x), cap(x) - cap(x - d))``, and
``5u |cap(x)|`` is added. Adding ALiBi and bias costs ``6u (|x| + |alibi| + |bias|)``: conversion,
product, two additions, constant and product of a base-2 kernel. Finally ``s_j - m`` and its
foldings cost ``2u (|s_j| + |m| + 1)``; the 1 is for a kernel that rounds its maximum to an integer.

The root ``sqrt(D)`` that random rounding errors would suggest is *not* a bound: equal terms are
rounded the same way in every step (a row of 256 equal products, summed in order in float32, misses
``(sqrt(D) + 5) u S`` by more than two), and so are terms after one dominant term. The worst case
``D`` is what can be promised to a correct kernel; sharpness comes from small ``D`` and ``n``.

**Weights.** The exponential costs ``4u``. A kernel that walks the keys in blocks multiplies by
``exp(m_old - m_new)``: the exponents telescope, so their error is in ``2u(|s_j| + |m|)`` already;
each such factor costs ``4u`` and is the same for numerator and row sum. After key ``j`` the
maximum can rise at most once for each key with a larger logit, whatever the order: ``r_j`` times.
Together the logit, as the kernel used it, is off by at most ``e_j``. A sum of ``a`` additions moves
each term by at most ``g_j = (a + r_j + 1) u``. In any order, one key at a time being the longest,
``a = n - 1``; a kernel that states its ``block_k`` is held to ``a = min(n, block_k) + blocks`` and
``r_j <= blocks``.

**Output.** Let ``d_j``, ``a_j``, ``b_j`` be the true errors of exponent, numerator and row sum.
Because ``sum_j w_j c_j v_j = out`` and ``sum_j w_j = 1``,

    out' - out = sum_j w_j exp(d_j) [(exp(a_j) - 1) c_j v_j - (exp(b_j) - 1) out]
                 / sum_j w_j exp(d_j + b_j)
                 + sum_j w_j (exp(d_j) - 1) (c_j v_j - out) / sum_j w_j exp(d_j + b_j),

hence, with ``h_j = e_j + g_j`` and without neglecting second-order terms,

    |out' - out| <= sum_j w_j [exp(e_j) expm1(g_j) (|c_j v_j| + |out|)
                               + expm1(e_j) |c_j v_j - out|] / sum_j w_j exp(-h_j).

A row with a single key owes nothing to the error of its logit. (For large problems ``|c_j v_j -
out|`` is replaced by ``|c_j v_j| + |out|``, which needs no array of keys times dims for each row.)
``out'`` is a weighted mean too, so ``max_j |c_j v_j| + |out|`` bounds the same difference and takes
over where logits are so large that their rounding errors decide the softmax. Division by the row
sum, and ``1/(1-p)``, cost ``4u |out'|``. A kernel may also weigh with ``exp(s_j - lse)``, as one
that merges splits does: the roundings of the lse (below, all but its first term) then are a
relative error of the output; rounding to the output type ``u_out |out'|`` and half its smallest
subnormal. A kernel that rounds its weights to a half type adds ``u_half`` to ``a_j`` and says so.

**lse.** ``m + log(sum)``: ``log sum_j w_j exp(h_j)``, at least as large as the error on the other
side because the logarithm of a mean of exponentials is convex in ``h``, plus
``u (4 (|lse - m| + 1) + 2 (|m| + 1) + 2 |lse|)``.

**Underflow.** Weights below ``tiny``, the smallest normal number, may be lost: ``4 n tiny`` of the
largest ``|c v|`` (weights are relative to a maximum of at least 1/2). Products may be
flushed to zero as well: ``tiny max(1, |scale|) (D + sum|q_d| + sum|k_d|)`` on a logit, whichever
factor the scale was folded into, and ``4 (n + 1) tiny`` on the output.

**Exact places.** A row that sees no key is 0 and ``-inf`` with budget 0; its lse with a sink is the
sink, up to the rounding of the sink. Where the output type cannot hold the value the budget is inf.

**Merge.** Parts ``(out_p, lse_p)`` are combined like keys with logits ``lse_p`` and values
``out_p``, and the budgets of the parts enter: ``e_p`` gains the part's lse budget, and
``w_p exp(h_p)`` times its out budget is added to the numerator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import reference
from fusedattn.problem import AttentionProblem
from fusedattn.testing.compare import Budget, assert_within
from fusedattn.testing.merge_tolerance import merge_budget
from fusedattn.testing.roundoff import (
    EXP_LIMIT,
    change_of_weight,
    largest,
    smallest_normal,
    smallest_subnormal,
    unit_roundoff,
)
from fusedattn.testing.rows import Bool, Float64, RowBlock, any_over, kv_heads, row_blocks

__all__ = ["Budget", "assert_within", "forward_budget", "merge_budget", "unit_roundoff"]

# Beyond this many (row, key, dim) triples the cheaper bound of |c_j v_j - out| is taken.
_EXACT_MEANS = 1 << 18


def working_roundoff(problem: AttentionProblem) -> float:
    """Sum the unit roundoffs of the accumulator and of the float64 reference."""
    return unit_roundoff(problem.accumulator) + 2.0**-53


def forward_budget(
    problem: AttentionProblem,
    *,
    out_dtype: Any = None,
    rounds_weights_to: Any = None,
    block_k: int | None = None,
) -> Budget:
    """Largest error of an exact kernel, for each element of out and lse.

    Parameters
    ----------
    problem : AttentionProblem
        What was computed.
    out_dtype : dtype, optional
        Type the output was rounded to; the problem's own by default.
    rounds_weights_to : dtype, optional
        Half type to which the kernel rounds its weights before they multiply V, if it does.
    block_k : int, optional
        Number of keys whose contributions the kernel adds in a row before it adds the sum to
        those of other blocks. By default any order of summation is permitted.

    Returns
    -------
    Budget
        ``out`` of shape ``problem.out_shape`` and ``lse`` of shape ``problem.lse_shape``, float64,
        in canonical axis order. Never NaN; 0 where the result must be exact.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn.problem import make_problem
    >>> q, k, v = np.ones((3, 1, 2, 4), np.float32)
    >>> budget = forward_budget(make_problem(q, k, v))
    >>> budget.out.shape, budget.lse.shape
    ((1, 2, 4), (1, 2))
    >>> bool(budget.out.max() < 100 * 2.0**-24)
    True
    """
    out_dtype = np.dtype(problem.out_dtype if out_dtype is None else out_dtype)
    out = np.zeros((*problem.batch_shape, problem.num_heads, problem.seqlen_q, problem.head_dim_v))
    lse = np.zeros(out.shape[:-1])
    if out.size == 0 or (problem.seqlen_k == 0 and problem.sinks is None):
        return Budget(out, lse)
    keep = kept_places(problem)
    with np.errstate(all="ignore"):
        for block in row_blocks(problem):
            kept = None if keep is None else keep[block.place]
            weights = Weights(problem, block, block_k)
            lse[block.place] = weights.lse_budget()
            out[block.place] = _out_budget(
                problem, block, weights, kept, out_dtype, rounds_weights_to
            )
    return Budget(out, lse)


def kept_places(problem: AttentionProblem) -> Bool | None:
    """Entries that dropout keeps, ``(*batch, heads, seqlen_q, seqlen_k)``; None without dropout."""
    if problem.dropout_p == 0:
        return None
    shape = (*problem.lse_shape, problem.seqlen_k)
    return reference.keep_mask(shape, problem.dropout_p, problem.seed)


class Weights:
    """Softmax of one block of rows with the error bounds of its exponents."""

    def __init__(
        self, problem: AttentionProblem, block: RowBlock, block_k: int | None = None
    ) -> None:
        self.u = u = working_roundoff(problem)
        self.tiny = smallest_normal(problem.accumulator)
        self.count: NDArray[np.int64] = block.attended.sum(-1)
        has_sink: Bool = np.greater(block.sink, -np.inf)
        self.row_max = np.maximum(block.logits.max(-1, initial=-np.inf), block.sink)
        size_of_max = np.where(np.isfinite(self.row_max), np.abs(self.row_max), 0.0) + 1
        shift = np.where(np.isfinite(self.row_max), self.row_max, 0.0)
        total = np.exp(block.logits - shift[..., None]).sum(-1) + np.exp(block.sink - shift)
        self.lse = np.where(total > 0, np.log(total) + shift, -np.inf)
        self.size_of_max = size_of_max

        additions, most = _chain(problem, self.count + has_sink, block_k)
        rescalings = _larger(block.logits) + (block.sink[..., None] > block.logits)
        rescalings = np.minimum(rescalings, most[..., None])
        logits = np.where(block.attended, block.logits, 0.0)
        exponent = logit_error(problem, block) + u * (
            2 * np.abs(logits) + 2 * size_of_max[..., None] + 4 * (1 + rescalings)
        )
        self.exponent = np.where(block.attended, exponent, 0.0)
        self.chain = u * (additions[..., None] + rescalings + 1)
        sink = np.where(has_sink, block.sink, 0.0)
        sink_exponent = u * (4 * np.abs(sink) + 2 * size_of_max + 4 * (1 + most))
        self.sink_exponent = np.where(has_sink, sink_exponent, 0.0)
        self.sink_chain = u * (additions + most + 1)
        lse = np.where(total > 0, self.lse, 0.0)
        self.log_w = block.logits - lse[..., None]
        self.sink_log_w = block.sink - lse

    def lse_budget(self) -> Float64:
        """Bound of the error of each row's lse."""
        error, sink_error = self.exponent + self.chain, self.sink_exponent + self.sink_chain
        change = change_of_weight(self.log_w, error).sum(-1) + change_of_weight(
            self.sink_log_w, sink_error
        )
        moved = np.log1p(change)
        widest = np.maximum(self.exponent.max(-1, initial=0.0), self.sink_exponent)
        moved = np.where(widest < EXP_LIMIT, moved, np.maximum(moved, widest))
        budget = moved + self.lse_rounding() + 4 * self.count * self.tiny
        return np.where(np.isfinite(self.lse) & ~np.isnan(budget), budget, 0.0)

    def lse_rounding(self) -> Float64:
        """Bound of the rounding errors of each row's lse, given exact weights."""
        spread = np.abs(self.lse - self.row_max)
        rounding: Float64 = self.u * (
            4 * (spread + 1) + 2 * self.size_of_max + 2 * np.abs(self.lse)
        )
        return rounding

    def blurred(self, extra: float) -> Float64:
        """Weight times the relative error of its sums, and of its own rounding."""
        w: Float64 = np.exp(np.minimum(self.log_w + self.exponent, EXP_LIMIT))
        blurred: Float64 = w * np.expm1(self.chain + extra)
        return blurred

    def sink_blurred(self) -> Float64:
        """Give the same for the sink."""
        w: Float64 = np.exp(np.minimum(self.sink_log_w + self.sink_exponent, EXP_LIMIT))
        blurred: Float64 = w * np.expm1(self.sink_chain)
        return blurred

    def least(self) -> Float64:
        """Smallest value that the sum of the computed weights may take."""
        total: Float64 = np.exp(self.log_w - self.exponent - self.chain).sum(-1)
        return total + np.exp(self.sink_log_w - self.sink_exponent - self.sink_chain)


def _chain(
    problem: AttentionProblem, terms: NDArray[np.int64], block_k: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Most additions and most rescalings that one term of a row's sums may go through."""
    longest = np.maximum(terms - 1, 0)
    if block_k is None:
        return longest, longest
    blocks = np.minimum(terms, -(-problem.seqlen_k // block_k) + 1)
    return np.minimum(terms, block_k) + blocks, blocks


def _larger(logits: Float64) -> NDArray[np.int64]:
    """At least the number of keys of the row with a larger logit, for each key."""
    rank = np.empty(logits.shape, np.int64)
    order = np.argsort(-logits, axis=-1)
    np.put_along_axis(
        rank, order, np.broadcast_to(np.arange(logits.shape[-1]), rank.shape), axis=-1
    )
    return rank


def capped_error(problem: AttentionProblem, block: RowBlock) -> Float64:
    """Bound of the error of each scaled product, after softcap."""
    u, tiny = working_roundoff(problem), smallest_normal(problem.accumulator)
    underflow = tiny * max(1.0, abs(problem.scale)) * (problem.head_dim + block.input_size)
    error: Float64 = u * (problem.head_dim + 4) * block.dot_size + underflow
    if problem.score_mod is not None:
        hidden = np.isneginf(block.modified)
        size = np.abs(block.raw) + np.where(hidden, 0.0, np.abs(block.modified))
        error = error + 4 * u * (size + error) + 4 * tiny
    cap = problem.softcap
    if cap is None:
        return error
    above = cap * np.tanh((block.modified + error) / cap) - block.capped
    below = block.capped - cap * np.tanh((block.modified - error) / cap)
    return np.maximum(above, below) + 5 * u * np.abs(block.capped)


def logit_error(problem: AttentionProblem, block: RowBlock) -> Float64:
    """Bound of the error of each logit before the maximum is subtracted."""
    error, cap = capped_error(problem, block), problem.softcap
    if problem.bias is not None or problem.alibi_slopes is not None or cap is not None:
        size = np.abs(block.capped)
        if cap is None:
            size = np.where(block.attended, np.maximum(size, block.dot_size), 0.0)
        error = error + 6 * working_roundoff(problem) * (size + block.added_size)
    return error


def _out_budget(
    problem: AttentionProblem,
    block: RowBlock,
    weights: Weights,
    kept: NDArray[np.bool_] | None,
    out_dtype: np.dtype[Any],
    rounds_weights_to: Any,
) -> Float64:
    u, tiny = weights.u, weights.tiny
    v = problem.v[block.index][kv_heads(problem, block.heads)].astype(np.float64)
    v = np.where(np.isfinite(v), v, 0.0) / (1.0 - problem.dropout_p)
    # Powers of two keep the sums finite when V stands at the end of the range.
    # (Not by log2, which rounds up to 1024 at the very end.)
    unit = np.ldexp(1.0, np.frexp(np.abs(v).max(initial=0.0) or 1.0)[1] - 1)
    v = v / unit
    seen_v = np.where(any_over(block.attended, -2)[..., None], np.abs(v), 0.0)
    v_max = seen_v.max(-2, initial=0.0)[..., None, :]

    w = np.exp(weights.log_w) * (1.0 if kept is None else kept)
    out = w @ v
    ref = np.abs(out)
    half = 0.0 if rounds_weights_to is None else unit_roundoff(rounds_weights_to)
    lost = 4 * weights.count * tiny
    if rounds_weights_to is not None:
        lost = lost + weights.count * smallest_subnormal(rounds_weights_to)
    bound = weights.blurred(half) * (1.0 if kept is None else kept) @ np.abs(v)
    bound += ref * (weights.blurred(0.0).sum(-1) + weights.sink_blurred())[..., None]
    bound += _moved_means(weights, v, out, kept)
    bound /= weights.least()[..., None]
    bound = np.where(bound < v_max + ref, bound, v_max + ref)
    relative = 4 * u + np.expm1(np.minimum(weights.lse_rounding(), 1.0))[..., None]
    bound = bound + relative * (ref + bound) + lost[..., None] * v_max

    bound, ref = bound * unit, ref * unit
    bound = bound + 4 * (weights.count[..., None] + 1) * tiny
    size = ref + bound
    bound = bound + unit_roundoff(out_dtype) * size + smallest_subnormal(out_dtype)
    bound = np.where(size > largest(out_dtype), np.inf, bound)
    exact = np.isnan(bound) | np.equal(weights.count, 0)[..., None]
    return np.where(exact, 0.0, bound)


def _moved_means(weights: Weights, v: Float64, out: Float64, kept: Bool | None) -> Float64:
    """Sum ``w_j expm1(e_j) |c_j v_j - out|``: how far errors of the exponents move the mean."""
    change = change_of_weight(weights.log_w, weights.exponent)
    sink = change_of_weight(weights.sink_log_w, weights.sink_exponent)[..., None] * np.abs(out)
    dropped = 0.0
    if kept is not None:
        dropped = (change * ~kept).sum(-1)[..., None] * np.abs(out)
        change = change * kept
    if change.size * v.shape[-1] > _EXACT_MEANS:
        spread: Float64 = change @ np.abs(v) + change.sum(-1)[..., None] * np.abs(out)
    else:
        distance = np.abs(v[..., None, :, :] - out[..., None, :])
        spread = (change[..., None, :] @ distance)[..., 0, :]
    return spread + sink + dropped
