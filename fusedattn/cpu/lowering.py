"""From a problem to the record of its kernels, but for the addresses of its arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu.choice import (
    heads_per_item,
    in_natural_units,
    panels_per_item,
    takes_few_rows,
)
from fusedattn.cpu.interface import LOG2_E, UNSEEN, unlift
from fusedattn.cpu.params import SCRATCH
from fusedattn.cpu.tile import CHUNK_KEYS, MATRIX_KEYS, ROWS_PER_ITEM, STORAGE_CODE, Tile
from fusedattn.cpu.user.words import describe_tables
from fusedattn.problem import AttentionProblem

# NumPy's C interface puts the address of an array's data right behind the head of the object. Read
# there it costs an eighth of ``__array_interface__``; a tiny call has four arrays to ask for.
_AFTER_HEAD = object.__basicsize__
_read_address = ctypes.c_size_t.from_address


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return _read_address(id(array) + _AFTER_HEAD).value


def lower_block_mask(problem: AttentionProblem, record: Any) -> Any:
    """Enter the kinds of the blocks and what partial ones ask; return what must be kept alive."""
    mask = problem.block_mask
    if mask is None:
        return None
    record["kinds"] = address_of(mask.kinds)
    for name, axis in (("batch", 0), ("head", 1), ("row", 2)):
        one_for_all = axis < 2 and mask.kinds.shape[axis] == 1
        record[f"kinds_{name}"] = 0 if one_for_all else mask.kinds.strides[axis]
    record["kinds_rows"], record["kinds_keys"] = mask.block
    leaves = [part.leaf for part in mask.predicate.leaves() if part.leaf is not None]
    words = describe_tables(tuple(array for leaf in leaves for array in leaf.aux))
    record["mask_words"] = ctypes.addressof(words)
    return mask, words


def out_strides(problem: AttentionProblem) -> tuple[int, ...]:
    """Strides of out in canonical axis order: the caller's own, or contiguous in its layout."""
    if problem.out is not None:
        return problem.out.strides
    *leading, heads, rows, dim = problem.out_shape
    axes = (
        [*leading, heads, rows, dim] if problem.layout == "bhsd" else [*leading, rows, heads, dim]
    )
    strides = [problem.out_dtype.itemsize]
    for length in reversed(axes[1:]):
        strides.insert(0, strides[0] * length)
    if problem.layout == "bshd":
        strides[-3], strides[-2] = strides[-2], strides[-3]
    return tuple(strides)


def lower_scores(problem: AttentionProblem, record: NDArray[Any]) -> None:
    """Units of the scores, softcap and dropout."""
    scale = problem.scale
    natural = in_natural_units(problem, bool(record["few_rows"]))
    # A factor near the ends of the type's range would lose bits or overflow on its own. Nobody
    # means it, but it has an exact answer.
    least = most = 100 if problem.accumulator == np.float32 else 900
    if record["matrix"]:
        # The matrix unit may lose up to 2**-114 (2**12 additions) of a score that is yet to be
        # scaled, and 2**-57 where the smallest part of one number meets a large one.
        most = 32 if record["parts"] == 3 else 64
    record["exact"] = scale != 0.0 and not 2.0**-least < abs(scale) < 2.0**most
    record["natural_units"], record["scale"] = natural, scale
    if natural:
        record["to_log2"], record["query_sign"] = LOG2_E, 1.0
    else:  # the softmax pass wants a positive factor: the sign, or a zero, goes into the queries
        record["to_log2"] = abs(scale) * LOG2_E if scale else 1.0
        record["query_sign"] = np.sign(scale)
    record["softcap"] = problem.softcap or 0.0
    later = (problem.softcap, problem.alibi_slopes, problem.bias)
    record["marks"] = problem.score_mod is not None and any(x is not None for x in later)
    if problem.dropout_p > 0.0:
        record["dropout"] = 1
        record["threshold"] = int(problem.dropout_p * 2.0**32)
        record["seed"] = np.uint64(problem.seed).view(np.int64)
    record["keep_scale"] = 1.0 / (1.0 - problem.dropout_p)


