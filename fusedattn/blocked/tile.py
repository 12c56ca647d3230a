"""One tile of rows x keys: what is read for it, its scores, and what of it counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.masks import FULL, KeyRange
from fusedattn.philox import WORD, philox4x32
from fusedattn.pointwise import evaluate
from fusedattn.problem import AttentionProblem

Array = NDArray[Any]

BLOCK_Q = 64
BLOCK_K = 128


@dataclass(frozen=True, slots=True)
class Head:
    """What one head of one batch item reads: views of the problem, nothing copied."""

    problem: AttentionProblem
    q: Array  # (seqlen_q, head_dim)
    k: Array  # (seqlen_k, head_dim)
    v: Array  # (seqlen_k, head_dim_v)
    mask: Array | None  # (seqlen_q, seqlen_k)
    bias: Array | None  # (seqlen_q, seqlen_k)
    alibi_slope: Any
    sink: Any
    keys: KeyRange
    q_offset: int
    head: int
    batch: int


class Tile(NamedTuple):
    """Scores of a tile, and what counts of them."""

    scores: Array  # -inf where hidden
    seen: Array | None  # which entries are seen; None: all of them
    d_softcap: Array | None  # derivative of the softcap; None without one
    raw: Array  # scores before the score_mod


def heads(problem: AttentionProblem) -> Iterator[tuple[tuple[int, ...], Head]]:
    """Walk the heads of all batch items. Query head h reads KV head ``h // group_size``."""
    read = problem.accumulator.type  # the type in which small operands count
    for batch, item in enumerate(np.ndindex(*problem.batch_shape)):
        for head in range(problem.num_heads):
            index = (*item, head)
            index_kv = (*item, head // problem.group_size)
            slopes, sinks = problem.alibi_slopes, problem.sinks
            yield (
                index,
                Head(
                    problem=problem,
                    q=problem.q[index],
                    k=problem.k[index_kv],
                    v=problem.v[index_kv],
                    mask=None if problem.mask is None else problem.mask[index],
                    bias=None if problem.bias is None else problem.bias[index],
                    alibi_slope=None if slopes is None else read(slopes[index]),
                    sink=None if sinks is None else read(sinks[head]),
                    keys=problem.key_range(batch),
                    q_offset=int(problem.q_offset[batch]),
                    head=head,
                    batch=batch,
                ),
            )


def score_tiles(problem: AttentionProblem) -> Iterator[Tile]:
    """Compute every tile of scores in which a row may see a key."""
    with np.errstate(all="ignore"):
        for _, head in heads(problem):
            for row in range(0, problem.seqlen_q, BLOCK_Q):
                rows = slice(row, min(row + BLOCK_Q, problem.seqlen_q))
                k_lo, k_hi = head.keys.block(rows.start, rows.stop)
                for key in range(k_lo // BLOCK_K * BLOCK_K, k_hi, BLOCK_K):
                    keys = slice(key, min(key + BLOCK_K, problem.seqlen_k))
                    yield score_tile(head, rows, keys, problem.accumulator)


def score_tile(head: Head, rows: slice, keys: slice, accumulator: np.dtype[Any]) -> Tile:
    """Compute the scores of a tile; the only place where features of a score are told apart."""
    problem = head.problem
    q = np.ascontiguousarray(head.q[rows], accumulator)
    k = np.ascontiguousarray(head.k[keys], accumulator)
    scores = raw = (q @ k.T) * accumulator.type(problem.scale)
    seen = _seen_tile(head, rows, keys)
    if problem.score_mod is not None:
        scores = _modified(head, rows, keys, scores, seen)
        shown = scores != -np.inf
        seen = shown if seen is None else seen & shown
    d_softcap: Array | None = None
    if problem.softcap is not None:
        cap = accumulator.type(problem.softcap)
        bent = np.tanh(scores / cap)
        scores = cap * bent
        d_softcap = 1 - bent * bent
    if head.alibi_slope is not None:
        position = np.arange(rows.start, rows.stop)[:, None] + head.q_offset
        distance = np.abs(position - np.arange(keys.start, keys.stop))
        scores -= head.alibi_slope * distance.astype(accumulator)
    if head.bias is not None:
        bias = head.bias[rows, keys].astype(problem.accumulator)
        scores += bias
        shown = bias != -np.inf
        seen = shown if seen is None else seen & shown
    if seen is not None:
        # By selection: a hidden key may hold NaN.
        scores = np.where(seen, scores, accumulator.type(-np.inf))
    return Tile(scores, seen, d_softcap, raw)


def _seen_tile(head: Head, rows: slice, keys: slice) -> Array | None:
    """Which entries of a tile masks and intervals show; None if they show all of them."""
    seen: Array | None = None
    if head.mask is not None:
        seen = head.mask[rows, keys]
    if head.problem.block_mask is not None:
        shown = head.problem.block_mask.seen(head.batch, head.head, rows, keys)
        if shown is not None:
            seen = shown if seen is None else seen & shown
    # Inside a full tile no row's interval ends, and nothing is left to look at.
    if head.keys.tile(rows.start, rows.stop, keys.start, keys.stop) != FULL:
        intervals = np.array([head.keys.row(row) for row in range(rows.start, rows.stop)])
        key = np.arange(keys.start, keys.stop)
        inside = (key >= intervals[:, :1]) & (key < intervals[:, 1:])
        seen = inside if seen is None else seen & inside
    return seen


def pairs_of(
    head: Head, rows: slice, keys: slice, seen: Array | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Return the pairs that are seen: where they lie in the tile, and what a function is told."""
    shape = (rows.stop - rows.start, keys.stop - keys.start)
    row, key = np.nonzero(np.ones(shape, bool) if seen is None else seen)
    where = (np.full(row.shape, head.batch), np.full(row.shape, head.head))
    return (row, key), (*where, row + rows.start, key + keys.start)


def _modified(head: Head, rows: slice, keys: slice, scores: Array, seen: Array | None) -> Array:
    """Ask the score_mod about the pairs that are seen; the scores of the others stay."""
    assert head.problem.score_mod is not None
    places, pairs = pairs_of(head, rows, keys, seen)
    changed = scores.copy()
    changed[places] = evaluate(head.problem.score_mod, scores[places], *pairs)
    return changed


def keep_tile(head: Head, rows: slice, keys: slice) -> Array:
    """Which entries of a tile dropout keeps: their word is at least ``floor(p * 2**32)``.

    Key ``j`` reads word ``j % 4`` of counter block ``j // 4``. The formula is that of the kernels,
    here on whole arrays of int64, which wrap around as it expects.
    """
    block: Any = np.arange(keys.start // 4, -(-keys.stop // 4))
    row: Any = np.arange(rows.start, rows.stop)[:, None]
    seed = head.problem.seed
    words = philox4x32(block, row, head.head, head.batch, seed & WORD, seed >> 32)
    drawn = np.stack(words, axis=-1).reshape(row.shape[0], -1)
    skipped = keys.start % 4
    keep: Array = drawn >= int(head.problem.dropout_p * 2.0**32)
    return keep[:, skipped : skipped + keys.stop - keys.start]
