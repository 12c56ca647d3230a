"""Gradients that did not come out finite: computed again, one row or one key alone.

The fast path multiplies what a row may not see by a gradient of 0, and ``0 * NaN`` is NaN. Here
hidden keys, or the rows that a key is hidden from, enter as zeros. Everything else has the order it
had, so what comes out has the bits that a clean call would give it, and a NaN that is attended
stays one.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from fusedattn.cpu.backward import add_to_d_q, bend_scores, fill_constants, products, write_rows
from fusedattn.cpu.backward_panel import (
    differentiate_tile,
    prepare,
    prepare_panel,
    stage_rows,
    write_d_q,
)
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.memory import (
    add_atomic,
    clear,
    get_atomic,
    get_i32,
    get_i64,
    get_u8,
    larger,
    set_u8,
    smaller,
)
from fusedattn.cpu.panel import NONE_SEEN, stage
from fusedattn.cpu.params import COUNTER, STOP
from fusedattn.cpu.record import backward_at
from fusedattn.cpu.rescue import is_kept, is_visible, row_addresses


@kernel("iiiiii>ii")
def load_keys(params, w, batch, kv_head, first, n):
    """Copy keys and values where they cannot be read as they lie; returns where they are."""
    p = backward_at(params)
    keys = p.k + get_i64(p.k_offsets, batch)
    keys += kv_head * p.k_head + first * p.k_row
    values = p.v + get_i64(p.v_offsets, batch)
    values += kv_head * p.v_head + first * p.v_row
    if p.stage_k:
        to, stride = w + p.at_keys, p.keys_stride
        stage(p.run_stage, to, stride, keys, p.k_row, p.k_dim, n, p.head_dim, 0)
        keys = to
    if p.stage_v:
        to, stride = w + p.at_values, p.values_stride
        stage(p.run_stage, to, stride, values, p.v_row, p.v_dim, n, p.head_dim_v, 0)
        values = to
    return keys, values


@kernel("iii>b")
def rescue_row(params, w, place):
    """One row of d_q, whose hidden keys enter as zeros. False if told to stop."""
    p = backward_at(params)
    row, head = place % p.seqlen_q, place // p.seqlen_q % p.num_heads
    batch, kv_head = place // p.seqlen_q // p.num_heads, head // p.group_size
    t, tile_k = w + p.at_alone, p.tile_k
    prepare_panel(params, w, t, batch, head, row, 1)
    low, high = get_i64(t + p.at_bounds, 0), get_i64(t + p.at_bounds, 1)
    mask_row, bias_row = row_addresses(params, batch, head, row)
    k_stride = p.keys_stride if p.stage_k else p.k_row
    v_stride = p.values_stride if p.stage_v else p.v_row
    tile = low // tile_k * tile_k
    while tile < high:
        if get_atomic(params + COUNTER) >= STOP:
            return False
        first, last = larger(tile, low), smaller(tile + tile_k, high)
        n = last - first
        keys, values = load_keys(params, w, batch, kv_head, first, n)
        found = differentiate_tile(params, w, t, batch, first, n, keys, k_stride, values, v_stride)
        if found & 3 != NONE_SEEN:
            for j in range(n):
                seen = is_visible(params, batch, head, row, mask_row, bias_row, first + j)
                if p.run_score_mod and get_u8(w + p.at_shown_tile, j * p.lanes) == 0:
                    seen = False
                set_u8(w + p.at_seen, j, 1 if seen else 0)
            bend_scores(params, w, t, batch, first, n, -1)
            add_to_d_q(params, w, t, first, n, keys, k_stride, 0)
        tile += tile_k
    write_d_q(params, w, t)
    return True


@kernel("iii>b")
def rescue_key(params, w, place):
    """One row of d_k and d_v; rows that do not see it give zeros. False if told to stop."""
    p = backward_at(params)
    key, heads = place % p.seqlen_k, place // p.seqlen_k
    batch, kv_head = heads // p.num_heads_kv, heads % p.num_heads_kv
    keys, values = load_keys(params, w, batch, kv_head, key, 1)
    clear(w + p.at_sum_d_k, p.sum_d_k_stride)
    clear(w + p.at_sum_d_v, p.sum_d_v_stride)
    s, d_scores = w + p.at_scores_tile, w + p.at_d_scores_tile
    for panel in range(p.panels):
        if get_atomic(params + COUNTER) >= STOP:
            return False
        t = w + p.at_alone
        if p.panels_at:
            t = p.panels_at + (heads * p.panels + panel) * p.panel_bytes
        else:
            prepare(params, w, batch, kv_head, panel, t)
        if key < get_i64(t + p.at_bounds, 0) or key >= get_i64(t + p.at_bounds, 1):
            continue
        found = differentiate_tile(params, w, t, batch, key, 1, keys, 0, values, 0)
        if found & 3 == NONE_SEEN:
            continue
        count = get_i64(t + p.at_counts, 0)
        for lane in range(count):
            row, head = get_i32(t + p.at_row, lane), get_i32(t + p.at_head, lane)
            seen = get_i32(t + p.at_low, lane) <= key < get_i32(t + p.at_high, lane)
            if seen:
                mask_row, bias_row = row_addresses(params, batch, head, row)
                seen = is_visible(params, batch, head, row, mask_row, bias_row, key)
                if p.run_score_mod and get_u8(w + p.at_shown_tile, lane) == 0:
                    seen = False
            set_u8(w + p.at_keep_k, lane, 1 if seen else 0)
            kept = seen and is_kept(params, batch, head, row, key)
            set_u8(w + p.at_keep_v, lane, 1 if kept else 0)
        stage_rows(params, w, t, w + p.at_keep_k, w + p.at_keep_v)
        rows, stride, to = w + p.at_staged_d_out, p.staged_d_out_stride, w + p.at_sum_d_v
        products(p.run_products, s, 1, rows, stride, count, to, 0, p.value_vectors)
        bend_scores(params, w, t, batch, key, 1, -1)
        rows, stride, to = w + p.at_staged_q, p.staged_q_stride, w + p.at_sum_d_k
        products(p.run_products, d_scores, 1, rows, stride, count, to, 0, p.query_vectors)
    d_k = p.d_k + get_i64(p.d_k_offsets, batch)
    d_k += kv_head * p.d_k_head + key * p.d_k_row
    d_v = p.d_v + get_i64(p.d_v_offsets, batch)
    d_v += kv_head * p.d_v_head + key * p.d_v_row
    run, bad = p.run_write_rows, w + p.at_bad
    write_rows(run, d_k, 0, p.d_k_dim, w + p.at_sum_d_k, 0, 1, p.head_dim, p.scale, bad)
    write_rows(run, d_v, 0, p.d_v_dim, w + p.at_sum_d_v, 0, 1, p.head_dim_v, 1.0, bad)
    return True


def rescue_worker(params, scratch):
    """Take entries of the list until none are left: ``2 * place``, plus 1 for a key."""
    p = backward_at(params)
    fill_constants(params, scratch)
    counter, items = params + COUNTER, p.items
    item = add_atomic(counter, 1)
    while item < items:
        entry = get_i64(p.bad_list, item)
        if entry % 2:
            done = rescue_key(params, scratch, entry // 2)
        else:
            done = rescue_row(params, scratch, entry // 2)
        if not done:
            break
        item = add_atomic(counter, 1)
    return 0
