"""The forward: output and log-sum-exp, one tile of scores at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.blocked.tile import BLOCK_K, BLOCK_Q, Head, heads, keep_tile, score_tile
from fusedattn.problem import AttentionProblem, Result

Array = NDArray[Any]


def forward(problem: AttentionProblem, *, block_q: int = BLOCK_Q, block_k: int = BLOCK_K) -> Result:
    """Compute ``out`` and, if asked for, ``lse``, one tile of scores at a time."""
    out = problem.out
    if out is None:
        out = np.empty(problem.out_shape, problem.out_dtype)
    lse = np.empty(problem.lse_shape, problem.accumulator)
    with np.errstate(all="ignore"):  # NaN, inf and overflow are looked at when a row is finished
        for index, head in heads(problem):
            for row_lo in range(0, problem.seqlen_q, block_q):
                rows = slice(row_lo, min(row_lo + block_q, problem.seqlen_q))
                out_rows, lse_rows = _query_block(head, rows, block_k)
                _rescue(head, rows, block_k, out_rows, lse_rows)
                out[index][rows] = out_rows
                lse[index][rows] = lse_rows
    return Result(out, lse if problem.return_lse else None)


def _query_block(
    head: Head, rows: slice, block_k: int, alone: int | None = None
) -> tuple[Array, Array]:
    """Compute ``out`` and ``lse`` of a block of rows, in the accumulator type; see `row_states`."""
    row_max, row_sum, acc = row_states(head, rows, block_k, alone)
    # Without any key or sink row_sum and acc are 0: divide by 1, and lse becomes log 0 = -inf.
    divisor = np.where(row_sum == 0, row_sum.dtype.type(1), row_sum)
    if head.problem.dropout_p:
        divisor = divisor * row_sum.dtype.type(1.0 - head.problem.dropout_p)
    lse = np.where(row_sum == 0, row_sum, row_max) + np.log(row_sum)
    return acc / divisor[:, None], lse


def row_states(
    head: Head, rows: slice, block_k: int, alone: int | None = None
) -> tuple[Array, Array, Array]:
    """Walk the keys that a block of rows sees; return ``row_max``, ``row_sum`` and ``acc``.

    With `alone`, the values that this row of the block does not see count as 0: see `_rescue`.
    """
    problem = head.problem
    accumulator = problem.accumulator
    count = rows.stop - rows.start
    row_max = np.full(count, -np.inf, accumulator)
    row_sum = np.zeros(count, accumulator)
    acc = np.zeros((count, problem.head_dim_v), accumulator)
    if head.sink is not None:
        # A sink is a key without a value. Rows past seqused_q have none, so a logit of -inf.
        active = np.arange(rows.start, rows.stop) < head.keys.seqused_q
        row_max = np.where(active, head.sink, row_max)
        # Its weight is 1, or 0 where there is none, or NaN where it is no number or infinite.
        row_sum = np.exp(row_max - np.where(row_max == -np.inf, accumulator.type(0), row_max))

    # Blocks that no row sees are not visited at all. Blocks start at multiples of block_k of the
    # absolute key index, so that the same keys meet in a block however the queries are cut.
    k_lo, k_hi = head.keys.block(rows.start, rows.stop)
    for key_lo in range(k_lo // block_k * block_k, k_hi, block_k):
        keys = slice(key_lo, min(key_lo + block_k, problem.seqlen_k))
        scores, seen, *_ = score_tile(head, rows, keys, accumulator)
        new_max = np.maximum(row_max, scores.max(axis=1))  # keeps NaN, as np.fmax would not
        # A row that has seen no key yet has nothing to shift by, and -inf - -inf would be NaN.
        shift = np.where(new_max == -np.inf, accumulator.type(0), new_max)
        exps = np.exp(scores - shift[:, None])  # exp(-inf) = 0 exactly: hidden keys weigh nothing
        rescale = np.exp(row_max - shift)
        row_max = new_max
        row_sum = row_sum * rescale + exps.sum(axis=1)
        if problem.dropout_p:
            # The row_sum is that of all weights: dropout comes after the softmax.
            keep = keep_tile(head, rows, keys)
            seen = keep if seen is None else seen & keep
            exps = np.where(keep, exps, accumulator.type(0))
        v = np.ascontiguousarray(head.v[keys], accumulator)
        if alone is not None and seen is not None:
            v = np.where(seen[alone][:, None], v, accumulator.type(0))
        acc = acc * rescale[:, None] + exps @ v
    return row_max, row_sum, acc


def _rescue(head: Head, rows: slice, block_k: int, out: Array, lse: Array) -> None:
    """Compute the rows again, alone, that did not end in finite numbers; in place.

    The fast path above is optimistic. Three things may spoil a row that deserves a finite result:

    - a value that the row does not see is NaN or inf, and ``0 * NaN`` reached its acc;
    - the values are so large that acc, which is not yet divided by row_sum, overflowed;
    - scores at the edge of the accumulator's range.

    The first is mended by the same operations in the same order with unseen values set to 0, which
    gives the bits of a call without the NaN. The other two by one pass in float64 whose weights are
    normalised before they meet the values. Rows that see a NaN stay NaN. Ordinary rows pay for one
    look at their result.
    """
    spoilt = ~(np.isfinite(out).all(axis=1) & np.isfinite(lse))
    for row in np.flatnonzero(spoilt):
        k_lo, k_hi = head.keys.row(rows.start + int(row))
        if k_lo == k_hi and np.isfinite(out[row]).all():
            continue  # sees no key: an lse of -inf is its answer
        out_alone, lse_alone = _query_block(head, rows, block_k, alone=int(row))
        out[row], lse[row] = out_alone[row], lse_alone[row]
        lost = ~np.isfinite(out[row])
        if lost.any() or not np.isfinite(lse[row]):
            wide, lse_wide = _row_in_float64(head, rows.start + int(row), block_k)
            out[row, lost] = wide[lost]
            if not np.isfinite(lse[row]):
                lse[row] = lse_wide


def _row_in_float64(head: Head, row: int, block_k: int) -> tuple[Array, float]:
    """Compute one row over just the keys it sees, in two passes, to be rounded once.

    The first pass finds row_max and row_sum, the second adds up values under normalised weights. A
    mean of finite numbers is finite, but near the largest float64 its sum could still round past
    the end; at a quarter of their size the values cannot, and numbers so large lose no precision.
    """
    problem = head.problem
    row_max, row_sum = -np.inf, 0.0
    if head.sink is not None and row < head.keys.seqused_q:
        row_max, row_sum = float(head.sink), 1.0
        if not row_max < np.inf:
            return np.full(problem.head_dim_v, np.nan), np.nan
    for scores, _, _ in _seen_tiles(head, row, block_k):
        new_max = np.maximum(row_max, scores.max(initial=-np.inf))
        shift = 0.0 if new_max == -np.inf else new_max
        row_sum = row_sum * np.exp(row_max - shift) + np.exp(scores - shift).sum()
        row_max = new_max
    if row_sum == 0.0:
        return np.zeros(problem.head_dim_v), -np.inf

    acc = np.zeros(problem.head_dim_v)
    for scores, keep, v in _seen_tiles(head, row, block_k):
        weights = np.exp(scores - row_max) / row_sum / (1.0 - problem.dropout_p)
        acc += weights[keep] @ (v[keep].astype(np.float64) / 4.0)
    if problem.dropout_p == 0.0:
        quarter = np.finfo(np.float64).max / 4.0
        acc = np.where(np.isfinite(acc), np.clip(acc, -quarter, quarter), acc)
    return 4.0 * acc, float(row_max + np.log(row_sum))


def _seen_tiles(head: Head, row: int, block_k: int) -> Iterator[tuple[Array, Array, Array]]:
    """Walk the keys that a row sees: their float64 scores, whether dropout keeps them, values."""
    rows = slice(row, row + 1)
    k_lo, k_hi = head.keys.row(row)
    for key_lo in range(k_lo // block_k * block_k, k_hi, block_k):
        keys = slice(key_lo, min(key_lo + block_k, head.problem.seqlen_k))
        scores, seen, *_ = score_tile(head, rows, keys, np.dtype(np.float64))
        chosen = np.ones(scores.shape[1], bool) if seen is None else seen[0]
        keep = keep_tile(head, rows, keys)[0] if head.problem.dropout_p else chosen
        yield scores[0, chosen], keep[chosen], head.v[keys][chosen]
