"""How a problem reaches a portable kernel: flat arrays, one table of integers, a few reals.

Each operand becomes a one-dimensional array from its lowest address on, and the table says where in
it the elements lie, so any leading axes with any strides will do. The slots of the table are named
here and only here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.masks import relative_bounds
from fusedattn.problem import AttentionProblem, Lengths, batch_offsets

Array = NDArray[Any]

# Up to so many rows per head, the heads of a KV group are stacked into one tile of rows.
SHARED_ROWS = 64
# Up to so many queries, blocks of threads share out the keys of a row, so many to each. Every tile
# of keys divides a split. The size is fixed and not the number, or bits would depend on neighbours.
SPLIT_QUERIES = 16
SPLIT_KEYS = 512

_OPERANDS = ("q", "k", "v", "out", "mask", "bias")
_SLOTS = (
    "num_heads", "group_size", "heads_per_item", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v",
    "row_blocks", "return_lse", "threshold", "seed_low", "seed_high",
    "slopes_head", "sinks_head",
    *(f"{name}_{axis}" for name in _OPERANDS for axis in ("head", "row", "last")),
)  # fmt: skip
# One row per batch item follows: what bounds its keys, and where its operands begin.
_ITEM_SLOTS = (
    "k_from", "k_to", "q_offset", "seqused_q", "seqused_k", "slopes_at", "sinks_at",
    *(f"{name}_at" for name in _OPERANDS),
)  # fmt: skip
SLOT = {name: index for index, name in enumerate(_SLOTS)}
ITEM = {name: index for index, name in enumerate(_ITEM_SLOTS)}
HEADER, ITEM_SIZE = len(_SLOTS), len(_ITEM_SLOTS)
REALS = ("scale", "softcap", "keep_scale")


class Span(NamedTuple):
    """Memory that an array covers, and where in it the elements lie, counted in elements."""

    low: int  # bytes from the first element to the lowest address; not positive
    length: int
    offset: int  # of the first element
    strides: tuple[int, ...]


def span_of(array: Array) -> Span | None:
    """Return the memory that an array covers; None where strides are no multiple of the item."""
    size = array.itemsize
    if any(stride % size for stride in array.strides):
        return None
    steps = [
        stride // size if n > 1 else 0 for n, stride in zip(array.shape, array.strides, strict=True)
    ]
    reach = [(n - 1) * step for n, step in zip(array.shape, steps, strict=True)]
    if array.size == 0:
        return Span(0, 0, 0, tuple(steps))
    low = sum(min(r, 0) for r in reach)
    high = sum(max(r, 0) for r in reach)
    return Span(low * size, high - low + 1, -low, tuple(steps))


def compact(array: Array) -> Array:
    """Copy an array in C order, with each broadcast axis held once."""
    once = tuple(
        slice(0, 1) if stride == 0 and n > 1 else slice(None)
        for n, stride in zip(array.shape, array.strides, strict=True)
    )
    dense = np.array(array[once], order="C")
    broadcast = zip(dense.shape, array.shape, dense.strides, strict=True)
    strides = [stride if held == n else 0 for held, n, stride in broadcast]
    return np.lib.stride_tricks.as_strided(dense, array.shape, strides)


def unit_heads(problem: AttentionProblem, block_q: int) -> int:
    """How many heads of a KV group fit into a tile of rows, all of their queries."""
    fitting = [
        n
        for n in range(1, problem.group_size + 1)
        if problem.group_size % n == 0 and n * problem.seqlen_q <= block_q
    ]
    return max(fitting, default=1)


def heads_per_item(problem: AttentionProblem) -> int:
    """How many heads of a KV group share a tile of rows: all of them where queries are few."""
    return problem.group_size if problem.seqlen_q <= SHARED_ROWS else 1


def real_table(problem: AttentionProblem) -> NDArray[Any]:
    """Numbers of the scores in the accumulator's type, in the order of `REALS`."""
    keep_scale = 1.0 / (1.0 - problem.dropout_p)
    numbers = [problem.scale, problem.softcap or 1.0, keep_scale]
    return np.array(numbers, problem.accumulator)


def item_offsets(span: Span, batch_shape: tuple[int, ...], axes: int) -> NDArray[np.int64]:
    """Where each batch item of an operand begins; its last `axes` are no batch axes."""
    strides = span.strides[:-axes] or (0,) * len(batch_shape)
    return span.offset + batch_offsets(batch_shape, strides)


def word_table(
    problem: AttentionProblem, spans: dict[str, Span], rows_per_block: int, lengths: Lengths
) -> NDArray[np.int64]:
    """Lower a problem to the table of integers."""
    table = np.zeros(HEADER + ITEM_SIZE * problem.batch_size, np.int64)
    rows = heads_per_item(problem) * problem.seqlen_q
    header: dict[str, int] = {
        "heads_per_item": heads_per_item(problem),
        "row_blocks": -(-rows // rows_per_block),
        "return_lse": problem.return_lse,
        "threshold": int(problem.dropout_p * 2.0**32),
        "seed_low": problem.seed & 0xFFFFFFFF,
        "seed_high": problem.seed >> 32,
    }
    for name in ("num_heads", "group_size", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
        header[name] = getattr(problem, name)
    items = table[HEADER:].reshape(problem.batch_size, ITEM_SIZE)
    for name, span in spans.items():
        axes = ("head", "row", "last") if name in _OPERANDS else ("head",)
        for axis, stride in zip(axes, span.strides[-len(axes) :], strict=True):
            header[f"{name}_{axis}"] = stride
        items[:, ITEM[f"{name}_at"]] = item_offsets(span, problem.batch_shape, len(axes))
    for name, value in header.items():
        table[SLOT[name]] = value
    enter_lengths(table, problem, lengths)
    return table


def enter_lengths(
    table: NDArray[np.int64], problem: AttentionProblem, lengths: Lengths
) -> NDArray[np.int64]:
    """Enter the lengths of the batch items into the table of integers, and return it."""
    items = table[HEADER:].reshape(problem.batch_size, ITEM_SIZE)
    k_from, k_to = relative_bounds(problem.causal, problem.window_size, 0)
    items[:, ITEM["k_from"]] = lengths.q_offset + k_from
    items[:, ITEM["k_to"]] = lengths.q_offset + k_to
    for name, values in lengths._asdict().items():
        items[:, ITEM[name]] = values
    return table


def lengths_of(problem: AttentionProblem) -> Lengths:
    """Return the lengths of a problem."""
    return Lengths(problem.q_offset, problem.seqused_q, problem.seqused_k)
