"""Partial states: what an item has found out from some of its keys.

The keys of few rows are walked in chunks of a fixed size. Each chunk starts from nothing, and the
states of all are folded together in the order of the keys. So the chunks of one long row may be
shared out among threads, and no bit depends on whether they were. A state is, as in the working
memory, the maxima and sums of the lanes and the rows of output (see `fusedattn.merge` for the law).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.memory import copy_bytes, get_real, set_real
from fusedattn.cpu.record import params_at
from fusedattn.cpu.tile import ROWS_TOGETHER


@kernel("iiiii>")
def move(params, w, count, state, saving):
    """Copy a state from the working memory, or back."""
    p = params_at(params)
    lane_bytes = p.lanes * p.real_bytes
    rows = (count + ROWS_TOGETHER - 1) // ROWS_TOGETHER * ROWS_TOGETHER
    at = state
    for part in range(3):
        here, size = w + p.at_row_max, lane_bytes
        if part == 1:
            here = w + p.at_row_sum
        if part == 2:
            here, size = w + p.at_row_output, rows * p.row_output_stride
        if saving:
            copy_bytes(at, here, size)
        else:
            copy_bytes(here, at, size)
        at += size


@kernel("iiii>")
def save(params, w, count, state):
    """Copy the state of an item with ``count`` rows from the working memory."""
    move(params, w, count, state, 1)


@kernel("iiii>")
def restore(params, w, count, state):
    """Copy it back."""
    move(params, w, count, state, 0)


@kernel("iiii>")
def fold(params, w, count, state):
    """Combine the state in the working memory with another one; which is which does not matter.

    Maxima are whole numbers in log2 units (up to 2**22, see the softmax pass), so that rescaling
    rounds nothing, and a sum of two products does not depend on their order.
    """
    p = params_at(params)
    size, stride = p.real_bytes, p.row_output_stride
    maxima, sums = state, state + p.lanes * size
    other_rows = sums + p.lanes * size
    for row in range(count):
        mine, other = get_real(w + p.at_row_max, row, size), get_real(maxima, row, size)
        common = mine if mine > other else other
        keep, add = 2.0 ** (mine - common), 2.0 ** (other - common)
        total = keep * get_real(w + p.at_row_sum, row, size) + add * get_real(sums, row, size)
        set_real(w + p.at_row_sum, row, size, total)
        set_real(w + p.at_row_max, row, size, common)
        output, others = w + p.at_row_output + row * stride, other_rows + row * stride
        for i in range(stride // size):
            value = keep * get_real(output, i, size) + add * get_real(others, i, size)
            set_real(output, i, size, value)
