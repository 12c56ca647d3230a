"""Logits of a problem in float64, a block of query rows at a time.

The budgets and the domain of the overflow law need the magnitudes behind each logit and not only
the logits, so the walk over the rows is written here once, from plain index arithmetic. It is
independent of the reference: where both agree, neither shares the other's mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.functions import UserFunction
from fusedattn.pointwise import evaluate
from fusedattn.problem import AttentionProblem

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

# Elements of one block of logits: eight float64 temporaries of it are 32 MiB.
_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Logits of some rows of some heads of one batch item, shape ``(heads, rows, keys)``.

    ``dot_size`` is ``|scale| * sum_d |q_d k_d|``, ``raw`` the scaled product itself, ``modified``
    the same after the score_mod, ``capped`` after softcap, ``added_size`` is ``|alibi| + |bias|``
    and ``logits`` the sum, ``-inf`` where the key is hidden. ``input_size`` is ``sum_d |q_d| +
    sum_d |k_d|``.
    """

    index: tuple[Any, ...]
    batch: int
    heads: slice
    rows: slice
    attended: Bool
    dot_size: Float64
    raw: Float64
    modified: Float64
    capped: Float64
    added_size: Float64
    logits: Float64
    input_size: Float64
    sink: Float64

    @property
    def place(self) -> tuple[Any, ...]:
        """Index of this block in an array of shape ``(*batch, heads, seqlen_q, ...)``."""
        return (*self.index, self.heads, self.rows)


def kv_heads(problem: AttentionProblem, heads: slice) -> NDArray[np.intp]:
    """KV head that each of these query heads reads."""
    return np.arange(heads.start, heads.stop) // max(problem.group_size, 1)


def visible(problem: AttentionProblem, batch: int, rows: slice) -> Bool:
    """Keys that causal, window, offset and lengths leave to these rows, ``(rows, keys)``."""
    i = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None]
    j = np.arange(problem.seqlen_k, dtype=np.int64)[None, :]
    position = i + int(problem.q_offset[batch])
    seen: Bool = (j < problem.seqused_k[batch]) & (i < problem.seqused_q[batch])
    if problem.causal:
        seen = seen & (j <= position)
    left, right = problem.window_size
    if left is not None:
        seen = seen & (j >= position - left)
    if right is not None:
        seen = seen & (j <= position + right)
    return seen


