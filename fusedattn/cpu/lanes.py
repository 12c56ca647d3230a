"""Which row each lane of an item is, and which keys its panels meet.

``p`` is the parameter record and ``w`` the address of the thread's working memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from types import FunctionType

from fusedattn import masks
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.memory import (
    get_f64,
    get_i64,
    get_u8,
    larger,
    set_i32,
    set_i64,
    set_real,
    smaller,
)
from fusedattn.cpu.record import params_at

# The built-ins would cost a compilation for each pair of types.
_names = vars(masks) | {"min": smaller, "max": larger}
row_interval = kernel("iiiii>ii")(FunctionType(masks.row_interval.__code__, _names))


@kernel("iiiiiii>")
def fill_lanes(params, w, batch, head, row, count, panels):
    """Write the lane tables for ``count`` rows from (head, row) on.

    Lanes past the last row repeat it: they compute what it computes and write the same.
    """
    p = params_at(params)
    q = p.q + get_i64(p.q_offsets, batch)
    out = p.out + get_i64(p.out_offsets, batch)
    q_head, q_row = p.q_head, p.q_row
    out_head, out_row = p.out_head, p.out_row
    mask, bias, slopes = p.mask, p.bias, p.slopes
    if mask:
        mask += get_i64(p.mask_offsets, batch)
    if bias:
        bias += get_i64(p.bias_offsets, batch)
    mask_head, mask_row = p.mask_head, p.mask_row
    bias_head, bias_row = p.bias_head, p.bias_row
    num_heads, seqlen_q = p.num_heads, p.seqlen_q
    k_from, k_to = get_i64(p.k_from, batch), get_i64(p.k_to, batch)
    used_q = get_i64(p.seqused_q, batch)
    used_k = get_i64(p.seqused_k, batch)
    position = get_i64(p.q_offset, batch)
    bounds = w + p.at_bounds
    q_rows, out_rows = w + p.at_q_rows, w + p.at_out_rows
    mask_rows, bias_rows = w + p.at_mask_rows, w + p.at_bias_rows
    lows, highs = w + p.at_low, w + p.at_high
    positions, slope = w + p.at_position, w + p.at_slope
    rows, heads = w + p.at_row, w + p.at_head
    kinds, kinds_head, kinds_row = p.kinds, p.kinds_head, p.kinds_row
    if kinds:
        kinds += batch * p.kinds_batch
    lanes, lane = p.lanes, 0
    for panel in range(panels):
        first_low, last_high, last_low, first_high = used_k, 0, 0, used_k
        listed, before = panel * lanes, 0
        for _ in range(lanes):
            low, high = row_interval(row, k_from, k_to, used_q, used_k)
            if low < high:
                first_low, last_high = smaller(first_low, low), larger(last_high, high)
            else:
                low = high = 0
            last_low, first_high = larger(last_low, low), smaller(first_high, high)
            set_i64(q_rows, lane, q + head * q_head + row * q_row)
            set_i64(out_rows, lane, out + head * out_head + row * out_row)
            set_i32(lows, lane, low)
            set_i32(highs, lane, high)
            set_i32(rows, lane, row)
            set_i32(heads, lane, head)
            if mask:
                set_i64(mask_rows, lane, mask + head * mask_head + row * mask_row)
            if bias:
                set_i64(bias_rows, lane, bias + head * bias_head + row * bias_row)
            if kinds:  # each row of blocks once: lanes side by side mostly share theirs
                blocks = kinds + head * kinds_head + row // p.kinds_rows * kinds_row
                if blocks != before:
                    set_i64(w + p.at_kinds, listed, blocks)
                    listed, before = listed + 1, blocks
            if slopes:
                set_i32(positions, lane, row + position)
                set_real(slope, lane, p.real_bytes, get_f64(slopes, batch * num_heads + head))
            lane += 1
            if lane < count:
                row += 1
                if row == seqlen_q:
                    row, head = 0, head + 1
        if kinds and listed < lane:
            set_i64(w + p.at_kinds, listed, 0)  # the end of the list
        set_i64(bounds, 4 * panel, first_low)
        set_i64(bounds, 4 * panel + 1, last_high)
        set_i64(bounds, 4 * panel + 2, last_low)
        set_i64(bounds, 4 * panel + 3, first_high)


@kernel("iiiii>iii")
def kept_keys(params, w, panel, first, last):
    """Cut the keys of a tile to those from the first to the last block that some lane keeps.

    Returns them and what they hold: nothing, all seen, or partly hidden.
    """
    p = params_at(params)
    size, table = p.kinds_keys, w + p.at_kinds + panel * p.lanes * 8
    begin, end = first // size, (last - 1) // size + 1
    low, high = end, begin
    for i in range(p.lanes):
        row = get_i64(table, i)
        if row == 0:
            break
        for block in range(begin, end):
            if get_u8(row, block) != masks.SKIP:
                low, high = smaller(low, block), larger(high, block + 1)
    if low >= high:
        return first, first, masks.SKIP
    kind = masks.FULL
    for i in range(p.lanes):
        row = get_i64(table, i)
        if row == 0:
            break
        for block in range(low, high):
            if get_u8(row, block) != masks.FULL:
                kind = masks.EDGE
    return larger(first, low * size), smaller(last, high * size), kind
