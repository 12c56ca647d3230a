"""The portable forward kernel: any GPU from compute capability 7.0, and Numba's simulator.

A block of threads owns a tile of query rows and a chunk of value columns, and walks the keys that
any of its rows sees, a tile at a time (online softmax, FlashAttention-2, arXiv:2307.08691). Both
products are register tiles over operands staged in shared memory: no warp intrinsics, no PTX, every
dtype, every feature; functions of the user's are device functions. Halves are read as bits and
accumulated in float32, never in tf32.

A weight that must not touch its value (a hidden key, a dropped one) is stored as -1: the product of
a weight of 0 and a NaN would reach rows that do not see the key. Only tiles in which something is
hidden look at the sign.
"""

# A condition that is a constant of the kernel stands alone, so that its branch is cut off early.
# "not a == b" is true of NaN with every compiler; "a != b" is not.
# ruff: noqa: SIM102, SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fusedattn import masks
from fusedattn.cuda import user
from fusedattn.cuda.elements import make_loader, make_storer
from fusedattn.cuda.params import HEADER, ITEM, ITEM_SIZE, SLOT
from fusedattn.cuda.unroll import unrolled
from fusedattn.philox import WORD, philox4x32

# Rows of a staging buffer are so many elements longer than the tile, against bank conflicts; a
# multiple of 4 keeps them aligned for vector loads.
PAD = 4


class Config(NamedTuple):
    """What is fixed when the kernel is compiled: types, features, shape of the tile."""

    storage: str
    out_storage: str
    bias: str | None
    slopes: str | None
    sinks: str | None
    mask: bool
    softcap: bool
    dropout: bool
    rows: int  # threads along the rows of a tile
    columns: int  # threads along its keys, and along the value columns
    rows_each: int  # rows of a thread
    keys_each: int
    columns_each: int
    dims: int  # head dims staged at a time
    keys_staged: int  # keys whose values are staged at a time
    split: int = 0  # keys of a split, a multiple of block_k; 0 where keys are not shared out
    functions: user.Functions | None = None  # of the user's

    @property
    def block_q(self) -> int:
        """Rows of a tile."""
        return self.rows * self.rows_each

    @property
    def block_k(self) -> int:
        """Keys of a tile; tiles begin at its multiples."""
        return self.columns * self.keys_each

    @property
    def block_v(self) -> int:
        """Value columns of a block of threads."""
        return self.columns * self.columns_each

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows * self.columns


PARAMETERS = ("q", "k", "v", "out", "lse", "mask", "bias", "slopes", "sinks", "words", "reals")


def parameters(config: Config) -> tuple[str, ...]:
    """Types of the kernel's parameters: flat arrays, and what functions of the user's read."""
    real = "float64" if config.storage == "float64" else "float32"
    optional = (config.bias or real, config.slopes or real, config.sinks or real)
    names = (*(config.storage,) * 3, config.out_storage, real, "bool", *optional, "int64", real)
    return (*(f"[{name}]" for name in names), *user.parameters_of(config.functions))


def names(config: Config) -> tuple[str, ...]:
    """Names of the kernel's parameters."""
    return (*PARAMETERS, *user.names_of(config.functions))


