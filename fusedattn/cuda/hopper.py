"""The forward kernel for Hopper: TMA, wgmma, and warpgroups with roles of their own.

One block of threads owns a tile of query rows of one head. Warpgroup 0 loads tiles of keys and
values through TMA; each of the others owns 64 rows. Scores come from shared memory into registers;
the weights stay there, because the layout of an accumulator is that of the left operand, once
packed. The product of the next scores is begun before that of weights and values, so the softmax
runs while the matrix unit does (FlashAttention-3, arXiv:2407.08608). Keys are walked from the last
to the first: what a causal mask cuts through comes first. At small head dims the warpgroups take
turns at the matrix unit, so that they do not all take exponentials at once.

The first tile of keys stands before the loop: were the weights written under a branch, the
assembler would serialise the products.

Where there are few queries, a tile is packed: it holds the rows of several heads of one KV group,
one head after the other. Where there are fewer still, the keys are split into runs of a fixed
length, each a tile of its own whose result is partial (Flash-Decoding); `fusedattn.cuda.combine`
merges them.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not.
# A piece assigns to its parameters, which are variables of the caller.
# What is read of an operand stands under a condition of its own, a constant of the kernel.
# ruff: noqa: F841, SIM102, SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

from fusedattn import masks
from fusedattn.cuda import (
    hopper_blocks,
    hopper_outputs,
    hopper_scores,
    hopper_values,
    intervals,
    ptx,
    user,
)
from fusedattn.cuda.hopper_scores import NO_KEY, PLAIN, Features
from fusedattn.cuda.unroll import inlined, unrolled

# Bytes of a row of a panel, the widest swizzle of TMA; a panel is 64 columns of a half type.
ROW_BYTES = 128
PANEL = 64
WARPGROUP = 128
# What a block may have in shared memory, 1 KiB of it to begin at a multiple of 1 KiB.
SHARED_LIMIT = 227 * 1024


class Config(NamedTuple):
    """What is fixed when the kernel is compiled."""

    storage: str
    out_storage: str
    dims: int  # of queries and keys, a multiple of 64
    dims_v: int
    warpgroups: int  # that compute, of 64 rows each
    block_k: int
    stages: int
    turns: bool = False  # warpgroups give their products to the matrix unit in turns
    packed: bool = False  # several heads of a KV group in one tile
    split_keys: int = 0  # keys of a tile; 0: all
    features: Features = PLAIN
    vectors: bool = False  # 16 bytes of a row of out are stored at once

    @property
    def block_q(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPGROUP * (1 + self.warpgroups)

    @property
    def q_bytes(self) -> int:
        """Shared memory of the queries."""
        return self.block_q * self.dims * 2

    @property
    def k_bytes(self) -> int:
        """Shared memory of a tile of keys."""
        return self.block_k * self.dims * 2

    @property
    def v_bytes(self) -> int:
        """Shared memory of a tile of values."""
        return self.block_k * self.dims_v * 2

    @property
    def q_stages(self) -> int:
        """Tiles of queries in shared memory: that of the next tile too, where there is room."""
        return 2 if self._shared(2) <= SHARED_LIMIT else 1

    @property
    def shared(self) -> int:
        """Dynamic shared memory: tiles, barriers, and room to align."""
        return self._shared(self.q_stages)

    def _shared(self, q_stages: int) -> int:
        tiles = q_stages * self.q_bytes + self.stages * (self.k_bytes + self.v_bytes)
        return tiles + 1024 + 512 + (2 if self.tells_at_times else self.stages) * self.seen_bytes

    @property
    def seen_bytes(self) -> int:
        """Shared memory in which warps tell which keys of a tile they see, of one tile."""
        return 64 * self.warpgroups if self.features.hides or self.features.blocks else 0

    @property
    def tells_at_times(self) -> bool:
        """Whether they do so for some tiles only: with a block mask alone."""
        return self.features.blocks and not self.features.hides

    @property
    def turn_bytes(self) -> int:
        """What the order of the tiles says of one."""
        return hopper_blocks.TURN_BYTES if self.features.blocks else TURN_BYTES


# 64-bit parameters: maps of q, k and v; out, lse (0 for none), the items, the order of the tiles;
# strides of out in bytes, and the rows of a partial result. What the host can compute is a
# parameter: it takes no register. For the features of scores: addresses of operands and of their
# places, strides in bytes; dropout's threshold and seed; factors.
PARAMETERS = (
    *(*("int64",) * 10, *("int32",) * 6, "float32"),
    *(*("int64",) * 13, *("int32",) * 3, *("float32",) * 4),
)
FORMATS = "q" * 10 + "i" * 6 + "f" + "q" * 13 + "i" * 3 + "f" * 4
# What an item of the batch has in the table: four int32, the offset of its out, as an int64, its
# q_offset, and room.
ITEM_BYTES = 32
# What the order of the tiles says of one: batch item, first head, first row, split; see `schedule`.
TURN_BYTES = 16
# A note of a tile tells the warpgroups that compute what it is; there is room for so many.
NOTE_BYTES = 64
NOTES = 4

# The number of the barrier at which the first warpgroup waits for its turn; the others' come next.
FIRST_TURN = 2

# Registers of a thread that loads, and of one that computes, by the number of those warpgroups.
_REGISTERS = {1: (56, 240), 2: (40, 232), 3: (32, 160)}


def parameters(config: Config) -> tuple[str, ...]:
    """Types of the kernel's parameters; what functions of the user's read comes last."""
    return (*PARAMETERS, *user.parameters_of(config.features.functions))


def make(tools: Any, config: Config) -> Any:
    """Return the kernel, a Python function for one toolchain."""
    cuda, types = tools.cuda, tools.types
    int32, int64, float32 = types.int32, types.int64, types.float32
    asm = tools.asm
    row_interval, block_interval, common_interval = intervals.make(tools)

    DIMS, DIMS_V, KEYS, STAGES = config.dims, config.dims_v, config.block_k, config.stages
    BLOCK_Q, WARPGROUPS = config.block_q, config.warpgroups
    PANELS_Q, PANELS_V = DIMS // PANEL, DIMS_V // PANEL
    Q_PANEL, KV_PANEL = BLOCK_Q * ROW_BYTES, KEYS * ROW_BYTES
    Q_BYTES, K_BYTES, V_BYTES = config.q_bytes, config.k_bytes, config.v_bytes
    Q_STAGES, Q_STEP = config.q_stages, Q_BYTES >> 4
    K_AT = Q_STAGES * Q_BYTES
    V_AT = K_AT + STAGES * K_BYTES
    NOTE = V_AT + STAGES * V_BYTES
    Q_FULL = NOTE + NOTES * NOTE_BYTES
    Q_EMPTY = Q_FULL + 8 * Q_STAGES
    K_FULL = Q_EMPTY + 8 * Q_STAGES
    V_FULL, K_EMPTY, V_EMPTY = (K_FULL + 8 * STAGES * n for n in (1, 2, 3))
    RING = NOTES * NOTE_BYTES - 1
    # Which tile of keys is in a stage, of two rounds: all have read it before it is written again.
    TOLD = V_EMPTY + 8 * STAGES
    TOLD_BYTES = 8 * STAGES if config.features.blocks else 0
    SEEN_AT, SEEN_BYTES = TOLD + TOLD_BYTES + 15 & -16, config.seen_bytes
    SCORES, OUTPUTS, WEIGHTS = KEYS // 2, DIMS_V // 2, KEYS // 4
    K_MAJOR = ptx.descriptor_words(16, 1024)[0]
    MN_MAJOR = ptx.descriptor_words(KV_PANEL, 1024)[0]
    K_STEP, V_STEP = K_BYTES >> 4, V_BYTES >> 4
    few, many = _REGISTERS[WARPGROUPS]
    CONSUMERS = WARPGROUPS * WARPGROUP
    TURNS = config.turns
    PACKED, SPLIT, SPLIT_KEYS = config.packed, config.split_keys > 0, config.split_keys
    features = config.features
    TOUCHED = features.natural or features.hides
    FEATURED = features != PLAIN
    HIDES, SINKS, DROPOUT = features.hides, features.sinks is not None, features.dropout
    BLOCKS, AT_TIMES = features.blocks, config.tells_at_times
    LAST, TURNED = hopper_blocks.LAST, hopper_blocks.TURNED
    TURNED_BYTES = SEEN_BYTES // TURNED
    TURN, KIND, FULL = config.turn_bytes, hopper_blocks.KIND, masks.FULL
    sink_of, begin_rows, touch, hide, weigh, drop, finish = hopper_scores.make(tools, config)
    tell_seen, clear_unseen = hopper_values.make(tools, config)
    set_out, look_ahead, hear, ask = hopper_blocks.make(tools, config)
    COLUMN_BYTES, write_row, fill_row = hopper_outputs.make(tools, config)

    shared_base, load_int, load_long = asm(ptx.SHARED_BASE), asm(ptx.LOAD_INT), asm(ptx.LOAD_LONG)
    store_float, this_thread = asm(ptx.STORE_FLOAT), asm(ptx.THREAD)
    tell, tell_long = asm(ptx.STORE_SHARED_INT), asm(ptx.STORE_SHARED_LONG)
    told, told_long = asm(ptx.LOAD_SHARED_INT), asm(ptx.LOAD_SHARED_LONG)
    pack = asm(ptx.PACK[config.storage])
    barrier_init, barrier_fence = asm(ptx.BARRIER_INIT), asm(ptx.BARRIER_INIT_FENCE)
    arrive, expect, wait = asm(ptx.BARRIER_ARRIVE), asm(ptx.BARRIER_EXPECT), asm(ptx.BARRIER_WAIT)
    prefetch, load_tile = asm(ptx.PREFETCH_MAP), asm(ptx.LOAD_TILE)
    fewer_registers = asm(ptx.set_registers(few, more=False))
    more_registers = asm(ptx.set_registers(many, more=True))
    first_lane = asm(ptx.FIRST_LANE)
    consumers_meet = asm(ptx.barrier(1, CONSUMERS))
    meet, arrive_at = asm(ptx.MEET), asm(ptx.ARRIVE)
    begin_scores = asm(ptx.products(KEYS, config.storage, DIMS, Q_PANEL, KV_PANEL))
    begin_outputs = asm(ptx.accumulate(DIMS_V, config.storage, KEYS))
    scores_ready = asm(ptx.wait_for(SCORES, 1))
    first_scores_ready = asm(ptx.wait_for(SCORES, 0))
    outputs_ready = asm(ptx.wait_for(OUTPUTS, 0))
    last_outputs_ready = asm(ptx.wait_for(OUTPUTS, 1))

    @inlined
    def advance(stage, phase, stages):
        stage = int32(stage + 1)
        if stage == stages:
            stage, phase = int32(0), int32(phase ^ int32(1))

    @inlined
    def next_note(note):
        # Notes lie in a ring, which begins at a multiple of its size.
        note = int32((note & int32(~RING)) | (int32(note + NOTE_BYTES) & int32(RING)))

    # The first of my rows and columns in a tile: the layout of an accumulator of wgmma.
    @inlined
    def first_row(row):
        thread = int32(this_thread())
        row = int32((int32(thread - int32(128)) >> int32(5)) * int32(16))
        row = int32(row + int32(int32(thread & int32(31)) >> int32(2)))

    @inlined
    def first_column(column):
        column = int32(int32(this_thread() & int32(3)) * int32(2))

    @inlined
    def bounds(query, about, low, high):
        # Which keys my rows see.
        k_from, k_to = told(int32(about + 16)), told(int32(about + 20))
        used_q, used_k = told(int32(about + 24)), told(int32(about + 28))
        for h in unrolled(2):
            low[h], high[h] = row_interval(query[h], k_from, k_to, used_q, used_k)

    def kernel(
        q_map, k_map, v_map, out, lse, items, order, out_head, out_row, split_rows,
        num_heads, group_size, seqlen_q, head_dim_v, unit_heads, turns, scale_log2,
        mask, bias, slopes, sinks, places, mask_head, mask_row, mask_last,
        bias_head, bias_row, bias_last, slopes_head, sinks_head, threshold, seed_low, seed_high,
        scale, softcap, softcap_inverse, keep_scale, *extra,
    ):  # fmt: skip
        thread = int32(cuda.threadIdx.x)
        # Products of int32 are int64 to Numba: what is cast back stays in one register.
        shared = int32((shared_base() + int32(1023)) & int32(-1024))
        # The tile at hand: which it is, what bounds its keys, and which any row of it sees.
        batch, head, row_lo, split = int32(0), int32(0), int32(0), int32(0)
        k_from, k_to, used_q, used_k = int32(0), int32(0), int32(0), int32(0)
        key_lo, key_hi, item = int32(0), int32(0), items
        # The tile of keys at hand, and which keys all rows see.
        key, all_lo, all_hi = int32(0), int32(0), int32(0)

        if thread == 0:
            prefetch(q_map)
            prefetch(k_map)
            prefetch(v_map)
            for s in unrolled(Q_STAGES):
                barrier_init(int32(shared + (Q_FULL + 8 * s)), int32(1))
                barrier_init(int32(shared + (Q_EMPTY + 8 * s)), int32(WARPGROUPS))
            for s in unrolled(STAGES):
                barrier_init(int32(shared + (K_FULL + 8 * s)), int32(1))
                barrier_init(int32(shared + (V_FULL + 8 * s)), int32(1))
                barrier_init(int32(shared + (K_EMPTY + 8 * s)), int32(WARPGROUPS))
                barrier_init(int32(shared + (V_EMPTY + 8 * s)), int32(WARPGROUPS))
            barrier_fence()
        cuda.syncthreads()

        if thread < 128:
            fewer_registers()
            if thread == 0:
                # The first round of waits passes: nobody has used anything yet.
                stage, phase, q_stage, q_phase = int32(0), int32(1), int32(0), int32(1)
                note = int32(shared + NOTE)
                turn = int32(cuda.blockIdx.x)
                q_bytes = int32(Q_BYTES)
                if BLOCKS:
                    walk, entry = order, int32(0)
                    following, after = int32(0), int32(0)
                if PACKED:
                    q_bytes = int32(int32(PANELS_Q * ROW_BYTES) * unit_heads * seqlen_q)

                def locate(at):
                    nonlocal head, row_lo, split, k_from, k_to, used_q, used_k
                    nonlocal key_lo, key_hi, all_lo, all_hi, item, walk, entry, key
                    head, row_lo = load_int(at + int64(4)), load_int(at + int64(8))
                    if SPLIT:
                        split = load_int(at + int64(12))
                    item = items + int64(batch) * int64(ITEM_BYTES)
                    k_from, k_to = load_int(item), load_int(item + int64(4))
                    used_q, used_k = load_int(item + int64(8)), load_int(item + int64(12))
                    row_hi = min(int32(row_lo + BLOCK_Q), seqlen_q)
                    key_lo, key_hi = block_interval(row_lo, row_hi, k_from, k_to, used_q, used_k)
                    all_lo, all_hi = common_interval(row_lo, row_hi, k_from, k_to, used_q, used_k)
                    if SPLIT:
                        first = int32(split * int32(SPLIT_KEYS))
                        key_lo = int32(max(key_lo, first))
                        key_hi = int32(min(key_hi, int32(first + int32(SPLIT_KEYS))))
                    if BLOCKS:
                        set_out(at, order, key_lo, walk, entry, key, key_hi)
                    else:
                        key = int32((key_hi - int32(1)) // int32(KEYS) * int32(KEYS))

                def announce():
                    # What the others need to know of a tile comes with its queries.
                    nonlocal note
                    next_note(note)
                    tell(note, row_lo)
                    tell(int32(note + 4), batch)
                    tell(int32(note + 8), head)
                    tell(int32(note + 12), split)
                    tell(int32(note + 16), k_from)
                    tell(int32(note + 20), k_to)
                    tell(int32(note + 24), used_q)
                    tell(int32(note + 28), used_k)
                    tell(int32(note + 32), key_lo)
                    tell(int32(note + 36), key_hi)
                    tell_long(int32(note + 40), load_long(item + int64(16)))
                    tell(int32(note + 48), key)
                    tell(int32(note + 52), all_lo)
                    tell(int32(note + 56), all_hi)

                while turn < turns:
                    at = order + int64(turn) * int64(TURN)
                    turn = int32(turn + int32(cuda.gridDim.x))
                    batch = load_int(at)
                    if batch < 0:
                        break
                    locate(at)
                    full = int32(shared + Q_FULL + 8 * q_stage)
                    wait(int32(shared + Q_EMPTY + 8 * q_stage), q_phase)
                    announce()
                    if key_lo < key_hi:
                        expect(full, q_bytes)
                        for panel in unrolled(PANELS_Q):
                            load_tile(
                                int32(shared + panel * Q_PANEL + q_stage * Q_BYTES), q_map, full,
                                int32(panel * PANEL), row_lo, head, batch,
                            )  # fmt: skip
                    else:
                        arrive(full)
                    advance(q_stage, q_phase, Q_STAGES)
                    head_kv = int32(head // group_size)
                    while key_lo < key_hi:
                        full = int32(shared + K_FULL + 8 * stage)
                        wait(int32(shared + K_EMPTY + 8 * stage), phase)
                        if BLOCKS:
                            slot = int32(stage + (phase ^ int32(1)) * STAGES)
                            slot = int32(shared + TOLD + 4 * slot)
                            look_ahead(slot, key, key_lo, walk, entry, following, after)
                        expect(full, int32(K_BYTES))
                        for panel in unrolled(PANELS_Q):
                            load_tile(
                                int32(shared + (K_AT + panel * KV_PANEL) + stage * K_BYTES),
                                k_map, full, int32(panel * PANEL), key, head_kv, batch,
                            )  # fmt: skip
                        full = int32(shared + V_FULL + 8 * stage)
                        wait(int32(shared + V_EMPTY + 8 * stage), phase)
                        expect(full, int32(V_BYTES))
                        for panel in unrolled(PANELS_V):
                            load_tile(
                                int32(shared + (V_AT + panel * KV_PANEL) + stage * V_BYTES),
                                v_map, full, int32(panel * PANEL), key, head_kv, batch,
                            )  # fmt: skip
                        advance(stage, phase, STAGES)
                        if BLOCKS:
                            key, entry = following, after
                            if int32(key + KEYS) <= key_lo:
                                key_hi = key_lo
                        else:
                            key_hi = key
                            key = int32(key - KEYS)
                # There are no more.
                wait(int32(shared + Q_EMPTY + 8 * q_stage), q_phase)
                next_note(note)
                tell(note, int32(-1))
                arrive(int32(shared + Q_FULL + 8 * q_stage))
        else:
            more_registers()
            scores = cuda.local.array(SCORES, float32)
            outputs = cuda.local.array(OUTPUTS, float32)
            weights = cuda.local.array(WEIGHTS, int32)
            # Of my two rows: their state, and which queries they are.
            row_max = cuda.local.array(2, float32)
            row_sum = cuda.local.array(2, float32)
            rescale = cuda.local.array(2, float32)
            factor = cuda.local.array(2, float32)
            row_lse = cuda.local.array(2, float32)
            query = cuda.local.array(2, int32)
            query_head = cuda.local.array(2, int32)
            low = cuda.local.array(2, int32)
            high = cuda.local.array(2, int32)
            # Their slopes, where they stand, and where their masks and biases begin.
            slope = cuda.local.array(2, float32)
            position = cuda.local.array(2, int32)
            mask_at = cuda.local.array(2, int64)
            bias_at = cuda.local.array(2, int64)
            # Which keys of a tile all warps see, and one of them.
            words = cuda.local.array(4, int32)
            some = cuda.local.array(4, int32)
            # Of two neighbouring keys: which they are, their biases and masks.
            near = cuda.local.array(2, int32)
            biases = cuda.local.array(2, float32)
            marks = cuda.local.array(2, int32)
            mine = int32(thread - int32(128))
            warp = first_lane(int32(mine >> int32(5)))
            warpgroup = int32(warp >> int32(2))
            leader = (mine & int32(127)) == 0
            q_places = int32(((shared + warpgroup * int32(64 * ROW_BYTES)) >> int32(4)) | K_MAJOR)
            k_places = int32(((shared + int32(K_AT)) >> int32(4)) | K_MAJOR)
            v_places = int32(((shared + int32(V_AT)) >> int32(4)) | MN_MAJOR)
            stage, phase, q_stage, q_phase = int32(0), int32(0), int32(0), int32(0)
            note, column = int32(shared + NOTE), int32(0)
            out_item, to, to_lse = int64(0), int64(0), int64(0)
            found = False
            if BLOCKS:
                word = int32(0)

            def await_turn():
                # Which warpgroup this is is asked anew: it takes no register meanwhile.
                turn = int32(int32(this_thread() >> int32(7)) + int32(FIRST_TURN - 1))
                meet(turn, int32(2 * WARPGROUP))

            def pass_turn():
                turn = int32(int32(this_thread() >> int32(7)) + int32(FIRST_TURN))
                if turn == FIRST_TURN + WARPGROUPS:
                    turn = int32(FIRST_TURN)
                arrive_at(turn, int32(2 * WARPGROUP))

            def my_queries(row_lo, head):
                # Which query of which head my rows are; none of any head past the last.
                my_row = int32(0)
                first_row(my_row)
                for h in unrolled(2):
                    query[h], query_head[h] = int32(row_lo + my_row + 8 * h), head
                    if PACKED:
                        above = int32(query[h] // seqlen_q)
                        query[h] = int32(query[h] - above * seqlen_q)
                        query_head[h] = int32(head + above)
                        if above >= unit_heads:
                            query[h] = seqlen_q

            def recall(about):
                # Where the results of a tile go.
                nonlocal batch, split, out_item
                batch = told(int32(about + 4))
                if SPLIT:
                    split = told(int32(about + 12))
                out_item = told_long(int32(about + 40))
                my_queries(told(about), told(int32(about + 8)))

            def place(h):
                # Where a row's results go; partial ones lie one split after the other.
                nonlocal to, to_lse, column
                first_column(column)
                row = int64(split) * split_rows + int64(query[h])
                heads_before = int64(batch) * int64(num_heads) + int64(query_head[h])
                to_lse = lse + (row + heads_before * int64(seqlen_q)) * int64(4)
                to = out + out_item + int64(query_head[h]) * out_head + row * out_row
                to += int64(column) * int64(COLUMN_BYTES)

            def write(h):
                dims_here = int32(0)
                if query[h] < seqlen_q:
                    dims_here = head_dim_v
                    if lse != 0 and column == 0:
                        store_float(to_lse, row_lse[h])
                write_row(h, outputs, factor[h], to, column, dims_here)

            def find():
                # The next tile with keys; what belongs into those without is written on the way.
                nonlocal row_lo, key_lo, key_hi, q_stage, q_phase, note, found
                found, row_lo = False, int32(0)
                while row_lo >= 0 and not found:
                    wait(int32(shared + Q_FULL + 8 * q_stage), q_phase)
                    next_note(note)
                    row_lo = told(note)
                    key_lo, key_hi = told(int32(note + 32)), told(int32(note + 36))
                    found = row_lo >= 0 and key_lo < key_hi
                    if row_lo >= 0 and not found:
                        consumers_meet()
                        if leader:
                            arrive(int32(shared + Q_EMPTY + 8 * q_stage))
                        advance(q_stage, q_phase, Q_STAGES)
                        recall(note)
                        for h in unrolled(2):
                            if query[h] < seqlen_q:
                                place(h)
                                row_lse[h], value = float32(NO_KEY), float32(0)
                                if SINKS:
                                    if split == 0 and query[h] < told(int32(note + 24)):
                                        sink = float32(0)
                                        sink_of(
                                            sink, batch, query_head[h], sinks, places, sinks_head
                                        )
                                        if not sink == float32(NO_KEY):
                                            # NaN of one that is not finite.
                                            value = sink - sink
                                        row_lse[h] = sink + value
                                if lse != 0 and column == 0:
                                    store_float(to_lse, row_lse[h])
                                fill_row(value, to, column, head_dim_v)

            def begin():
                begin_scores(
                    scores, int32(q_places + q_stage * Q_STEP), int32(k_places + stage * K_STEP)
                )

            def clear(of):
                # Of the values of the tile of keys at hand, those that no row sees.
                if AT_TIMES:
                    cut = key < all_lo or int32(key + KEYS) > all_hi
                    if cut or word & int32(KIND) != int32(FULL):
                        clear_unseen(
                            int32(shared + V_AT + of * V_BYTES),
                            int32(shared + SEEN_AT + int32(word & int32(TURNED)) * TURNED_BYTES),
                            key, key_lo, key_hi, words, some,
                        )  # fmt: skip
                else:
                    clear_unseen(
                        int32(shared + V_AT + of * V_BYTES),
                        int32(shared + SEEN_AT + of * SEEN_BYTES), key, key_lo, key_hi,
                        words, some,
                    )  # fmt: skip

            def look():
                # From products to weights, those of the tile of keys at hand.
                nonlocal word
                column = int32(0)
                cut = key < all_lo or int32(key + KEYS) > all_hi
                if BLOCKS:
                    cut = cut or word & int32(KIND) != int32(FULL)
                if FEATURED:
                    first_column(column)
                if cut:
                    first_column(column)
                    bounds(query, note, low, high)
                if HIDES:
                    if cut:
                        touch(
                            scores, key, column, low, high, True, query, query_head, item_batch,
                            slope, position, mask_at, bias_at, mask_last, bias_last,
                            scale, softcap, softcap_inverse, near, biases, marks, *extra,
                        )  # fmt: skip
                    else:
                        touch(
                            scores, key, column, low, high, False, query, query_head, item_batch,
                            slope, position, mask_at, bias_at, mask_last, bias_last,
                            scale, softcap, softcap_inverse, near, biases, marks, *extra,
                        )  # fmt: skip
                elif TOUCHED:
                    touch(
                        scores, key, column, low, high, False, query, query_head, item_batch,
                        slope, position, mask_at, bias_at, mask_last, bias_last,
                        scale, softcap, softcap_inverse, near, biases, marks, *extra,
                    )  # fmt: skip
                if cut:
                    hide(scores, key, column, low, high)
                if BLOCKS:
                    if word & int32(KIND) != int32(FULL):
                        kind = int32(word & int32(KIND))
                        ask(
                            scores, key, column, kind, low, high, query, query_head, item_batch,
                            *extra,
                        )  # fmt: skip
                if AT_TIMES:
                    if cut:
                        # Not where the warps may still be reading of the tile told of before.
                        word = int32(word ^ int32(TURNED))
                        slot = int32(word & int32(TURNED)) * TURNED_BYTES
                        tell_seen(scores, int32(shared + SEEN_AT + slot))
                else:
                    tell_seen(scores, int32(shared + SEEN_AT + stage * SEEN_BYTES))
                weigh(scores, row_max, row_sum, rescale, scale_log2)
                if DROPOUT:
                    drop(
                        scores, key, column, query, query_head, item_batch,
                        threshold, seed_low, seed_high,
                    )  # fmt: skip

            if TURNS:
                if warpgroup == WARPGROUPS - 1:
                    pass_turn()
            find()
            if found:
                wait(int32(shared + K_FULL + 8 * stage), phase)
                begin()
                first_scores_ready(scores)
            while found:
                if leader:
                    arrive(int32(shared + K_EMPTY + 8 * stage))
                now = note
                all_lo, all_hi = told(int32(note + 52)), told(int32(note + 56))
                my_queries(row_lo, told(int32(note + 8)))
                if FEATURED:
                    item_batch = told(int32(note + 4))
                    first_column(column)
                begin_rows(
                    query, query_head, column, item_batch, told(int32(note + 8)),
                    told(int32(note + 12)), told(int32(note + 24)), seqlen_q,
                    row_max, row_sum, slope, position, mask_at, bias_at,
                    items + int64(item_batch) * int64(ITEM_BYTES),
                    mask, bias, slopes, sinks, places,
                    mask_head, mask_row, bias_head, bias_row, slopes_head, sinks_head,
                )  # fmt: skip
                for i in unrolled(OUTPUTS):
                    outputs[i] = float32(0)
                if BLOCKS:
                    slot = int32(shared + TOLD + 4 * (stage + phase * STAGES))
                    hear(slot, word, key)
                else:
                    key = told(int32(note + 48))
                look()
                for i in unrolled(WEIGHTS):
                    weights[i] = pack(scores[2 * i], scores[2 * i + 1])

                while word & int32(LAST) == 0 if BLOCKS else key > key_lo:
                    before, phase_before = stage, phase
                    advance(stage, phase, STAGES)
                    wait(int32(shared + K_FULL + 8 * stage), phase)
                    if TURNS:
                        # Whose turn it is must not wait for those whose turn it is not.
                        wait(int32(shared + V_FULL + 8 * before), phase_before)
                        clear(before)
                        await_turn()
                        begin()
                    else:
                        begin()
                        wait(int32(shared + V_FULL + 8 * before), phase_before)
                        clear(before)
                    begin_outputs(outputs, weights, int32(v_places + before * V_STEP))
                    if TURNS:
                        pass_turn()
                    scores_ready(scores)
                    if leader:
                        arrive(int32(shared + K_EMPTY + 8 * stage))
                    if BLOCKS:
                        slot = int32(shared + TOLD + 4 * (stage + phase * STAGES))
                        hear(slot, word, key)
                    else:
                        key = int32(key - KEYS)
                    look()
                    outputs_ready(outputs)
                    if leader:
                        arrive(int32(shared + V_EMPTY + 8 * before))
                    for i in unrolled(OUTPUTS):
                        outputs[i] *= rescale[i % 4 // 2]
                    for i in unrolled(WEIGHTS):
                        weights[i] = pack(scores[2 * i], scores[2 * i + 1])

                if leader:
                    arrive(int32(shared + Q_EMPTY + 8 * q_stage))
                advance(q_stage, q_phase, Q_STAGES)
                wait(int32(shared + V_FULL + 8 * stage), phase)
                clear(stage)
                begin_outputs(outputs, weights, int32(v_places + stage * V_STEP))
                # The first scores of the next tile are made while the outputs of this one are
                # finished and written; after the last tile nobody looks at what is made.
                before = stage
                advance(stage, phase, STAGES)
                find()
                if found:
                    wait(int32(shared + K_FULL + 8 * stage), phase)
                begin()
                last_outputs_ready(outputs)
                if leader:
                    arrive(int32(shared + V_EMPTY + 8 * before))
                recall(now)
                finish(row_sum, row_max, scale_log2, keep_scale, factor, row_lse)
                place(0)
                write(0)
                if PACKED:
                    place(1)
                else:
                    to += int64(8) * out_row
                    to_lse += int64(8 * 4)
                write(1)
                first_scores_ready(scores)
            if TURNS:
                if warpgroup == 0:
                    await_turn()  # which the last has passed in the end

    return kernel
