"""Which tiles the Hopper kernel computes, and which block of threads takes which of them when.

Blocks of threads stay on their multiprocessor and take one tile after the other. Heads are walked
in sections whose keys and values fit into the L2; within a section the longest tiles come first,
and each goes to the block that would be free first. All of that is known before the launch, so it
costs the kernel one load a tile, and no result depends on who computed it.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda.params import unit_heads
from fusedattn.masks import block_interval, relative_bounds
from fusedattn.problem import AttentionProblem

Array = NDArray[np.int32]

# Keys and values of so many bytes are walked at a time: they should stay in the L2.
_L2_BYTES = 12 * 2**20
# What the beginning and the end of a tile cost, in tiles of keys.
_AROUND = 1.5
# More tiles than these are dealt out in turn: who is free first matters less then.
_WEIGHED = 1 << 16


def schedule(
    problem: AttentionProblem,
    tile: tuple[int, int],
    multiprocessors: int,
    *,
    packed: bool = False,
    split_keys: int = 0,
    kept: NDArray[np.bool_] | None = None,
) -> Array:
    """Return ``(turns, blocks, 4)``: batch item, first head, first row and split of each tile.

    Parameters
    ----------
    problem : AttentionProblem
        What is computed.
    tile : (int, int)
        Rows and keys of a tile.
    multiprocessors : int
        How many blocks of threads there are at most.
    packed : bool
        Whether a tile holds all queries of several heads.
    split_keys : int
        Keys of a split, 0 where they are not split.
    kept : ndarray of bool, (batch, units, tiles of rows, tiles of keys), optional
        Which tiles of keys a tile of rows walks; a unit is the heads of a tile. Axes of batch and
        units have length 1 where all are alike.

    Returns
    -------
    ndarray of int32
        A batch item of -1 stands for no tile.
    """
    block_q = tile[0]
    together = unit_heads(problem, block_q) if packed else 1
    units = problem.batch_size * problem.num_heads // together
    row_blocks = 1 if packed else -(-problem.seqlen_q // block_q)
    splits = -(-problem.seqlen_k // split_keys) if split_keys else 1
    unit, block, split = (
        x.ravel() for x in np.indices((units, row_blocks, splits), dtype=np.int32, sparse=False)
    )
    head_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    abreast = units
    if not packed:
        fitting = problem.group_size * max(1, _L2_BYTES // max(1, head_bytes))
        abreast = -(-units // -(-units // fitting))  # sections of about one size
    order = np.lexsort((split, unit % abreast, -block, unit // abreast))
    unit, block, split = unit[order], block[order], split[order]
    batch, head = np.divmod(unit * together, problem.num_heads)
    tiles = np.stack([batch, head, block * block_q, split], axis=-1).astype(np.int32)
    low, high = _runs(problem, tile, row_blocks, split_keys or max(1, problem.seqlen_k), splits)
    low, high = low[batch, block, split], high[batch, block, split]
    counts = high - low
    if kept is not None:
        before = np.zeros((*kept.shape[:3], kept.shape[3] + 1), np.int32)
        np.cumsum(kept, axis=-1, out=before[..., 1:])
        place = (batch if kept.shape[0] > 1 else 0, head // together if kept.shape[1] > 1 else 0)
        counts = before[*place, block, high] - before[*place, block, low]
    costs = np.where(counts > 0, counts + _AROUND, _AROUND / 2)
    return _shared_out(tiles, costs, min(len(tiles), multiprocessors))


def _runs(
    problem: AttentionProblem, tile: tuple[int, int], row_blocks: int, run: int, splits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last tile of keys, for each batch item, block of rows and run of keys."""
    k_from, k_to = relative_bounds(problem.causal, problem.window_size, 0)
    offset, *lengths = problem.q_offset, problem.seqused_q, problem.seqused_k
    bounds = np.stack([offset + k_from, offset + k_to, *lengths], axis=-1)
    kinds, kind = np.unique(bounds.reshape(-1, 4), axis=0, return_inverse=True)
    runs = np.empty((2, len(kinds), row_blocks, splits), np.int64)
    starts = np.arange(splits) * run
    for index, bound in enumerate(kinds.tolist()):
        for block in range(row_blocks):
            # Packed heads are as tall as the sequence.
            first = block * tile[0]
            lo, hi = block_interval(first, min(first + tile[0], problem.seqlen_q), *bound)
            low, high = np.maximum(lo, starts), np.minimum(hi, starts + run)
            count = np.where(low < high, -(-high // tile[1]) - low // tile[1], 0)
            runs[:, index, block] = low // tile[1], low // tile[1] + count
    return runs[0, kind.ravel()], runs[1, kind.ravel()]


def _shared_out(tiles: Array, costs: NDArray[np.float64], blocks: int) -> Array:
    """Give each tile, in their order, to the block of threads that is free first."""
    if len(tiles) > _WEIGHED or np.ptp(costs) == 0:
        turns = -(-len(tiles) // blocks)
        table = np.full((turns * blocks, 4), -1, np.int32)
        table[: len(tiles)] = tiles
        return table.reshape(turns, blocks, 4)
    free = [(0.0, block) for block in range(blocks)]
    taken: list[list[int]] = [[] for _ in range(blocks)]
    for index, cost in enumerate(costs.tolist()):
        time, block = free[0]
        taken[block].append(index)
        heapq.heapreplace(free, (time + cost, block))
    table = np.full((max(map(len, taken)), blocks, 4), -1, np.int32)
    for block, indices in enumerate(taken):
        table[: len(indices), block] = tiles[indices]
    return table
