"""The interval of a row and the kind of a tile, against plain index arithmetic."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusedattn.masks import (
    EDGE,
    FULL,
    SKIP,
    UNBOUNDED,
    KeyRange,
    relative_bounds,
    visible_pairs,
)

SIDES = st.none() | st.integers(0, 25)


@st.composite
def maskings(draw):
    """Draw a rectangle, the options that mask it, and what each row sees by the definition."""
    seqlen_q, seqlen_k = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    seqused_q, seqused_k = draw(st.integers(0, seqlen_q)), draw(st.integers(0, seqlen_k))
    causal, window_size = draw(st.booleans()), draw(st.tuples(SIDES, SIDES))
    q_offset = draw(st.integers(-25, 25))

    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    p = i + q_offset
    seen = (i < seqused_q) & (j < seqused_k)
    if causal:
        seen = seen & (j <= p)
    left, right = window_size
    if left is not None:
        seen = seen & (p - left <= j)
    if right is not None:
        seen = seen & (j <= p + right)
    bounds = relative_bounds(causal, window_size, q_offset)
    return KeyRange(*bounds, seqused_q, seqused_k), seen


@given(maskings())
def test_the_interval_of_a_row_holds_just_the_keys_that_it_sees(masking):
    keys, seen = masking
    for row in range(seen.shape[0]):
        k_lo, k_hi = keys.row(row)
        assert 0 <= k_lo <= k_hi <= keys.seqused_k
        j = np.arange(seen.shape[1])
        np.testing.assert_array_equal((k_lo <= j) & (j < k_hi), seen[row])


@given(maskings(), st.data())
def test_the_interval_of_a_block_is_the_smallest_that_holds_its_rows(masking, data):
    keys, seen = masking
    row_lo = data.draw(st.integers(0, seen.shape[0]))
    row_hi = data.draw(st.integers(row_lo, seen.shape[0]))
    k_lo, k_hi = keys.block(row_lo, row_hi)
    columns = np.flatnonzero(seen[row_lo:row_hi].any(axis=0))
    if columns.size:
        assert (k_lo, k_hi) == (columns[0], columns[-1] + 1)
    else:
        assert k_lo == k_hi


@given(maskings(), st.data())
def test_a_tile_is_skipped_full_or_an_edge(masking, data):
    keys, seen = masking
    if 0 in seen.shape:
        return
    row_lo = data.draw(st.integers(0, seen.shape[0] - 1))
    row_hi = data.draw(st.integers(row_lo + 1, seen.shape[0]))
    key_lo = data.draw(st.integers(0, seen.shape[1] - 1))
    key_hi = data.draw(st.integers(key_lo + 1, seen.shape[1]))
    tile = seen[row_lo:row_hi, key_lo:key_hi]
    expected = FULL if tile.all() else EDGE if tile.any() else SKIP
    assert keys.tile(row_lo, row_hi, key_lo, key_hi) == expected


@given(st.lists(maskings(), min_size=1, max_size=5))
def test_pairs_are_counted_without_walking_the_rows(drawn):
    columns = np.array([keys for keys, _ in drawn], np.int64).T
    counted = visible_pairs(*columns)
    assert counted.tolist() == [int(seen.sum()) for _, seen in drawn]


def test_pairs_are_counted_exactly_at_the_largest_sizes():
    n = 2**30
    keys = np.array([(-UNBOUNDED, 1, n, n), (-UNBOUNDED, UNBOUNDED + 1, n, n)], np.int64).T
    assert visible_pairs(*keys).tolist() == [n * (n + 1) // 2, n * n]


def test_an_open_side_passes_every_key_at_the_largest_offsets():
    for q_offset in (1 - 2**30, 2**30 - 1):
        keys = KeyRange(*relative_bounds(False, (None, None), q_offset), 2**30, 2**30)
        assert keys.row(0) == keys.row(2**30 - 1) == (0, 2**30)


def test_a_window_wider_than_any_sequence_is_an_open_side():
    assert relative_bounds(False, (2**40, 2**40), 3) == relative_bounds(False, (None, None), 3)