def row_blocks(problem: AttentionProblem) -> Iterator[RowBlock]:
    """Walk over all rows of a problem.

    Non-finite numbers in hidden places never reach the logits; an attended NaN does.
    """
    keys, num_heads = problem.seqlen_k, problem.num_heads
    head_step = max(1, min(num_heads, _BLOCK_ELEMENTS // max(1, problem.seqlen_q * keys)))
    row_step = max(1, min(problem.seqlen_q, _BLOCK_ELEMENTS // max(1, head_step * keys)))
    for batch, index in enumerate(np.ndindex(*problem.batch_shape)):
        for head in range(0, num_heads, head_step):
            heads = slice(head, min(head + head_step, num_heads))
            k = problem.k[index][kv_heads(problem, heads)].astype(np.float64)
            for row in range(0, problem.seqlen_q, row_step):
                rows = slice(row, min(row + row_step, problem.seqlen_q))
                with np.errstate(all="ignore"):
                    yield _row_block(problem, index, batch, heads, rows, k)


def _row_block(
    problem: AttentionProblem,
    index: tuple[int, ...],
    batch: int,
    heads: slice,
    rows: slice,
    k: Float64,
) -> RowBlock:
    q = problem.q[index][heads, rows].astype(np.float64)
    k_t = np.swapaxes(k, -1, -2)
    abs_q, abs_k = np.abs(q), np.abs(k_t)
    raw = (q @ k_t) * problem.scale
    dot_size = (abs_q @ abs_k) * abs(problem.scale)
    attended = np.broadcast_to(visible(problem, batch, rows), raw.shape)
    if problem.block_mask is not None:
        attended = attended & _in_blocks(problem, batch, heads, rows)
    modified = raw
    if problem.score_mod is not None:
        modified = _modified(problem.score_mod, raw, batch, heads, rows)
        attended = attended & (modified != -np.inf)
    cap = problem.softcap
    capped = modified if cap is None else cap * np.tanh(modified / cap)
    logits, added_size = capped, np.zeros(())
    if problem.alibi_slopes is not None:
        slopes = problem.alibi_slopes[index][heads].astype(problem.accumulator).astype(np.float64)
        i = np.arange(rows.start, rows.stop)[:, None] + int(problem.q_offset[batch])
        alibi = slopes[:, None, None] * np.abs(i - np.arange(problem.seqlen_k))
        logits, added_size = logits - alibi, added_size + np.abs(alibi)
    if problem.bias is not None:
        bias = problem.bias[index][heads, rows].astype(problem.accumulator).astype(np.float64)
        attended = attended & (bias != -np.inf)
        logits, added_size = logits + bias, added_size + np.abs(bias)
    if problem.mask is not None:
        attended = attended & problem.mask[index][heads, rows]
    sink = np.full(heads.stop - heads.start, -np.inf)
    if problem.sinks is not None:
        sink = problem.sinks[heads].astype(problem.accumulator).astype(np.float64)
    # A row past seqused_q does not see the sink either.
    live = np.arange(rows.start, rows.stop) < problem.seqused_q[batch]
    return RowBlock(
        index=index,
        batch=batch,
        heads=heads,
        rows=rows,
        attended=attended,
        dot_size=dot_size,
        raw=raw,
        modified=modified,
        capped=capped,
        added_size=np.where(attended, added_size, 0.0),
        logits=np.where(attended, logits, -np.inf),
        input_size=abs_q.sum(-1)[..., None] + abs_k.sum(-2)[..., None, :],
        sink=np.where(live, sink[:, None], -np.inf),
    )


def _modified(
    function: UserFunction, raw: Float64, batch: int, heads: slice, rows: slice
) -> Float64:
    """Ask a score_mod about each pair of a block."""
    head, row, key = np.indices(raw.shape)
    head, row, where = head + heads.start, row + rows.start, np.full(raw.size, batch)
    pairs = (where, head.ravel(), row.ravel(), key.ravel())
    return evaluate(function, raw.ravel(), *pairs).reshape(raw.shape)


def _in_blocks(problem: AttentionProblem, batch: int, heads: slice, rows: slice) -> Bool:
    """Ask the functions of a block mask about each pair: what its blocks say does not count."""
    mask = problem.block_mask
    assert mask is not None
    shape = (heads.stop - heads.start, rows.stop - rows.start, problem.seqlen_k)
    head, row, key = (part.ravel() for part in np.indices(shape))
    where = np.full(head.shape, batch)
    seen: Bool = mask.predicate(where, head + heads.start, row + rows.start, key).reshape(shape)
    return seen


def attended(problem: AttentionProblem) -> Bool:
    """Which keys each row attends, ``(*batch, heads, seqlen_q, seqlen_k)``."""
    seen = np.zeros((*problem.lse_shape, problem.seqlen_k), np.bool_)
    everything = slice(0, problem.seqlen_q)
    for batch, index in enumerate(np.ndindex(*problem.batch_shape)):
        seen[index] = visible(problem, batch, everything)
        heads = slice(0, problem.num_heads)
        if problem.block_mask is not None:
            seen[index] &= _in_blocks(problem, batch, heads, everything)
        if problem.score_mod is not None:
            # What is hidden depends on positions alone in all that is drawn.
            nothing = np.zeros(seen[index].shape)
            shown = _modified(problem.score_mod, nothing, batch, heads, everything)
            seen[index] &= shown != -np.inf
    if problem.mask is not None:
        seen &= problem.mask
    if problem.bias is not None:
        with np.errstate(over="ignore"):
            seen &= problem.bias.astype(problem.accumulator) != -np.inf
    return seen


def any_over(mask: Bool, axis: int) -> Bool:
    """Return where any entry along an axis is true."""
    found: Bool = np.asarray(np.any(mask, axis=axis))
    return found


def unseen_keys(problem: AttentionProblem) -> Bool:
    """Which keys no row of any head sees, ``(*batch, heads_kv, seqlen_k)``."""
    seen = any_over(attended(problem), -2)
    groups = (*problem.batch_shape, problem.num_heads_kv, problem.group_size, problem.seqlen_k)
    return ~any_over(seen.reshape(groups), -2)
