"""How a problem reaches a kernel: one record, whose fields are named here and only here.

Kernels take the address of this record, so one compilation serves every dtype, shape, stride and
option. Addresses of the caller's arrays are those of batch item 0; what each item adds stands in
the ``*_offsets`` tables, so any leading axes with any strides will do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
from numba import from_dtype
from numpy.typing import NDArray

from fusedattn.cpu.memory import STORAGE_CODE, view_as
from fusedattn.cpu.micro import LOG2_E, SIGNATURES, UNSEEN
from fusedattn.cpu.tile import CHUNK_KEYS, MATRIX_KEYS, ROWS_PER_ITEM, Tile, tile_for
from fusedattn.cpu.user.words import describe_tables
from fusedattn.masks import relative_bounds
from fusedattn.problem import AttentionProblem, Lengths

STORAGE_NAME = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
}

# Large items spare copies, but every thread should have so many of them; smaller ones than this
# spare too little.
ITEMS_PER_THREAD = 4
FEWEST_PANELS = 4

# Up to so many rows per head, the heads of a KV group share the lanes of an item.
SHARED_ROWS = 96

# An operand is an address, three strides in bytes and the address of its batch offsets.
OPERANDS = {
    "q": ("head", "row", "dim"),
    "k": ("head", "row", "dim"),
    "v": ("head", "row", "dim"),
    "out": ("head", "row", "dim"),
    "mask": ("head", "row", "key"),
    "bias": ("head", "row", "key"),
}

# Functions of the user's: passes over a tile, and for one pair.
USER_FUNCTIONS = {
    "score_mod": "iiiiiii>",
    "mask_mod": "iiiiiii>",
    "score_mod_one": "fiiiii>f",
    "mask_mod_one": "iiiii>i",
    "score_slope": "iiiiiiii>",
    "score_aux": "iiiiiiiiiii>",
}

# A thread's working memory, by field: where each part begins.
_SCRATCH = (
    "queries", "output", "scores_tile", "bias_tile", "mask_tile", "keys", "values",
    "seen_values", "shown_tile", "seen", "keep_k", "keep_v", "row_queries", "row_output", "row_max",
    "kinds", "row_sum", "alpha", "factor", "check", "q_rows", "out_rows", "mask_rows", "bias_rows",
    "low", "high", "position", "row", "head", "slope", "bounds", "bad", "exact", "partial",
    "softcap_slope", "raw_tile", "query_rows", "weight_parts", "product", "has_rest",
)  # fmt: skip

_INTEGERS = [
    *(f"run_{name}" for name in SIGNATURES),  # addresses of the micro-kernels
    *(f"run_{name}" for name in USER_FUNCTIONS),  # of the user's functions, 0 without
    "run_mark_visible",  # addresses of the rescue, 0 until it is compiled
    "run_rescue",
    "counter",  # the atomic counter that hands out items, itself
    "items",
    "few_rows",  # 1: lanes along the head dim, one panel an item
    "matrix",  # 1: products by the matrix unit
    "key_group",  # tiles of scores begin at multiples of so many keys
    "parts",  # that each element has
    "queries_bytes",  # of the queries of a panel
    "queries_part",  # of one part of them, and so on
    "keys_part",
    "values_part",
    "chunk_keys",  # of few rows: keys whose sums start from nothing
    "chunks",
    "partial_bytes",
    "states",  # if chunks go to several threads: a count per item, then their states; else 0
    "panels",  # panels of a full item
    "heads_per_item",  # query heads of one KV group that share the lanes of an item
    "head_groups",
    "row_blocks",
    "width",
    "lanes",
    "block_k",
    "real_bytes",
    "storage",  # code of the type of q, k and v
    "out_storage",
    "bias_storage",
    "num_heads",
    "group_size",
    "seqlen_q",
    "seqlen_k",
    "head_dim",
    "head_dim_v",
    *(
        f"{name}{field}"
        for name, strides in OPERANDS.items()
        for field in ("", *(f"_{axis}" for axis in strides), "_offsets")
    ),
    "lse",  # accumulator type, contiguous (batch, head, row); 0 if not wanted
    "slopes",  # float64, contiguous (batch, head); 0 without
    "sinks",  # float64, contiguous (head); 0 without
    "k_from",  # tables with one int64 per batch item, from here
    "k_to",
    "q_offset",
    "seqused_q",
    "seqused_k",  # to here
    "score_words",  # descriptions of the aux arrays of the score_mod
    "mask_words",  # and of those of the block mask's functions
    "marks",  # 1: passes come after a score_mod, so what it hides is written down
    "kinds",  # of the block mask's blocks, one byte each; 0 without
    "kinds_batch",  # steps in bytes, 0 where all have the same
    "kinds_head",
    "kinds_row",
    "kinds_rows",  # rows and keys of a block
    "kinds_keys",
    "natural_units",  # 1: scale, then the passes in natural units; 0: straight to log2
    "exact",  # 1: every row takes the exact path
    "dropout",
    "threshold",
    "seed",
    "stage_k",  # 1: key blocks are copied as reals first
    "stage_v",
    "keys_stride",
    "values_stride",
    "row_queries_stride",
    "row_output_stride",
    *(f"at_{name}" for name in _SCRATCH),
    "scratch_bytes",
]
_REALS = ["scale", "to_log2", "query_sign", "softcap", "keep_scale", "unseen"]

PARAMS = np.dtype(
    [(name, np.int64) for name in _INTEGERS] + [(name, np.float64) for name in _REALS]
)

OFFSETS = {name: 8 * index for index, name in enumerate(_INTEGERS + _REALS)}
# In a kernel: the record at an address, its fields as attributes.
params_at = view_as(from_dtype(PARAMS))


_INDEX = {name: index for index, name in enumerate(_INTEGERS + _REALS)}
_WORDS = ctypes.c_int64 * len(_INDEX)
_ADDRESSES = tuple(_INDEX[name] for name in ("q", "k", "v", "out", "lse", "mask", "bias"))
_SLOPES, _SINKS = _INDEX["slopes"], _INDEX["sinks"]
_SCORE_WORDS = _INDEX["score_words"]
_RESCUE = (_INDEX["run_mark_visible"], _INDEX["run_rescue"])
_COUNTER, _STATES = _INDEX["counter"], _INDEX["states"]
_LENGTH_NAMES = ("k_from", "k_to", "q_offset", "seqused_q", "seqused_k")
_LENGTHS = tuple(_INDEX[name] for name in _LENGTH_NAMES)


# NumPy's C interface puts the address of an array's data right behind the head of the object. Read
# there it costs an eighth of ``__array_interface__``; a tiny call has four arrays to ask for.
_AFTER_HEAD = object.__basicsize__
_read_address = ctypes.c_size_t.from_address


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return _read_address(id(array) + _AFTER_HEAD).value


# A counter at or above this value tells the workers to stop.
STOP = 1 << 62


class Bound:
    """The record of one call, and the arrays that it points to."""

    def __init__(
        self, words: Any, work: int, counts: NDArray[np.int64] | None, keep_alive: tuple[Any, ...]
    ) -> None:
        self.address = ctypes.addressof(words)
        self.work = work
        self._words = words
        self._counts = counts
        self._keep_alive = keep_alive

    def enter_rescue(self, addresses: tuple[int, int]) -> None:
        """Enter the functions of the rescue."""
        self._words[_RESCUE[0]], self._words[_RESCUE[1]] = addresses

    def enter_functions(self, addresses: dict[str, int]) -> None:
        """Enter functions of the user's."""
        for name, address in addresses.items():
            self._words[_INDEX[f"run_{name}"]] = address

    def stop(self) -> None:
        """Make the workers leave what they have not begun."""
        self._words[_COUNTER] = STOP

    def start_over(self) -> None:
        """Let the next workers begin with the first item again."""
        self._words[_COUNTER] = 0
        if self._counts is not None:
            self._counts[:] = 0


