"""Rows that did not come out finite: what the fast path cannot promise, made good row by row.

The fast path is optimistic. It multiplies hidden values by a weight of 0 and sums in the
accumulator's range; a row that meets a NaN it may not see, or values near the largest number,
ends non-finite and is computed again alone.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

from fusedattn import masks, philox
from fusedattn.cpu.forward import attend_chunks
from fusedattn.cpu.interface import SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.lanes import fill_lanes, row_interval
from fusedattn.cpu.memory import (
    get_atomic,
    get_f64,
    get_i32,
    get_i64,
    get_u8,
    read_storage,
    round_real,
    set_f64,
    set_real,
    set_u8,
    write_storage,
)
from fusedattn.cpu.output import finish
from fusedattn.cpu.params import COUNTER, STOP, USER_FUNCTIONS
from fusedattn.cpu.record import params_at
from fusedattn.cpu.simd import native

# Sums of values near the largest float64 are kept this much smaller: 2**30 of them still fit.
SHRINK = 2.0**-64

philox4x32 = kernel("iiiiii>iiii")(philox.philox4x32)
dot = native(SIGNATURES["dot"])
score_mod_one, mask_mod_one = (
    native(USER_FUNCTIONS[name]) for name in ("score_mod_one", "mask_mod_one")
)


@kernel("iii>f")
def bias_at(params, row_address, key):
    """The bias of one entry, in the accumulator type."""
    p = params_at(params)
    at = row_address + key * p.bias_key
    return round_real(read_storage(at, p.bias_storage), p.real_bytes)


@kernel("iiiii>b")
def is_in_blocks(params, batch, head, row, key):
    """Whether the block mask shows a key."""
    p = params_at(params)
    kinds = p.kinds
    if not kinds:
        return True
    kinds += batch * p.kinds_batch + head * p.kinds_head + row // p.kinds_rows * p.kinds_row
    kind = get_u8(kinds, key // p.kinds_keys)
    if kind == masks.EDGE:
        return mask_mod_one(p.run_mask_mod_one, batch, head, row, key, p.mask_words) != 0
    return kind == masks.FULL


@kernel("iiiiiii>b")
def is_visible(params, batch, head, row, mask_row, bias_row, key):
    """Whether masks and bias show a key of the row's interval."""
    p = params_at(params)
    if mask_row and get_u8(mask_row, key * p.mask_key) == 0:
        return False
    if not is_in_blocks(params, batch, head, row, key):
        return False
    return not (bias_row and bias_at(params, bias_row, key) == -math.inf)


