"""Pieces of the Hopper kernel: from scores to weights.

What a call does to its scores is one pass over a tile of them, in registers, between the product
of queries and keys and the softmax: scale, score_mod, softcap, ALiBi, bias, then what is hidden. A
thread holds parts of two rows: element i of its scores belongs to row ``i % 4 // 2`` and to the key
``key + column + i // 4 * 8 + i % 2``. With a pass that computes, scores are in natural units and
the factor of their exponents is log2(e); without one they stay products of queries and keys.

Operands are read where a row sees the key. Rows that are nobody's read what the first row reads,
and nobody looks at what comes of it.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not. What is read of two operands
# stands under a condition of its own, which is a constant of the kernel.
# A piece assigns to its parameters, which are variables of the caller.
# ruff: noqa: SIM201, SIM102, F841
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fusedattn.cuda import ptx, user
from fusedattn.cuda.unroll import inlined, unrolled

NO_KEY = -math.inf
LN_2 = math.log(2.0)
TWICE_LOG2_E = 2.0 / LN_2
# Logits in base 2 beyond this are subtracted before they are scaled.
LARGE = 2.0**20
# tanh(y) = y + y^3 (c_0 + c_1 y^2 + ...) for small y, fitted to 0.3 units of roundoff; beyond, 1 -
# 2 / (1 + exp(2 y)). Both together stay within 6 units of roundoff of 2^-24, relatively.
SMALL = 0.7
TANH = (
    -0.3333319127559662,
    0.1332911103963852,
    -0.053558871150016785,
    0.020091990008950233,
    -0.005138678476214409,
)
# What an item of the batch has in the table of places: offsets of its operands in bytes, int64.
PLACES = ("mask", "bias", "slopes", "sinks")
PLACE_BYTES = 8 * len(PLACES)


class Features(NamedTuple):
    """What a kernel does to scores and weights; types are those of the operands."""

    softcap: bool = False
    slopes: str | None = None
    sinks: str | None = None
    bias: str | None = None
    bias_pairs: bool = False  # neighbouring keys can be read together
    mask: bool = False
    mask_pairs: bool = False
    dropout: bool = False
    functions: user.Functions | None = None  # of the user's

    @property
    def natural(self) -> bool:
        """Whether scores are brought to natural units."""
        score_mod = self.functions is not None and self.functions.score_mod is not None
        return self.softcap or score_mod or bool(self.slopes or self.sinks or self.bias)

    @property
    def hides(self) -> bool:
        """Whether keys are hidden one by one in every tile, and not by intervals alone."""
        score_mod = self.functions is not None and self.functions.score_mod is not None
        return self.mask or self.bias is not None or score_mod

    @property
    def pairs(self) -> bool:
        """Whether all that is read for each key is read for two of them at once."""
        return self.bias_pairs == (self.bias is not None) and self.mask_pairs == self.mask

    @property
    def blocks(self) -> bool:
        """Whether there is a block mask: tiles are skipped, and keys of some are hidden."""
        return self.functions is not None and self.functions.predicate is not None


PLAIN = Features()


def make_bring_near(types: Any, count: int) -> Any:
    """Return the piece that shifts so many scores before they are scaled, where they are large."""
    float32 = types.float32

    @inlined
    def bring_near(scores, row_max, shift):
        if max(abs(shift[0]), abs(shift[1])) > float32(LARGE):
            # Far from 0, a product rounded here and not there may differ by more than the largest
            # exponent.
            for h in unrolled(2):
                shift[h] = float32(0)
                base = row_max[h]
                if base == float32(NO_KEY):
                    base = float32(0)
                for i in unrolled(count // 4):
                    scores[4 * i + 2 * h] -= base
                    scores[4 * i + 2 * h + 1] -= base

    return bring_near


class Pieces(NamedTuple):
    """What the kernel is written with."""

    sink_of: Any
    begin_rows: Any
    touch: Any
    hide: Any
    weigh: Any
    drop: Any
    finish: Any


def make(tools: Any, config: Any) -> Pieces:
    """Return the pieces, for one toolchain and `hopper.Config`."""
    cuda, types, asm = tools.cuda, tools.types, tools.asm
    int32, int64, float32 = types.int32, types.int64, types.float32
    features: Features = config.features
    SCORES, CHAINS = config.block_k // 2, 4
    assert SCORES <= 64, "a word has a bit for each key of a thread's row"
    NATURAL, SOFTCAP, MASK = features.natural, features.softcap, features.mask
    SLOPES, SINKS, BIAS = (
        kind is not None for kind in (features.slopes, features.sinks, features.bias)
    )
    BIAS_PAIRS, MASK_PAIRS = features.bias_pairs, features.mask_pairs
    modify: Any = None
    SCORE_MOD = False
    FEATURED, DROPOUT = features != PLAIN, features.dropout
    if features.functions is not None:
        modify = user.device_functions(tools, features.functions, float32).modify
        SCORE_MOD = modify is not None
    # Quads of neighbouring keys that dropout decides on, of a tile and of a word.
    QUADS = config.block_k // 8
    IN_WORD = max(n for n in range(1, 9) if QUADS % n == 0)
    WORDS = QUADS // IN_WORD

    exp2, log2, fma, maximum = asm(ptx.EXP2), asm(ptx.LOG2), asm(ptx.FMA), asm(ptx.MAX)
    reciprocal, copy_sign = asm(ptx.RECIPROCAL), asm(ptx.COPY_SIGN)
    swap_1, swap_2 = asm(ptx.SWAP_1), asm(ptx.SWAP_2)
    unknown, load_place = asm(ptx.UNKNOWN_LONG), asm(ptx.LOAD_LONG)
    load_offset = asm(ptx.LOAD_INT)
    load_sink = asm(ptx.LOAD_ELEMENT[features.sinks or "float32"])
    load_slope = asm(ptx.LOAD_ELEMENT[features.slopes or "float32"])
    load_bias = asm(ptx.LOAD_ELEMENT[features.bias or "float32"])
    load_halves, load_byte, load_bytes = (
        asm(ptx.LOAD_HALVES), asm(ptx.LOAD_BYTE), asm(ptx.LOAD_BYTES),
    )  # fmt: skip
    half = features.bias if BIAS_PAIRS and features.bias else "float16"
    lower, upper = asm(ptx.LOWER[half]), asm(ptx.UPPER[half])
    bring_near = make_bring_near(types, SCORES)
    bits_from = asm(ptx.BITS)
    kept_by_philox, swap_words = asm(ptx.kept_by_philox()), asm(ptx.swap_words(1))

    @inlined
    def sink_of(sink, batch, head, sinks, places, sinks_head):
        at = load_place(places + int64(batch) * int64(PLACE_BYTES) + int64(24))
        sink = load_sink(sinks + at + int64(head) * sinks_head)

    @inlined
    def begin_rows(
        query, query_head, column, batch, head, split, used_q, seqlen_q,
        row_max, row_sum, slope, position, mask_at, bias_at, item,
        mask, bias, slopes, sinks, places,
        mask_head, mask_row, bias_head, bias_row, slopes_head, sinks_head,
    ):  # fmt: skip
        # What my rows begin with, and where their operands lie.
        if FEATURED:
            place = places + int64(batch) * int64(PLACE_BYTES)
        for h in unrolled(2):
            row_max[h], row_sum[h] = float32(NO_KEY), float32(0)
            if FEATURED:
                row, its_head = query[h], query_head[h]
                if row >= seqlen_q:
                    row, its_head = int32(0), head
            if MASK:
                mask_at[h] = mask + load_place(place)
                mask_at[h] += int64(its_head) * mask_head + int64(row) * mask_row
            if BIAS:
                bias_at[h] = bias + load_place(place + int64(8))
                bias_at[h] += int64(its_head) * bias_head + int64(row) * bias_row
            if SLOPES:
                slope[h] = -load_slope(
                    slopes + load_place(place + int64(16)) + int64(its_head) * slopes_head
                )
                position[h] = int32(row + load_offset(item + int64(24)) - column)
            if SINKS:
                # A key without a value; one thread of the row counts it, in one split.
                if split == 0 and query[h] < used_q:
                    sink = float32(0)
                    sink_of(sink, batch, its_head, sinks, places, sinks_head)
                    row_max[h] = sink
                    if column == 0 and not sink == float32(NO_KEY):
                        row_sum[h] = float32(1) + (sink - sink)  # NaN of one that is not finite

    @inlined
    def cap(scores, i, softcap, softcap_inverse):
        y = scores[i] * softcap_inverse
        z = y * y
        power = fma(z, float32(TANH[4]), float32(TANH[3]))
        power = fma(power, z, float32(TANH[2]))
        power = fma(power, z, float32(TANH[1]))
        power = fma(power, z, float32(TANH[0]))
        size = abs(y)
        grown = exp2(size * float32(TWICE_LOG2_E))
        large = fma(reciprocal(grown + float32(1)), float32(-2), float32(1))
        scores[i] = copy_sign(y, large) * softcap
        if size < float32(SMALL):
            scores[i] = fma(y * z, power, y) * softcap

    @inlined
    def read_bias(biases, near, row_at, last, careful):
        if careful:
            for j in unrolled(2):
                biases[j] = load_bias(row_at + int64(near[j]) * last)
        elif BIAS_PAIRS:
            both = load_halves(row_at + int64(near[0]) * int64(2))
            biases[0], biases[1] = lower(both), upper(both)
        else:
            for j in unrolled(2):
                biases[j] = load_bias(row_at + int64(near[j]) * last)

    @inlined
    def read_mask(marks, near, row_at, last, careful):
        if careful:
            for j in unrolled(2):
                marks[j] = load_byte(row_at + int64(near[j]) * last)
        elif MASK_PAIRS:
            both = load_bytes(row_at + int64(near[0]))
            marks[0], marks[1] = int32(both & int32(255)), int32(both >> int32(8))
        else:
            for j in unrolled(2):
                marks[j] = load_byte(row_at + int64(near[j]) * last)

    @inlined
    def touch(
        scores, key, column, low, high, careful, query, query_head, batch,
        slope, position, mask_at, bias_at, mask_last, bias_last, scale, softcap, softcap_inverse,
        near, biases, marks, *extra,
    ):  # fmt: skip
        # Where rows do not see all keys of the tile, `careful` looks before it reads: a key that is
        # not to be read is replaced by one that is, and hidden afterwards.
        if BIAS:
            bias_step = unknown(bias_last)
        if MASK:
            mask_step = unknown(mask_last)
        for pair in unrolled(SCORES // 2):
            for j in unrolled(2):
                near[j] = int32(key + column + (pair // 2 * 8 + j))
                if careful:
                    last_key = int32(max(int32(high[pair % 2] - 1), int32(0)))
                    near[j] = int32(min(max(near[j], low[pair % 2]), last_key))
            if BIAS:
                read_bias(biases, near, bias_at[pair % 2], bias_step, careful)
            if MASK:
                read_mask(marks, near, mask_at[pair % 2], mask_step, careful)
            for j in unrolled(2):
                if NATURAL:
                    scores[2 * pair + j] *= scale
                if SCORE_MOD:
                    at = int32(key + column + (pair // 2 * 8 + j))
                    if careful:
                        if low[pair % 2] <= at and at < high[pair % 2]:
                            x = scores[2 * pair + j]
                            scores[2 * pair + j] = modify(
                                x, batch, query_head[pair % 2], query[pair % 2], at, *extra
                            )
                    else:
                        x = scores[2 * pair + j]
                        scores[2 * pair + j] = modify(
                            x, batch, query_head[pair % 2], query[pair % 2], at, *extra
                        )
                    modified = scores[2 * pair + j]
                if SOFTCAP:
                    cap(scores, 2 * pair + j, softcap, softcap_inverse)
                if SLOPES:
                    distance = float32(int32(position[pair % 2] - key))
                    distance -= float32(pair // 2 * 8 + j)
                    scores[2 * pair + j] = fma(slope[pair % 2], abs(distance), scores[2 * pair + j])
                # What is read hides a key by selection, and not by arithmetic.
                if BIAS:
                    scores[2 * pair + j] += biases[j]
                    if biases[j] == float32(NO_KEY):
                        scores[2 * pair + j] = float32(NO_KEY)
                if SCORE_MOD:
                    if modified == float32(NO_KEY):
                        scores[2 * pair + j] = float32(NO_KEY)
                if MASK:
                    if marks[j] == 0:
                        scores[2 * pair + j] = float32(NO_KEY)

    @inlined
    def count_below(bound, key, column, count):
        # How many of my keys of a row lie before one; of each eight I have the first two.
        ahead = int32(bound - key - column)
        count = int32(int32(ahead >> int32(3)) * int32(2) + min(int32(ahead & int32(7)), int32(2)))
        count = int32(min(max(count, int32(0)), int32(SCORES // 2)))

    @inlined
    def hide(scores, key, column, low, high):
        # A bit for each of my keys: to look at one takes fewer instructions than to compare.
        seen = cuda.local.array(2, int32)
        for h in unrolled(2):
            first, last = int32(0), int32(0)
            count_below(low[h], key, column, first)
            count_below(high[h], key, column, last)
            seen[h] = bits_from(first, int32(max(int32(last - first), int32(0))))
        for i in unrolled(SCORES):
            if (seen[i % 4 // 2] >> int32(i // 4 * 2 + i % 2)) & int32(1) == 0:
                scores[i] = float32(NO_KEY)

    @inlined
    def shift_of(row_max, scale_log2, shift):
        # A row that has seen no key has nothing to shift by; -inf - -inf is NaN. The selection also
        # keeps the product from becoming one operation with a difference (see `ptx.MULTIPLY`).
        for h in unrolled(2):
            shift[h] = -row_max[h] * scale_log2
            if row_max[h] == float32(NO_KEY):
                shift[h] = float32(0)

    @inlined
    def weigh(scores, row_max, row_sum, rescale, scale_log2):
        # From scores to weights: the largest of each row, and what the rows before it shrink by.
        old = cuda.local.array(2, float32)
        shift = cuda.local.array(2, float32)
        start = cuda.local.array(2, float32)
        largest = cuda.local.array(2 * CHAINS, float32)
        shift_of(row_max, scale_log2, old)
        # Several at a time: each waits for the one before.
        for h in unrolled(2):
            for i in unrolled(CHAINS):
                largest[2 * i + h] = row_max[h]
        for i in unrolled(SCORES // 4):
            for h in unrolled(2):
                larger = maximum(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1])
                largest[2 * (i % CHAINS) + h] = maximum(largest[2 * (i % CHAINS) + h], larger)
        for h in unrolled(2):
            for i in unrolled(CHAINS):
                row_max[h] = maximum(row_max[h], largest[2 * i + h])
        for h in unrolled(2):
            row_max[h] = maximum(row_max[h], swap_1(row_max[h]))
        for h in unrolled(2):
            row_max[h] = maximum(row_max[h], swap_2(row_max[h]))
        shift_of(row_max, scale_log2, shift)
        for h in unrolled(2):
            start[h] = shift[h]
        bring_near(scores, row_max, start)
        for h in unrolled(2):
            # Of a row without a key so far, sums and outputs are 0: any factor will do.
            rescale[h] = exp2(min(shift[h] - old[h], float32(0)))
            row_sum[h] *= rescale[h]
        for i in unrolled(SCORES // 4):
            for h in unrolled(2):
                for j in unrolled(4 * i + 2 * h, 4 * i + 2 * h + 2):
                    scores[j] = exp2(fma(scores[j], scale_log2, start[h]))
                row_sum[h] += scores[4 * i + 2 * h] + scores[4 * i + 2 * h + 1]

    @inlined
    def drop(scores, key, column, query, query_head, batch, threshold, seed_low, seed_high):
        # Four neighbouring keys share four random words, and two threads hold them for two rows:
        # each thread decides on all four keys of one row, and both tell each other.
        second = int32((column >> int32(1)) & int32(1))
        row, its_head = query[0], query_head[0]
        if second == 1:
            row, its_head = query[1], query_head[1]
        quad = int32((key + column) >> int32(2))
        for word in unrolled(WORDS):
            mine = int32(0)
            for i in unrolled(IN_WORD):
                kept = kept_by_philox(
                    int32(quad + 2 * (word * IN_WORD + i)), row, its_head, batch,
                    seed_low, seed_high, threshold,
                )  # fmt: skip
                mine = int32(mine | (kept << int32(4 * i)))
            other = swap_words(mine)
            if second == 1:
                mine, other = int32(other >> int32(2)), int32(mine >> int32(2))
            for i in unrolled(IN_WORD):
                for j in unrolled(2):
                    if (mine >> int32(4 * i + j)) & int32(1) == 0:
                        scores[4 * (word * IN_WORD + i) + j] = float32(0)
                    if (other >> int32(4 * i + j)) & int32(1) == 0:
                        scores[4 * (word * IN_WORD + i) + 2 + j] = float32(0)

    @inlined
    def finish(row_sum, row_max, scale_log2, keep_scale, factor, row_lse):
        # Of each row: its sum, what its outputs are multiplied by, and its lse.
        for h in unrolled(2):
            row_sum[h] += swap_1(row_sum[h])
        for h in unrolled(2):
            row_sum[h] += swap_2(row_sum[h])
        for h in unrolled(2):
            # The largest weight is 1, so a sum that is not 0 is no small number either.
            factor[h] = reciprocal(row_sum[h])
            if row_sum[h] == float32(0):
                factor[h] = float32(1)
            if NATURAL:
                row_lse[h] = fma(log2(row_sum[h]), float32(LN_2), row_max[h])
            else:
                row_lse[h] = fma(row_max[h], scale_log2, log2(row_sum[h])) * float32(LN_2)
            if DROPOUT:
                factor[h] *= keep_scale

    return Pieces(sink_of, begin_rows, touch, hide, weigh, drop, finish)