class Template:
    """All that a call's record holds before its arrays are known; reused by calls alike."""

    def __init__(
        self, problem: AttentionProblem, tile: Tile, natives: dict[str, int], threads: int
    ) -> None:
        self.record = np.zeros((), PARAMS)
        self._tables: list[NDArray[Any]] = []
        for name, address in natives.items():
            self.record[f"run_{name}"] = address
        self._lower_operands(problem)
        self._relative_bounds = relative_bounds(problem.causal, problem.window_size, 0)
        lengths = Lengths(problem.q_offset, problem.seqused_q, problem.seqused_k)
        for name, table in zip(_LENGTH_NAMES, self._length_tables(lengths), strict=True):
            self._table(name, table)
        self._mask_words = lower_block_mask(problem, self.record)
        _lower_work(problem, tile, self.record, threads)
        lower_scores(problem, self.record)
        _lower_scratch(tile, self.record)
        self.scratch_bytes = int(self.record["scratch_bytes"])
        self.items = int(self.record["items"])
        self.chunks = int(self.record["chunks"])
        self._partial_bytes = int(self.record["partial_bytes"])
        self._accumulator = problem.accumulator
        self._slopes_shape = problem.lse_shape[:-1]
        self._image = self.record.tobytes()

    def bind(
        self,
        operands: tuple[NDArray[Any] | None, ...],
        slopes: NDArray[Any] | None,
        sinks: NDArray[Any] | None,
        lengths: Lengths | None,
        aux: tuple[NDArray[Any], ...],
        split: bool,
    ) -> Bound:
        """Return the record of a call on ``(q, k, v, out, lse, mask, bias)`` and the rest.

        ``lengths`` are the call's own, or None if they are those of the template's problem; ``aux``
        are the arrays of its score_mod;
        ``split``: whether the chunks of an item may go to several threads.
        """
        words = _WORDS.from_buffer_copy(self._image)
        tables: tuple[NDArray[np.int64], ...] = ()
        if lengths is not None:
            tables = self._length_tables(lengths)
            for index, table in zip(_LENGTHS, tables, strict=True):
                words[index] = address_of(table)
        for index, array in zip(_ADDRESSES, operands, strict=True):
            if array is not None:
                words[index] = address_of(array)
        if slopes is not None:
            slopes = self._in_float64(np.broadcast_to(slopes, self._slopes_shape))
            words[_SLOPES] = address_of(slopes)
        if sinks is not None:
            sinks = self._in_float64(sinks)
            words[_SINKS] = address_of(sinks)
        described = describe_tables(aux) if aux else None
        if described is not None:
            words[_SCORE_WORDS] = ctypes.addressof(described)
        work, states, counts = self.items, None, None
        if split:
            work *= self.chunks
            states = np.empty(self.items + work * self._partial_bytes // 8, np.int64)
            counts = states[: self.items]
            counts.fill(0)
            words[_STATES] = address_of(states)
        return Bound(
            words, work, counts, (self, operands, slopes, sinks, tables, states, aux, described)
        )

    def _in_float64(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Slopes or sinks, which count in the accumulator type whatever they are stored in."""
        with np.errstate(all="ignore"):  # a NaN or an infinity is an answer here, no accident
            return values.astype(self._accumulator).astype(np.float64, order="C")

    def _table(self, name: str, values: NDArray[Any]) -> None:
        """Enter the address of a table that lives as long as this object."""
        self._tables.append(values)
        self.record[name] = address_of(values)

    def _lower_operands(self, problem: AttentionProblem) -> None:
        """Strides and batch offsets."""
        operands = {name: getattr(problem, name) for name in ("q", "k", "v", "mask", "bias")}
        strides = {"out": out_strides(problem)}
        strides |= {name: array.strides for name, array in operands.items() if array is not None}
        for name, steps in strides.items():
            for axis, stride in zip(OPERANDS[name], steps[-3:], strict=True):
                self.record[f"{name}_{axis}"] = stride
            self._table(f"{name}_offsets", batch_offsets(problem.batch_shape, steps))
        for name in ("num_heads", "group_size", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            self.record[name] = getattr(problem, name)
        if problem.bias is not None:
            self.record["bias_storage"] = STORAGE_CODE[STORAGE_NAME[problem.bias.dtype]]

    def _length_tables(self, lengths: Lengths) -> tuple[NDArray[np.int64], ...]:
        """Tables in the order of `_LENGTHS`: the bounds of the keys seen, relative to the row."""
        k_from, k_to = self._relative_bounds
        return (lengths.q_offset + k_from, lengths.q_offset + k_to, *lengths)


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


def batch_offsets(batch_shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
    """Bytes from the first batch item to each, flat in C order."""
    offsets = np.zeros(1, np.int64)
    for length, stride in zip(batch_shape, strides[: len(batch_shape)], strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return offsets


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


def groups_of(problem: AttentionProblem) -> list[str]:
    """Which groups of micro-kernels a problem needs."""
    few, matrix = takes_few_rows(problem), tile_of(problem).matrix
    user = problem.score_mod is not None or problem.block_mask is not None
    needed = {
        "common": True,
        "rows": few,
        "panels": not few and not matrix,
        "matrix": matrix,
        "passes": in_natural_units(problem, few),
        "mask": problem.mask is not None or user,
        "user": user,
        "dropout": problem.dropout_p > 0.0,
    }
    return [group for group, is_needed in needed.items() if is_needed]


def takes_few_rows(problem: AttentionProblem) -> bool:
    """Whether the lanes lie along the head dim; decided by lengths, dims and dtype alone."""
    tile = _widest_tile(problem)
    return tile.takes_few(problem.seqlen_q, problem.head_dim, problem.head_dim_v)


def _widest_tile(problem: AttentionProblem) -> Tile:
    return tile_for(STORAGE_NAME[problem.dtype], STORAGE_NAME[problem.out_dtype])


def in_natural_units(problem: AttentionProblem, few: bool) -> bool:
    """Whether scores take passes in natural units; few rows are not packed, which takes a sign."""
    options = (problem.score_mod, problem.softcap, problem.bias, problem.alibi_slopes)
    return any(option is not None for option in options) or (few and problem.scale <= 0.0)


def heads_per_item(problem: AttentionProblem) -> int:
    """How many query heads of a KV group lie across the lanes together.

    They read the same keys. Where one head has few rows, as much of the group as there are lanes
    for shares them.
    """
    if takes_few_rows(problem):
        lanes = min(ROWS_PER_ITEM, _widest_tile(problem).lanes)
        most = max(1, lanes // max(1, problem.seqlen_q))
        return max(n for n in range(1, most + 1) if problem.group_size % n == 0)
    return problem.group_size if problem.seqlen_q <= SHARED_ROWS else 1


def tile_of(problem: AttentionProblem) -> Tile:
    """Return the tile shape that serves a problem."""
    rows = heads_per_item(problem) * problem.seqlen_q
    block_rows = None
    if problem.block_mask is not None and not takes_few_rows(problem):
        block_rows = problem.block_mask.block[0]  # the rows of an item of few share one panel
    storage, out_storage = STORAGE_NAME[problem.dtype], STORAGE_NAME[problem.out_dtype]
    matrix = not takes_few_rows(problem)
    return tile_for(storage, out_storage, rows, block_rows=block_rows, matrix=matrix)


def panels_per_item(problem: AttentionProblem, tile: Tile, threads: int) -> int:
    """How many panels of rows an item has; no bit depends on it."""
    panels, heads = tile.panels(problem.head_dim, problem.head_dim_v), heads_per_item(problem)
    groups, rows = problem.batch_size * problem.num_heads // heads, heads * problem.seqlen_q
    while panels > FEWEST_PANELS:
        if groups * -(-rows // (panels * tile.lanes)) >= ITEMS_PER_THREAD * threads:
            break
        panels = -(-panels // 2)
    return panels


def _lower_work(problem: AttentionProblem, tile: Tile, record: NDArray[Any], threads: int) -> None:
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
    chunk_keys = CHUNK_KEYS if few else 2**31
    record["chunk_keys"] = chunk_keys
    record["chunks"] = max(1, -(-problem.seqlen_k // chunk_keys))
    for name in ("k", "v"):
        array = getattr(problem, name)
        dense = array.strides[-1] == array.itemsize
        record[f"stage_{name}"] = not (dense and (few or array.itemsize == tile.real_bytes))


def _lower_scratch(tile: Tile, record: NDArray[Any]) -> None:
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
        "alpha": lanes * size,
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
    for name in _SCRATCH:
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
    keys_stride, values_stride = 2 * dims, 2 * tile.block_k
    record["keys_stride"], record["values_stride"] = keys_stride, values_stride
    record["queries_part"] = tile.lanes * dims * 2
    record["keys_part"] = tile.block_k * keys_stride
    record["values_part"] = columns * values_stride
    parts = max(2, tile.parts)  # bfloat16 may have a rest
    record["queries_bytes"] = parts * int(record["queries_part"])
    return {
        "queries": panels * int(record["queries_bytes"]),
        "keys": parts * int(record["keys_part"]),
        "values": parts * int(record["values_part"]),
        "seen_values": parts * int(record["values_part"]),
        "query_rows": tile.parts * tile.lanes * dims * 2,
        "weight_parts": 3 * tile.block_k * tile.lanes * 2,
        "product": MATRIX_KEYS * tile.lanes * tile.real_bytes,
        "has_rest": 8 * (2 + panels),
    }