@kernel("iiiii>b")
def is_kept(params, batch, head, row, key):
    """Whether dropout keeps the entry."""
    p = params_at(params)
    if not p.dropout:
        return True
    seed = p.seed
    words = philox4x32(key // 4, row, head, batch, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return words[key % 4] >= p.threshold


@kernel("iiii>ii")
def row_addresses(params, batch, head, row):
    """Addresses of the row's mask and bias, 0 without."""
    p = params_at(params)
    mask, bias = p.mask, p.bias
    if mask:
        mask += get_i64(p.mask_offsets, batch)
        mask += head * p.mask_head + row * p.mask_row
    if bias:
        bias += get_i64(p.bias_offsets, batch)
        bias += head * p.bias_head + row * p.bias_row
    return mask, bias


@kernel("iii>ii")
def key_interval(params, batch, row):
    """The keys that lengths, window and causality leave to the row."""
    p = params_at(params)
    return row_interval(
        row,
        get_i64(p.k_from, batch),
        get_i64(p.k_to, batch),
        get_i64(p.seqused_q, batch),
        get_i64(p.seqused_k, batch),
    )


def mark_visible(params, w, batch, first_key, n, keep_k, keep_v):
    """Mark, for the row in lane 0, the keys it sees and the values it multiplies."""
    p = params_at(params)
    row = get_i32(w + p.at_row, 0)
    head = get_i32(w + p.at_head, 0)
    mask_row, bias_row = row_addresses(params, batch, head, row)
    for j in range(n):
        seen = is_visible(params, batch, head, row, mask_row, bias_row, first_key + j)
        set_u8(keep_k, j, 1 if seen else 0)
        kept = seen and is_kept(params, batch, head, row, first_key + j)
        set_u8(keep_v, j, 1 if kept else 0)


@kernel("iiiiiiifii>f")
def exact_score(params, batch, head, row, q, k, bias_row, slope, position, key):
    """The score of one visible key in natural units, in float64; -inf if the score_mod hides it."""
    p = params_at(params)
    score = p.scale * dot(p.run_dot, q, p.q_dim, k, p.k_dim, p.head_dim)
    if p.run_score_mod:
        score = score_mod_one(p.run_score_mod_one, score, batch, head, row, key, p.score_words)
        if score == -math.inf:
            return score
    softcap = p.softcap
    if softcap > 0.0:
        score = softcap * math.tanh(score / softcap)
    if slope != 0.0:
        score -= slope * abs(position - key)
    if bias_row:
        score += bias_at(params, bias_row, key)
    return score


@kernel("iiii>b")
def has_nan_value(params, batch, head, row):
    """Whether the row multiplies a value that is NaN in every column, and so is rightly NaN."""
    p = params_at(params)
    low, high = key_interval(params, batch, row)
    v = p.v + get_i64(p.v_offsets, batch)
    v += head // p.group_size * p.v_head
    columns, v_dim = p.head_dim_v, p.v_dim
    mask_row, bias_row = row_addresses(params, batch, head, row)
    for key in range(low, high):
        at, d = v + key * p.v_row, 0
        while d < columns and math.isnan(read_storage(at + d * v_dim, p.storage)):
            d += 1
        if (
            d == columns
            and is_visible(params, batch, head, row, mask_row, bias_row, key)
            and is_kept(params, batch, head, row, key)
        ):
            return True
    return False


@kernel("iiiii>")
def exact_row(params, w, batch, head, row):
    """One row in float64, from the definition: maximum, weights, sum; rounded once.

    Left unfinished if told to stop.
    """
    p = params_at(params)
    columns, v_dim = p.head_dim_v, p.v_dim
    used_q = get_i64(p.seqused_q, batch)
    low, high = key_interval(params, batch, row)
    q = p.q + get_i64(p.q_offsets, batch)
    q += head * p.q_head + row * p.q_row
    kv_head = head // p.group_size
    k = p.k + get_i64(p.k_offsets, batch)
    v = p.v + get_i64(p.v_offsets, batch)
    k += kv_head * p.k_head
    v += kv_head * p.v_head
    k_row, v_row = p.k_row, p.v_row
    mask_row, bias_row = row_addresses(params, batch, head, row)
    slope, position = 0.0, row + get_i64(p.q_offset, batch)
    if p.slopes:
        slope = get_f64(p.slopes, batch * p.num_heads + head)
    sink = -math.inf
    if p.sinks and row < used_q:
        sink = get_f64(p.sinks, head)

    largest, poisoned = sink, not sink < math.inf
    for key in range(low, high):
        if get_atomic(params + COUNTER) >= STOP:
            return
        if is_visible(params, batch, head, row, mask_row, bias_row, key):
            at_k = k + key * k_row
            score = exact_score(params, batch, head, row, q, at_k, bias_row, slope, position, key)
            if score > largest:
                largest = score
            if score != score or score == math.inf:
                poisoned = True  # every output is NaN, whatever the other keys are
                break

    sums = w + p.at_exact
    shrunk, smallest, greatest = sums + 8 * columns, sums + 16 * columns, sums + 24 * columns
    for d in range(columns):
        set_f64(sums, d, 0.0)
        set_f64(shrunk, d, 0.0)
        set_f64(smallest, d, math.inf)
        set_f64(greatest, d, -math.inf)
    total = math.exp(sink - largest) if sink != -math.inf else 0.0
    if largest != -math.inf and not poisoned:
        for key in range(low, high):
            if get_atomic(params + COUNTER) >= STOP:
                return
            if not is_visible(params, batch, head, row, mask_row, bias_row, key):
                continue
            at_k = k + key * k_row
            score = exact_score(params, batch, head, row, q, at_k, bias_row, slope, position, key)
            if score == -math.inf and p.run_score_mod:
                continue
            weight = math.exp(score - largest)
            total += weight
            if is_kept(params, batch, head, row, key):
                for d in range(columns):
                    value = read_storage(v + key * v_row + d * v_dim, p.storage)
                    set_f64(sums, d, get_f64(sums, d) + weight * value)
                    set_f64(shrunk, d, get_f64(shrunk, d) + weight * (value * SHRINK))
                    if value < get_f64(smallest, d):
                        set_f64(smallest, d, value)
                    if value > get_f64(greatest, d):
                        set_f64(greatest, d, value)

    keep_scale = p.keep_scale
    out = p.out + get_i64(p.out_offsets, batch)
    out += head * p.out_head + row * p.out_row
    for d in range(columns):
        mean = 0.0
        if poisoned:
            mean = math.nan
        elif total > 0.0:
            mean = get_f64(sums, d) / total
            if not math.isfinite(mean):
                mean = get_f64(shrunk, d) / total / SHRINK
            # A mean lies between its values, or between them and 0 where a sink takes weight; the
            # last rounding must not take it past them.
            bound = greatest if mean > 0.0 else smallest
            limit = get_f64(bound, d)
            if math.isinf(mean) and math.isfinite(limit):
                mean = limit
            mean *= keep_scale
        write_storage(out + d * p.out_dim, p.out_storage, mean + 0.0)
    if p.lse:
        at = (batch * p.num_heads + head) * p.seqlen_q + row
        value = largest
        if poisoned:
            value = math.nan
        elif total > 0.0 and largest != -math.inf:
            value = largest + math.log(total)
        set_real(p.lse, at, p.real_bytes, value)


def rescue(params, w, batch, entry):
    """Compute one bad row again, alone: first as before, then exactly. 0 if told to stop.

    A NaN or inf in a value that this row may not see, but a neighbour does, has met a weight of 0.
    Entered as zeros, hidden keys leave the row the bits that a clean call would give it. Whatever
    is still not finite goes through float64 and is rounded once. ``entry`` is from `finish`.
    """
    p = params_at(params)
    head, row = entry // 2 // p.seqlen_q, entry // 2 % p.seqlen_q
    if entry % 2 == 0:
        # (What a score_mod hides is known when the scores are.)
        if not p.run_score_mod and has_nan_value(params, batch, head, row):
            return 1
        fill_lanes(params, w, batch, head, row, 1, 1)
        if not attend_chunks(params, w, batch, head // p.group_size, 1, 1, 1, 0, p.chunks):
            return 0
        if finish(params, w, batch, 1, 1) == 0:
            return 1
    exact_row(params, w, batch, head, row)
    return 1
