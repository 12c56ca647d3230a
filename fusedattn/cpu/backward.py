"""The backward pass: the macro loops around the micro-kernels.

Weights are recomputed, never stored. One item is (block of keys, batch item, KV head): it walks
the panels of all query heads that read this KV head. The first item of a KV head fills the *panel
block* of each panel before it goes on: lane tables, packed queries and d_out, a sum of d_q that
begins at 0, and ``delta = rowsum(d_out * out) - d_lse``. Then, for each tile,

    P = weights of the scores        dP = V d_out^T        dS = P * (dP - delta)
    dV += P d_out                    dK += dS Q            dQ^T += K^T dS

The sums of dK and dV stay in the item's own memory until it ends. Those of dQ belong to all items
of a KV head: an item adds to a panel only after the item of the keys before has, so every sum has
one order, whatever the number of threads. Items are handed out in the order of their keys, one head
after the other, so what an item waits for has begun before it, and mostly ended.

A row of dQ, dK or dV that ends non-finite is marked; `fusedattn.cpu.backward_rescue` looks at it.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2, whose dQ is summed by atomics instead.

Throughout, ``p`` is the parameter record, ``w`` the address of the thread's working memory and
``t`` that of a panel block.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from fusedattn.cpu.backward_panel import differentiate_tile, prepare, stage_rows, write_d_q
from fusedattn.cpu.backward_params import (
    EACH_ENTRY,
    NO_BIAS,
    SUM_OVER_KEYS,
    SUM_OVER_ROWS,
)
from fusedattn.cpu.interface import SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.lanes import kept_keys
from fusedattn.cpu.memory import (
    add_atomic,
    clear,
    get_acquire,
    get_atomic,
    get_i32,
    get_i64,
    get_real,
    get_u8,
    larger,
    set_real,
    set_release,
    set_u8,
    smaller,
)
from fusedattn.cpu.panel import EACH_KEY_SEEN, NONE_SEEN, accumulate, copy, stage
from fusedattn.cpu.params import COUNTER, STOP, USER_FUNCTIONS
from fusedattn.cpu.record import backward_at
from fusedattn.cpu.simd import native

products = native(SIGNATURES["products"])
write_rows = native(SIGNATURES["write_rows"])
bend = native(SIGNATURES["bend"])
sum_keys = native(SIGNATURES["sum_keys"])
sum_lanes = native(SIGNATURES["sum_lanes"])
add_rows = native(SIGNATURES["add_rows"])
let_others_run = native(">")
score_slope, score_aux = (native(USER_FUNCTIONS[name]) for name in ("score_slope", "score_aux"))

# Looks at a counter before the thread lets others run.
PATIENCE = 256


@kernel("iii>b")
def wait_until(params, address, least):
    """Return when the counter at an address has come so far; False if told to stop."""
    p = backward_at(params)
    looks = 0
    while get_acquire(address) < least:
        if get_atomic(params + COUNTER) >= STOP:
            return False
        looks += 1
        if looks > PATIENCE and p.run_yield:
            let_others_run(p.run_yield)
    return True


@kernel("iii>b")
def wait_for_turn(params, index, panel):
    """Wait until the items whose share comes first have passed the panel; False if told to stop.

    They are the item of the same KV head and the keys before, and, where several heads or batch
    items share a bias, the item just before this one. That one must have passed these rows in all
    of its heads.
    """
    p = backward_at(params)
    heads = p.heads_in_all
    if index >= heads and not wait_until(params, p.progress + 8 * (index - heads), panel + 1):
        return False
    if p.bias_in_turn and index % heads:
        together, passed = p.group_size // p.heads_per_item, p.panels
        if p.heads_per_item == 1:
            passed = (panel // together + 1) * together
        return wait_until(params, p.progress + 8 * (index - 1), passed)
    return True


@kernel("iiiiii>")
def add_bias(params, w, t, batch, first_key, n):
    """Add a tile of gradients of scores to the gradient of the bias."""
    p = backward_at(params)
    d_scores, count = w + p.at_d_scores_tile, get_i64(t + p.at_counts, 0)
    if p.bias_kind == EACH_ENTRY:
        table, offset = t + p.at_d_bias_rows, first_key * p.d_bias_key
        add_rows(p.run_add_rows, d_scores, n, table, offset, count)
    elif p.bias_kind == SUM_OVER_KEYS:
        sum_keys(p.run_sum_keys, d_scores, n, t + p.at_bias_sums)
    else:
        heads, first = t + p.at_head, 0
        while first < count:
            head, last = get_i32(heads, first), first + 1
            while last < count and get_i32(heads, last) == head:
                last += 1
            place = (batch * p.num_heads + head) * p.seqlen_k + first_key
            to = p.bias_sums + place * p.real_bytes
            sum_lanes(p.run_sum_lanes, d_scores, n, first, last, to)
            first = last


@kernel("iiiiiii>")
def bend_scores(params, w, t, batch, first_key, n, index):
    """Pull a tile of gradients back through softcap and score_mod, to the raw scores.

    What goes to the arrays of the score_mod is added to the item's slot; ``index`` -1: to none.
    """
    p = backward_at(params)
    d_scores = w + p.at_d_scores_tile
    if p.softcap > 0.0:
        bend(p.run_bend, d_scores, n, w + p.at_softcap_slope)
    if p.run_score_slope:
        rows, heads, words = t + p.at_row, t + p.at_head, p.score_words
        raw = w + p.at_raw_tile
        if p.aux_slots and index >= 0:
            sums = p.aux_sums + index % p.aux_slots * p.aux_slot_bytes
            count, offsets = get_i64(t + p.at_counts, 0), p.aux_offsets
            run = p.run_score_aux
            score_aux(
                run, d_scores, n, first_key, rows, heads, batch, words, raw, sums, offsets, count
            )
        run = p.run_score_slope
        score_slope(run, d_scores, n, first_key, rows, heads, batch, words, raw)


@kernel("iiiiiiiii>b")
def sum_tile(params, w, t, index, panel, batch, first_key, n, in_block):
    """Add a tile's share to the sums of the item, and to d_bias. False if told to stop.

    ``in_block`` is the first key's place in the block. Leaves the gradients of the raw scores.
    """
    p = backward_at(params)
    count = get_i64(t + p.at_counts, 0)
    q, q_stride = get_i64(t + p.at_q_rows, 0), p.q_row
    d_out, d_out_stride = get_i64(t + p.at_d_out_rows, 0), p.d_out_row
    if not get_i64(t + p.at_counts, 1):
        keep = t + p.at_keep_rows
        stage_rows(params, w, t, keep, keep)
        q, q_stride = w + p.at_staged_q, p.staged_q_stride
        d_out, d_out_stride = w + p.at_staged_d_out, p.staged_d_out_stride
    s, d_scores = w + p.at_scores_tile, w + p.at_d_scores_tile
    to, stride = w + p.at_sum_d_v + in_block * p.sum_d_v_stride, p.sum_d_v_stride
    products(p.run_products, s, n, d_out, d_out_stride, count, to, stride, p.value_vectors)
    if p.bias_kind != NO_BIAS:
        if p.bias_kind != SUM_OVER_ROWS and not wait_for_turn(params, index, panel):
            return False
        add_bias(params, w, t, batch, first_key, n)
    bend_scores(params, w, t, batch, first_key, n, index)
    to, stride = w + p.at_sum_d_k + in_block * p.sum_d_k_stride, p.sum_d_k_stride
    products(p.run_products, d_scores, n, q, q_stride, count, to, stride, p.query_vectors)
    return True


@kernel("iiiiiiii>")
def add_to_d_q(params, w, t, first_key, n, keys, k_stride, each_key_seen):
    """Add a tile's share to the panel's sum of d_q."""
    p = backward_at(params)
    head_dim, d_scores = p.head_dim, w + p.at_d_scores_tile
    if not each_key_seen:
        # What no row of the panel may see may hold anything: it is not even multiplied by 0.
        target, stride, keep = w + p.at_seen_keys, p.keys_stride, w + p.at_seen
        copy(p.run_copy, target, stride, keys, k_stride, p.real_bytes, n, head_dim, keep)
        keys, k_stride = target, stride
    total, ones = t + p.at_sum_d_q, w + p.at_ones
    accumulate(p.run_accumulate, keys, k_stride, n, d_scores, total, head_dim, ones)


@kernel("iiii>")
def finish_panel(params, w, t, batch):
    """Write what the last block of keys has completed."""
    p = backward_at(params)
    write_d_q(params, w, t)
    size = p.real_bytes
    for lane in range(get_i64(t + p.at_counts, 0)):
        row, head = get_i32(t + p.at_row, lane), get_i32(t + p.at_head, lane)
        place = (batch * p.num_heads + head) * p.seqlen_q + row
        if get_real(w + p.at_check, lane, size) != 0.0:
            set_u8(p.bad_rows, place, 1)
        if p.bias_kind == SUM_OVER_KEYS:
            set_real(p.bias_sums, place, size, get_real(t + p.at_bias_sums, lane, size))


@kernel("iiiiii>")
def begin_block(params, w, batch, kv_head, begin, end):
    """Copy keys and values where they cannot be read as they lie, and begin their sums at 0."""
    p = backward_at(params)
    n = end - begin
    if p.stage_k:
        keys = p.k + get_i64(p.k_offsets, batch)
        keys += kv_head * p.k_head + begin * p.k_row
        to, stride = w + p.at_keys, p.keys_stride
        stage(p.run_stage, to, stride, keys, p.k_row, p.k_dim, n, p.head_dim, 0)
    if p.stage_v:
        values = p.v + get_i64(p.v_offsets, batch)
        values += kv_head * p.v_head + begin * p.v_row
        to, stride = w + p.at_values, p.values_stride
        stage(p.run_stage, to, stride, values, p.v_row, p.v_dim, n, p.head_dim_v, 0)
    clear(w + p.at_sum_d_k, n * p.sum_d_k_stride)
    clear(w + p.at_sum_d_v, n * p.sum_d_v_stride)


@kernel("iiiiii>")
def finish_block(params, w, batch, kv_head, begin, end):
    """Write the gradients of a block of keys, and mark those that are not finite."""
    p = backward_at(params)
    n, bad = end - begin, w + p.at_bad
    d_k = p.d_k + get_i64(p.d_k_offsets, batch)
    d_k += kv_head * p.d_k_head + begin * p.d_k_row
    d_v = p.d_v + get_i64(p.d_v_offsets, batch)
    d_v += kv_head * p.d_v_head + begin * p.d_v_row
    place = (batch * p.num_heads_kv + kv_head) * p.seqlen_k + begin
    run, total, stride = p.run_write_rows, w + p.at_sum_d_k, p.sum_d_k_stride
    write_rows(run, d_k, p.d_k_row, p.d_k_dim, total, stride, n, p.head_dim, p.scale, bad)
    for j in range(n):
        if get_u8(bad, j):
            set_u8(p.bad_keys, place + j, 1)
    total, stride = w + p.at_sum_d_v, p.sum_d_v_stride
    write_rows(run, d_v, p.d_v_row, p.d_v_dim, total, stride, n, p.head_dim_v, 1.0, bad)
    for j in range(n):
        if get_u8(bad, j):
            set_u8(p.bad_keys, place + j, 1)


@kernel("iii>b")
def walk(params, w, index):
    """One block of keys against all panels of the heads that read it. False if told to stop."""
    p = backward_at(params)
    panels, kv_heads, block_k, tile_k = p.panels, p.num_heads_kv, p.block_k, p.tile_k
    heads = p.heads_in_all
    block, batch, kv_head = index // heads, index % heads // kv_heads, index % kv_heads
    begin, end = block * block_k, smaller((block + 1) * block_k, p.seqlen_k)
    keys, k_stride = w + p.at_keys, p.keys_stride
    values, v_stride = w + p.at_values, p.values_stride
    if not p.stage_k:
        keys, k_stride = p.k + get_i64(p.k_offsets, batch), p.k_row
        keys += kv_head * p.k_head + begin * k_stride
    if not p.stage_v:
        values, v_stride = p.v + get_i64(p.v_offsets, batch), p.v_row
        values += kv_head * p.v_head + begin * v_stride
    begun = False
    # Items that share a slot add to it one after the other.
    before = index - p.aux_slots
    if p.aux_slots and before >= 0 and not wait_until(params, p.progress + 8 * before, panels):
        return False
    for panel in range(panels):
        if get_atomic(params + COUNTER) >= STOP:
            return False
        t = w + p.at_alone
        if p.panels_at:
            t = p.panels_at + (index % heads * panels + panel) * p.panel_bytes
        if block == 0:
            prepare(params, w, batch, kv_head, panel, t)
        elif not wait_until(params, p.progress + 8 * (index % heads), panel + 1):
            return False
        last_key = get_i64(t + p.at_bounds, 1)
        first, last = larger(begin, get_i64(t + p.at_bounds, 0)), smaller(end, last_key)
        if first < last and not begun:
            begin_block(params, w, batch, kv_head, begin, end)
            begun = True
        key = first
        while key < last:
            low, high = key, smaller(last, (key // tile_k + 1) * tile_k)
            key = high
            if p.kinds:
                low, high, _ = kept_keys(params, t, 0, low, high)
            if low >= high:
                continue
            n, place = high - low, low - begin
            at_k, at_v = keys + place * k_stride, values + place * v_stride
            found = differentiate_tile(params, w, t, batch, low, n, at_k, k_stride, at_v, v_stride)
            if found & 3 != NONE_SEEN:
                if not sum_tile(params, w, t, index, panel, batch, low, n, place):
                    return False
                if not wait_for_turn(params, index, panel):
                    return False
                add_to_d_q(params, w, t, low, n, at_k, k_stride, found >= EACH_KEY_SEEN)
        if not wait_for_turn(params, index, panel):
            return False
        if first < last == last_key:
            finish_panel(params, w, t, batch)
        set_release(p.progress + 8 * index, panel + 1)
    if not begun:  # the gradients of keys that nobody sees are 0
        begin_block(params, w, batch, kv_head, begin, end)
    finish_block(params, w, batch, kv_head, begin, end)
    return True


@kernel("ii>")
def fill_constants(params, w):
    """Rows of lanes that hold one number."""
    p = backward_at(params)
    for lane in range(p.lanes):
        set_real(w + p.at_ones, lane, p.real_bytes, 1.0)
        set_real(w + p.at_scales, lane, p.real_bytes, p.scale)


def backward_worker(params, scratch):
    """Take items until none are left."""
    p = backward_at(params)
    fill_constants(params, scratch)
    counter, items = params + COUNTER, p.items
    item = add_atomic(counter, 1)
    while item < items:
        if not walk(params, scratch, item):
            break
        item = add_atomic(counter, 1)
    return 0
