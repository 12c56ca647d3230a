"""Rows that did not come out finite: what the fast path cannot promise, made good row by row.

The fast path is optimistic. It multiplies hidden values by a weight of 0 and sums in the
accumulator's range; a row that meets a NaN it may not see, or values near the largest number,
ends non-finite and is computed again alone.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from fusedattn import masks, philox
from fusedattn.cpu.memory import njit
from fusedattn.cpu.params import Slot
from fusedattn.cpu.tile import Tile

# Sums of values near the largest float64 are kept this much smaller: 2**30 of them still fit.
SHRINK = 2.0**-64


def make_rescue(tile: Tile, memory: SimpleNamespace, micro: SimpleNamespace) -> tuple[Any, Any, Any]:
    """Return ``mark_visible``, ``has_nan_value`` and ``exact_row`` for a tile shape."""
    get_i64, get_f64, set_f64 = memory.get_i64, memory.get_f64, memory.set_f64
    get_i32, get_u8, set_u8 = memory.get_i32, memory.get_u8, memory.set_u8
    read_float16, read_bfloat16 = memory.read_float16, memory.read_bfloat16
    read_float32, read_float64 = memory.read_float32, memory.read_float64
    element, put_out, set_real = memory.element, memory.put_out, memory.set_real
    row_interval, philox4x32 = njit(masks.row_interval), njit(philox.philox4x32)
    dot = micro.dot

    @njit
    def bias_at(p, row_address, key):  # type: ignore[no-untyped-def]
        code, at = get_i64(p, Slot.BIAS_CODE), row_address + key * get_i64(p, Slot.BIAS_KEY)
        if code == 0:
            return read_float16(at)
        if code == 1:
            return read_bfloat16(at)
        if code == 2:
            return read_float32(at)
        return read_float64(at)

    @njit
    def is_visible(p, mask_row, bias_row, key):  # type: ignore[no-untyped-def]
        """Whether mask and bias show a key of the row's interval."""
        if mask_row and get_u8(mask_row, key * get_i64(p, Slot.MASK_KEY)) == 0:
            return False
        return not (bias_row and bias_at(p, bias_row, key) == -math.inf)

    @njit
    def is_kept(p, batch, head, row, key):  # type: ignore[no-untyped-def]
        """Whether dropout keeps the entry."""
        if not get_i64(p, Slot.DROPOUT):
            return True
        seed = get_i64(p, Slot.SEED)
        words = philox4x32(
            key // 4, row, head, batch, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        )
        return words[key % 4] >= get_i64(p, Slot.THRESHOLD)

    @njit
    def row_addresses(p, batch, head, row):  # type: ignore[no-untyped-def]
        """Addresses of the row's mask and bias, 0 without."""
        mask, bias = get_i64(p, Slot.MASK), get_i64(p, Slot.BIAS)
        if mask:
            mask += get_i64(get_i64(p, Slot.MASK_OFFSETS), batch)
            mask += head * get_i64(p, Slot.MASK_HEAD) + row * get_i64(p, Slot.MASK_ROW)
        if bias:
            bias += get_i64(get_i64(p, Slot.BIAS_OFFSETS), batch)
            bias += head * get_i64(p, Slot.BIAS_HEAD) + row * get_i64(p, Slot.BIAS_ROW)
        return mask, bias

    @njit
    def key_interval(p, batch, row):  # type: ignore[no-untyped-def]
        """The keys that lengths, window and causality leave to the row."""
        return row_interval(
            row,
            get_i64(get_i64(p, Slot.K_FROM), batch),
            get_i64(get_i64(p, Slot.K_TO), batch),
            get_i64(get_i64(p, Slot.SEQUSED_Q), batch),
            get_i64(get_i64(p, Slot.SEQUSED_K), batch),
        )

    @njit
    def mark_visible(p, w, batch, first_key, n, keep_k, keep_v):  # type: ignore[no-untyped-def]
        """Mark, for the row in lane 0, the keys it sees and the values it multiplies."""
        row = get_i32(w + get_i64(p, Slot.AT_ROW), 0)
        head = get_i32(w + get_i64(p, Slot.AT_HEAD), 0)
        mask_row, bias_row = row_addresses(p, batch, head, row)
        for j in range(n):
            seen = is_visible(p, mask_row, bias_row, first_key + j)
            set_u8(keep_k, j, 1 if seen else 0)
            kept = seen and is_kept(p, batch, head, row, first_key + j)
            set_u8(keep_v, j, 1 if kept else 0)

    @njit
    def exact_score(p, q, k, bias_row, slope, position, key):  # type: ignore[no-untyped-def]
        """The score of one visible key in natural units, in float64."""
        q_dim, k_dim = get_i64(p, Slot.Q_DIM), get_i64(p, Slot.K_DIM)
        score = get_f64(p, Slot.SCALE) * dot(q, q_dim, k, k_dim, get_i64(p, Slot.HEAD_DIM))
        softcap = get_f64(p, Slot.SOFTCAP)
        if softcap > 0.0:
            score = softcap * math.tanh(score / softcap)
        if slope != 0.0:
            score -= slope * abs(position - key)
        if bias_row:
            score += bias_at(p, bias_row, key)
        return score

    @njit
    def has_nan_value(p, batch, head, row):  # type: ignore[no-untyped-def]
        """Whether the row multiplies a value that is NaN in every column, and so is rightly NaN."""
        low, high = key_interval(p, batch, row)
        v = get_i64(p, Slot.V) + get_i64(get_i64(p, Slot.V_OFFSETS), batch)
        v += head // get_i64(p, Slot.GROUP_SIZE) * get_i64(p, Slot.V_HEAD)
        columns, v_dim = get_i64(p, Slot.HEAD_DIM_V), get_i64(p, Slot.V_DIM)
        mask_row, bias_row = row_addresses(p, batch, head, row)
        for key in range(low, high):
            at, d = v + key * get_i64(p, Slot.V_ROW), 0
            while d < columns and math.isnan(element(at + d * v_dim)):
                d += 1
            if (
                d == columns
                and is_visible(p, mask_row, bias_row, key)
                and is_kept(p, batch, head, row, key)
            ):
                return True
        return False

    @njit
    def exact_row(p, w, batch, head, row):  # type: ignore[no-untyped-def]
        """One row in float64, from the definition: maximum, weights, sum; rounded once."""
        columns, v_dim = get_i64(p, Slot.HEAD_DIM_V), get_i64(p, Slot.V_DIM)
        used_q = get_i64(get_i64(p, Slot.SEQUSED_Q), batch)
        low, high = key_interval(p, batch, row)
        q = get_i64(p, Slot.Q) + get_i64(get_i64(p, Slot.Q_OFFSETS), batch)
        q += head * get_i64(p, Slot.Q_HEAD) + row * get_i64(p, Slot.Q_ROW)
        kv_head = head // get_i64(p, Slot.GROUP_SIZE)
        k = get_i64(p, Slot.K) + get_i64(get_i64(p, Slot.K_OFFSETS), batch)
        v = get_i64(p, Slot.V) + get_i64(get_i64(p, Slot.V_OFFSETS), batch)
        k += kv_head * get_i64(p, Slot.K_HEAD)
        v += kv_head * get_i64(p, Slot.V_HEAD)
        k_row, v_row = get_i64(p, Slot.K_ROW), get_i64(p, Slot.V_ROW)
        mask_row, bias_row = row_addresses(p, batch, head, row)
        slope, position = 0.0, row + get_i64(get_i64(p, Slot.POSITION), batch)
        if get_i64(p, Slot.SLOPES):
            slope = get_f64(get_i64(p, Slot.SLOPES), batch * get_i64(p, Slot.NUM_HEADS) + head)
        sink = -math.inf
        if get_i64(p, Slot.SINKS) and row < used_q:
            sink = get_f64(get_i64(p, Slot.SINKS), head)

        largest, poisoned = sink, not sink < math.inf
        for key in range(low, high):
            if is_visible(p, mask_row, bias_row, key):
                score = exact_score(p, q, k + key * k_row, bias_row, slope, position, key)
                if score > largest:
                    largest = score
                if score != score or score == math.inf:
                    poisoned = True  # every output is NaN, whatever the other keys are
                    break

        sums = w + get_i64(p, Slot.AT_EXACT)
        shrunk, smallest, greatest = sums + 8 * columns, sums + 16 * columns, sums + 24 * columns
        for d in range(columns):
            set_f64(sums, d, 0.0)
            set_f64(shrunk, d, 0.0)
            set_f64(smallest, d, math.inf)
            set_f64(greatest, d, -math.inf)
        total = math.exp(sink - largest) if sink != -math.inf else 0.0
        if largest != -math.inf and not poisoned:
            for key in range(low, high):
                if not is_visible(p, mask_row, bias_row, key):
                    continue
                score = exact_score(p, q, k + key * k_row, bias_row, slope, position, key)
                weight = math.exp(score - largest)
                total += weight
                if is_kept(p, batch, head, row, key):
                    for d in range(columns):
                        value = element(v + key * v_row + d * v_dim)
                        set_f64(sums, d, get_f64(sums, d) + weight * value)
                        set_f64(shrunk, d, get_f64(shrunk, d) + weight * (value * SHRINK))
                        set_f64(smallest, d, min(get_f64(smallest, d), value))
                        set_f64(greatest, d, max(get_f64(greatest, d), value))

        keep_scale = get_f64(p, Slot.KEEP_SCALE)
        out = get_i64(p, Slot.OUT) + get_i64(get_i64(p, Slot.OUT_OFFSETS), batch)
        out += head * get_i64(p, Slot.OUT_HEAD) + row * get_i64(p, Slot.OUT_ROW)
        for d in range(columns):
            mean = 0.0
            if poisoned:
                mean = math.nan
            elif total > 0.0:
                mean = get_f64(sums, d) / total
                if not math.isfinite(mean):
                    mean = get_f64(shrunk, d) / total / SHRINK
                # A mean lies between its values; the last rounding must not take it past them.
                bound = greatest if mean > 0.0 else smallest
                limit = get_f64(bound, d)
                if math.isinf(mean) and math.isfinite(limit) and sink == -math.inf:
                    mean = limit
                mean *= keep_scale
            put_out(out + d * get_i64(p, Slot.OUT_DIM), mean + 0.0)
        if get_i64(p, Slot.LSE):
            at = (batch * get_i64(p, Slot.NUM_HEADS) + head) * get_i64(p, Slot.SEQLEN_Q) + row
            value = largest
            if poisoned:
                value = math.nan
            elif total > 0.0 and largest != -math.inf:
                value = largest + math.log(total)
            set_real(get_i64(p, Slot.LSE), at, value)

    return mark_visible, has_nan_value, exact_row
