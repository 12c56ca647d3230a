"""The record of a backward call: that of the forward pass with more fields behind it.

Functions of the forward pass see its fields where they have always been, so its lane tables and
passes over the scores serve here too. What belongs to one panel of rows lies together: its lane
tables, its packed queries and d_out, and its sum of d_q. These *panel blocks* are the memory of a
call that grows with the length of the sequences; everything else is a few tiles for each thread.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu.choice import SHARED_ROWS, STORAGE_NAME, in_natural_units
from fusedattn.cpu.interface import BACKWARD_GROUPS, LOG2_E, UNSEEN
from fusedattn.cpu.lowering import address_of, lower_block_mask, lower_scores
from fusedattn.cpu.params import OPERANDS, PARAMS
from fusedattn.cpu.tile import STORAGE_CODE, Tile, backward_tile_for
from fusedattn.problem import AttentionProblem, batch_offsets

# How the gradient of the bias is collected.
NO_BIAS, SUM_OVER_KEYS, SUM_OVER_ROWS, EACH_ENTRY = range(4)

_OPERANDS = {
    "d_out": ("head", "row", "dim"),
    "d_q": ("head", "row", "dim"),
    "d_k": ("head", "row", "dim"),
    "d_v": ("head", "row", "dim"),
    "d_bias": ("head", "row", "key"),
}
# Parts of a panel block; those that the forward pass has too keep their names.
_PANEL = (
    "q_rows", "out_rows", "d_out_rows", "d_q_rows", "mask_rows", "bias_rows", "d_bias_rows",
    "kinds", "low", "high", "position", "row", "head", "slope", "bounds", "counts", "keep_rows",
    "shift", "factor", "delta", "bias_sums", "queries", "packed_d_out", "sum_d_q",
)  # fmt: skip
# Parts of a thread's working memory.
_SCRATCH = (
    "scores_tile", "d_scores_tile", "raw_tile", "bias_tile", "mask_tile", "shown_tile", "keep_tile",
    "softcap_slope", "keys", "values", "seen_keys", "seen", "keep_k", "keep_v", "staged_q",
    "staged_d_out", "sum_d_k", "sum_d_v", "row_max", "row_sum", "alpha", "check", "ones", "scales",
    "bad", "alone",
)  # fmt: skip

_FIRST = PARAMS.names or ()
_INTEGERS = [
    "tile_k",  # keys of a tile; a block holds one or more
    "num_heads_kv",
    "heads_in_all",  # KV heads of all batch items
    "panels_at",  # 0 if one block of keys is all: threads then have one panel block each
    "panel_bytes",
    *(
        f"{name}{field}"
        for name, strides in _OPERANDS.items()
        for field in ("", *(f"_{axis}" for axis in strides), "_offsets")
    ),
    "d_lse",  # accumulator type, contiguous (batch, head, row); 0 without
    "sink_shares",  # float64, contiguous (batch, head, row): what each row gives to d_sinks
    "bias_kind",
    "bias_in_turn",  # 1: items share entries of d_bias, and add to them one after the other
    "bias_sums",  # accumulator type, (batch, head, row) or (batch, head, key); 0 if not summed
    "aux_slots",  # accumulators of the gradients of aux arrays; 0: there are none
    "aux_slot_bytes",
    "aux_sums",  # float64, the accumulators, one slot after the other
    "aux_offsets",  # where in a slot each array begins, in elements
    "progress",  # for each item how many panels it has passed
    "bad_rows",  # bytes (batch, head, row), 1: d_q is not finite
    "bad_keys",  # bytes (batch, KV head, key), 1: d_k or d_v is not finite
    "bad_list",  # what the rescue works through
    "rows_in_place",  # 1: rows of q and d_out can be multiplied as they lie in memory
    "query_vectors",
    "value_vectors",
    "staged_q_stride",
    "staged_d_out_stride",
    "sum_d_k_stride",
    "sum_d_v_stride",
    "run_yield",  # lets other threads run, 0 if the system has no such function
    *(f"at_{name}" for name in (*_PANEL, *_SCRATCH) if f"at_{name}" not in _FIRST),
]
_REALS = [
    "lse_to_log2",  # what `to_log2`, rounded, makes of one natural unit
    "coarse_lse",  # an lse beyond this is too coarse to weigh with
    "exact_shift",  # shifts below this are integers
    "lse_slack",  # roundings of an lse, relative to it
]

BACKWARD = np.dtype(
    [(name, PARAMS[name]) for name in _FIRST]
    + [(name, np.dtype(np.int64)) for name in _INTEGERS]
    + [(name, np.dtype(np.float64)) for name in _REALS]
)

Array = NDArray[Any]


def backward_tile(problem: AttentionProblem) -> Tile:
    """Return the tile shape that serves a problem."""
    rows = _heads_together(problem) * problem.seqlen_q
    return backward_tile_for(STORAGE_NAME[problem.dtype], STORAGE_NAME[problem.out_dtype], rows)


def _heads_together(problem: AttentionProblem) -> int:
    """How many query heads of a KV group lie in a panel one after the other: all, or each alone."""
    return problem.group_size if problem.seqlen_q <= SHARED_ROWS else 1


def backward_groups(problem: AttentionProblem, bias_grad: bool) -> list[str]:
    """Which groups of micro-kernels the gradients of a problem need."""
    user = problem.score_mod is not None or problem.block_mask is not None
    needed = {
        "common": True,
        "panels": True,
        "passes": in_natural_units(problem, False),
        "mask": problem.mask is not None or user,
        "user": user,
        "gradients": True,
        "softcap_gradients": problem.softcap is not None,
        "dropout_gradients": problem.dropout_p > 0.0,
        "bias_gradients": problem.bias is not None and bias_grad,
    }
    assert set(BACKWARD_GROUPS) <= set(needed)
    return [group for group, is_needed in needed.items() if is_needed]


# Keys of a tile: their scores, and the gradients of these, stay in the innermost cache.
TILE_K = 96
# A block of keys is some tiles. The more, the less often panels are fetched from memory; but keys,
# values and their gradients have to stay in a core's own cache, and items must not be too few.
_TILES = (4, 2, 1)
_BLOCK_BYTES = {64: 800 * 1024, 32: 400 * 1024, 16: 400 * 1024}  # by the width of a vector
_ENOUGH_ITEMS = 16


def keys_per_block(problem: AttentionProblem, tile: Tile) -> int:
    """Keys whose gradients one item sums up. Moves no bit: sums go tile by tile, or by panels."""
    row = 2 * (problem.head_dim + problem.head_dim_v) * tile.real_bytes
    most = _BLOCK_BYTES[tile.width * tile.real_bytes] // row
    heads = problem.batch_size * problem.num_heads_kv
    for tiles in _TILES:
        keys = tiles * TILE_K
        if keys <= most and heads * -(-problem.seqlen_k // keys) >= _ENOUGH_ITEMS:
            return keys
    return TILE_K


class BackwardCall:
    """The record of one call, and the memory that it points to."""

    def __init__(
        self, problem: AttentionProblem, natives: dict[str, int], arrays: dict[str, Array | None]
    ) -> None:
        self._keep_alive: list[Any] = [problem, arrays]
        self.record = np.zeros(1, BACKWARD)
        fields = self.record[0]
        for name, address in natives.items():
            fields[f"run_{name}"] = address
        tile = backward_tile(problem)
        heads = ("num_heads", "num_heads_kv", "group_size")
        for name in (*heads, "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            fields[name] = getattr(problem, name)
        self._lower_arrays(problem, arrays)
        self._lower_lengths(problem)
        self._keep_alive.append(lower_block_mask(problem, fields))
        lower_scores(problem, fields)
        _lower_tile(problem, tile, fields)
        _lower_places(problem, tile, fields)
        self._lower_items(problem, fields)
        self.scratch_bytes = int(fields["scratch_bytes"])
        self.items = int(fields["items"])
        self.address = address_of(self.record)

    def set_counter(self, value: int) -> None:
        """Say which item is the next one."""
        self.record["counter"] = value

    def keep(self, owner: Any) -> None:
        """Let something live as long as this object."""
        self._keep_alive.append(owner)

    def enter_functions(self, addresses: dict[str, int]) -> None:
        """Enter functions of the user's."""
        for name, address in addresses.items():
            self.record[f"run_{name}"] = address

    def own(self, name: str, array: Array) -> Array:
        """Enter the address of an array that lives as long as this object."""
        self._keep_alive.append(array)
        self.record[name] = address_of(array)
        return array

    def _lower_arrays(self, problem: AttentionProblem, arrays: dict[str, Array | None]) -> None:
        """Addresses, strides and batch offsets of the operands; addresses of what is contiguous."""
        axes = OPERANDS | _OPERANDS
        for name, array in arrays.items():
            if array is None:
                continue
            self.record[name] = address_of(array)
            if name in axes:
                for axis, stride in zip(axes[name], array.strides[-3:], strict=True):
                    self.record[f"{name}_{axis}"] = stride
                self.own(f"{name}_offsets", batch_offsets(problem.batch_shape, array.strides))
        if problem.bias is not None:
            self.record["bias_storage"] = STORAGE_CODE[STORAGE_NAME[problem.bias.dtype]]

    def _lower_lengths(self, problem: AttentionProblem) -> None:
        k_from, k_to = problem.key_bounds
        self.own("k_from", k_from)
        self.own("k_to", k_to)
        for name in ("q_offset", "seqused_q", "seqused_k"):
            self.own(name, getattr(problem, name))

    def _lower_items(self, problem: AttentionProblem, fields: Any) -> None:
        """Cut the work into blocks of keys of one KV head."""
        heads = problem.batch_size * problem.num_heads_kv
        together = _heads_together(problem)
        groups = problem.group_size // together
        panels = groups * -(-together * problem.seqlen_q // int(fields["lanes"]))
        # Without keys there still are rows to prepare.
        blocks = max(1, -(-problem.seqlen_k // int(fields["block_k"])))
        fields["heads_per_item"], fields["heads_in_all"] = together, heads
        fields["panels"], fields["items"] = panels, heads * blocks if panels else 0
        if blocks > 1:
            memory = np.empty(heads * panels * int(fields["panel_bytes"]) + 64, np.uint8)
            self._keep_alive.append(memory)
            fields["panels_at"] = -(-address_of(memory) // 64) * 64
        self.own("progress", np.zeros(heads * blocks, np.int64))

    def restart(self, items: NDArray[np.int64]) -> None:
        """Go over to the rescue of these rows (2 n) and keys (2 n + 1)."""
        self.own("bad_list", items)
        self.record["items"] = self.items = len(items)
        self.set_counter(0)


def _lower_tile(problem: AttentionProblem, tile: Tile, fields: Any) -> None:
    """Shapes of the tiles, and which operands have to be copied as reals first."""
    fields["width"], fields["lanes"] = tile.width, tile.lanes
    fields["block_k"], fields["tile_k"] = keys_per_block(problem, tile), TILE_K
    fields["real_bytes"], fields["unseen"] = tile.real_bytes, UNSEEN[tile.bits]
    fields["storage"] = STORAGE_CODE[tile.storage]
    for name in ("k", "v"):
        array = getattr(problem, name)
        in_place = array.strides[-1] == array.itemsize == tile.real_bytes
        fields[f"stage_{name}"] = not in_place
    mantissa = 24 if tile.bits == 32 else 53
    to_log2 = float(fields["to_log2"])
    fields["lse_to_log2"] = LOG2_E * float(problem.accumulator.type(to_log2)) / to_log2
    # In float64 it is also computed with roundings.
    fields["lse_slack"] = (2.0 if tile.bits == 32 else 4.0) * 2.0**-mantissa
    fields["coarse_lse"] = 2.0 ** (mantissa - 12)
    fields["exact_shift"] = 2.0 ** (mantissa - 2)
    fields["run_yield"] = _yield_address()
    vectors = [-(-dim // tile.width) for dim in (problem.head_dim, problem.head_dim_v)]
    fields["query_vectors"], fields["value_vectors"] = vectors
    whole = problem.head_dim % tile.width == problem.head_dim_v % tile.width == 0
    real = tile.storage == tile.out_storage and tile.real_bytes == problem.dtype.itemsize
    dense = all(int(fields[f"{name}_dim"]) == tile.real_bytes for name in ("q", "d_out"))
    fields["rows_in_place"] = whole and real and dense


def _lower_places(problem: AttentionProblem, tile: Tile, fields: Any) -> None:
    """Lay out panel blocks and working memory, each part on a cache line."""
    size, lanes, keys = tile.real_bytes, tile.lanes, int(fields["block_k"])
    tile_keys = int(fields["tile_k"])
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    vector = tile.width * size

    def stride(dim: int) -> int:
        # Whole vectors. An odd number of cache lines per row keeps the rows of a block out of each
        # other's sets.
        return (-(-(-(-dim * size // vector) * vector) // 64) | 1) * 64

    for name, dim in (("keys", head_dim), ("values", head_dim_v), ("staged_q", head_dim),
                      ("staged_d_out", head_dim_v), ("sum_d_k", head_dim),
                      ("sum_d_v", head_dim_v)):  # fmt: skip
        fields[f"{name}_stride"] = stride(dim)
    row = lanes * size
    sizes = {
        **dict.fromkeys(("queries", "sum_d_q"), head_dim * row),
        "packed_d_out": head_dim_v * row,
        **dict.fromkeys((name for name in _PANEL if name.endswith("_rows")), 8 * lanes),
        **dict.fromkeys(("low", "high", "position", "row", "head"), 4 * lanes),
        **dict.fromkeys(("slope", "shift", "factor", "delta", "bias_sums"), row),
        "keep_rows": lanes,
        "kinds": 8 * lanes,
        "bounds": 4 * 8,
        "counts": 2 * 8,
    }
    fields["panel_bytes"] = (_lay_out(_PANEL, sizes, fields, 0) // 64 | 1) * 64
    tile_bytes = tile_keys * row
    sizes = {
        **dict.fromkeys(("scores_tile", "d_scores_tile"), tile_bytes),
        "bias_tile": tile_bytes if problem.bias is not None else 0,
        "keep_tile": tile_bytes if problem.dropout_p > 0.0 else 0,
        "softcap_slope": tile_bytes if problem.softcap is not None else 0,
        "raw_tile": tile_bytes if problem.score_mod is not None else 0,
        **dict.fromkeys(("mask_tile", "shown_tile"), tile_keys * lanes),
        "keys": keys * stride(head_dim),
        "seen_keys": tile_keys * stride(head_dim),
        "values": keys * stride(head_dim_v),
        **dict.fromkeys(("seen", "bad"), keys),
        **dict.fromkeys(("keep_k", "keep_v"), max(keys, lanes)),
        "staged_q": lanes * stride(head_dim),
        "staged_d_out": lanes * stride(head_dim_v),
        "sum_d_k": keys * stride(head_dim),
        "sum_d_v": keys * stride(head_dim_v),
        **dict.fromkeys(("row_max", "row_sum", "alpha", "check", "ones", "scales"), row),
        "alone": int(fields["panel_bytes"]),
    }
    # Not a multiple of 4 KiB apart: a load that shares its low address bits with a store in flight
    # has to wait for it.
    fields["scratch_bytes"] = _lay_out(_SCRATCH, sizes, fields, 1088)


def _lay_out(names: tuple[str, ...], sizes: dict[str, int], fields: Any, apart: int) -> int:
    at = 0
    for name in names:
        fields[f"at_{name}"] = at
        at += -(-sizes[name] // 64) * 64 + apart
    return at


@functools.cache
def _yield_address() -> int:
    """Address of the system's function that lets another thread run, 0 without."""
    try:
        if sys.platform == "win32":
            function = ctypes.WinDLL("kernel32").SwitchToThread
        else:
            function = ctypes.CDLL(None).sched_yield
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
