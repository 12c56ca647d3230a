"""What instructions of PTX do, by their names.

To add one, write a function of a `Call` and of the values of its operands without the destination,
under `instruction` with the name as it stands in the text; what it returns is the destination's
value. A name that ends in ``.*`` takes all that begin so, and finds the rest in ``call.rest``. An
operand in brackets or braces is a list; one named in ``registers`` comes as `matrix.Registers`.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from hopper_emulator.machine import WARP, Fault
from hopper_emulator.matrix import Shape

float32 = np.float32
# The smallest float32 that is not subnormal.
_TINY = 2.0**-126


class Call(NamedTuple):
    """What an instruction knows beside its operands."""

    tools: Any
    rest: tuple[str, ...]

    @property
    def machine(self):
        """The block of threads that runs."""
        return self.tools.machine

    @property
    def shared(self):
        """Its shared memory."""
        return self.tools.shared

    @property
    def warpgroup(self):
        """The matrix unit of the thread that runs."""
        return self.tools.warpgroups[self.tools.machine.current.warp // 4]


class Instruction(NamedTuple):
    """How one is carried out, whether it has a destination, and which operands are registers."""

    function: Any
    writes: bool
    registers: tuple[int, ...]


TABLE: dict[str, Instruction] = {}


def instruction(*names, writes=True, registers=()):
    """Enter an instruction into the table."""

    def enter(function):
        for name in names:
            TABLE[name] = Instruction(function, writes, registers)
        return function

    return enter


def find(name):
    """Return what carries out an instruction, and the rest of its name."""
    if name in TABLE:
        return TABLE[name], ()
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix + ".*" in TABLE:
            return TABLE[prefix + ".*"], tuple(parts[count:])
    raise Fault(f"the emulator knows no instruction {name}: add it to instructions.py")


def signed(word, bits=32):
    """Wrap an integer into the range of a register."""
    half = 1 << bits - 1
    return word if -half <= word < half else (word + half) % (2 * half) - half


def flushed(x):
    """Round to float32, and subnormal numbers to 0."""
    return float32(x) if abs(x) >= _TINY or x != x else float32(math.copysign(0.0, x))


# Moves and integers.


@instruction("mov.u32", "mov.b32", "mov.s32", "mov.u64", "mov.s64", "mov.f32")
def _move(_, x):
    return x


@instruction("mov.b64")
def _move_64(_, x):
    return x[0] & 0xFFFFFFFF | (x[1] & 0xFFFFFFFF) << 32 if isinstance(x, list) else x


@instruction("mov.b64 {}")
def _halves(_, x):
    return signed(x & 0xFFFFFFFF), signed(x >> 32 & 0xFFFFFFFF)


@instruction("add.s32", "add.u32")
def _add(_, a, b):
    return signed(signed(a) + signed(b))


@instruction("mul.wide.u32")
def _multiply_wide(_, a, b):
    return signed((a & 0xFFFFFFFF) * (b & 0xFFFFFFFF), 64)


@instruction("xor.b32")
def _xor(_, a, b):
    return signed(a ^ b)


@instruction("or.b32")
def _or(_, a, b):
    return signed(a | b)


@instruction("and.b32")
def _and(_, a, b):
    return signed(a & b)


@instruction("selp.b32")
def _select(_, a, b, first):
    return a if first else b


@instruction("bmsk.clamp.b32")
def _bits_from(_, first, count):
    first, count = min(first & 0xFFFFFFFF, 32), min(count & 0xFFFFFFFF, 32)
    return signed(((1 << count) - 1 << first) & 0xFFFFFFFF)


@instruction("shr.u32")
def _shift_right(_, a, b):
    return (a & 0xFFFFFFFF) >> b


@instruction("cvt.u16.u32")
def _lower_half(_, a):
    return a & 0xFFFF


@instruction("setp.ge.u32")
def _not_less(_, a, b):
    return a & 0xFFFFFFFF >= b & 0xFFFFFFFF


@instruction("add.s64")
def _add_64(_, a, b):
    return signed(a + b, 64)


@instruction("setp.ne.b32")
def _differ(_, a, b):
    return a != b


@instruction("setp.lt.u32")
def _is_below(_, a, b):
    return a & 0xFFFFFFFF < b & 0xFFFFFFFF


@instruction("setp.gt.and.s32")
def _is_above_and(_, a, b, also):
    return a > b and also


# Arithmetic of float32.


@instruction("ex2.approx.ftz.f32")
def _exp2(_, x):
    x = float(x)
    return float32(math.inf) if x >= 1000 else flushed(math.exp2(x))


@instruction("lg2.approx.ftz.f32")
def _log2(_, x):
    return np.log2(flushed(x))


@instruction("fma.rn.f32")
def _fma(_, a, b, c):
    # The product is exact in float64, the sum is not quite: it is rounded twice.
    return float32(float(a) * float(b) + float(c))


@instruction("mul.rn.f32")
def _multiply_float(_, a, b):
    return a * b


@instruction("max.f32")
def _max(_, a, b):
    return a if a >= b or b != b else b


@instruction("max.NaN.f32")
def _max_or_nan(_, a, b):
    return a if a >= b or a != a else b


@instruction("cvt.rz.bf16x2.f32")
def _truncate_bfloat16(_, upper, lower):
    low, high = struct.unpack("<2I", struct.pack("<2f", lower, upper))
    low = low >> 16 if lower == lower else 0x7FFF
    high = high >> 16 if upper == upper else 0x7FFF
    return signed(low | high << 16)


@instruction("rcp.approx.ftz.f32")
def _reciprocal(_, x):
    return flushed(float32(1) / flushed(x))


@instruction("copysign.f32")
def _copy_sign(_, sign, size):
    return np.copysign(size, sign)


@instruction("cvt.f32.f16")
def _from_float16(_, bits):
    return float32(np.uint16(bits).view(np.float16))


@instruction("cvt.f32.bf16")
def _from_bfloat16(_, bits):
    return np.uint32(bits << 16).view(float32)


@instruction("cvt.rn.f32.f64")
def _from_float64(_, x):
    return float32(x)


@instruction("cvt.rn.bf16x2.f32")
def _pack_bfloat16(_, upper, lower):
    low, high = struct.unpack("<2I", struct.pack("<2f", lower, upper))
    low = low + 0x7FFF + (low >> 16 & 1) >> 16 if lower == lower else 0x7FFF
    high = high + 0x7FFF + (high >> 16 & 1) >> 16 if upper == upper else 0x7FFF
    return signed(low | high << 16)


@instruction("cvt.rn.f16x2.f32")
def _pack_float16(_, upper, lower):
    return int(np.array([lower, upper], np.float16).view(np.int32)[0])


# Global and ordinary shared memory. A type's letter is that of struct.

_LETTERS = {"b32": "i", "s32": "i", "u32": "I", "f32": "f", "b64": "q", "s64": "q", "u64": "Q"}
_LETTERS |= {"u8": "B", "u16": "H", "f64": "d"}


def _format(rest):
    """Return the format of a vector of registers."""
    *vector, kind = rest
    count = {(): 1, ("v2",): 2, ("v4",): 4}.get(tuple(vector))
    if count is None or kind not in _LETTERS:
        raise Fault(f"the emulator knows no access .{'.'.join(rest)}")
    return f"<{count}{_LETTERS[kind]}"


def _values(rest, bits):
    values = struct.unpack(_format(rest), bits)
    if rest[-1] == "f32":
        values = tuple(map(float32, values))
    return values if len(values) > 1 else values[0]


def _bits(rest, values):
    letters = _format(rest)
    values = values if isinstance(values, list) else [values]
    return np.frombuffer(struct.pack(letters, *values), np.uint8)


@instruction("ld.global.nc.*", "ld.global.*")
def _load_global(call, at):
    memory = call.tools.memory.bytes_at(at[0], struct.calcsize(_format(call.rest)))
    return _values(call.rest, memory)


@instruction("st.global.*", writes=False)
def _store_global(call, at, values):
    bits = _bits(call.rest, values)
    call.tools.memory.bytes_at(at[0], bits.size)[:] = bits


@instruction("ld.shared.*")
def _load_shared(call, at):
    return _values(call.rest, call.shared.load(at[0], struct.calcsize(_format(call.rest))))


@instruction("st.shared.*", writes=False)
def _store_shared(call, at, values):
    call.shared.store(at[0], _bits(call.rest, values))


# Warps and blocks. All lanes of a warp take part: nobody asks for less here.


def _shuffle(call, value, source, clamp, members):
    if (clamp, members & 0xFFFFFFFF) != (0x1F, 0xFFFFFFFF):
        raise Fault("only shuffles of whole warps are emulated")
    me = call.machine.current
    key = f"a shuffle of warp {me.warp}"
    return call.machine.meet(key, WARP, value)[me.warp * WARP + source(me.lane)]


@instruction("shfl.sync.idx.b32")
def _shuffle_index(call, value, lane, clamp, members):
    return _shuffle(call, value, lambda _: lane & 31, clamp, members)


@instruction("shfl.sync.bfly.b32")
def _shuffle_butterfly(call, value, mask, clamp, members):
    return _shuffle(call, value, lambda lane: lane ^ mask, clamp, members)


@instruction("bar.sync", writes=False)
def _barrier(call, number, threads):
    call.machine.meet(f"barrier {number}", threads)


@instruction("bar.arrive", writes=False)
def _arrive_at_barrier(call, number, threads):
    call.machine.meet(f"barrier {number}", threads, waits=False)


@instruction("setmaxnreg.*", writes=False)
def _set_registers(call, count):
    more = {"inc": True, "dec": False}[call.rest[0]]
    me = call.machine.current
    less, more = (me.registers, 256) if more else (24, me.registers)
    if count % 8 or not less <= count <= more:
        raise Fault(f"setmaxnreg.{call.rest[0]} from {me.registers} to {count} registers")
    call.machine.set_registers(count)
    # Of all warps of a warpgroup; one that stays away is missed.
    call.machine.meet(f"setmaxnreg of warpgroup {me.warp // 4}", 4 * WARP, count)


# Barriers in shared memory, fences, TMA.


@instruction("mbarrier.init.shared::cta.b64", writes=False)
def _barrier_init(call, at, count):
    call.shared.init(at[0], count)


@instruction("mbarrier.arrive.shared::cta.b64")
def _arrive(call, at):
    call.shared.arrive(at[0])


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64")
def _expect(call, at, size):
    call.shared.arrive(at[0], size)


@instruction("mbarrier.try_wait.parity.shared::cta.b64")
def _wait(call, at, parity):
    return call.shared.wait(at[0], parity)


@instruction("fence.mbarrier_init.release.cluster", writes=False)
def _fence_barriers(call):
    """Barriers are told of by the fence for the proxy."""


@instruction("fence.proxy.async", "fence.proxy.async.shared::cta", writes=False)
def _fence(call):
    call.shared.fence()


@instruction("prefetch.tensormap", writes=False)
def _prefetch(call, at):
    call.tools.memory.map_at(at[0])


_TMA = "shared::cluster.global.tile.mbarrier::complete_tx::bytes"


@instruction(*(f"cp.async.bulk.tensor.{n}d.{_TMA}" for n in range(1, 6)), writes=False)
def _load_box(call, to, source, barrier):
    at, coordinates = source
    call.shared.load_box(to[0], at, coordinates, barrier[0])


# wgmma.


@instruction("wgmma.fence.sync.aligned", writes=False)
def _begin(call):
    call.machine.current.fenced = True


@instruction("wgmma.commit_group.sync.aligned", writes=False)
def _commit(call):
    call.warpgroup.commit()


@instruction("wgmma.wait_group.sync.aligned", writes=False)
def _wait_for_groups(call, pending):
    call.warpgroup.wait(pending)


@instruction("wgmma.mma_async.sync.aligned.*", writes=False, registers=(0, 1))
def _multiply(call, sums, a, b, add, *options):
    size, result, kind, other = call.rest
    n = int(size.removeprefix("m64n").removesuffix("k16"))
    known = result == "f32" and kind == other in ("bf16", "f16") and sums.count == n // 2
    in_registers = not isinstance(a, int)
    # The signs of A and B, and which of those in shared memory are transposed.
    negate_a, negate_b, *transposed = options
    known = known and (negate_a, negate_b) == (1, 1) and len(transposed) == 2 - in_registers
    if not known or (not in_registers and transposed[0]):
        raise Fault(f"the emulator knows no wgmma {'.'.join(call.rest)} with {options}")
    shape = Shape(n, kind, None if in_registers else a, b, bool(add), bool(transposed[-1]))
    call.warpgroup.multiply(shape, sums, a if in_registers else None)