def lower_work(problem: AttentionProblem, tile: Tile, record: NDArray[Any], threads: int) -> None:
    """Cut the output into items: (batch, group of heads, block of rows)."""
    panels, heads = panels_per_item(problem, tile, threads), heads_per_item(problem)
    groups = problem.num_heads // heads
    row_blocks = -(-heads * problem.seqlen_q // (panels * tile.lanes))
    record["panels"], record["heads_per_item"], record["head_groups"] = panels, heads, groups
    record["row_blocks"], record["items"] = row_blocks, problem.batch_size * groups * row_blocks
    record["width"], record["lanes"], record["block_k"] = tile.width, tile.lanes, tile.block_k
    record["real_bytes"], record["unseen"] = tile.real_bytes, UNSEEN[tile.bits]
    record["storage"] = STORAGE_CODE[tile.storage]
    record["out_storage"] = STORAGE_CODE[tile.out_storage]
    few = takes_few_rows(problem)
    record["few_rows"], record["matrix"] = few, tile.matrix
    record["key_group"] = MATRIX_KEYS if record["matrix"] else 1
    record["parts"] = tile.parts
    record["unlift"] = unlift(tile.parts) if tile.matrix else 1.0
    chunk_keys = CHUNK_KEYS if few else 2**31
    record["chunk_keys"] = chunk_keys
    record["chunks"] = max(1, -(-problem.seqlen_k // chunk_keys))
    for name in ("k", "v"):
        array = getattr(problem, name)
        dense = array.strides[-1] == array.itemsize
        record[f"stage_{name}"] = not (dense and (few or array.itemsize == tile.real_bytes))


def lower_scratch(tile: Tile, record: NDArray[Any]) -> None:
    """Lay out the working memory of one thread, each part on a cache line."""
    size, lanes, keys = tile.real_bytes, tile.lanes, tile.block_k
    panels, head_dim, head_dim_v = (
        int(record[name]) for name in ("panels", "head_dim", "head_dim_v")
    )
    rows = panels * lanes
    # An odd number of cache lines per row keeps the rows of a block out of each other's sets.
    keys_stride = (-(-head_dim * size // 64) | 1) * 64
    values_stride = (-(-head_dim_v * size // 64) | 1) * 64
    record["keys_stride"], record["values_stride"] = keys_stride, values_stride
    # Whole vectors, and one more where the head dim is no multiple of the width.
    vector = tile.width * size
    row_queries_stride = -(-head_dim * size // vector) * vector
    row_output_stride = -(-head_dim_v * size // vector) * vector
    record["row_queries_stride"] = row_queries_stride
    record["row_output_stride"] = row_output_stride
    few = ROWS_PER_ITEM if record["few_rows"] else 0
    if record["chunks"] > 1:
        record["partial_bytes"] = 2 * lanes * size + few * row_output_stride
    tile_bytes = keys * lanes * size
    sizes = {
        "queries": rows * head_dim * size,
        "output": rows * head_dim_v * size,
        "scores_tile": tile_bytes,
        "bias_tile": tile_bytes,
        **dict.fromkeys(("mask_tile", "shown_tile"), keys * lanes),
        "keys": keys * keys_stride,
        "values": keys * values_stride,
        "seen_values": keys * values_stride,
        **dict.fromkeys(("seen", "keep_k", "keep_v"), keys),
        "row_queries": few * row_queries_stride,
        "row_output": few * row_output_stride,
        **dict.fromkeys(("row_max", "row_sum", "factor", "check", "slope"), rows * size),
        "alpha": 2 * lanes * size,
        **dict.fromkeys(("q_rows", "out_rows", "mask_rows", "bias_rows", "kinds", "bad"), rows * 8),
        **dict.fromkeys(("low", "high", "position", "row", "head"), rows * 4),
        "bounds": 4 * 8 * panels,
        "exact": 4 * 8 * head_dim_v,
        "partial": int(record["partial_bytes"]),
        **dict.fromkeys(("softcap_slope", "raw_tile"), 0),  # the backward pass has them
        **dict.fromkeys(("query_rows", "weight_parts", "product", "has_rest"), 0),
    }
    if record["matrix"]:
        sizes |= _matrix_scratch(tile, record)
    at = 0
    for name in SCRATCH:
        record[f"at_{name}"] = at
        # Not a multiple of 4 KiB apart: a load that shares its low address bits with a store in
        # flight has to wait for it.
        at += -(-sizes[name] // 64) * 64 + 1088
    record["scratch_bytes"] = at


def _matrix_scratch(tile: Tile, record: NDArray[Any]) -> dict[str, int]:
    """Lay out what the matrix unit multiplies: all parts of each operand, in whole tiles."""
    panels, head_dim, head_dim_v = (
        int(record[name]) for name in ("panels", "head_dim", "head_dim_v")
    )
    dims, columns = (-(-n // MATRIX_KEYS) * MATRIX_KEYS for n in (head_dim, head_dim_v))
    # An odd number of cache lines again: 14 % of the products of scores at a head dim of 128.
    keys_stride, values_stride = ((2 * n // 64 | 1) * 64 for n in (dims, tile.block_k))
    record["keys_stride"], record["values_stride"] = keys_stride, values_stride
    record["queries_part"] = tile.lanes * dims * 2
    record["keys_part"] = tile.block_k * keys_stride
    record["values_part"] = columns * values_stride
    record["weights_bytes"] = 3 * tile.block_k * tile.lanes * 2
    parts = max(2, tile.parts)  # bfloat16 may have a rest
    record["queries_bytes"] = parts * int(record["queries_part"])
    return {
        "queries": panels * int(record["queries_bytes"]),
        "keys": parts * int(record["keys_part"]),
        "values": parts * int(record["values_part"]),
        "seen_values": parts * int(record["values_part"]),
        "query_rows": tile.parts * tile.lanes * dims * 2,
        "weight_parts": 2 * int(record["weights_bytes"]),
        "product": MATRIX_KEYS * tile.lanes * tile.real_bytes,
        "has_rest": 8 * (2 + panels),
    }
