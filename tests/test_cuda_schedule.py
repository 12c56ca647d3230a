"""Which block of threads computes which tile of the Hopper kernel, and when."""

import numpy as np
import pytest

from fusedattn.cuda.schedule import _AROUND, schedule
from fusedattn.problem import make_problem


def problem(batch, heads, heads_kv, rows, keys, **options):
    q, k = (
        np.broadcast_to(np.float16(0), (batch, n, m, 64))
        for n, m in ((heads, rows), (heads_kv, keys))
    )
    return make_problem(q, k, k, **options)


@pytest.mark.parametrize(
    ("case", "options", "units"),
    [
        (problem(2, 4, 2, 300, 300), {}, 8 * 3),
        (problem(2, 4, 2, 300, 300, causal=True), {}, 8 * 3),
        (problem(1, 8, 2, 5, 2000, seqused_k=700), {"packed": True, "split_keys": 512}, 2 * 4),
        (problem(3, 1, 1, 130, 0), {}, 3 * 2),
        (problem(1, 1, 1, 1, 1), {}, 1),
    ],
)
@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_each_tile_is_computed_once(case, options, units, multiprocessors):
    table = schedule(case, (128, 128), multiprocessors, **options)
    assert table.shape[1] <= multiprocessors
    tiles = table[table[..., 0] >= 0]
    assert len(tiles) == len(np.unique(tiles, axis=0)) == units
    # Nothing follows the last tile of a block.
    assert (np.diff((table[..., 0] >= 0).astype(int), axis=0) <= 0).all()


def test_blocks_of_threads_have_shares_of_work():
    case = problem(1, 16, 16, 4096, 4096, causal=True)
    table = schedule(case, (128, 128), 132)
    keys = table[..., 2] / 128 + 1 + _AROUND
    work = np.where(table[..., 0] >= 0, keys, 0).sum(axis=0)
    assert work.max() < 1.05 * work.mean()


def test_a_section_of_heads_is_done_before_the_next():
    case = problem(1, 8, 8, 1 << 16, 1 << 16)  # 16 MiB of keys and values a head
    heads = schedule(case, (128, 128), 132)[..., 1].ravel()
    assert (np.diff(heads[heads >= 0]) >= 0).all()


def test_tiles_of_keys_that_a_block_mask_skips_cost_nothing():
    case = problem(1, 16, 4, 4096, 4096, causal=True)
    kept = np.random.default_rng(5).random((1, 16, 32, 32)) < np.linspace(0, 1, 32)[:, None]
    table = schedule(case, (128, 128), 132, kept=kept)
    seen = np.tril(np.ones((32, 32), bool)) & kept[0]
    counts = seen.sum(axis=-1)[table[..., 1], table[..., 2] // 128]
    costs = np.where(counts > 0, counts + _AROUND, _AROUND / 2)
    work = np.where(table[..., 0] >= 0, costs, 0).sum(axis=0)
    assert work.max() < 1.1 * work.mean()
    unaware = np.where(table[..., 0] >= 0, table[..., 2] / 128, 0).sum(axis=0)
    assert unaware.max() > 1.2 * unaware.mean()
