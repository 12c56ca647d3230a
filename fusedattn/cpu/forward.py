"""The forward pass: the macro loops around the micro-kernels.

One work item is (batch item, group of heads, block of rows). Its rows lie across the lanes of a
few panels; the lane tables say for each lane which row it is and which keys it sees, so nothing
below them knows about heads, layouts or grouped queries. Then, for every block of keys that any
row of the item sees and every panel: scores, passes, weights, accumulate. Key blocks begin at
multiples of ``block_k`` of the absolute key index: where a call is cut into chunks does not show.

A worker is one C function ``worker(parameters, scratch) -> items done`` without Python objects; it
takes items from an atomic counter until none are left, so any number of threads may run it.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cfunc, types

from fusedattn import masks
from fusedattn.cpu.memory import make_memory, njit
from fusedattn.cpu.micro import LOG2_E, UNSEEN, make_micro
from fusedattn.cpu.params import Slot
from fusedattn.cpu.rescue import make_rescue
from fusedattn.cpu.tile import Tile

# A counter at or above this value tells the workers to stop.
STOP = 1 << 62

# What a tile of the dense mask holds.
NONE_SEEN, SOME_SEEN, ALL_SEEN = 0, 1, 2

WORKER_SIGNATURE = types.int64(types.int64, types.int64)


def make_worker(tile: Tile) -> Any:
    """Return the uncompiled worker of a tile shape, a Python function for ``numba.cfunc``."""
    micro, memory = make_micro(tile), make_memory(tile)
    # Numba wants plain names.
    scores, weights, accumulate = micro.scores, micro.weights, micro.accumulate
    hide_outside, hide_masked, drop = micro.hide_outside, micro.hide_masked, micro.drop
    multiply, softcap, alibi, add = micro.multiply, micro.softcap, micro.alibi, micro.add
    pack, unpack, stage = micro.pack, micro.unpack, micro.stage
    get_i64, set_i64 = memory.get_i64, memory.set_i64
    get_i32, set_i32, get_u8, set_u8 = memory.get_i32, memory.set_i32, memory.get_u8, memory.set_u8
    get_f64, get_real, set_real = memory.get_f64, memory.get_real, memory.set_real
    add_atomic, get_atomic = memory.add_atomic, memory.get_atomic
    read_float16, read_bfloat16 = memory.read_float16, memory.read_bfloat16
    read_float32, read_float64 = memory.read_float32, memory.read_float64
    row_interval = njit(masks.row_interval)
    lanes, block_k, real_bytes = tile.lanes, tile.block_k, tile.real_bytes
    row_bytes = lanes * real_bytes
    unseen = UNSEEN[tile.bits]
    ln_2 = math.log(2.0)

    @njit
    def fill_lanes(p, w, batch, head, row, count, panels):  # type: ignore[no-untyped-def]
        """Write the lane tables for ``count`` rows from (head, row) on.

        Lanes past the last row repeat it: they compute what it computes and write the same.
        """
        q = get_i64(p, Slot.Q) + get_i64(get_i64(p, Slot.Q_OFFSETS), batch)
        out = get_i64(p, Slot.OUT) + get_i64(get_i64(p, Slot.OUT_OFFSETS), batch)
        q_head, q_row = get_i64(p, Slot.Q_HEAD), get_i64(p, Slot.Q_ROW)
        out_head, out_row = get_i64(p, Slot.OUT_HEAD), get_i64(p, Slot.OUT_ROW)
        mask, bias, slopes = get_i64(p, Slot.MASK), get_i64(p, Slot.BIAS), get_i64(p, Slot.SLOPES)
        if mask:
            mask += get_i64(get_i64(p, Slot.MASK_OFFSETS), batch)
        if bias:
            bias += get_i64(get_i64(p, Slot.BIAS_OFFSETS), batch)
        mask_head, mask_row = get_i64(p, Slot.MASK_HEAD), get_i64(p, Slot.MASK_ROW)
        bias_head, bias_row = get_i64(p, Slot.BIAS_HEAD), get_i64(p, Slot.BIAS_ROW)
        num_heads, seqlen_q = get_i64(p, Slot.NUM_HEADS), get_i64(p, Slot.SEQLEN_Q)
        k_from, k_to = get_i64(get_i64(p, Slot.K_FROM), batch), get_i64(get_i64(p, Slot.K_TO), batch)
        used_q = get_i64(get_i64(p, Slot.SEQUSED_Q), batch)
        used_k = get_i64(get_i64(p, Slot.SEQUSED_K), batch)
        position = get_i64(get_i64(p, Slot.POSITION), batch)
        bounds = w + get_i64(p, Slot.AT_BOUNDS)
        q_rows, out_rows = w + get_i64(p, Slot.AT_Q_ROWS), w + get_i64(p, Slot.AT_OUT_ROWS)
        mask_rows, bias_rows = w + get_i64(p, Slot.AT_MASK_ROWS), w + get_i64(p, Slot.AT_BIAS_ROWS)
        lows, highs = w + get_i64(p, Slot.AT_LOW), w + get_i64(p, Slot.AT_HIGH)
        positions, slope = w + get_i64(p, Slot.AT_POSITION), w + get_i64(p, Slot.AT_SLOPE)
        rows, heads = w + get_i64(p, Slot.AT_ROW), w + get_i64(p, Slot.AT_HEAD)
        lane = 0
        for panel in range(panels):
            first_low, last_high, last_low, first_high = used_k, 0, 0, used_k
            for _ in range(lanes):
                low, high = row_interval(row, k_from, k_to, used_q, used_k)
                if low < high:
                    first_low, last_high = min(first_low, low), max(last_high, high)
                else:
                    low = high = 0
                last_low, first_high = max(last_low, low), min(first_high, high)
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
                if slopes:
                    set_i32(positions, lane, row + position)
                    set_real(slope, lane, get_f64(slopes, batch * num_heads + head))
                lane += 1
                if lane < count:
                    row += 1
                    if row == seqlen_q:
                        row, head = 0, head + 1
            set_i64(bounds, 4 * panel, first_low)
            set_i64(bounds, 4 * panel + 1, last_high)
            set_i64(bounds, 4 * panel + 2, last_low)
            set_i64(bounds, 4 * panel + 3, first_high)

    @njit
    def load_mask(p, w, panel, first_key, n):  # type: ignore[no-untyped-def]
        """Transpose a tile of the dense mask to ``[key][lane]``; say what it holds.

        Returns the kind of tile and whether each key is seen by some row.
        """
        tile_at, seen = w + get_i64(p, Slot.AT_MASK), w + get_i64(p, Slot.AT_SEEN)
        rows, step = w + get_i64(p, Slot.AT_MASK_ROWS), get_i64(p, Slot.MASK_KEY)
        count = 0
        for j in range(n):
            set_u8(seen, j, 0)
        for lane in range(lanes):
            row = get_i64(rows, panel * lanes + lane) + first_key * step
            for j in range(n):
                bit = 1 if get_u8(row, j * step) else 0
                set_u8(tile_at, j * lanes + lane, bit)
                count += bit
                if bit:
                    set_u8(seen, j, 1)
        keys_seen = 0
        for j in range(n):
            keys_seen += get_u8(seen, j)
        kind = SOME_SEEN
        if count == 0:
            kind = NONE_SEEN
        elif count == n * lanes:
            kind = ALL_SEEN
        return kind, keys_seen == n

    @njit
    def load_bias(p, w, panel, first_key, n):  # type: ignore[no-untyped-def]
        """Transpose a tile of the bias to ``[key][lane]`` in the accumulator type."""
        tile_at, code = w + get_i64(p, Slot.AT_BIAS), get_i64(p, Slot.BIAS_CODE)
        rows, step = w + get_i64(p, Slot.AT_BIAS_ROWS), get_i64(p, Slot.BIAS_KEY)
        for lane in range(lanes):
            at = get_i64(rows, panel * lanes + lane) + first_key * step
            if code == 0:
                for j in range(n):
                    set_real(tile_at, j * lanes + lane, read_float16(at + j * step))
            elif code == 1:
                for j in range(n):
                    set_real(tile_at, j * lanes + lane, read_bfloat16(at + j * step))
            elif code == 2:
                for j in range(n):
                    set_real(tile_at, j * lanes + lane, read_float32(at + j * step))
            else:
                for j in range(n):
                    set_real(tile_at, j * lanes + lane, read_float64(at + j * step))

    @njit
    def natural_units(p, w, panel, first_key, n):  # type: ignore[no-untyped-def]
        """The passes over a tile of raw scores whose order the specification fixes."""
        s = w + get_i64(p, Slot.AT_SCORES)
        multiply(s, n, get_f64(p, Slot.SCALE))
        cap = get_f64(p, Slot.SOFTCAP)
        if cap > 0.0:
            softcap(s, n, cap)
        if get_i64(p, Slot.SLOPES):
            positions = w + get_i64(p, Slot.AT_POSITION) + panel * lanes * 4
            slope = w + get_i64(p, Slot.AT_SLOPE) + panel * row_bytes
            alibi(s, n, first_key, positions, slope)
        if get_i64(p, Slot.BIAS):
            load_bias(p, w, panel, first_key, n)
            add(s, n, w + get_i64(p, Slot.AT_BIAS))

    @njit
    def attend_tile(p, w, batch, panel, first_key, n, keys, k_stride, values, v_stride):  # type: ignore[no-untyped-def]
        """One tile of scores: ``n`` keys from ``first_key`` on against one panel of rows."""
        s = w + get_i64(p, Slot.AT_SCORES)
        bounds = w + get_i64(p, Slot.AT_BOUNDS)
        mask_kind, each_key_seen = ALL_SEEN, True
        if get_i64(p, Slot.MASK):
            mask_kind, each_key_seen = load_mask(p, w, panel, first_key, n)
            if mask_kind == NONE_SEEN:
                return
        head_dim, head_dim_v = get_i64(p, Slot.HEAD_DIM), get_i64(p, Slot.HEAD_DIM_V)
        queries = w + get_i64(p, Slot.AT_QUERIES) + panel * head_dim * row_bytes
        scores(keys, k_stride, n, queries, s, head_dim)
        if get_i64(p, Slot.NATURAL_UNITS):
            natural_units(p, w, panel, first_key, n)
        at_lane = panel * lanes * 4
        if get_i64(bounds, 4 * panel + 2) > first_key or get_i64(bounds, 4 * panel + 3) < first_key + n:
            lows, highs = w + get_i64(p, Slot.AT_LOW), w + get_i64(p, Slot.AT_HIGH)
            hide_outside(s, n, first_key, lows + at_lane, highs + at_lane)
        if mask_kind == SOME_SEEN:
            hide_masked(s, n, w + get_i64(p, Slot.AT_MASK))
        alpha = w + get_i64(p, Slot.AT_ALPHA)
        running_max = w + get_i64(p, Slot.AT_MAX) + panel * row_bytes
        row_sum = w + get_i64(p, Slot.AT_SUM) + panel * row_bytes
        weights(s, n, get_f64(p, Slot.TO_LOG2), running_max, alpha, row_sum)
        if get_i64(p, Slot.DROPOUT):
            rows, heads = w + get_i64(p, Slot.AT_ROW), w + get_i64(p, Slot.AT_HEAD)
            threshold, seed = get_i64(p, Slot.THRESHOLD), get_i64(p, Slot.SEED)
            drop(s, n, first_key, threshold, seed, rows + at_lane, heads + at_lane, batch)
        if not each_key_seen:
            # What no row of the panel may see may hold anything: it is not even multiplied by 0.
            target, stride = w + get_i64(p, Slot.AT_SEEN_VALUES), get_i64(p, Slot.VALUES_STRIDE)
            copy_rows(target, stride, values, v_stride, n, head_dim_v, w + get_i64(p, Slot.AT_SEEN))
            values, v_stride = target, stride
        output = w + get_i64(p, Slot.AT_OUTPUT) + panel * head_dim_v * row_bytes
        accumulate(values, v_stride, n, s, output, head_dim_v, alpha)

    @njit
    def copy_rows(target, target_stride, source, stride, n, columns, keep):  # type: ignore[no-untyped-def]
        """Copy rows of reals; rows whose byte in ``keep`` is 0 become 0."""
        for j in range(n):
            kept = get_u8(keep, j)
            for d in range(columns):
                value = get_real(source + j * stride, d) if kept else 0.0
                set_real(target + j * target_stride, d, value)

    @njit
    def attend(p, w, batch, kv_head, panels, alone):  # type: ignore[no-untyped-def]
        """Walk the key blocks of an item whose lane tables stand. False if told to stop.

        ``alone``: all lanes are one row, and keys hidden from it enter as zeros (see the rescue).
        """
        head_dim, head_dim_v = get_i64(p, Slot.HEAD_DIM), get_i64(p, Slot.HEAD_DIM_V)
        bounds, counter = w + get_i64(p, Slot.AT_BOUNDS), get_i64(p, Slot.COUNTER)
        low, high = get_i64(p, Slot.SEQLEN_K), 0
        for panel in range(panels):
            low = min(low, get_i64(bounds, 4 * panel))
            high = max(high, get_i64(bounds, 4 * panel + 1))
            table = w + get_i64(p, Slot.AT_Q_ROWS) + panel * lanes * 8
            queries = w + get_i64(p, Slot.AT_QUERIES) + panel * head_dim * row_bytes
            sign = get_f64(p, Slot.QUERY_SIGN)
            pack(queries, table, get_i64(p, Slot.Q_DIM), head_dim, sign)
        for i in range(panels * lanes):
            set_real(w + get_i64(p, Slot.AT_MAX), i, unseen)
            set_real(w + get_i64(p, Slot.AT_SUM), i, 0.0)
        output = w + get_i64(p, Slot.AT_OUTPUT)
        for i in range(panels * lanes * head_dim_v):
            set_real(output, i, 0.0)

        k = get_i64(p, Slot.K) + get_i64(get_i64(p, Slot.K_OFFSETS), batch)
        v = get_i64(p, Slot.V) + get_i64(get_i64(p, Slot.V_OFFSETS), batch)
        k += kv_head * get_i64(p, Slot.K_HEAD)
        v += kv_head * get_i64(p, Slot.V_HEAD)
        k_row, v_row = get_i64(p, Slot.K_ROW), get_i64(p, Slot.V_ROW)
        k_dim, v_dim = get_i64(p, Slot.K_DIM), get_i64(p, Slot.V_DIM)
        stage_k, stage_v = get_i64(p, Slot.STAGE_K), get_i64(p, Slot.STAGE_V)
        keep_k = keep_v = 0
        if alone:
            stage_k = stage_v = 1
            keep_k = w + get_i64(p, Slot.AT_SEEN) + block_k
            keep_v = keep_k + block_k
        block = low // block_k * block_k
        while block < high:
            if get_atomic(counter) >= STOP:
                return False
            begin, end = max(block, low), min(block + block_k, high)
            keys, k_stride = k + begin * k_row, k_row
            values, v_stride = v + begin * v_row, v_row
            if alone:
                mark_visible(p, w, batch, begin, end - begin, keep_k, keep_v)
            if stage_k:
                staged, k_stride = w + get_i64(p, Slot.AT_KEYS), get_i64(p, Slot.KEYS_STRIDE)
                stage(staged, k_stride, keys, k_row, k_dim, end - begin, head_dim, keep_k)
                keys = staged
            if stage_v:
                staged, v_stride = w + get_i64(p, Slot.AT_VALUES), get_i64(p, Slot.VALUES_STRIDE)
                stage(staged, v_stride, values, v_row, v_dim, end - begin, head_dim_v, keep_v)
                values = staged
            for panel in range(panels):
                first = max(begin, get_i64(bounds, 4 * panel))
                last = min(end, get_i64(bounds, 4 * panel + 1))
                if first < last:
                    at_k, at_v = keys + (first - begin) * k_stride, values + (first - begin) * v_stride
                    attend_tile(p, w, batch, panel, first, last - first, at_k, k_stride, at_v, v_stride)
            block += block_k
        return True

    @njit
    def finish(p, w, batch, count, panels):  # type: ignore[no-untyped-def]
        """Divide by the row sums and write the rows; return how many need another look.

        Their (head, row) go to the list of bad rows. Ordinary rows pay one comparison.
        """
        maxima, sums = w + get_i64(p, Slot.AT_MAX), w + get_i64(p, Slot.AT_SUM)
        factors, checks = w + get_i64(p, Slot.AT_FACTOR), w + get_i64(p, Slot.AT_CHECK)
        rows, heads = w + get_i64(p, Slot.AT_ROW), w + get_i64(p, Slot.AT_HEAD)
        lows, highs = w + get_i64(p, Slot.AT_LOW), w + get_i64(p, Slot.AT_HIGH)
        lse, sinks = get_i64(p, Slot.LSE), get_i64(p, Slot.SINKS)
        num_heads, seqlen_q = get_i64(p, Slot.NUM_HEADS), get_i64(p, Slot.SEQLEN_Q)
        used_q = get_i64(get_i64(p, Slot.SEQUSED_Q), batch)
        keep_scale = get_f64(p, Slot.KEEP_SCALE)
        for lane in range(panels * lanes):
            total, shift, factor = get_real(sums, lane), get_real(maxima, lane), 0.0
            if total != 0.0:
                factor = keep_scale / total
            sink = -math.inf
            if sinks and get_i32(rows, lane) < used_q:
                sink = get_f64(sinks, get_i32(heads, lane))
            if not sink < math.inf:
                total = factor = math.nan
            elif sink != -math.inf and total != 0.0:
                sink_log2 = sink * LOG2_E
                common = max(shift, sink_log2)
                rescale = 2.0 ** (shift - common)
                total = total * rescale + 2.0 ** (sink_log2 - common)
                factor, shift = keep_scale * rescale / total, common
            set_real(factors, lane, factor)
            if lse and lane < count:
                at = (batch * num_heads + get_i32(heads, lane)) * seqlen_q
                value = sink if total == 0.0 else (shift + math.log2(total)) * ln_2
                set_real(lse, at + get_i32(rows, lane), value)
        head_dim_v, out_dim = get_i64(p, Slot.HEAD_DIM_V), get_i64(p, Slot.OUT_DIM)
        for panel in range(panels):
            output = w + get_i64(p, Slot.AT_OUTPUT) + panel * head_dim_v * row_bytes
            table = w + get_i64(p, Slot.AT_OUT_ROWS) + panel * lanes * 8
            at = panel * row_bytes
            unpack(output, factors + at, table, out_dim, head_dim_v, checks + at)
        bad, exact = 0, get_i64(p, Slot.EXACT)
        for lane in range(count):
            total = get_real(sums, lane)
            has_keys = get_i32(lows, lane) < get_i32(highs, lane)
            # Hidden values do not enter the sum: where it is unusable, starting over cannot help.
            hopeless = exact or total != total or (total == 0.0 and has_keys)
            if hopeless or get_real(checks, lane) != 0.0:
                place = get_i32(heads, lane) * seqlen_q + get_i32(rows, lane)
                set_i64(w + get_i64(p, Slot.AT_BAD), bad, 2 * place + (1 if hopeless else 0))
                bad += 1
        return bad

    mark_visible, has_nan_value, exact_row = make_rescue(tile, memory, micro)

    @njit
    def rescue(p, w, batch, head, row):  # type: ignore[no-untyped-def]
        """Compute one row again, alone: first as before, then exactly. False if told to stop.

        A NaN or inf in a value that this row may not see, but a neighbour does, has met a weight
        of 0. Entered as zeros, hidden keys leave the row the bits that a clean call would give it.
        Whatever is still not finite goes through float64, rounded once.
        """
        if has_nan_value(p, batch, head, row):
            return True
        fill_lanes(p, w, batch, head, row, 1, 1)
        if not attend(p, w, batch, head // get_i64(p, Slot.GROUP_SIZE), 1, True):
            return False
        if finish(p, w, batch, 1, 1) > 0:
            exact_row(p, w, batch, head, row)
        return True

    def worker(p, scratch):  # type: ignore[no-untyped-def]
        """Take items until none are left; return how many were taken."""
        done, counter, items = 0, get_i64(p, Slot.COUNTER), get_i64(p, Slot.ITEMS)
        row_blocks, groups = get_i64(p, Slot.ROW_BLOCKS), get_i64(p, Slot.HEAD_GROUPS)
        heads, seqlen_q = get_i64(p, Slot.HEADS_PER_ITEM), get_i64(p, Slot.SEQLEN_Q)
        block = get_i64(p, Slot.PANELS) * lanes
        item = add_atomic(counter, 1)
        while item < items:
            # Late rows see the most keys under a causal mask: the heavy items go first.
            row = (row_blocks - 1 - item % row_blocks) * block
            group = item // row_blocks
            batch, head = group // groups, group % groups * heads
            count = min(block, heads * seqlen_q - row)
            panels = (count + lanes - 1) // lanes
            fill_lanes(p, scratch, batch, head + row // seqlen_q, row % seqlen_q, count, panels)
            kv_head = head // get_i64(p, Slot.GROUP_SIZE)
            if not attend(p, scratch, batch, kv_head, panels, False):
                break
            bad = finish(p, scratch, batch, count, panels)
            for i in range(bad):
                entry = get_i64(scratch + get_i64(p, Slot.AT_BAD), i)
                head, row = entry // 2 // seqlen_q, entry // 2 % seqlen_q
                if entry % 2:
                    exact_row(p, scratch, batch, head, row)
                elif not rescue(p, scratch, batch, head, row):
                    break
            done += 1
            item = add_atomic(counter, 1)
        return done

    return worker


def compile_worker(tile: Tile) -> Any:
    """Compile the worker of a tile shape; ``.address`` of the result is its entry point."""
    return cfunc(WORKER_SIGNATURE, error_model="numpy")(make_worker(tile))