def make(tools: Any, config: Config) -> Any:
    """Return the kernel, a Python function for one toolchain."""
    cuda, types = tools.cuda, tools.types
    real = types.float64 if config.storage == "float64" else types.float32
    int64 = types.int64
    load = make_loader(tools, config.storage, real)
    load_bias = make_loader(tools, config.bias or "float32", real)
    load_slope = make_loader(tools, config.slopes or "float32", real)
    load_sink = make_loader(tools, config.sinks or "float32", real)
    store = make_storer(tools, config.out_storage)
    row_interval = tools.device(masks.row_interval)
    block_interval = tools.device(masks.block_interval)
    common_interval = tools.device(masks.common_interval)
    philox = tools.device(philox4x32)
    exp, log, tanh = math.exp, math.log, math.tanh
    NO_KEY = -math.inf

    has_bias, has_mask, has_dropout = config.bias is not None, config.mask, config.dropout
    has_softcap, has_slopes = config.softcap, config.slopes is not None
    has_sinks, has_splits, SPLIT = config.sinks is not None, config.split > 0, config.split
    of_user = user.DeviceFunctions()
    if config.functions is not None:
        of_user = user.device_functions(tools, config.functions, real)
    modify, shows, kind_at, keys_of = (
        of_user.modify, of_user.shows, of_user.kind_at, of_user.keys,
    )  # fmt: skip
    has_score_mod, has_block_mask = modify is not None, shows is not None
    SKIP, FULL = masks.SKIP, masks.FULL
    plain = not (has_bias or has_mask or has_dropout or has_score_mod)
    COLUMNS, THREADS = config.columns, config.threads
    MQ, NK, NV = config.rows_each, config.keys_each, config.columns_each
    SCORES, OUTPUTS = MQ * NK, MQ * NV
    BLOCK_Q, BLOCK_K, BLOCK_V = config.block_q, config.block_k, config.block_v
    PARTS = THREADS // BLOCK_Q
    # Scores of a row looked at together: where little is done to each, waiting is what it costs.
    simple = plain and not (has_softcap or has_slopes or has_block_mask)
    AT_ONCE = min(8, BLOCK_K // PARTS) if simple else 1
    TURNS = BLOCK_K // PARTS // AT_ONCE
    DIMS, STAGED = config.dims, config.keys_staged
    Q_STEP, K_STEP, P_STEP = BLOCK_Q + PAD, BLOCK_K + PAD, BLOCK_Q + PAD
    K_AT = DIMS * Q_STEP
    STAGE = max(K_AT + DIMS * K_STEP, STAGED * BLOCK_V, PARTS * BLOCK_Q)
    WEIGHTS = BLOCK_K * P_STEP
    # How often each thread loads; a pass covers so many rows.
    LOADED = THREADS // DIMS
    Q_LOADS, K_LOADS = BLOCK_Q // LOADED, BLOCK_K // LOADED
    V_LOADS = STAGED * BLOCK_V // THREADS
    (
        NUM_HEADS, GROUP, HEADS_HERE, SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V, ROW_BLOCKS,
        RETURN_LSE, THRESHOLD, SEED_LOW, SEED_HIGH, SLOPES_HEAD, SINKS_HEAD,
        Q, K, V, OUT, MASK, BIAS,
    ) = (SLOT[name] for name in (
        "num_heads", "group_size", "heads_per_item", "seqlen_q", "seqlen_k", "head_dim",
        "head_dim_v", "row_blocks", "return_lse", "threshold", "seed_low", "seed_high",
        "slopes_head", "sinks_head",
        "q_head", "k_head", "v_head", "out_head", "mask_head", "bias_head",
    ))  # fmt: skip
    (
        K_FROM, K_TO, Q_OFFSET, USED_Q, USED_K, SLOPES_AT, SINKS_AT,
        Q_AT, K_ITEM, V_AT, OUT_AT, MASK_AT, BIAS_AT,
    ) = (ITEM[name] for name in (
        "k_from", "k_to", "q_offset", "seqused_q", "seqused_k", "slopes_at", "sinks_at",
        "q_at", "k_at", "v_at", "out_at", "mask_at", "bias_at",
    ))  # fmt: skip

    def kernel(q, k, v, out, lse, mask, bias, slopes, sinks, words, reals, *extra):
        stage = cuda.shared.array(STAGE, real)
        weights = cuda.shared.array(WEIGHTS, real)
        factors = cuda.shared.array(BLOCK_Q, real)  # of a row: its rescale, at last 1 / row_sum
        q_places = cuda.shared.array(BLOCK_Q, int64)  # where a row begins; -1 past the last
        out_places = cuda.shared.array(BLOCK_Q, int64)
        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        thread = ty * COLUMNS + tx

        # Which tile: blocks of rows from the last, which under a causal mask has the most to do;
        # within one, the heads of a KV group side by side; splits of the keys one after another.
        heads_here, seqlen_q, seqlen_k = words[HEADS_HERE], words[SEQLEN_Q], words[SEQLEN_K]
        groups = words[NUM_HEADS] // heads_here
        abreast = (words.shape[0] - HEADER) // ITEM_SIZE * groups
        group_index = int64(cuda.blockIdx.x) % abreast
        turn, split = int64(cuda.blockIdx.x) // abreast, int64(0)
        if has_splits:
            turn, split = turn % words[ROW_BLOCKS], turn // words[ROW_BLOCKS]
        first = (words[ROW_BLOCKS] - 1 - turn) * BLOCK_Q
        batch, head_lo = group_index // groups, group_index % groups * heads_here
        column_lo = int64(cuda.blockIdx.y) * BLOCK_V
        item = HEADER + batch * ITEM_SIZE
        k_from, k_to = words[item + K_FROM], words[item + K_TO]
        used_q, used_k = words[item + USED_Q], words[item + USED_K]
        head_kv = head_lo // words[GROUP]
        head_dim, head_dim_v = words[HEAD_DIM], words[HEAD_DIM_V]
        k_base = words[item + K_ITEM] + head_kv * words[K]
        v_base = words[item + V_AT] + head_kv * words[V]
        q_last, k_row, k_last = words[Q + 2], words[K + 1], words[K + 2]
        v_row, v_last = words[V + 1], words[V + 2]

        # The row whose scores this thread looks at, with others: each takes a part of the keys.
        my_row, my_part = thread % BLOCK_Q, thread // BLOCK_Q
        query, head = seqlen_q, head_lo
        if first + my_row < heads_here * seqlen_q:
            query = (first + my_row) % seqlen_q
            head = head_lo + (first + my_row) // seqlen_q
        low, high = row_interval(query, k_from, k_to, used_q, used_k)
        slope, row_max, row_sum = real(0), real(NO_KEY), real(0)
        mask_row, bias_row = int64(0), int64(0)
        if query < seqlen_q:
            if has_mask:
                mask_row = words[item + MASK_AT] + head * words[MASK] + query * words[MASK + 1]
            if has_bias:
                bias_row = words[item + BIAS_AT] + head * words[BIAS] + query * words[BIAS + 1]
            if has_slopes:
                slope = load_slope(slopes, words[item + SLOPES_AT] + head * words[SLOPES_HEAD])
            if has_sinks:
                if query < used_q and split == 0:
                    # A key without a value; one thread of the row counts it, in one split.
                    row_max = load_sink(sinks, words[item + SINKS_AT] + head * words[SINKS_HEAD])
                    if my_part == 0:
                        row_sum = real(1)
                        if not row_max == real(NO_KEY):
                            row_sum += row_max - row_max  # NaN of one that is not finite
        if my_part == 0:
            q_places[my_row], out_places[my_row] = int64(-1), int64(-1)
            if query < seqlen_q:
                q_places[my_row] = words[item + Q_AT] + head * words[Q] + query * words[Q + 1]
                out_places[my_row] = (
                    words[item + OUT_AT] + head * words[OUT] + query * words[OUT + 1]
                )
                if has_splits:
                    place = split * abreast * heads_here + batch * words[NUM_HEADS] + head
                    out_places[my_row] = (place * seqlen_q + query) * head_dim_v

        scores = cuda.local.array(SCORES, real)
        acc = cuda.local.array(OUTPUTS, real)
        for i in unrolled(OUTPUTS):
            acc[i] = real(0)
        cuda.syncthreads()

        # The keys that any row here sees; heads on top of each other are as tall as the sequence.
        query_lo, query_hi = first, min(first + BLOCK_Q, seqlen_q)
        if heads_here > 1:
            query_lo, query_hi = int64(0), seqlen_q
        key_lo, key_hi = block_interval(query_lo, query_hi, k_from, k_to, used_q, used_k)
        all_lo, all_hi = common_interval(query_lo, query_hi, k_from, k_to, used_q, used_k)
        if has_splits:
            key_lo, key_hi = max(key_lo, split * SPLIT), min(key_hi, (split + 1) * SPLIT)
        key_lo = key_lo // BLOCK_K * BLOCK_K
        while key_lo < key_hi:
            clean = plain and all_lo <= key_lo and key_lo + BLOCK_K <= all_hi
            if has_block_mask:
                # Each thread looks at the blocks that its row meets, with others of the row.
                some, whole = int64(0), int64(1)
                if query < used_q:
                    block_keys = keys_of(*extra)
                    block_key = (key_lo // block_keys + my_part) * block_keys
                    while block_key < min(key_lo + BLOCK_K, key_hi):
                        kind = kind_at(batch, head, query, block_key, *extra)
                        if not kind == SKIP:
                            some = int64(1)
                        if not kind == FULL:
                            whole = int64(0)
                        block_key += PARTS * block_keys
                if cuda.syncthreads_or(some) == 0:
                    key_lo += BLOCK_K
                    continue
                is_whole = cuda.syncthreads_and(whole) != 0
                clean = clean and is_whole

            # Products of queries and keys, some head dims at a time.
            for i in unrolled(SCORES):
                scores[i] = real(0)
            dim_lo = int64(0)
            while dim_lo < head_dim:
                d = thread % DIMS
                inside = dim_lo + d < head_dim
                for n in unrolled(Q_LOADS):
                    r = thread // DIMS + n * LOADED
                    x = real(0)
                    if inside and q_places[r] >= 0:
                        x = load(q, q_places[r] + (dim_lo + d) * q_last)
                    stage[d * Q_STEP + r] = x
                for n in unrolled(K_LOADS):
                    r = thread // DIMS + n * LOADED
                    x = real(0)
                    if inside and key_lo + r < seqlen_k:
                        x = load(k, k_base + (key_lo + r) * k_row + (dim_lo + d) * k_last)
                    stage[K_AT + d * K_STEP + r] = x
                cuda.syncthreads()
                for d in range(DIMS):
                    for j in unrolled(NK):
                        x = stage[K_AT + d * K_STEP + tx * NK + j]
                        for i in unrolled(MQ):
                            scores[i * NK + j] += stage[d * Q_STEP + ty * MQ + i] * x
                cuda.syncthreads()
                dim_lo += DIMS
            for j in unrolled(NK):
                for i in unrolled(MQ):
                    weights[(tx * NK + j) * P_STEP + ty * MQ + i] = scores[i * NK + j]
            cuda.syncthreads()

            # From products to scores; the largest of my row, of my part and then of all parts.
            largest, hidden = row_max, int64(0)
            for turn in range(TURNS):
                for m in unrolled(AT_ONCE):
                    j = my_part + (turn * AT_ONCE + m) * PARTS
                    key = key_lo + j
                    x = weights[j * P_STEP + my_row] * reals[0]
                    seen = low <= key and key < high
                    if has_mask:
                        if seen:
                            seen = mask[mask_row + key * words[MASK + 2]] != 0
                    if has_block_mask:
                        if seen and not is_whole:
                            seen = shows(batch, head, query, key, *extra)
                    if has_score_mod:
                        if seen:
                            x = modify(x, batch, head, query, key, *extra)
                            seen = not x == real(NO_KEY)
                    if has_softcap:
                        x = reals[1] * real(tanh(x / reals[1]))
                    if has_slopes:
                        x -= slope * real(abs(query + words[item + Q_OFFSET] - key))
                    if has_bias:
                        if seen:
                            b = load_bias(bias, bias_row + key * words[BIAS + 2])
                            x += b
                            seen = not b == real(NO_KEY)
                    if seen:
                        if x > largest or not x == x:  # keeps NaN
                            largest = x
                    else:
                        hidden |= int64(1) << (turn * AT_ONCE + m)
                    weights[j * P_STEP + my_row] = x
            stage[my_part * BLOCK_Q + my_row] = largest
            cuda.syncthreads()
            for part in range(PARTS):
                x = stage[part * BLOCK_Q + my_row]
                if x > largest or not x == x:
                    largest = x
            # A row that has seen no key has nothing to shift by; -inf - -inf would be NaN.
            shift = largest
            if shift == real(NO_KEY):
                shift = real(0)
            rescale = real(exp(row_max - shift))
            row_max = largest
            row_sum *= rescale
            if my_part == 0:
                factors[my_row] = rescale
            for turn in range(TURNS):
                for m in unrolled(AT_ONCE):
                    j = my_part + (turn * AT_ONCE + m) * PARTS
                    key = key_lo + j
                    weight = real(-1)
                    if (hidden >> (turn * AT_ONCE + m)) & 1 == 0:
                        weight = real(exp(weights[j * P_STEP + my_row] - shift))
                        row_sum += weight
                        if has_dropout:
                            w0, w1, w2, w3 = philox(
                                key // 4, query, head, batch, words[SEED_LOW], words[SEED_HIGH]
                            )
                            word = w0
                            if key % 4 == 1:
                                word = w1
                            if key % 4 == 2:
                                word = w2
                            if key % 4 == 3:
                                word = w3
                            if (word & WORD) < words[THRESHOLD]:
                                weight = real(-1)
                    weights[j * P_STEP + my_row] = weight
            cuda.syncthreads()

            # Products of weights and values, some keys at a time.
            for i in unrolled(MQ):
                rescale = factors[ty * MQ + i]
                for j in unrolled(NV):
                    acc[i * NV + j] *= rescale
            staged_lo = int64(0)
            while staged_lo < BLOCK_K:
                for n in unrolled(V_LOADS):
                    at = thread + n * THREADS
                    key, c = key_lo + staged_lo + at // BLOCK_V, column_lo + at % BLOCK_V
                    x = real(0)
                    if key < seqlen_k and c < head_dim_v:
                        x = load(v, v_base + key * v_row + c * v_last)
                    stage[at] = x
                cuda.syncthreads()
                if clean:
                    for r in range(STAGED):
                        for j in unrolled(NV):
                            x = stage[r * BLOCK_V + tx + j * COLUMNS]
                            for i in unrolled(MQ):
                                weight = weights[(staged_lo + r) * P_STEP + ty * MQ + i]
                                acc[i * NV + j] += weight * x
                else:
                    for r in range(STAGED):
                        for i in unrolled(MQ):
                            weight = weights[(staged_lo + r) * P_STEP + ty * MQ + i]
                            if not weight < real(0):  # NaN counts
                                for j in unrolled(NV):
                                    x = stage[r * BLOCK_V + tx + j * COLUMNS]
                                    acc[i * NV + j] += weight * x
                cuda.syncthreads()
                staged_lo += STAGED
            key_lo += BLOCK_K

        # The sum of a row over its parts, in their order.
        stage[my_part * BLOCK_Q + my_row] = row_sum
        cuda.syncthreads()
        if my_part == 0:
            total = real(0)
            for part in range(PARTS):
                total += stage[part * BLOCK_Q + my_row]
            writes_lse = words[RETURN_LSE] != 0
            if has_splits:
                writes_lse = True  # it is the weight of the split
            if writes_lse and column_lo == 0 and query < seqlen_q:
                x = real(NO_KEY)
                if not total == real(0):
                    x = row_max + real(log(total))
                place = (batch * words[NUM_HEADS] + head) * seqlen_q + query
                if has_splits:
                    place = out_places[my_row] // head_dim_v  # or registers run out
                lse[place] = x
            factor = real(1)
            if not total == real(0):
                factor = real(1) / total
            if has_dropout:
                factor *= reals[2]
            factors[my_row] = factor
        cuda.syncthreads()
        for i in unrolled(MQ):
            place = out_places[ty * MQ + i]
            factor = factors[ty * MQ + i]
            if place >= 0:
                for j in unrolled(NV):
                    column = column_lo + tx + j * COLUMNS
                    if column < head_dim_v:
                        store(out, place + column * words[OUT + 2], acc[i * NV + j] * factor)

    return kernel
