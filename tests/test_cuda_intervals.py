"""The intervals of the GPU kernels are those of `fusedattn.masks`, in 32 bits."""

import pytest
from hopper_emulator.run import Emulator
from hypothesis import example, given
from hypothesis import strategies as st

from fusedattn import masks
from fusedattn.cuda import intervals

INTERVALS = intervals.make(Emulator())
LONGEST = masks.MAX_SEQLEN

lengths = st.integers(0, 300) | st.integers(LONGEST - 300, LONGEST)
bounds = st.integers(-300, 300) | st.sampled_from([-LONGEST, LONGEST - 1, LONGEST])


@pytest.mark.parametrize("name", ["block_interval", "common_interval"])
@given(st.tuples(lengths, lengths), bounds, bounds, lengths, lengths)
@example((LONGEST - 1, LONGEST), LONGEST, LONGEST, LONGEST, LONGEST)
def test_blocks_of_rows_see_the_same_keys(name, rows, k_from, k_to, used_q, used_k):
    row_lo, row_hi = sorted(rows)
    row_hi = max(row_hi, row_lo + 1)
    arguments = (row_lo, row_hi, k_from, k_to, used_q, used_k)
    assert getattr(INTERVALS, name)(*arguments) == getattr(masks, name)(*arguments)


# Tiles reach past the last row.
@given(lengths | st.integers(LONGEST, LONGEST + 300), bounds, bounds, lengths, lengths)
@example(LONGEST - 1, LONGEST, LONGEST, LONGEST, LONGEST)
def test_rows_see_the_same_keys(row, k_from, k_to, used_q, used_k):
    arguments = (row, k_from, k_to, used_q, used_k)
    assert INTERVALS.row_interval(*arguments) == masks.row_interval(*arguments)
