"""Inline PTX: the only file that emits any.

Instructions are data (`Op`, `Block`) that each toolchain turns into functions for kernels. Names
and semantics are those of NVIDIA's PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor" and
"Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
"""

from __future__ import annotations

from fusedattn import philox
from fusedattn.cuda.inline import Block, Op

# Where the shared memory of a kernel without variables of its own begins.
SHARED_BASE = Op("mov.u32 $0, %reserved_smem_offset_end;", "r")

# Asked anew where it is needed, the thread's number holds no register meanwhile.
THREAD = Op("mov.u32 $0, %tid.x;", "r")

LOAD_INT = Op("ld.global.b32 $0, [$1];", "r", "l")
LOAD_LONG = Op("ld.global.b64 $0, [$1];", "l", "l")
STORE_WORD = Op("st.global.b32 [$0], $1;", "", "lr")
STORE_FLOAT = Op("st.global.f32 [$0], $1;", "", "lf")
STORE_WORDS = Op("st.global.v4.b32 [$0], {$1, $2, $3, $4};", "", "lrrrr")
STORE_FLOATS = Op("st.global.v2.f32 [$0], {$1, $2};", "", "lff")
LOAD_SHARED_INT = Op("ld.shared.b32 $0, [$1];", "r", "r")
LOAD_SHARED_LONG = Op("ld.shared.b64 $0, [$1];", "l", "r")
STORE_SHARED_LONG = Op("st.shared.b64 [$0], $1;", "", "rl")
STORE_SHARED_INT = Op("st.shared.b32 [$0], $1;", "", "rr")
STORE_SHARED_ZEROS = Op("st.shared.v4.b32 [$0], {0, 0, 0, 0};", "", "r")
STORE_SHARED_WORDS = Op("st.shared.v2.b32 [$0], {$1, $2};", "", "rrr")

# Elements of operands that no kernel writes, as float32 or as a word; float64 is rounded.
LOAD_ELEMENT = {
    "float16": Op("{ .reg .b16 h; ld.global.nc.u16 h, [$1]; cvt.f32.f16 $0, h; }", "f", "l"),
    "bfloat16": Op("{ .reg .b16 h; ld.global.nc.u16 h, [$1]; cvt.f32.bf16 $0, h; }", "f", "l"),
    "float32": Op("ld.global.nc.f32 $0, [$1];", "f", "l"),
    "float64": Op("{ .reg .f64 d; ld.global.nc.f64 d, [$1]; cvt.rn.f32.f64 $0, d; }", "f", "l"),
}
LOAD_BYTE = Op("ld.global.nc.u8 $0, [$1];", "r", "l")
# Two elements of half a word each, and either of them.
LOAD_BYTES = Op("ld.global.nc.u16 $0, [$1];", "r", "l")
LOAD_HALVES = Op("ld.global.nc.b32 $0, [$1];", "r", "l")
LOWER = {
    kind: Op(f"{{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.{short} $0, h; }}", "f", "r")
    for kind, short in (("float16", "f16"), ("bfloat16", "bf16"))
}
UPPER = {
    kind: Op(
        "{ .reg .b16 h; .reg .b32 w; shr.u32 w, $1, 16; cvt.u16.u32 h, w;"
        f" cvt.f32.{short} $0, h; }}",
        "f",
        "r",
    )
    for kind, short in (("float16", "f16"), ("bfloat16", "bf16"))
}

