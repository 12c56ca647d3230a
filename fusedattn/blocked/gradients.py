"""The backward: gradients in the tiles of the forward, with no weight stored in between.

The forward keeps ``out`` and ``lse``; both are as long as the sequence. From the scores, computed
once more, ``exp(score - lse)`` gives each normalised weight directly, so no second running maximum
is needed (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2). With ``z`` the dropout factor
of an entry, 0 or ``1 / (1 - dropout_p)``, one tile adds its share to every gradient::

    d_weight = z * d_out v^T
    d_score  = weight * (d_weight - delta + d_lse)       delta = rowsum(d_out * out), one per row
    d_bias  += d_score
    d_score *= derivative of the softcap
    d_aux   += d_score * derivative of the score_mod by each element that it reads
    d_score *= derivative of the score_mod
    d_q     += scale * d_score k
    d_k     += scale * d_score^T q
    d_v     += (z * weight)^T d_out

`delta` is what makes a tile enough: the derivative of the softmax needs the sum of
``weight * d_weight`` over the whole row, and that sum is ``d_out . out``. A sink has a weight and
no value, so its ``d_weight`` is 0 and ``d_sink = w_sink * (d_lse - delta)``.

Blocks of keys are the outer loop: the gradients of one block of keys and values are finished in one
go, while each block of queries is visited many times. Query heads that read the same keys, and
entries that read the same element of a bias, add up.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.blocked.output import row_states
from fusedattn.blocked.tile import (
    BLOCK_K,
    BLOCK_Q,
    Head,
    heads,
    keep_tile,
    pairs_of,
    score_tile,
)
from fusedattn.masks import SKIP
from fusedattn.problem import AttentionProblem, Gradients
from fusedattn.slopes import add_to_aux, d_score

Array = NDArray[Any]

# A weight from a stored lse is off by the roundoff of that lse, relatively. Rows where this exceeds
# 2**-12 look for their row_max and row_sum again.
COARSE = 2.0**-12


class _Rows(NamedTuple):
    """What the rows of one head bring along; all in the accumulator's type."""

    d_out: Array  # (seqlen_q, head_dim_v)
    slope: Array  # (seqlen_q,): d_lse - delta
    shift: Array  # (seqlen_q,): a weight is exp(score - shift) / row_sum
    row_sum: Array  # (seqlen_q,)


class _Sums(NamedTuple):
    """Gradients of one head under way; views of accumulators, added to in place."""

    d_q: Array  # (seqlen_q, head_dim)
    d_k: Array  # (seqlen_k, head_dim)
    d_v: Array  # (seqlen_k, head_dim_v)
    d_bias: Array | None  # (seqlen_q or 1, seqlen_k or 1)
    d_aux: list[Array | None]  # of the whole call: shaped as the arrays, None for integers


