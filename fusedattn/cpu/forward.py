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

from fusedattn import masks
from fusedattn.cpu.interface import NEEDS_RESCUE, RESCUE_SIGNATURES, SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.lanes import fill_lanes, kept_keys
from fusedattn.cpu.matrix import accumulate_tile, keep_block, score_tile, split_block, split_panel
from fusedattn.cpu.memory import (
    add_atomic,
    clear,
    get_atomic,
    get_i64,
    get_real,
    larger,
    set_real,
    smaller,
)
from fusedattn.cpu.output import finish
from fusedattn.cpu.panel import attend_tile
from fusedattn.cpu.params import COUNTER, STOP
from fusedattn.cpu.partial import fold, restore, save
from fusedattn.cpu.record import params_at
from fusedattn.cpu.simd import native
from fusedattn.cpu.tile import ROWS_TOGETHER

# With so few tiles in a block, products of single parts cost less alone than beside weights: the
# vector unit multiplies half as fast while the matrix unit is awake.
FEW_PANELS = 4

pack = native(SIGNATURES["pack"])
stage = native(SIGNATURES["stage"])
configure = native(SIGNATURES["configure"])
release = native(SIGNATURES["release"])
mark_visible, rescue = (native(signature) for signature in RESCUE_SIGNATURES.values())


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
        # With a matrix unit one tile waits, its scores standing, until the next is known, and one
        # with its weights until they are multiplied beside what that makes of its scores.
        waiting, wait_first, wait_n, wait_skip, wait_blocks, wait_values = 0, 0, 0, 0, 0, values
        side = old_panel = old_values = old_n = 0
        at_once = p.parts == 1 and panels <= FEW_PANELS
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
                found = attend_tile(
                    params, w, batch, panel, first, n, skip, blocks, at_k, k_stride, at_v,
                    v_stride, groups, staged, side, old_panel, old_values, old_n, waiting, at_k,
                    next_n,
                )  # fmt: skip
                if found and at_once:
                    accumulate_tile(params, w, panel, found, n, side)
                elif found:
                    side, old_panel, old_values, old_n = 1 - side, panel, found, n
        if old_n:
            accumulate_tile(params, w, old_panel, old_values, old_n, 1 - side)
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
