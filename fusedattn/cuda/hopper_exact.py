"""The forward kernel for float32 on Hopper: exact products on the matrix unit, in parts.

A float32 number is the sum of three bfloat16 numbers, each a rounding of what the ones before it
left, and the matrix unit multiplies those exactly. Six of the nine products of parts are computed;
the others come to at most 2**-22 of the product, and to far less on average (Henry, Tang and
Heinecke, arXiv:1904.06376). The largest are added up apart from the others, because the matrix unit
cuts its sums off where float32 arithmetic rounds them.

One block of threads owns 128 query rows of a head. Warpgroup 0 loads tiles of keys and values,
splits them and stores the parts in shared memory; the next tile is on its way into its registers
while it waits for room. Each of the other two owns 64 rows. Their scores, weights and outputs stay
in registers, and while one takes exponentials the other multiplies: they take turns. Products of
weights and values are added up over one tile of keys and join the outputs by ordinary arithmetic.

Keys and values outside of what the rows of a tile see are stored as zeros, and never loaded.
An infinite element has the parts (infinity, NaN, NaN), so each sum with it is NaN: it is replaced
by the sum of first parts alone, which is then what IEEE arithmetic gives.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not.
# ruff: noqa: SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

from fusedattn import masks
from fusedattn.cuda import ptx
from fusedattn.cuda.hopper import PANEL, ROW_BYTES, TURN_BYTES, WARPGROUP
from fusedattn.cuda.hopper_scores import LN_2, NO_KEY, make_bring_near
from fusedattn.cuda.unroll import inlined, unrolled

PARTS = 3
WARPGROUPS = 2  # that compute
BLOCK_Q = 64 * WARPGROUPS
THREADS = WARPGROUP * (1 + WARPGROUPS)


class Config(NamedTuple):
    """What is fixed when the kernel is compiled."""

    dims: int  # of queries and keys, a multiple of 64
    dims_v: int
    block_k: int
    stages: int
    vectors: bool  # four elements of q, k and v are loaded at once
    pairs: bool  # two elements of out are stored at once
    registers: tuple[int, int]  # of a thread that loads, and of one that computes
    turns: bool = True  # warpgroups give their products to the matrix unit in turns

    @property
    def block_q(self) -> int:
        """Rows of a tile."""
        return BLOCK_Q

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return THREADS

    @property
    def q_bytes(self) -> int:
        """Shared memory of the queries."""
        return PARTS * BLOCK_Q * self.dims * 2

    @property
    def k_bytes(self) -> int:
        """Shared memory of a tile of keys."""
        return PARTS * self.block_k * self.dims * 2

    @property
    def v_bytes(self) -> int:
        """Shared memory of a tile of values."""
        return PARTS * self.block_k * self.dims_v * 2

    @property
    def shared(self) -> int:
        """Dynamic shared memory: tiles, barriers, and room to align."""
        return self.q_bytes + self.stages * (self.k_bytes + self.v_bytes) + 1024 + 256


# Addresses: q, k, v, out, lse (0 for none), items, the order of the tiles; then strides in bytes of
# heads, rows and elements.
# What the host can compute is a parameter: it takes no register.
PARAMETERS = ("int64",) * 19 + ("int32",) * 6 + ("float32",)
FORMATS = "q" * 19 + "i" * 6 + "f"
# What an item of the batch has in the table: four int32, and where q, k, v and out begin, as int64.
ITEM_BYTES = 48


def make(tools: Any, config: Config) -> Any:
    """Return the kernel, a Python function for one toolchain."""
    cuda, types = tools.cuda, tools.types
    int32, int64, float32 = types.int32, types.int64, types.float32
    asm = tools.asm
    row_interval = tools.device(masks.row_interval)
    block_interval = tools.device(masks.block_interval)
    common_interval = tools.device(masks.common_interval)
    int_as_float = tools.conversions()["int_as_float"]

    DIMS, DIMS_V, KEYS, STAGES = config.dims, config.dims_v, config.block_k, config.stages
    PANELS_V = DIMS_V // PANEL
    Q_PANEL, KV_PANEL = BLOCK_Q * ROW_BYTES, KEYS * ROW_BYTES
    K_PANEL = PARTS * KV_PANEL  # the parts of keys lie one behind the other in each panel
    Q_PART, K_PART, V_PART = DIMS // PANEL * Q_PANEL, KV_PANEL, PANELS_V * KV_PANEL
    K_BYTES, V_BYTES = config.k_bytes, config.v_bytes
    K_AT = config.q_bytes
    V_AT = K_AT + STAGES * K_BYTES
    K_FULL = V_AT + STAGES * V_BYTES
    V_FULL, K_EMPTY, V_EMPTY = (K_FULL + 8 * STAGES * n for n in (1, 2, 3))
    SCORES, OUTPUTS, WEIGHTS = KEYS // 2, DIMS_V // 2, KEYS // 4
    # Threads beside each other load a row, four elements each; so many rows at a time.
    FOURS, FOURS_V = DIMS // 4, DIMS_V // 4
    ROWS, ROWS_V = WARPGROUP // FOURS, WARPGROUP // FOURS_V
    Q_TURNS, K_TURNS, V_TURNS = 64 // ROWS, KEYS // ROWS, KEYS // ROWS_V
    K_MAJOR = ptx.descriptor_words(16, 1024)[0]
    MN_MAJOR = ptx.descriptor_words(KV_PANEL, 1024)[0]
    K_STEP, V_STEP = K_BYTES >> 4, V_BYTES >> 4
    PAIRS, TURNS = config.pairs, config.turns
    bring_near = make_bring_near(types, SCORES)
    few, many = config.registers

    shared_base, load_int, load_long = asm(ptx.SHARED_BASE), asm(ptx.LOAD_INT), asm(ptx.LOAD_LONG)
    store_float, store_floats = asm(ptx.STORE_FLOAT), asm(ptx.STORE_FLOATS)
    store_words = asm(ptx.STORE_SHARED_WORDS)
    exp2, log2, fma = asm(ptx.EXP2), asm(ptx.LOG2), asm(ptx.FMA)
    multiply = asm(ptx.MULTIPLY)
    maximum, maximum_or_nan = asm(ptx.MAX), asm(ptx.MAX_OR_NAN)
    pack, truncate = asm(ptx.PACK["bfloat16"]), asm(ptx.TRUNCATE)
    swap_1, swap_2 = asm(ptx.SWAP_1), asm(ptx.SWAP_2)
    barrier_init, barrier_fence = asm(ptx.BARRIER_INIT), asm(ptx.BARRIER_INIT_FENCE)
    arrive, wait = asm(ptx.BARRIER_ARRIVE), asm(ptx.BARRIER_WAIT)
    proxy_fence = asm(ptx.PROXY_FENCE)
    fewer_registers = asm(ptx.set_registers(few, more=False))
    more_registers = asm(ptx.set_registers(many, more=True))
    first_lane, unknown = asm(ptx.FIRST_LANE), asm(ptx.UNKNOWN)
    meet, arrive_at = asm(ptx.MEET), asm(ptx.ARRIVE)
    load_queries = asm(ptx.load_rows(Q_TURNS, ROWS, vectors=config.vectors))
    load_keys = asm(ptx.load_rows(K_TURNS, ROWS, vectors=config.vectors))
    load_values = asm(ptx.load_rows(V_TURNS, ROWS_V, vectors=config.vectors))
    begin_scores = asm(ptx.part_products(KEYS, DIMS, Q_PART, Q_PANEL, K_PANEL))
    begin_outputs = asm(ptx.part_accumulate(DIMS_V, KEYS, V_PART))
    scores_ready = asm(ptx.wait_for((PARTS * SCORES, SCORES), 0))
    outputs_ready = asm(ptx.wait_for(OUTPUTS, 0))

    def lower(word):
        return int_as_float(int32(word << 16))

    def upper(word):
        return int_as_float(int32(word & -65536))

    first_of, second_of = tools.device(lower), tools.device(upper)

    @inlined
    def clear(array, length):
        # What goes into an instruction is alive before it: so this is not, and takes no register.
        for i in unrolled(length):
            array[i] = float32(0)

    @inlined
    def advance(stage, phase):
        stage = int32(stage + 1)
        if stage == STAGES:
            stage, phase = int32(0), int32(phase ^ int32(1))

    @inlined
    def place_in_panels(to, thread, fours, panel):
        # Where a thread's four elements of the first of its rows lie: chunks of 16 bytes are
        # swizzled by the row.
        first, four = int32(thread // int32(fours)), int32(thread % int32(fours))
        chunk = int32(((four & int32(15)) >> int32(1)) ^ first)
        to += int32(int32(four >> int32(4)) * int32(panel) + first * int32(ROW_BYTES))
        to += int32((chunk << int32(4)) + ((four & int32(1)) << int32(3)))
        to = int32(to)

    @inlined
    def store_parts(loaded, turns, rows, to, part):
        # Split what was loaded, and store the parts so many bytes apart. Rounded toward zero, the
        # first part of no finite number is infinite.
        words = cuda.local.array(2 * PARTS, int32)
        here = unknown(to)
        for i in unrolled(turns):
            # Chunks change places in rows that are 4 apart.
            row_at = int32(here ^ int32(rows * i % 8 * 16))
            for j in unrolled(2):
                x, y = loaded[4 * i + 2 * j], loaded[4 * i + 2 * j + 1]
                words[j] = truncate(x, y)
                x -= first_of(words[j])
                y -= second_of(words[j])
                words[2 + j] = pack(x, y)
                x -= first_of(words[2 + j])
                y -= second_of(words[2 + j])
                words[4 + j] = pack(x, y)
            for p in unrolled(PARTS):
                at = int32(row_at + int32(rows * i * ROW_BYTES + p * part))
                store_words(at, words[2 * p], words[2 * p + 1])
        proxy_fence()

    @inlined
    def find_maximum(scores, row_max):
        top = cuda.local.array(2, float32)
        for h in unrolled(2):
            top[h] = row_max[h]
            for i in unrolled(SCORES // 4):
                larger = maximum_or_nan(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1])
                top[h] = maximum_or_nan(top[h], larger)
        if not (top[0] == top[0] and top[1] == top[1]):
            # Of infinite elements, products of the first parts are what they should be.
            for i in unrolled(SCORES):
                if not scores[i] == scores[i]:
                    scores[i] = scores[SCORES + i]
            for h in unrolled(2):
                top[h] = row_max[h]
                for i in unrolled(SCORES // 4):
                    larger = maximum(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1])
                    top[h] = maximum(top[h], larger)
        for h in unrolled(2):
            row_max[h] = maximum(top[h], swap_1(top[h]))
        for h in unrolled(2):
            row_max[h] = maximum(row_max[h], swap_2(row_max[h]))

    @inlined
    def weigh(scores, row_max, row_sum, rescale, scale_log2):
        # From scores to weights: the largest of each row, and what the rows before it shrink by.
        # Weights are added up over one tile first: errors grow with the number of sums.
        old = cuda.local.array(2, float32)
        shift = cuda.local.array(2, float32)
        tile_sum = cuda.local.array(2, float32)
        for h in unrolled(2):
            old[h] = -multiply(row_max[h], scale_log2)
        find_maximum(scores, row_max)
        for h in unrolled(2):
            # A row that has seen no key has nothing to shift by; -inf - -inf is NaN.
            shift[h] = -multiply(row_max[h], scale_log2)
            if row_max[h] == float32(NO_KEY):
                shift[h] = float32(0)
            # Before a row's first key, sums and outputs are 0: so is the factor.
            rescale[h] = exp2(min(shift[h] - old[h], float32(0)))
            tile_sum[h] = float32(0)
        bring_near(scores, row_max, shift)
        for i in unrolled(SCORES // 4):
            for h in unrolled(2):
                for j in unrolled(4 * i + 2 * h, 4 * i + 2 * h + 2):
                    scores[j] = exp2(fma(scores[j], scale_log2, shift[h]))
                tile_sum[h] += scores[4 * i + 2 * h] + scores[4 * i + 2 * h + 1]
        for h in unrolled(2):
            row_sum[h] = fma(row_sum[h], rescale[h], tile_sum[h])

    @inlined
    def write_row(h, outputs, factor, to, out_last, column, head_dim_v):
        for i in unrolled(OUTPUTS // 4):
            x, y = outputs[4 * i + 2 * h] * factor, outputs[4 * i + 2 * h + 1] * factor
            if int32(column + i * 8) < head_dim_v:
                if PAIRS:
                    store_floats(to + int64(i * 32), x, y)
                else:
                    store_float(to + int64(i * 8) * out_last, x)
                    if int32(column + (i * 8 + 1)) < head_dim_v:
                        store_float(to + int64(i * 8 + 1) * out_last, y)

    def kernel(
        q, k, v, out, lse, items, order, q_head, q_row, q_last, k_head, k_row, k_last,
        v_head, v_row, v_last, out_head, out_row, out_last,
        num_heads, group_size, seqlen_q, head_dim, head_dim_v, turns, scale_log2,
    ):  # fmt: skip
        thread = int32(cuda.threadIdx.x)
        # Products of int32 are int64 to Numba: what is cast back stays in one register.
        shared = int32((shared_base() + int32(1023)) & int32(-1024))
        # The tile at hand: which it is, what bounds its keys, and which any row of it sees.
        turn, more = int32(cuda.blockIdx.x), True
        batch, head, row_lo, row_hi = int32(0), int32(0), int32(0), int32(0)
        k_from, k_to, used_q, used_k = int32(0), int32(0), int32(0), int32(0)
        key_lo, key_hi, item = int32(0), int32(0), items

        def locate():
            # The next tile, if there is one more.
            nonlocal batch, head, row_lo, row_hi, item, k_from, k_to, used_q, used_k, key_lo, key_hi
            nonlocal turn, more
            more = turn < turns
            if more:
                at = order + int64(turn) * int64(TURN_BYTES)
                batch, head, row_lo = load_int(at), load_int(at + int64(4)), load_int(at + int64(8))
                turn = int32(turn + int32(cuda.gridDim.x))
                more = batch >= 0
            if more:
                row_hi = min(int32(row_lo + BLOCK_Q), seqlen_q)
                item = items + int64(batch) * int64(ITEM_BYTES)
                k_from, k_to = load_int(item), load_int(item + int64(4))
                used_q, used_k = load_int(item + int64(8)), load_int(item + int64(12))
                lo, hi = block_interval(row_lo, row_hi, k_from, k_to, used_q, used_k)
                key_lo, key_hi = int32(lo), int32(hi)

        if thread == 0:
            for s in unrolled(STAGES):
                barrier_init(int32(shared + (K_FULL + 8 * s)), int32(WARPGROUP))
                barrier_init(int32(shared + (V_FULL + 8 * s)), int32(WARPGROUP))
                barrier_init(int32(shared + (K_EMPTY + 8 * s)), int32(WARPGROUPS))
                barrier_init(int32(shared + (V_EMPTY + 8 * s)), int32(WARPGROUPS))
            barrier_fence()
        cuda.syncthreads()

        if thread < 128:
            fewer_registers()
            keys = cuda.local.array(4 * K_TURNS, float32)
            values = cuda.local.array(4 * V_TURNS, float32)
            k_first, v_first = int32(thread // int32(FOURS)), int32(thread // int32(FOURS_V))
            k_column = int32(thread % int32(FOURS) * int32(4))
            v_column = int32(thread % int32(FOURS_V) * int32(4))
            k_place, v_place = int32(shared + int32(K_AT)), int32(shared + int32(V_AT))
            place_in_panels(k_place, thread, FOURS, K_PANEL)
            place_in_panels(v_place, thread, FOURS_V, KV_PANEL)
            # The first round of waits passes: nobody has used anything yet.
            stage, phase = int32(0), int32(1)
            locate()
            while more:
                if key_lo < key_hi:
                    first_key = int32(key_lo // int32(KEYS) * int32(KEYS))
                    key = int32((key_hi - int32(1)) // int32(KEYS) * int32(KEYS))
                    head_kv = int64(int32(head // group_size))
                    k_at = k + load_long(item + int64(24)) + head_kv * k_head
                    k_at += int64(int32(key + k_first)) * k_row + int64(k_column) * k_last
                    v_at = v + load_long(item + int64(32)) + head_kv * v_head
                    v_at += int64(int32(key + v_first)) * v_row + int64(v_column) * v_last
                    while key >= first_key:
                        # Loads are under way while this waits for room.
                        clear(keys, 4 * K_TURNS)
                        load_keys(
                            keys, k_at, k_row * int64(ROWS), k_last,
                            int32(key + k_first - key_lo), int32(key_hi - key_lo),
                            int32(head_dim - k_column),
                        )  # fmt: skip
                        wait(int32(shared + K_EMPTY + 8 * stage), phase)
                        k_to_here = int32(k_place + stage * int32(K_BYTES))
                        store_parts(keys, K_TURNS, ROWS, k_to_here, K_PART)
                        arrive(int32(shared + K_FULL + 8 * stage))
                        clear(values, 4 * V_TURNS)
                        load_values(
                            values, v_at, v_row * int64(ROWS_V), v_last,
                            int32(key + v_first - key_lo), int32(key_hi - key_lo),
                            int32(head_dim_v - v_column),
                        )  # fmt: skip
                        wait(int32(shared + V_EMPTY + 8 * stage), phase)
                        v_to_here = int32(v_place + stage * int32(V_BYTES))
                        store_parts(values, V_TURNS, ROWS_V, v_to_here, V_PART)
                        arrive(int32(shared + V_FULL + 8 * stage))
                        advance(stage, phase)
                        key = int32(key - KEYS)
                        k_at -= k_row * int64(KEYS)
                        v_at -= v_row * int64(KEYS)
                locate()
        else:
            more_registers()
            queries = cuda.local.array(4 * Q_TURNS, float32)
            # Products of the first part of queries with each of keys, the first of which become
            # the scores; and the sum of the others.
            scores = cuda.local.array(PARTS * SCORES, float32)
            others = cuda.local.array(SCORES, float32)
            weights_0 = cuda.local.array(WEIGHTS, int32)
            weights_1 = cuda.local.array(WEIGHTS, int32)
            weights_2 = cuda.local.array(WEIGHTS, int32)
            sums = cuda.local.array(OUTPUTS, float32)
            outputs = cuda.local.array(OUTPUTS, float32)
            # Of my two rows.
            row_max = cuda.local.array(2, float32)
            row_sum = cuda.local.array(2, float32)
            rescale = cuda.local.array(2, float32)
            mine = int32((thread - int32(128)) & int32(127))
            warp = first_lane(int32((thread - int32(128)) >> int32(5)))
            warpgroup = int32(warp >> int32(2))
            lane = int32(thread & int32(31))
            leader = mine == 0
            # The first of my rows and columns in a tile: the layout of an accumulator of wgmma.
            my_row = int32(warp * int32(16) + (lane >> int32(2)))
            column = int32((lane & int32(3)) * int32(2))
            q_base = int32(shared + warpgroup * int32(64 * ROW_BYTES))
            q_first = int32(mine // int32(FOURS))
            q_column = int32(mine % int32(FOURS) * int32(4))
            q_to = q_base
            place_in_panels(q_to, mine, FOURS, Q_PANEL)
            q_place = int32((q_base >> int32(4)) | K_MAJOR)
            k_places = int32(((shared + int32(K_AT)) >> int32(4)) | K_MAJOR)
            v_places = int32(((shared + int32(V_AT)) >> int32(4)) | MN_MAJOR)
            stage, phase = int32(0), int32(0)

            def meet_warpgroup():
                meet(int32(1 + warpgroup), int32(WARPGROUP))

            def await_turn():
                if TURNS:
                    meet(int32(3 + warpgroup), int32(2 * WARPGROUP))

            def pass_turn():
                if TURNS:
                    arrive_at(int32(4 - warpgroup), int32(2 * WARPGROUP))

            def take_queries():
                first = int32(row_lo + warpgroup * int32(64) + q_first)
                q_at = q + load_long(item + int64(16)) + int64(head) * q_head
                q_at += int64(first) * q_row + int64(q_column) * q_last
                clear(queries, 4 * Q_TURNS)
                load_queries(
                    queries, q_at, q_row * int64(ROWS), q_last,
                    first, row_hi, int32(head_dim - q_column),
                )  # fmt: skip
                # What is overwritten here has been multiplied, and nobody multiplies what is new
                # before all of it is there.
                meet_warpgroup()
                store_parts(queries, Q_TURNS, ROWS, q_to, Q_PART)
                meet_warpgroup()

            def hide():
                # Read again what bounds the keys: few tiles come here, and registers are scarce.
                from_here, to_here = load_int(item), load_int(item + int64(4))
                rows_used, keys_used = load_int(item + int64(8)), load_int(item + int64(12))
                for h in unrolled(2):
                    row = int32(row_lo + my_row + 8 * h)
                    lo, hi = row_interval(row, from_here, to_here, rows_used, keys_used)
                    low, high = int32(int32(lo) - column - key), int32(int32(hi) - column - key)
                    for i in unrolled(SCORES // 4):
                        for j in unrolled(2):
                            if int32(i * 8 + j) < low or int32(i * 8 + j) >= high:
                                scores[4 * i + 2 * h + j] = float32(NO_KEY)

            def split_weights():
                for i in unrolled(WEIGHTS):
                    x, y = scores[2 * i], scores[2 * i + 1]
                    weights_0[i] = pack(x, y)
                    x -= first_of(weights_0[i])
                    y -= second_of(weights_0[i])
                    weights_1[i] = pack(x, y)
                    x -= first_of(weights_1[i])
                    y -= second_of(weights_1[i])
                    weights_2[i] = pack(x, y)

            if warpgroup == 1:
                pass_turn()
            locate()
            while more:
                if key_lo < key_hi:
                    take_queries()
                lo, hi = common_interval(row_lo, row_hi, k_from, k_to, used_q, used_k)
                all_lo, all_hi = int32(lo), int32(hi)
                for h in unrolled(2):
                    row_max[h], row_sum[h] = float32(NO_KEY), float32(0)
                clear(outputs, OUTPUTS)
                first_key = int32(key_lo // int32(KEYS) * int32(KEYS))
                key = int32((key_hi - int32(1)) // int32(KEYS) * int32(KEYS))
                if key_lo >= key_hi:
                    key = int32(first_key - int32(KEYS))

                while key >= first_key:
                    wait(int32(shared + K_FULL + 8 * stage), phase)
                    clear(scores, PARTS * SCORES)
                    clear(others, SCORES)
                    await_turn()
                    begin_scores(scores, others, q_place, int32(k_places + stage * K_STEP))
                    pass_turn()
                    scores_ready(scores, others)
                    if leader:
                        arrive(int32(shared + K_EMPTY + 8 * stage))
                    for i in unrolled(SCORES):
                        others[i] += scores[2 * SCORES + i]
                        others[i] += scores[SCORES + i]
                        scores[SCORES + i] = scores[i]
                        scores[i] += others[i]
                    if key < all_lo or int32(key + KEYS) > all_hi:
                        hide()
                    weigh(scores, row_max, row_sum, rescale, scale_log2)
                    split_weights()
                    wait(int32(shared + V_FULL + 8 * stage), phase)
                    clear(sums, OUTPUTS)
                    v_here = int32(v_places + stage * V_STEP)
                    await_turn()
                    begin_outputs(sums, weights_0, weights_1, weights_2, v_here)
                    pass_turn()
                    outputs_ready(sums)
                    if leader:
                        arrive(int32(shared + V_EMPTY + 8 * stage))
                    for i in unrolled(OUTPUTS):
                        outputs[i] = fma(outputs[i], rescale[i % 4 // 2], sums[i])
                    advance(stage, phase)
                    key = int32(key - KEYS)

                heads_before = int64(batch) * int64(num_heads) + int64(head)
                for h in unrolled(2):
                    row_sum[h] += swap_1(row_sum[h])
                    row_sum[h] += swap_2(row_sum[h])
                    factor, row_lse = float32(1), float32(NO_KEY)
                    if not row_sum[h] == float32(0):
                        factor = float32(1) / row_sum[h]
                        row_lse = fma(row_max[h], scale_log2, log2(row_sum[h])) * float32(LN_2)
                    row = int32(row_lo + my_row + 8 * h)
                    if row < seqlen_q:
                        if lse != 0 and column == 0:
                            to_lse = lse + (heads_before * int64(seqlen_q) + int64(row)) * int64(4)
                            store_float(to_lse, row_lse)
                        to = out + load_long(item + int64(40)) + int64(head) * out_head
                        to += int64(row) * out_row + int64(column) * out_last
                        write_row(h, outputs, factor, to, out_last, column, head_dim_v)
                locate()
            if warpgroup == 0:
                await_turn()  # which the other has passed at last

    return kernel