# base 2, 2 ulp, tiny results become 0
EXP2 = Op("ex2.approx.ftz.f32 $0, $1;", "f", "f")
LOG2 = Op("lg2.approx.ftz.f32 $0, $1;", "f", "f")
FMA = Op("fma.rn.f32 $0, $1, $2, $3;", "f", "fff")
# Rounded, whatever is done to it next: compilers make a product and a sum one operation, and the
# difference of two equal products is then what one of them was rounded by.
MULTIPLY = Op("mul.rn.f32 $0, $1, $2;", "f", "ff")
MAX = Op("max.f32 $0, $1, $2;", "f", "ff")
# 1 ulp
RECIPROCAL = Op("rcp.approx.ftz.f32 $0, $1;", "f", "f")
# The sign of the first argument, the size of the second.
COPY_SIGN = Op("copysign.f32 $0, $1, $2;", "f", "ff")
# This one keeps a NaN, the others lose it.
MAX_OR_NAN = Op("max.NaN.f32 $0, $1, $2;", "f", "ff")
# The larger argument is the upper half.
PACK = {
    "bfloat16": Op("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff"),
    "float16": Op("cvt.rn.f16x2.f32 $0, $2, $1;", "r", "ff"),
}
# The same toward zero, which never makes a finite number infinite.
TRUNCATE = Op("cvt.rz.bf16x2.f32 $0, $2, $1;", "r", "ff")
# A word of ones, from a bit on, and so many.
BITS = Op("bmsk.clamp.b32 $0, $1, $2;", "r", "rr")
# The value of the warp's first lane, which tells the compiler that it is the same in all.
FIRST_LANE = Op("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "r", "r")
# The same value, of which compilers know nothing: what follows from it is not computed ahead of a
# loop, where it would take registers.
UNKNOWN = Op("mov.b32 $0, $1;", "r", "r")
UNKNOWN_LONG = Op("mov.b64 $0, $1;", "l", "l")
# The value of the lane whose number differs in one bit.
SWAP_1 = Op("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "f", "f")
SWAP_2 = Op("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "f", "f")


def swap_words(bit: int) -> Op:
    """Return the same for an integer."""
    return Op(f"shfl.sync.bfly.b32 $0, $1, {bit}, 0x1f, 0xffffffff;", "r", "r")


def exchange_words() -> Block:
    """Transpose the four words of four neighbouring threads.

    The scalar is twice the number of the thread among the four.
    """
    arrays = (("r", 4, True),)
    (words,), (twice,) = Block.operands(arrays, "r")
    lines = ["{ .reg .pred odd, high; .reg .b32 bit, word;"]
    for name, bit in (("odd", 1), ("high", 2)):
        lines += [f"and.b32 bit, {twice}, {2 * bit};", f"setp.ne.b32 {name}, bit, 0;"]
        for first, second in ((0, 1), (2, 3)) if bit == 1 else ((0, 2), (1, 3)):
            one, other = words[first], words[second]
            lines += [
                f"selp.b32 word, {one}, {other}, {name};",
                f"shfl.sync.bfly.b32 word, word, {bit}, 0x1f, 0xffffffff;",
                f"selp.b32 {one}, word, {one}, {name};",
                f"selp.b32 {other}, {other}, word, {name};",
            ]
    return Block("\n".join([*lines, "}"]), arrays, "r")


def kept_by_philox() -> Op:
    """Which of four neighbouring keys dropout keeps, one bit each.

    Arguments: four counter words, two of the key, and the threshold that a kept key's word reaches
    (`fusedattn.philox`).
    """
    words, keys = ["a", "b", "c", "d"], ("k", "l")
    lines = ["{ .reg .b32 a, b, c, d, k, l, x, y, kept; .reg .b64 wide; .reg .pred p;"]
    lines += [f"mov.b32 {name}, ${i};" for i, name in enumerate((*words, *keys), 1)]
    for turn in range(philox.ROUNDS):
        if turn:
            steps = zip(keys, philox.KEY_STEPS, strict=True)
            lines += [f"add.u32 {name}, {name}, {step};" for name, step in steps]
        a, b, c, d = words
        lines += [
            f"mul.wide.u32 wide, {a}, {philox.MULTIPLIERS[0]}; mov.b64 {{{a}, x}}, wide;",
            f"mul.wide.u32 wide, {c}, {philox.MULTIPLIERS[1]}; mov.b64 {{{c}, y}}, wide;",
            f"xor.b32 {b}, {b}, y; xor.b32 {b}, {b}, k; xor.b32 {d}, {d}, x; xor.b32 {d}, {d}, l;",
        ]
        words = [b, c, d, a]
    lines.append("mov.b32 kept, 0;")
    lines += [
        f"setp.ge.u32 p, {name}, $7; @p or.b32 kept, kept, {1 << i};"
        for i, name in enumerate(words)
    ]
    return Op("\n".join([*lines, "mov.b32 $0, kept; }"]), "r", "r" * 7)


BARRIER_INIT = Op("mbarrier.init.shared::cta.b64 [$0], $1;", "", "rr")
BARRIER_INIT_FENCE = Op("fence.mbarrier_init.release.cluster; fence.proxy.async;")
BARRIER_ARRIVE = Op("mbarrier.arrive.shared::cta.b64 _, [$0];", "", "r")
BARRIER_EXPECT = Op("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "rr")
BARRIER_WAIT = Op(
    "{ .reg .pred done;\n"
    "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
    "@done bra.uni READY; bra.uni AGAIN;\n"
    "READY: }",
    "",
    "rr",
)
PREFETCH_MAP = Op("prefetch.tensormap [$0];", "", "l")
# shared memory, map, barrier, coordinates from the innermost
LOAD_TILE = Op(
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    " [$0], [$1, {$3, $4, $5, $6}], [$2];",
    "",
    "rlrrrrr",
)
# Ordinary writes to shared memory become visible to TMA and wgmma.
PROXY_FENCE = Op("fence.proxy.async.shared::cta;")


# A barrier by its number and the threads that take part: some wait, others only arrive.
MEET = Op("bar.sync $0, $1;", "", "rr")
ARRIVE = Op("bar.arrive $0, $1;", "", "rr")


def load_rows(turns: int, rows_apart: int, *, vectors: bool) -> Block:
    """Load four elements of every so many rows; what lies outside keeps its value.

    Scalars: the address of the first element, the bytes from a row to the next of these rows, the
    bytes from an element to the next, the first row, how many rows there are (one that is negative
    or not below is outside), and how many elements from the first on. ``vectors`` says that four
    lie side by side at multiples of 16 bytes, all outside or none.
    """
    arrays = (("f", 4 * turns, True),)
    (loaded,), (address, step, next_, row, rows, elements) = Block.operands(arrays, "lllrrr")
    lines = [
        "{ .reg .pred inside, all; .reg .b32 row; .reg .b64 from, place;",
        f"mov.b64 from, {address};",
        f"mov.b32 row, {row};",
    ]
    for turn in range(turns):
        four = loaded[4 * turn : 4 * turn + 4]
        lines.append(f"setp.lt.u32 inside, row, {rows};")
        if vectors:
            lines += [
                f"setp.gt.and.s32 all, {elements}, 0, inside;",
                f"@all ld.global.v4.f32 {{{', '.join(four)}}}, [from];",
            ]
        else:
            lines.append("mov.b64 place, from;")
            for index, name in enumerate(four):
                lines += [
                    f"setp.gt.and.s32 all, {elements}, {index}, inside;",
                    f"@all ld.global.f32 {name}, [place];",
                    f"add.s64 place, place, {next_};",
                ]
        lines += [f"add.s64 from, from, {step};", f"add.s32 row, row, {rows_apart};"]
    return Block("\n".join([*lines, "}"]), arrays, "lllrrr")


def set_registers(count: int, *, more: bool) -> Op:
    """Give registers back, or ask for more, until the warpgroup has this many a thread."""
    return Op(f"setmaxnreg.{'inc' if more else 'dec'}.sync.aligned.u32 {count};")


def barrier(number: int, threads: int) -> Op:
    """Wait for some of the threads of a block."""
    return Op(f"bar.sync {number}, {threads};")


def _wgmma(n: int, kind: str) -> str:
    kind = {"bfloat16": "bf16", "float16": "f16"}[kind]
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"


def products(n: int, kind: str, dims: int, a_panel: int, b_panel: int) -> Block:
    """``S[64, n] = A B^T`` over `dims` columns of shared memory, begun and committed.

    A and B lie K-major in panels of 64 columns with a swizzle of 128 bytes; `a_panel` and
    `b_panel` are the bytes of a panel. Scalars are the lower words of the descriptors of A and B.
    """
    arrays = (("f", n // 2, True),)
    (sums,), (a, b) = Block.operands(arrays, "rr")
    upper = descriptor_words(16, 1024)[1]
    lines = ["{ .reg .pred p; .reg .b32 low; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for step in range(dims // 16):
        panel, inside = divmod(step, 4)
        lines += [
            f"setp.ne.b32 p, {int(step > 0)}, 0;",
            f"add.s32 low, {a}, {(panel * a_panel + inside * 32) >> 4};",
            f"mov.b64 a, {{low, {upper}}};",
            f"add.s32 low, {b}, {(panel * b_panel + inside * 32) >> 4};",
            f"mov.b64 b, {{low, {upper}}};",
            f"{_wgmma(n, kind)} {{{', '.join(sums)}}}, a, b, p, 1, 1, 0, 0;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return Block("\n".join(lines), arrays, "rr")


def accumulate(n: int, kind: str, keys: int) -> Block:
    """``O[64, n] += P V`` over `keys` rows of V, begun and committed.

    P is held in registers, packed as the A operand; V lies in shared memory, MN-major. The scalar
    is the lower word of the descriptor of V.
    """
    arrays = (("f", n // 2, True), ("r", keys // 4, False))
    (sums, weights), (b,) = Block.operands(arrays, "r")
    upper = descriptor_words(16, 1024)[1]
    lines = ["{ .reg .b32 low; .reg .b64 b;", "wgmma.fence.sync.aligned;"]
    for step in range(keys // 16):
        a = ", ".join(weights[4 * step : 4 * step + 4])
        lines += [
            f"add.s32 low, {b}, {step * 16 * 128 >> 4};",
            f"mov.b64 b, {{low, {upper}}};",
            f"{_wgmma(n, kind)} {{{', '.join(sums)}}}, {{{a}}}, b, 1, 1, 1, 1;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return Block("\n".join(lines), arrays, "r")


def part_products(n: int, dims: int, a_part: int, a_panel: int, b_panel: int) -> Block:
    """``S[64, n] = A B^T``, both in three bfloat16 parts; begun and committed.

    The first array holds three sums, one after the other: of the first part of A with each of B;
    the second array the sum of the other products, but for the three smallest. The parts of B lie
    one behind the other in each panel of 64 columns, so one instruction multiplies by all three.
    Scalars are as for `products`.
    """
    each = n // 2
    arrays = (("f", 3 * each, True), ("f", each, True))
    (sums, rest), (a, b) = Block.operands(arrays, "rr")
    upper = descriptor_words(16, 1024)[1]
    lines = ["{ .reg .pred p; .reg .b32 low; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    # Parts of A and of B, and where the sum goes: what is smaller is added first.
    for of_a, of_b, count, to in (
        (2, 0, n, rest),
        (1, 1, n, rest),
        (1, 0, n, rest),
        (0, 0, 3 * n, sums),
    ):
        for step in range(dims // 16):
            panel, inside = divmod(step, 4)
            a_at = of_a * a_part + panel * a_panel + inside * 32
            b_at = of_b * n * 128 + panel * b_panel + inside * 32
            first = step == 0 and of_a in (0, 2)
            lines += [
                f"setp.ne.b32 p, {int(not first)}, 0;",
                f"add.s32 low, {a}, {a_at >> 4};",
                f"mov.b64 a, {{low, {upper}}};",
                f"add.s32 low, {b}, {b_at >> 4};",
                f"mov.b64 b, {{low, {upper}}};",
                f"{_wgmma(count, 'bfloat16')} {{{', '.join(to)}}}, a, b, p, 1, 1, 0, 0;",
            ]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return Block("\n".join(lines), arrays, "rr")


def part_accumulate(n: int, keys: int, b_part: int) -> Block:
    """``O[64, n] = P V``, both in three bfloat16 parts; begun and committed.

    What is smaller is added first: each sum is cut off at the end, not rounded. Arrays are O and
    the parts of P, the largest first, packed as the A operand; `b_part` bytes lie between the
    parts of V, MN-major. The scalar is the lower word of the descriptor of V.
    """
    arrays = (("f", n // 2, True), *(("r", keys // 4, False),) * 3)
    (sums, *weights), (b,) = Block.operands(arrays, "r")
    upper = descriptor_words(16, 1024)[1]
    lines = ["{ .reg .pred p; .reg .b32 low; .reg .b64 b;", "wgmma.fence.sync.aligned;"]
    pairs = [(2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)]
    for place, (of_p, of_v) in enumerate(pairs):
        for step in range(keys // 16):
            a = ", ".join(weights[of_p][4 * step : 4 * step + 4])
            lines += [
                f"setp.ne.b32 p, {int(place + step > 0)}, 0;",
                f"add.s32 low, {b}, {(of_v * b_part + step * 16 * 128) >> 4};",
                f"mov.b64 b, {{low, {upper}}};",
                f"{_wgmma(n, 'bfloat16')} {{{', '.join(sums)}}}, {{{a}}}, b, p, 1, 1, 1;",
            ]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return Block("\n".join(lines), arrays, "r")


def load_shared(count: int) -> Block:
    """Load words from shared memory, at a multiple of their bytes."""
    arrays = (("r", count, True),)
    (words,), (at,) = Block.operands(arrays, "r")
    return Block(f"ld.shared.v{count}.b32 {{{', '.join(words)}}}, [{at}];", arrays, "r")


def wait_for(counts: int | tuple[int, ...], pending: int) -> Block:
    """Wait until at most `pending` groups are under way; the accumulators are ready then."""
    counts = (counts,) if isinstance(counts, int) else counts
    arrays = tuple(("f", count, True) for count in counts)
    return Block(f"wgmma.wait_group.sync.aligned {pending};", arrays)


def descriptor_words(leading: int, stride: int) -> tuple[int, int]:
    """Return both words of a matrix descriptor without its address; 128-byte swizzle.

    `leading` and `stride` are its byte offsets; the address goes, divided by 16, into the lower 14
    bits of the lower word.
    """
    return (leading >> 4) << 16, stride >> 4 | 1 << 30
