"""From the running state of an item to rows of out and lse."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

from fusedattn.cpu.interface import LOG2_E, SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.memory import (
    get_f64,
    get_i32,
    get_i64,
    get_real,
    read_storage,
    set_i64,
    set_real,
    smaller,
)
from fusedattn.cpu.record import params_at
from fusedattn.cpu.simd import native

LN_2 = math.log(2.0)

unpack = native(SIGNATURES["unpack"])
gather = native(SIGNATURES["gather"])


@kernel("iii>")
def gather_rows(params, w, count):
    """Few rows: turn the rows of output into the panel that `finish` expects."""
    p = params_at(params)
    full = p.head_dim_v // p.width * p.width
    left = p.head_dim_v - full
    for lane in range(p.lanes):
        row = w + p.at_row_output + smaller(lane, count - 1) * p.row_output_stride
        if left and lane < count:
            for i in range(left):
                value = get_real(row, full + p.width - left + i, p.real_bytes)
                set_real(row, full + i, p.real_bytes, value)
        set_i64(w + p.at_q_rows, lane, row)
    table, size = w + p.at_q_rows, p.real_bytes
    gather(p.run_gather, w + p.at_output, table, size, p.head_dim_v, 1.0)


@kernel("iiii>")
def give_only_value(params, w, batch, lane):
    """Let a row that sees one key have its value: no product and quotient rounds it."""
    p = params_at(params)
    v = p.v + get_i64(p.v_offsets, batch)
    v += get_i32(w + p.at_head, lane) // p.group_size * p.v_head
    v += get_i32(w + p.at_low, lane) * p.v_row
    first = lane // p.lanes * p.head_dim_v * p.lanes + lane % p.lanes
    for d in range(p.head_dim_v):
        value = read_storage(v + d * p.v_dim, p.storage)
        set_real(w + p.at_output, first + d * p.lanes, p.real_bytes, value)


@kernel("iiiii>i")
def finish(params, w, batch, count, panels):
    """Divide by the row sums and write the rows; return how many need another look.

    They go to the list of bad rows: ``2 * (head * seqlen_q + row)``, plus 1 where nothing short of
    the exact path can help. Ordinary rows pay one comparison.
    """
    p = params_at(params)
    if p.few_rows:
        gather_rows(params, w, count)
    maxima, sums = w + p.at_row_max, w + p.at_row_sum
    factors, checks = w + p.at_factor, w + p.at_check
    rows, heads = w + p.at_row, w + p.at_head
    lows, highs = w + p.at_low, w + p.at_high
    lse, sinks = p.lse, p.sinks
    num_heads, seqlen_q = p.num_heads, p.seqlen_q
    used_q = get_i64(p.seqused_q, batch)
    keep_scale = p.keep_scale
    size, row_bytes = p.real_bytes, p.lanes * p.real_bytes
    factor, sees_one = 0.0, False
    for lane in range(panels * p.lanes):
        if lane >= count:  # repeats the last row
            set_real(factors, lane, size, factor)
            if sees_one:
                give_only_value(params, w, batch, lane)
            continue
        total, shift, factor = get_real(sums, lane, size), get_real(maxima, lane, size), 0.0
        if total != 0.0:
            factor = keep_scale / total
        sink = -math.inf
        if sinks and get_i32(rows, lane) < used_q:
            sink = get_f64(sinks, get_i32(heads, lane))
        if not sink < math.inf:
            total = factor = math.nan
        elif sink != -math.inf and total != 0.0:
            sink_log2 = sink * LOG2_E
            common = shift if shift > sink_log2 else sink_log2
            rescale = 2.0 ** (shift - common)
            total = total * rescale + 2.0 ** (sink_log2 - common)
            factor, shift = keep_scale * rescale / total, common
        factor *= p.unlift
        seen = get_i32(highs, lane) - get_i32(lows, lane)
        sees_one = seen == 1 and sink == -math.inf and not p.dropout and 0.0 < total < math.inf
        if sees_one:
            factor = 1.0
            give_only_value(params, w, batch, lane)
        set_real(factors, lane, size, factor)
        if lse:
            at = (batch * num_heads + get_i32(heads, lane)) * seqlen_q
            value = sink if total == 0.0 else (shift + math.log2(total)) * LN_2
            set_real(lse, at + get_i32(rows, lane), size, value)
    head_dim_v, out_dim = p.head_dim_v, p.out_dim
    for panel in range(panels):
        output = w + p.at_output + panel * head_dim_v * row_bytes
        table = w + p.at_out_rows + panel * p.lanes * 8
        at = panel * row_bytes
        unpack(p.run_unpack, output, factors + at, table, out_dim, head_dim_v, checks + at)
    bad, exact = 0, p.exact
    for lane in range(count):
        total = get_real(sums, lane, size)
        has_keys = get_i32(lows, lane) < get_i32(highs, lane)
        # Hidden values do not enter the sum: where it is unusable, starting over cannot help.
        hopeless = exact or total != total or (total == 0.0 and has_keys)
        if hopeless or get_real(checks, lane, size) != 0.0:
            place = get_i32(heads, lane) * seqlen_q + get_i32(rows, lane)
            set_i64(w + p.at_bad, bad, 2 * place + (1 if hopeless else 0))
            bad += 1
    return bad
