"""What serves a problem: which micro-kernels, which tile, how many heads and rows an item has."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fusedattn.cpu.tile import ROWS_PER_ITEM, Tile, takes_matrix, tile_for
from fusedattn.problem import AttentionProblem

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
    matrix = not takes_few_rows(problem) and takes_matrix(storage, problem.seqlen_q)
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
