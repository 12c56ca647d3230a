"""Panels of the backward pass: what is known of their rows, and the tiles of their gradients.

The *panel block* of a panel holds its lane tables, its packed queries and d_out, its sum of d_q,
and for each row ``delta = rowsum(d_out * out) - d_lse`` and what makes weights of its scores. A
weight is ``2**(score - shift) * factor``, both from the stored lse where that tells enough.

Throughout, ``p`` is the parameter record, ``w`` the address of the thread's working memory and
``t`` that of a panel block.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

import numpy as np

from fusedattn import masks
from fusedattn.cpu.backward_params import EACH_ENTRY
from fusedattn.cpu.forward import pack
from fusedattn.cpu.interface import SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.lanes import fill_lanes, kept_keys
from fusedattn.cpu.memory import (
    clear,
    get_atomic,
    get_f64,
    get_i32,
    get_i64,
    get_real,
    larger,
    round_real,
    set_f64,
    set_i64,
    set_real,
    set_u8,
    smaller,
)
from fusedattn.cpu.panel import (
    ALL_SEEN,
    EACH_KEY_SEEN,
    NONE_SEEN,
    SOME_SEEN,
    both,
    hide_masked,
    hide_outside,
    mask_mod,
    mask_tile,
    natural_units,
    scores,
    stage,
    summary,
    weights,
)
from fusedattn.cpu.params import COUNTER, STOP
from fusedattn.cpu.record import backward_at
from fusedattn.cpu.simd import native

differentiate = native(SIGNATURES["differentiate"])
keep_tile = native(SIGNATURES["keep_tile"])
pack_d_out = native(SIGNATURES["pack_d_out"])
stage_d_out = native(SIGNATURES["stage_d_out"])
dot_out = native(SIGNATURES["dot_out"])
unpack_d_q = native(SIGNATURES["unpack_d_q"])


@kernel("iiii>")
def row_tables(params, t, batch, lane):
    """Lane tables of the backward pass alone: addresses of the rows of d_out, d_q and d_bias."""
    p = backward_at(params)
    row, head = get_i32(t + p.at_row, lane), get_i32(t + p.at_head, lane)
    d_out = p.d_out + get_i64(p.d_out_offsets, batch)
    set_i64(t + p.at_d_out_rows, lane, d_out + head * p.d_out_head + row * p.d_out_row)
    d_q = p.d_q + get_i64(p.d_q_offsets, batch)
    set_i64(t + p.at_d_q_rows, lane, d_q + head * p.d_q_head + row * p.d_q_row)
    if p.bias_kind == EACH_ENTRY:
        d_bias = p.d_bias + get_i64(p.d_bias_offsets, batch)
        set_i64(t + p.at_d_bias_rows, lane, d_bias + head * p.d_bias_head + row * p.d_bias_row)


@kernel("iiiiiiii>i")
def scores_of_tile(params, w, t, batch, first_key, n, keys, stride):
    """Scores of ``n`` keys from ``first_key`` on, hidden where a row does not see them.

    Returns which entries the dense mask shows, as `mask_tile` does.
    """
    p = backward_at(params)
    s, found = w + p.at_scores_tile, ALL_SEEN + EACH_KEY_SEEN
    if p.mask:
        tile_at, table = w + p.at_mask_tile, t + p.at_mask_rows
        offset, step = first_key * p.mask_key, p.mask_key
        found = mask_tile(p.run_mask_tile, tile_at, table, offset, step, n, w + p.at_seen)
    if p.kinds:
        low, high, blocks = kept_keys(params, t, 0, first_key, first_key + n)
        if blocks == masks.SKIP:
            return NONE_SEEN
        if blocks == masks.EDGE or high - low < n:
            shown = w + p.at_shown_tile if p.mask else w + p.at_mask_tile
            rows, heads = t + p.at_row, t + p.at_head
            mask_mod(p.run_mask_mod, shown, n, first_key, rows, heads, batch, p.mask_words)
            if p.mask:
                both(p.run_both, w + p.at_mask_tile, n, shown)
            found = summary(p.run_summary, w + p.at_mask_tile, n, w + p.at_seen)
    if found & 3 == NONE_SEEN:
        return found
    scores(p.run_scores, keys, stride, n, t + p.at_queries, s, p.head_dim)
    if p.natural_units:
        natural_units(params, w, t, batch, 0, first_key, n, 0, 1)
    last_low, first_high = get_i64(t + p.at_bounds, 2), get_i64(t + p.at_bounds, 3)
    if last_low > first_key or first_high < first_key + n:
        lows, highs = t + p.at_low, t + p.at_high
        hide_outside(p.run_hide_outside, s, n, first_key, lows, highs)
    if found & 3 == SOME_SEEN:
        hide_masked(p.run_hide_masked, s, n, w + p.at_mask_tile)
    if p.marks:
        hide_masked(p.run_hide_masked, s, n, w + p.at_shown_tile)
    return found


@kernel("iiiiii>")
def weigh_anew(params, w, t, batch, kv_head, count):
    """Recompute maximum and sum of the rows whose lse is too coarse to give their weights.

    The stored lse may be that of more keys than these. It is then not what comes out here, and
    stands.
    """
    p = backward_at(params)
    size, tile_k, lanes = p.real_bytes, p.tile_k, p.lanes
    for lane in range(lanes):
        set_real(w + p.at_row_max, lane, size, p.unseen)
    clear(w + p.at_row_sum, lanes * size)
    low, high = get_i64(t + p.at_bounds, 0), get_i64(t + p.at_bounds, 1)
    k = p.k + get_i64(p.k_offsets, batch)
    k += kv_head * p.k_head
    tile = low // tile_k * tile_k
    while tile < high:
        if get_atomic(params + COUNTER) >= STOP:
            return
        first, last = larger(tile, low), smaller(tile + tile_k, high)
        keys, stride, n = k + first * p.k_row, p.k_row, last - first
        if p.stage_k:
            copied = w + p.at_seen_keys
            stage(p.run_stage, copied, p.keys_stride, keys, stride, p.k_dim, n, p.head_dim, 0)
            keys, stride = copied, p.keys_stride
        if scores_of_tile(params, w, t, batch, first, n, keys, stride) & 3 != NONE_SEEN:
            maxima, sums = w + p.at_row_max, w + p.at_row_sum
            s, alpha = w + p.at_scores_tile, w + p.at_alpha
            weights(p.run_weights, s, n, p.to_log2, maxima, alpha, sums)
        tile += tile_k
    used_q = get_i64(p.seqused_q, batch)
    for lane in range(lanes):
        row, head = get_i32(t + p.at_row, lane), get_i32(t + p.at_head, lane)
        place = (batch * p.num_heads + head) * p.seqlen_q + row
        stored = get_real(p.lse, place, size)
        if not abs(stored) > p.coarse_lse:
            continue
        shift = get_real(w + p.at_row_max, lane, size)
        total = get_real(w + p.at_row_sum, lane, size)
        of_sink, sink = 0.0, -math.inf
        if p.sinks and row < used_q:
            sink = get_f64(p.sinks, head)
        lse = (shift + math.log2(total)) / p.lse_to_log2
        if sink != -math.inf:
            sink_log2 = sink * p.lse_to_log2
            of_sink = 1.0 / (1.0 + total * 2.0 ** (shift - sink_log2))
            total += 2.0 ** (sink_log2 - shift)
            lse = sink - math.log(of_sink)
            if of_sink < 0.5:
                lse = (shift + math.log2(total)) / p.lse_to_log2
        if abs(lse - stored) <= p.lse_slack * abs(stored):
            set_real(t + p.at_shift, lane, size, shift)
            set_real(t + p.at_factor, lane, size, 1.0 / total)
            if p.sinks and lane < count:
                share = -of_sink * get_real(t + p.at_delta, lane, size)
                set_f64(p.sink_shares, place, share)


@kernel("iii>")
def write_d_q(params, w, t):
    """Write the finished rows of a panel, and mark those that are not finite."""
    p = backward_at(params)
    check = w + p.at_check
    rows, step = t + p.at_d_q_rows, p.d_q_dim
    unpack_d_q(p.run_unpack_d_q, t + p.at_sum_d_q, w + p.at_scales, rows, step, p.head_dim, check)


@kernel("iiiiiii>")
def prepare_panel(params, w, t, batch, head, row, count):
    """Fill the panel block of ``count`` rows from (head, row) on."""
    p = backward_at(params)
    fill_lanes(params, t, batch, head, row, count, 1)
    size, lanes = p.real_bytes, p.lanes
    clear(t + p.at_sum_d_q, p.head_dim * lanes * size)
    clear(t + p.at_bias_sums, lanes * size)
    num_heads, seqlen_q = p.num_heads, p.seqlen_q
    used_q = get_i64(p.seqused_q, batch)
    rows, heads = t + p.at_row, t + p.at_head
    lows, highs = t + p.at_low, t + p.at_high
    whole, coarse = p.rows_in_place, 0
    if get_i32(heads, 0) != get_i32(heads, count - 1):
        whole = 0
    for lane in range(lanes):
        row, head = get_i32(rows, lane), get_i32(heads, lane)
        place = (batch * num_heads + head) * seqlen_q + row
        row_tables(params, t, batch, lane)
        lse = get_real(p.lse, place, size)
        counts = get_i32(lows, lane) < get_i32(highs, lane) and lse != -math.inf
        set_u8(t + p.at_keep_rows, lane, 1 if counts else 0)
        delta, shift, factor = 0.0, 0.0, 0.0
        if counts:
            left, right = get_i64(t + p.at_d_out_rows, lane), get_i64(t + p.at_out_rows, lane)
            delta = dot_out(p.run_dot_out, left, p.d_out_dim, right, p.out_dim, p.head_dim_v)
        elif lane < count:
            whole = 0
        if p.d_lse and lse != -math.inf:
            delta -= get_real(p.d_lse, place, size)
        set_real(t + p.at_delta, lane, size, delta)
        if lse != -math.inf:
            lse_log2 = lse * p.lse_to_log2
            shift, factor = round_real(lse_log2, size), 1.0
            if not abs(lse_log2) >= p.exact_shift:
                shift = np.floor(lse_log2)
                factor = 2.0 ** (shift - lse_log2)
            if abs(lse) > p.coarse_lse:
                coarse = 1
        set_real(t + p.at_shift, lane, size, shift)
        set_real(t + p.at_factor, lane, size, factor)
        if p.sinks and lane < count:
            share, sink = 0.0, get_f64(p.sinks, head)
            if row < used_q and sink != -math.inf:
                share = -(2.0 ** (sink * p.lse_to_log2 - shift) * factor) * delta
            set_f64(p.sink_shares, place, share)
    set_i64(t + p.at_counts, 0, count)
    set_i64(t + p.at_counts, 1, whole)
    head_dim, head_dim_v = p.head_dim, p.head_dim_v
    queries, d_out = t + p.at_queries, t + p.at_packed_d_out
    pack(p.run_pack, queries, t + p.at_q_rows, p.q_dim, head_dim, p.query_sign)
    pack_d_out(p.run_pack_d_out, d_out, t + p.at_d_out_rows, p.d_out_dim, head_dim_v, 1.0)
    if coarse:
        weigh_anew(params, w, t, batch, get_i32(heads, 0) // p.group_size, count)


@kernel("iiiiii>")
def prepare(params, w, batch, kv_head, panel, t):
    """Fill one panel block of the call.

    The panels of a KV head go through all of its query heads, or groups of them, before they go on
    to further rows.
    """
    p = backward_at(params)
    lanes, seqlen_q, heads = p.lanes, p.seqlen_q, p.heads_per_item
    groups = p.group_size // heads
    row = panel // groups * lanes
    count = smaller(lanes, heads * seqlen_q - row)
    head = kv_head * p.group_size + panel % groups * heads + row // seqlen_q
    prepare_panel(params, w, t, batch, head, row % seqlen_q, count)
    if get_i64(t + p.at_bounds, 0) >= get_i64(t + p.at_bounds, 1):
        write_d_q(params, w, t)  # zeros: no block of keys will


@kernel("iiiiiiiiii>i")
def differentiate_tile(params, w, t, batch, first_key, n, keys, k_stride, values, v_stride):
    """Put weights into the tile of scores, and gradients of scores into theirs.

    Returns what `scores_of_tile` does.
    """
    p = backward_at(params)
    found = scores_of_tile(params, w, t, batch, first_key, n, keys, k_stride)
    if found & 3 == NONE_SEEN:
        return found
    s, d_scores, keep = w + p.at_scores_tile, w + p.at_d_scores_tile, w + p.at_keep_tile
    scores(p.run_scores, values, v_stride, n, t + p.at_packed_d_out, d_scores, p.head_dim_v)
    run = p.run_differentiate
    if p.dropout:
        run = p.run_differentiate_dropped
        rows, heads, run_keep = t + p.at_row, t + p.at_head, p.run_keep_tile
        threshold, seed, scale = p.threshold, p.seed, p.keep_scale
        keep_tile(run_keep, keep, n, first_key, threshold, seed, rows, heads, batch, scale)
    shift, factor, delta = t + p.at_shift, t + p.at_factor, t + p.at_delta
    differentiate(run, s, d_scores, n, p.to_log2, shift, factor, delta, keep)
    return found


@kernel("iiiii>")
def stage_rows(params, w, t, keep_q, keep_d_out):
    """Copy the panel's rows of q and d_out as reals; those whose byte is 0 become 0."""
    p = backward_at(params)
    count, heads = get_i64(t + p.at_counts, 0), t + p.at_head
    q_stride, d_out_stride = p.staged_q_stride, p.staged_d_out_stride
    first = 0
    while first < count:  # rows of one head at a time
        last = first + 1
        while last < count and get_i32(heads, last) == get_i32(heads, first):
            last += 1
        n, to = last - first, w + p.at_staged_q + first * q_stride
        rows, keep = get_i64(t + p.at_q_rows, first), keep_q + first
        stage(p.run_stage, to, q_stride, rows, p.q_row, p.q_dim, n, p.head_dim, keep)
        to = w + p.at_staged_d_out + first * d_out_stride
        rows, keep = get_i64(t + p.at_d_out_rows, first), keep_d_out + first
        run, stride, step = p.run_stage_d_out, p.d_out_row, p.d_out_dim
        stage_d_out(run, to, d_out_stride, rows, stride, step, n, p.head_dim_v, keep)
        first = last
