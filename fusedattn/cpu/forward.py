"""The forward pass: the macro loops around the micro-kernels.

One work item is (batch item, group of heads, block of rows). Its rows lie across the lanes of a
few panels; the lane tables say for each lane which row it is and which keys it sees, so nothing
below them knows about heads, layouts or grouped queries. Then, for every block of keys that any
row of the item sees and every panel: scores, passes, weights, accumulate. Key blocks begin at
multiples of ``block_k`` of the absolute key index: where a call is cut into chunks does not show.

A worker is one C function ``worker(parameters, scratch) -> items done`` without Python objects; it
takes items from an atomic counter until none are left, so any number of threads may run it. It is
compiled once: what depends on the dtype stands in the micro-kernels, which it calls by address.

Throughout, ``p`` is the parameter record and ``w`` the address of the thread's working memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

from fusedattn import masks
from fusedattn.cpu.matrix import (
    accumulate_tile,
    keep_block,
    score_tile,
    split_block,
    split_panel,
    split_tile,
    weigh_tile,
)
from fusedattn.cpu.memory import (
    add_atomic,
    clear,
    copy_bytes,
    get_atomic,
    get_f64,
    get_i32,
    get_i64,
    get_real,
    get_u8,
    kernel,
    larger,
    set_i32,
    set_i64,
    set_real,
    set_u8,
    smaller,
)
from fusedattn.cpu.micro import LOG2_E, SIGNATURES
from fusedattn.cpu.params import OFFSETS, STOP, USER_FUNCTIONS, params_at
from fusedattn.cpu.partial import fold, restore, save
from fusedattn.cpu.simd import native
from fusedattn.cpu.tile import ROWS_TOGETHER

NEEDS_RESCUE = 1

# What a tile of the dense mask holds.
NONE_SEEN, SOME_SEEN, ALL_SEEN, EACH_KEY_SEEN = 0, 1, 2, 4

# Where the counter lies in the record.
COUNTER = OFFSETS["counter"]

LN_2 = math.log(2.0)

row_interval = kernel("iiiii>ii")(masks.row_interval)
# The rescue is compiled when a row first needs it, and called by address like a micro-kernel.
RESCUE_SIGNATURES = {"mark_visible": "iiiiiii>", "rescue": "iiii>i"}
mark_visible, rescue = (native(signature) for signature in RESCUE_SIGNATURES.values())
_call = {name: native(signature) for name, signature in SIGNATURES.items()}
scores = _call["scores"]
weights = _call["weights"]
accumulate = _call["accumulate"]
hide_outside = _call["hide_outside"]
hide_masked = _call["hide_masked"]
mask_tile = _call["mask_tile"]
bias_tile = _call["bias_tile"]
multiply = _call["multiply"]
softcap = _call["softcap"]
softcap_slope = _call["softcap_slope"]
alibi = _call["alibi"]
add = _call["add"]
drop = _call["drop"]
mark_hidden = _call["mark_hidden"]
both = _call["both"]
summary = _call["summary"]
pack = _call["pack"]
unpack = _call["unpack"]
stage = _call["stage"]
copy = _call["copy"]
gather = _call["gather"]
row_scores = _call["row_scores"]
row_accumulate = _call["row_accumulate"]
configure = _call["configure"]
release = _call["release"]
# Functions of the user's, see `fusedattn.cpu.user`.
score_mod, mask_mod = (native(USER_FUNCTIONS[name]) for name in ("score_mod", "mask_mod"))


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


@kernel("iiiiiiiii>")
def natural_units(params, w, tables, batch, panel, first_key, n, skip, mark):
    """The passes over a tile of raw scores whose order the specification fixes.

    ``tables`` is where the lane tables lie. The backward pass also wants the slope of the softcap.
    The score_mod is not asked about the first ``skip`` keys. ``mark``: write down which scores it
    has made minus infinity.
    """
    p = params_at(params)
    s = w + p.at_scores_tile
    multiply(p.run_multiply, s, n, p.scale)
    if p.run_score_slope:  # the backward pass differentiates there
        copy_bytes(w + p.at_raw_tile, s, n * p.lanes * p.real_bytes)
    if p.run_score_mod:
        at_lane = panel * p.lanes * 4
        rows, heads = tables + p.at_row + at_lane, tables + p.at_head + at_lane
        asked, key = s + skip * p.lanes * p.real_bytes, first_key + skip
        score_mod(p.run_score_mod, asked, n - skip, key, rows, heads, batch, p.score_words)
        if mark:
            mark_hidden(p.run_mark_hidden, s, n, w + p.at_shown_tile)
    cap = p.softcap
    if cap > 0.0:
        softcap(p.run_softcap, s, n, cap)
        if p.run_softcap_slope:
            softcap_slope(p.run_softcap_slope, s, n, cap, w + p.at_softcap_slope)
    if p.slopes:
        positions = tables + p.at_position + panel * p.lanes * 4
        slope = tables + p.at_slope + panel * p.lanes * p.real_bytes
        alibi(p.run_alibi, s, n, first_key, positions, slope)
    if p.bias:
        tile_at, table = w + p.at_bias_tile, tables + p.at_bias_rows + panel * p.lanes * 8
        offset, step = first_key * p.bias_key, p.bias_key
        bias_tile(p.run_bias_tile, tile_at, table, offset, step, n, p.bias_storage)
        add(p.run_add, s, n, tile_at)


@kernel("iiiiiiiiiiiiiiiii>")
def attend_tile(
    params, w, batch, panel, first_key, n, skip, blocks, keys, k_stride, values, v_stride, groups,
    staged, next_panel, next_keys, next_n,
):  # fmt: skip
    """One tile of scores: ``n`` keys from ``first_key`` on against one panel of rows.

    ``blocks``: what the block mask says of the tile, but for its first ``skip`` keys, which are
    hidden and which the user's functions are not asked about. ``groups`` of rows if there are few;
    ``staged``: 1 if keys are reals, plus 2 if values are, plus 4 if all lanes are one row.
    With a matrix unit the scores stand already; they make room for those of the next tile.
    """
    p = params_at(params)
    s = w + p.at_scores_tile
    bounds = w + p.at_bounds
    at_lane = panel * p.lanes * 4
    rows, heads = w + p.at_row + at_lane, w + p.at_head + at_lane
    found, tile_at = ALL_SEEN | EACH_KEY_SEEN, w + p.at_mask_tile
    if p.mask:
        table = w + p.at_mask_rows + panel * p.lanes * 8
        offset, step = first_key * p.mask_key, p.mask_key
        found = mask_tile(p.run_mask_tile, tile_at, table, offset, step, n, w + p.at_seen)
    if blocks == masks.EDGE:
        shown = w + p.at_shown_tile if p.mask else tile_at
        asked, key = shown + skip * p.lanes, first_key + skip
        mask_mod(p.run_mask_mod, asked, n - skip, key, rows, heads, batch, p.mask_words)
        if p.mask:
            both(p.run_both, tile_at, n, shown)
    elif skip and not p.mask:
        for i in range(skip * p.lanes, n * p.lanes):
            set_u8(tile_at, i, 1)
    if skip:
        clear(tile_at, skip * p.lanes)
    if skip or blocks == masks.EDGE:
        found = summary(p.run_summary, tile_at, n, w + p.at_seen)
    mask_kind, each_key_seen = found & 3, found >= EACH_KEY_SEEN
    if mask_kind == NONE_SEEN:
        if next_n:
            score_tile(params, w, next_panel, next_keys, next_n)
        return
    head_dim, head_dim_v, row_bytes = p.head_dim, p.head_dim_v, p.lanes * p.real_bytes
    if p.few_rows:
        run = p.run_row_scores_of_reals if staged & 1 else p.run_row_scores
        queries, stride = w + p.at_row_queries, p.row_queries_stride
        row_scores(run, keys, k_stride, n, queries, stride, s, head_dim, groups, values, v_stride)
    elif not p.matrix:
        queries = w + p.at_queries + panel * head_dim * row_bytes
        scores(p.run_scores, keys, k_stride, n, queries, s, head_dim)
    marked = p.run_score_mod and (p.marks or staged & 4)
    if p.natural_units:
        natural_units(params, w, w, batch, panel, first_key, n, skip, 1 if marked else 0)
    last_low, first_high = get_i64(bounds, 4 * panel + 2), get_i64(bounds, 4 * panel + 3)
    if last_low > first_key or first_high < first_key + n:
        lows, highs = w + p.at_low, w + p.at_high
        hide_outside(p.run_hide_outside, s, n, first_key, lows + at_lane, highs + at_lane)
    if mask_kind == SOME_SEEN:
        hide_masked(p.run_hide_masked, s, n, tile_at)
    if marked:
        hide_masked(p.run_hide_masked, s, n, w + p.at_shown_tile)
        if staged & 4:  # values that the score_mod hides count as zeros: see the rescue
            for j in range(n):
                shown = get_u8(w + p.at_shown_tile, j * p.lanes)
                if p.matrix:
                    each_key_seen = False
                    set_u8(w + p.at_seen, j, shown)
                elif shown == 0:
                    clear(values + j * v_stride, v_stride)
    alpha = w + p.at_alpha
    running_max = w + p.at_row_max + panel * row_bytes
    row_sum = w + p.at_row_sum + panel * row_bytes
    if p.matrix and not p.dropout:
        weigh_tile(params, w, panel, n, next_panel, next_keys, next_n)
    else:
        weights(p.run_weights, s, n, p.to_log2, running_max, alpha, row_sum)
    if p.dropout:
        drop(p.run_drop, s, n, first_key, p.threshold, p.seed, rows, heads, batch)
    if p.matrix:
        if p.dropout:
            split_tile(params, w, n)
            if next_n:
                score_tile(params, w, next_panel, next_keys, next_n)
        accumulate_tile(params, w, panel, values, n, each_key_seen)
        return
    if not each_key_seen:
        # What no row of the panel may see may hold anything: it is not even multiplied by 0.
        target, stride, keep = w + p.at_seen_values, p.values_stride, w + p.at_seen
        if staged & 2:
            size = p.real_bytes
            copy(p.run_copy, target, stride, values, v_stride, size, n, head_dim_v, keep)
        else:
            stage(p.run_stage, target, stride, values, v_stride, p.v_dim, n, head_dim_v, keep)
        values, v_stride, staged = target, stride, staged | 2
    if p.few_rows:
        run = p.run_row_accumulate_of_reals if staged & 2 else p.run_row_accumulate
        output, stride = w + p.at_row_output, p.row_output_stride
        soon = keys + n * k_stride  # past the last key there is nothing to fetch, and no harm in it
        row_accumulate(
            run, values, v_stride, n, s, output, stride, head_dim_v, alpha, groups, soon, k_stride
        )
    else:
        output = w + p.at_output + panel * head_dim_v * row_bytes
        accumulate(p.run_accumulate, values, v_stride, n, s, output, head_dim_v, alpha)


@kernel("iii>")
def load_rows(params, w, groups):
    """Few rows: copy the queries as rows of reals, and begin the rows of output at 0."""
    p = params_at(params)
    full = p.head_dim // p.width * p.width
    left = p.head_dim - full
    for row in range(groups * ROWS_TOGETHER):
        target, source = w + p.at_row_queries + row * p.row_queries_stride, w + p.at_q_rows
        stage(p.run_stage, target, 0, get_i64(source, row), 0, p.q_dim, 1, p.head_dim, 0)
        if left:  # to the end of the overlapping vector, zeros before it
            for i in range(p.width):
                lane = p.width - 1 - i
                value = get_real(target, full + left - 1 - i, p.real_bytes) if i < left else 0.0
                set_real(target, full + lane, p.real_bytes, value)
    clear(w + p.at_row_output, groups * ROWS_TOGETHER * p.row_output_stride)
    clear(w + p.at_scores_tile, p.block_k * p.lanes * p.real_bytes)


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


@kernel("iiiiiiii>b")
def attend(params, w, batch, kv_head, count, panels, alone, chunk):
    """Walk the key blocks of one chunk for an item whose lane tables stand. False if told to stop.

    ``alone``: all lanes are one row, and keys hidden from it enter as zeros (see the rescue).
    """
    p = params_at(params)
    head_dim, head_dim_v, lanes = p.head_dim, p.head_dim_v, p.lanes
    size, block_k = p.real_bytes, p.block_k
    bounds, counter = w + p.at_bounds, params + COUNTER
    low, high = p.seqlen_k, 0
    for panel in range(panels):
        low = smaller(low, get_i64(bounds, 4 * panel))
        high = larger(high, get_i64(bounds, 4 * panel + 1))
        if p.matrix:
            split_panel(params, w, panel)
        elif not p.few_rows:
            table = w + p.at_q_rows + panel * lanes * 8
            queries = w + p.at_queries + panel * head_dim * lanes * size
            pack(p.run_pack, queries, table, p.q_dim, head_dim, p.query_sign)
    low, high = larger(low, chunk * p.chunk_keys), smaller(high, (chunk + 1) * p.chunk_keys)
    for i in range(panels * lanes):
        set_real(w + p.at_row_max, i, size, p.unseen)
    clear(w + p.at_row_sum, panels * lanes * size)
    groups = (count + ROWS_TOGETHER - 1) // ROWS_TOGETHER
    if p.few_rows:
        load_rows(params, w, groups)
    else:
        clear(w + p.at_output, panels * lanes * head_dim_v * size)

    k = p.k + get_i64(p.k_offsets, batch)
    v = p.v + get_i64(p.v_offsets, batch)
    k += kv_head * p.k_head
    v += kv_head * p.v_head
    k_row, v_row = p.k_row, p.v_row
    k_dim, v_dim = p.k_dim, p.v_dim
    stage_k, stage_v = p.stage_k, p.stage_v
    keep_k = keep_v = 0
    if alone:
        stage_k = stage_v = 1
        keep_k, keep_v = w + p.at_keep_k, w + p.at_keep_v
    staged = (1 if stage_k else 0) + (2 if stage_v else 0) + (4 if alone else 0)
    key_group = p.key_group
    low_group = low // key_group * key_group
    block = low // block_k * block_k
    while block < high:
        if get_atomic(counter) >= STOP:
            return False
        begin, end = larger(block, low_group), smaller(block + block_k, high)
        keys, k_stride = k + begin * k_row, k_row
        values, v_stride = v + begin * v_row, v_row
        ready = False
        # With a matrix unit one tile waits, its scores standing, until the next is known.
        waiting, wait_first, wait_n, wait_skip, wait_blocks, wait_values = 0, 0, 0, 0, 0, values
        for turn in range(panels + 1 if p.matrix else panels):
            panel, first, last, blocks = turn, begin, begin, masks.FULL
            if turn < panels:
                first = larger(begin, get_i64(bounds, 4 * panel) // key_group * key_group)
                last = smaller(end, get_i64(bounds, 4 * panel + 1))
                if p.kinds and first < last:
                    first, last, blocks = kept_keys(params, w, panel, first, last)
            skip = first % key_group if first < last else 0  # of the keys that no block keeps
            first -= skip
            n = larger(last - first, 0)
            if n and not ready:  # nothing is copied for a block that no panel keeps
                ready, size_k = True, end - begin
                if alone:
                    mark_visible(
                        p.run_mark_visible, params, w, batch, begin, size_k, keep_k, keep_v
                    )
                if p.matrix:
                    split_block(params, w, keys, values, size_k, alone)
                    if alone or begin < low:
                        keep_block(params, w, size_k, low - begin, alone)
                    keys, k_stride = w + p.at_keys, p.keys_stride
                    values, v_stride = w + p.at_values, 2
                elif stage_k:
                    copied, k_stride = w + p.at_keys, p.keys_stride
                    stage(
                        p.run_stage, copied, k_stride, keys, k_row, k_dim, size_k, head_dim, keep_k
                    )
                    keys = copied
                if stage_v and not p.matrix:
                    copied, v_stride = w + p.at_values, p.values_stride
                    stage(
                        p.run_stage, copied, v_stride, values, v_row, v_dim, size_k, head_dim_v,
                        keep_v,
                    )  # fmt: skip
                    values = copied
            at_k, at_v = keys + (first - begin) * k_stride, values + (first - begin) * v_stride
            next_n = 0
            if p.matrix:
                if n and not wait_n:
                    score_tile(params, w, panel, at_k, n)
                next_n = n
                panel, waiting = waiting, panel
                first, wait_first = wait_first, first
                n, wait_n = wait_n, n
                skip, wait_skip = wait_skip, skip
                blocks, wait_blocks = wait_blocks, blocks
                at_v, wait_values = wait_values, at_v
            if n:
                attend_tile(
                    params, w, batch, panel, first, n, skip, blocks, at_k, k_stride, at_v,
                    v_stride, groups, staged, waiting, at_k, next_n,
                )  # fmt: skip
        block += block_k
    return True


@kernel("iiiiiiiii>b")
def attend_chunks(params, w, batch, kv_head, count, panels, alone, begin, end):
    """Attend to some chunks of keys one after the other. False if told to stop."""
    p = params_at(params)
    for chunk in range(begin, end):
        if not attend(params, w, batch, kv_head, count, panels, alone, chunk):
            return False
        if chunk > begin:
            fold(params, w, count, w + p.at_partial)
        if chunk < end - 1:
            save(params, w, count, w + p.at_partial)
    return True


@kernel("iiiii>b")
def lay_down(params, w, item, count, chunk):
    """Lay the state of one chunk down; True for who comes last, who folds them all.

    In the order of the chunks, as `attend_chunks` does: the same bits.
    """
    p = params_at(params)
    chunks, size = p.chunks, p.partial_bytes
    states = p.states + 8 * p.items + item * chunks * size
    save(params, w, count, states + chunk * size)
    if add_atomic(p.states + 8 * item, 1) < chunks - 1:
        return False
    restore(params, w, count, states)
    for i in range(1, chunks):
        fold(params, w, count, states + i * size)
    return True


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
    factor = 0.0
    for lane in range(panels * p.lanes):
        if lane >= count:  # repeats the last row
            set_real(factors, lane, size, factor)
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


def worker(params, scratch):
    """Take items until none are left.

    Returns 0, or `NEEDS_RESCUE` if a row needs the rescue, which is not compiled yet.
    """
    p = params_at(params)
    if p.matrix:
        configure(p.run_configure)
    counter, chunks, apart = params + COUNTER, p.chunks, p.states != 0
    parts = chunks if apart else 1
    row_blocks, groups, lanes = p.row_blocks, p.head_groups, p.lanes
    heads, seqlen_q = p.heads_per_item, p.seqlen_q
    block, work = p.panels * lanes, p.items * parts
    place, status = add_atomic(counter, 1), 0
    while place < work and status == 0:
        item, part = place // parts, place % parts
        # Late rows see the most keys under a causal mask: the heavy items go first.
        row = (row_blocks - 1 - item % row_blocks) * block
        group = item // row_blocks
        batch, head = group // groups, group % groups * heads
        count = smaller(block, heads * seqlen_q - row)
        panels = (count + lanes - 1) // lanes
        fill_lanes(params, scratch, batch, head + row // seqlen_q, row % seqlen_q, count, panels)
        kv_head = head // p.group_size
        end = part + 1 if apart else chunks
        done = attend_chunks(params, scratch, batch, kv_head, count, panels, 0, part, end)
        if done and apart:
            done = lay_down(params, scratch, item, count, part)
        bad = finish(params, scratch, batch, count, panels) if done else 0
        if bad and not p.run_rescue:
            status, bad = NEEDS_RESCUE, 0
        for i in range(bad):
            entry = get_i64(scratch + p.at_bad, i)
            if not rescue(p.run_rescue, params, scratch, batch, entry):
                break
        place = add_atomic(counter, 1)
    if p.matrix:
        release(p.run_release)
    return status