def backward(
    problem: AttentionProblem,
    d_out: Array,
    out: Array,
    lse: Array,
    d_lse: Array | None = None,
    *,
    bias_grad: bool = True,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> Gradients:
    """Pull ``d_out`` and ``d_lse`` back to the operands; arrays in canonical axis order."""
    read = problem.accumulator
    d_q, d_k, d_v = (np.zeros(x.shape, read) for x in (problem.q, problem.k, problem.v))
    d_bias = _bias_accumulator(problem) if bias_grad else None
    d_aux = _aux_accumulators(problem)
    d_sinks = None if problem.sinks is None else np.zeros(problem.sinks.shape, read)
    with np.errstate(all="ignore"):  # hidden entries may hold anything; they are selected away
        for index, head in heads(problem):
            slope = -(d_out[index].astype(read) * out[index].astype(read)).sum(axis=-1)
            if d_lse is not None:
                slope += d_lse[index]
            shift, row_sum = _row_sums(head, lse[index], block_q, block_k)
            rows = _Rows(d_out[index].astype(read), slope, shift, row_sum)
            index_kv = (*index[:-1], head.head // problem.group_size)
            d_bias_here = _of_head(d_bias, index)
            sums = _Sums(d_q[index], d_k[index_kv], d_v[index_kv], d_bias_here, d_aux)
            sees = _walk(head, rows, sums, block_q, block_k)
            if d_sinks is not None:
                own = np.zeros(len(slope), read) if d_lse is None else d_lse[index]
                # Without keys the output is 0 whatever the sink: d_out does not matter.
                d_sinks[head.head] += _d_sink(head, rows, np.where(sees, slope, own))
        d_q *= read.type(problem.scale)
        d_k *= read.type(problem.scale)
        if d_bias is not None and problem.bias is not None and problem.bias_shape is not None:
            d_bias = d_bias.reshape(problem.bias_shape).astype(problem.bias.dtype)
        if d_sinks is not None and problem.sinks is not None:
            d_sinks = d_sinks.astype(problem.sinks.dtype)
        d_q, d_k, d_v = (x.astype(problem.dtype, copy=False) for x in (d_q, d_k, d_v))
    return Gradients(d_q, d_k, d_v, d_bias, d_sinks, _finished_aux(problem, d_aux))


def _walk(head: Head, rows: _Rows, sums: _Sums, block_q: int, block_k: int) -> Array:
    """Visit each tile in which any row sees a key; return which rows see one at all."""
    problem = head.problem
    sees = np.zeros(problem.seqlen_q, bool)
    for key_lo in range(0, problem.seqlen_k, block_k):
        keys = slice(key_lo, min(key_lo + block_k, problem.seqlen_k))
        for row_lo in range(0, problem.seqlen_q, block_q):
            part = slice(row_lo, min(row_lo + block_q, problem.seqlen_q))
            if head.keys.tile(part.start, part.stop, keys.start, keys.stop) != SKIP:
                seen = _add_tile(head, rows, sums, part, keys)
                sees[part] |= True if seen is None else seen.any(axis=1)
    return sees


def _add_tile(head: Head, rows: _Rows, sums: _Sums, part: slice, keys: slice) -> Array | None:
    """Add the share of a tile to every gradient; return which entries are seen (None: all)."""
    problem, read = head.problem, head.problem.accumulator
    scores, seen, d_softcap, raw = score_tile(head, part, keys, read)
    q, k, v = (np.ascontiguousarray(x, read) for x in (head.q[part], head.k[keys], head.v[keys]))
    d_out = rows.d_out[part]
    weights = np.exp(scores - rows.shift[part, None]) / rows.row_sum[part, None]
    used, dropped, d_weights = seen, weights, d_out @ v.T
    if problem.dropout_p:
        keep, factor = keep_tile(head, part, keys), read.type(1.0 / (1.0 - problem.dropout_p))
        used = keep if seen is None else seen & keep
        dropped = np.where(keep, weights * factor, read.type(0))
        d_weights = np.where(keep, d_weights * factor, read.type(0))
    d_scores = weights * (d_weights + rows.slope[part, None])
    if seen is not None:
        # By selection: the weight of a hidden key is 0, but 0 * NaN is NaN.
        d_scores = np.where(seen, d_scores, read.type(0))
        dropped = np.where(seen, dropped, read.type(0))
    if sums.d_bias is not None:
        _add_to_bias(sums.d_bias, part, keys, d_scores)
    if d_softcap is not None:
        d_scores = d_scores * d_softcap
        d_scores = d_scores if seen is None else np.where(seen, d_scores, read.type(0))
    if problem.score_mod is not None:
        d_scores = _through_score_mod(head, part, keys, seen, raw, d_scores, sums.d_aux)
    sums.d_q[part] += _product(d_scores, seen, k)
    sums.d_k[keys] += _product(d_scores.T, None if seen is None else seen.T, q)
    sums.d_v[keys] += _product(dropped.T, None if used is None else used.T, d_out)
    return seen


def _through_score_mod(
    head: Head,
    part: slice,
    keys: slice,
    seen: Array | None,
    raw: Array,
    d_scores: Array,
    d_aux: list[Array | None],
) -> Array:
    """Pull a tile back through the score_mod: to its arrays, which are added to, and its score."""
    function, grad = head.problem.score_mod, head.problem.score_mod_grad
    assert function is not None
    places, pairs = pairs_of(head, part, keys, seen)
    d_result = d_scores[places]
    add_to_aux(function, d_aux, d_result, raw[places], *pairs)
    slope = d_score(function, grad, raw[places], *pairs)
    pulled = np.zeros_like(d_scores)
    # A weight of 0 takes nothing back, however steep the function is there.
    pulled[places] = np.where(d_result == 0, d_result, d_result * slope)
    return pulled


def _aux_accumulators(problem: AttentionProblem) -> list[Array | None]:
    """Zeros for each floating array of the score_mod, at least in the accumulator's type."""
    arrays = () if problem.score_mod is None else problem.score_mod.aux
    wide = (problem.accumulator, np.dtype(np.float64))
    return [
        None
        if array.dtype.kind in "iub"
        else np.zeros(array.shape, wide[1] if array.dtype == wide[1] else wide[0])
        for array in arrays
    ]


def _finished_aux(
    problem: AttentionProblem, d_aux: list[Array | None]
) -> tuple[Array | None, ...] | None:
    """Round to the dtypes of the arrays."""
    if problem.score_mod is None:
        return None
    pairs = zip(d_aux, problem.score_mod.aux, strict=True)
    return tuple(None if total is None else total.astype(array.dtype) for total, array in pairs)


def _product(weights: Array, used: Array | None, values: Array) -> Array:
    """Multiply ``weights @ values``, where an entry that is not used does not count.

    Its weight is 0, but its value may be NaN or inf: those are left out of the product, and put
    into just the sums that use them.
    """
    finite = np.isfinite(values)
    if used is None or finite.all():
        return weights @ values
    product = weights @ np.where(finite, values, values.dtype.type(0))
    reached = used.astype(values.dtype) @ (~finite).astype(values.dtype) > 0
    return np.where(reached, values.dtype.type(np.nan), product)


def _row_sums(head: Head, lse: Array, block_q: int, block_k: int) -> tuple[Array, Array]:
    """Return what makes weights of scores: ``exp(score - shift) / row_sum``.

    The stored lse and 1 or, in rows where that lse is too large a number to be precise, the row_max
    and row_sum of the forward, found again: the same scores in the same order.
    """
    shift = np.where(lse == -np.inf, lse.dtype.type(0), lse)  # such a row sees nothing
    row_sum = np.ones_like(lse)
    coarse = np.finfo(lse.dtype).eps / 2 * np.abs(shift) > COARSE
    for row_lo in range(0, len(lse), block_q):
        part = slice(row_lo, min(row_lo + block_q, len(lse)))
        if coarse[part].any():
            row_max, total, _ = row_states(head, part, block_k)
            again = coarse[part] & (row_max != -np.inf)
            shift[part] = np.where(again, row_max, shift[part])
            row_sum[part] = np.where(again, total, row_sum[part])
    return shift, row_sum


def _bias_accumulator(problem: AttentionProblem) -> Array | None:
    """Zeros in the shape of the bias, with leading axes of 1 up to that of the scores."""
    if problem.bias is None or problem.bias_shape is None:
        return None
    missing = len(problem.lse_shape) + 1 - len(problem.bias_shape)
    return np.zeros((1,) * missing + problem.bias_shape, problem.accumulator)


def _of_head(d_bias: Array | None, index: tuple[int, ...]) -> Array | None:
    """View the part of a bias that a head reads."""
    if d_bias is None:
        return None
    lengths = d_bias.shape[:-2]
    part: Array = d_bias[tuple(0 if n == 1 else i for n, i in zip(lengths, index, strict=True))]
    return part


def _add_to_bias(d_bias: Array, part: slice, keys: slice, d_scores: Array) -> None:
    """Add a tile, summed over the axes along which the bias was broadcast."""
    if d_bias.shape[0] == 1:
        part, d_scores = slice(None), d_scores.sum(axis=0, keepdims=True)
    if d_bias.shape[1] == 1:
        keys, d_scores = slice(None), d_scores.sum(axis=1, keepdims=True)
    d_bias[part, keys] += d_scores


def _d_sink(head: Head, rows: _Rows, slope: Array) -> Any:
    """Sum ``w_sink * slope`` over the rows of a head; rows past seqused_q have no sink."""
    active = np.arange(len(slope)) < head.keys.seqused_q
    weight = np.exp(head.sink - rows.shift) / rows.row_sum
    # A sink of -inf takes no weight, whatever its slope.
    counts = active & (head.sink > -np.inf)
    return np.where(counts, weight * slope, slope.dtype.type(0)).sum()
