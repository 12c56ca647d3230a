"""Block masks in the Hopper kernel: which tiles of keys a tile of rows walks, and what is asked.

On the host, the kinds of a mask's blocks are reduced to the kernel's own tiles. For each tile of
rows there is a walk: an entry for each tile of keys, with its kind and which tile comes next, so
that the thread that loads passes over any number of empty tiles in one step. It knows nothing of
lengths, which may change from call to call: the kernel cuts it to the keys that rows see.

Where all blocks of a tile are partial, the mask's function is asked about each pair. Where they are
of several kinds, the kind of a pair's own block comes first, as in the other kernels. The answers
are held as bits: the function is compiled once, in a loop that touches no score.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not.
# A piece assigns to its parameters, which are variables of the caller.
# ruff: noqa: F841
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.block_mask import BlockMask
from fusedattn.cuda import ptx, user
from fusedattn.cuda.hopper_scores import NO_KEY
from fusedattn.cuda.unroll import inlined, unrolled
from fusedattn.masks import EDGE, FULL, SKIP

Walks = NDArray[np.int32]

# A tile that blocks of several kinds meet, beside `SKIP`, `FULL` and `EDGE`.
MIXED = 3
# An entry: the kind in so many bits, and above them the number of the next tile. Tiles are counted
# from 1, from the last keys to the first; 0 is none.
KIND_BITS = 2
KIND = (1 << KIND_BITS) - 1
# What consumers are told of a tile: its first key, a multiple of 16, its kind, and whether it is
# the last one.
LAST = 1 << KIND_BITS
# What each of them adds: it changes with each tile that warps tell each other of.
TURNED = 8
# What the order of the tiles says of one where there are walks: what it says without, and where its
# walk begins, in bytes from the beginning of the order.
TURN_BYTES = 32


def walks_of(mask: BlockMask, tile: tuple[int, int], heads: int, *, packed: bool) -> Walks:
    """Return the walk of each tile of rows.

    Parameters
    ----------
    mask : BlockMask
        The mask, not of an empty problem.
    tile : (int, int)
        Rows and keys of a tile.
    heads : int
        Heads of a tile.
    packed : bool
        Whether a tile holds all queries of its heads.

    Returns
    -------
    ndarray of int32, (batch, units, tiles of rows, 1 + tiles of keys)
        An axis of batch or units has length 1 where all have the same mask; a unit is the heads of
        a tile. Entry 0 is none.
    """
    kinds = mask.kinds
    batches, all_heads = kinds.shape[:2]
    row_tile = mask.seqlen_q if packed else tile[0]
    units = all_heads // heads if all_heads > 1 else 1
    shape = (batches, units, -(-mask.seqlen_q // row_tile), 1 + -(-mask.seqlen_k // tile[1]))
    walks = np.zeros(shape, np.int32)
    numbers = np.arange(shape[-1], dtype=np.int32)
    kind_of = np.full(8, MIXED, np.int32)
    for kind in (SKIP, FULL, EDGE):
        kind_of[1 << kind] = kind
    for batch, unit in np.ndindex(batches, units):
        own = kinds[batch, unit * heads : (unit + 1) * heads]
        bits: NDArray[np.uint8] = np.bitwise_or.reduce(np.left_shift(1, own, dtype=np.uint8), 0)
        bits = _over(bits, mask.seqlen_q, row_tile, mask.block[0], axis=0)
        bits = _over(bits, mask.seqlen_k, tile[1], mask.block[1], axis=1)
        found = walks[batch, unit]
        found[:, 1:] = kind_of[bits]
        kept = np.maximum.accumulate(np.where(found != SKIP, numbers, 0), axis=1)
        found[:, 1:] |= kept[:, :-1] << KIND_BITS
    return walks


def _over(
    bits: NDArray[np.uint8], length: int, tile: int, block: int, axis: int
) -> NDArray[np.uint8]:
    """Join the bits of all blocks that a tile meets, for each tile along an axis."""
    first = np.arange(0, length, tile)
    last = np.minimum(first + tile, length)
    ends = np.stack([first // block, -(-last // block)], axis=-1).ravel()
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, 1)  # an end may not be the length itself
    every_other = np.arange(0, len(ends), 2)
    joined = np.bitwise_or.reduceat(np.pad(bits, padding), ends, axis=axis)
    return joined.take(every_other, axis=axis)


def is_kept(walks: Walks) -> NDArray[np.bool_]:
    """Whether a tile of keys is walked, ``(batch, units, tiles of rows, tiles of keys)``."""
    kept: NDArray[np.bool_] = (walks[..., 1:] & KIND) != SKIP
    return kept


def order_with(order: Walks, walks: Walks, heads: int, block_q: int) -> Walks:
    """Return the order of the tiles, each with its walk, and the walks behind them all.

    Parameters
    ----------
    order : ndarray of int32, (turns, blocks, 4)
        See `fusedattn.cuda.schedule`.
    walks : ndarray of int32
        See `walks_of`.
    heads, block_q : int
        Heads and rows of a tile.
    """
    batch, head, row = (order[..., i].astype(np.int64) for i in range(3))
    batches, units, row_tiles, entries = walks.shape
    which = (batch if batches > 1 else 0 * batch) * units
    which = (which + (head // heads if units > 1 else 0)) * row_tiles + row // block_q
    turns = np.zeros((*order.shape[:2], TURN_BYTES // 4), np.int32)
    turns[..., :4] = order
    turns[..., 4:6] = (turns.nbytes + which * entries * 4)[..., None].view(np.int32)
    return np.concatenate([turns.ravel(), walks.ravel()])


class Pieces(NamedTuple):
    """What the kernel is written with."""

    set_out: Any
    look_ahead: Any
    hear: Any
    ask: Any


def make(tools: Any, config: Any) -> Pieces:
    """Return the pieces, for one toolchain and `hopper.Config`."""
    cuda, types, asm = tools.cuda, tools.types, tools.asm
    int32, int64, float32 = types.int32, types.int64, types.float32
    functions: user.Functions | None = config.features.functions
    KEYS, SCORES = config.block_k, config.block_k // 2
    load_start, load_entry = asm(ptx.LOAD_LONG), asm(ptx.LOAD_INT)
    tell_tile, hear_tile = asm(ptx.STORE_SHARED_INT), asm(ptx.LOAD_SHARED_INT)
    of_user = user.DeviceFunctions()
    if functions is not None and functions.predicate is not None:
        of_user = user.device_functions(tools, functions, float32)
    asks, kind_in, place_of, keys_of = (
        of_user.asks, of_user.kind_in, of_user.place_of, of_user.keys,
    )  # fmt: skip

    @inlined
    def set_out(at, order, key_lo, walk, entry, key, key_hi):
        # To the last tile of keys that is kept, if there is one.
        walk = order + load_start(at + int64(16))
        number = int32(int32(key_hi + int32(KEYS - 1)) // int32(KEYS))
        entry = load_entry(walk + int64(number) * int64(4))
        if entry & int32(KIND) == SKIP:
            number = int32(entry >> int32(KIND_BITS))
            entry = load_entry(walk + int64(number) * int64(4))
        key = int32((number - int32(1)) * int32(KEYS))
        if int32(key + KEYS) <= key_lo:
            key_hi = key_lo

    @inlined
    def look_ahead(slot, key, key_lo, walk, entry, following, after):
        # Tell of the tile of keys at hand, and look for the next that is kept.
        tile = int32(key | (entry & int32(KIND)))
        number = int32(entry >> int32(KIND_BITS))
        following = int32((number - int32(1)) * int32(KEYS))
        after = load_entry(walk + int64(number) * int64(4))
        if int32(following + KEYS) <= key_lo:
            tile = int32(tile | int32(LAST))
        tell_tile(slot, tile)

    @inlined
    def hear(slot, word, key):
        # Which tile of keys is at hand.
        word = int32(hear_tile(slot) | (word & int32(TURNED)))
        key = int32(word & int32(-16))

    @inlined
    def ask(scores, key, column, kind, low, high, query, query_head, batch, *extra):
        # Hide what the mask hides. Keys outside a row's interval are hidden already: in their place
        # another one is asked about.
        seen = cuda.local.array(2, int32)
        place = cuda.local.array(2, int32)
        block_keys = int32(1)
        if kind == int32(MIXED):
            block_keys = int32(keys_of(*extra))
        for h in unrolled(2):
            seen[h], place[h] = int32(0), int32(0)
            if kind == int32(MIXED) and low[h] < high[h]:
                place[h] = int32(place_of(batch, query_head[h], query[h], *extra))
        turn = int32(0)
        while turn < int32(SCORES // 2):
            at = int32(key + column + int32(turn >> int32(1)) * int32(8) + int32(turn & int32(1)))
            for h in unrolled(2):
                near = int32(min(max(at, low[h]), max(int32(high[h] - 1), int32(0))))
                shown = asks(batch, query_head[h], query[h], near, *extra)
                if kind == int32(MIXED):
                    own = kind_in(place[h], int32(near // block_keys), *extra)
                    shown = (shown and own == EDGE) or own == FULL
                if shown:
                    seen[h] = int32(seen[h] | int32(int32(1) << turn))
            turn = int32(turn + 1)
        for i in unrolled(SCORES):
            if (seen[i % 4 // 2] >> int32(i // 4 * 2 + i % 2)) & int32(1) == 0:
                scores[i] = float32(NO_KEY)

    return Pieces(set_out, look_ahead, hear, ask)
