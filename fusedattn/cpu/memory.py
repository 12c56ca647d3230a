"""Scalar reads and writes at an address, for the macro loops.

Arrays as arguments would make Numba compile a kernel again for each layout, so kernels hold plain
int64 addresses: ``get_*(base, index)`` and ``set_*(base, index, value)`` treat one as a table.
Storage types go by their code, so that one compilation serves them all.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fusedattn.cpu.simd import DOUBLE, FLOAT, I1, I8, I32, I64, Emitter, Writer, inlined
from fusedattn.cpu.tile import STORAGE_CODE


def _get(kind: ir.Type, size: int) -> Writer:
    def write(e: Emitter, base: ir.Value, index: ir.Value) -> ir.Value:
        value = e.load(e.offset(base, index, size), kind)
        if kind == I8:
            return e.builder.zext(value, I64)
        return e.builder.sext(value, I64) if kind == I32 else value

    return write


def _set(kind: ir.Type, size: int) -> Writer:
    def write(e: Emitter, base: ir.Value, index: ir.Value, value: ir.Value) -> None:
        narrow = e.builder.trunc(value, kind) if kind in (I8, I32) else value
        e.store(narrow, e.offset(base, index, size))

    return write


get_i64 = inlined("ii>i", _get(I64, 8))
get_i32 = inlined("ii>i", _get(I32, 4))
get_u8 = inlined("ii>i", _get(I8, 1))
get_f64 = inlined("ii>f", _get(DOUBLE, 8))
set_i64 = inlined("iii>", _set(I64, 8))
set_i32 = inlined("iii>", _set(I32, 4))
set_u8 = inlined("iii>", _set(I8, 1))
set_f64 = inlined("iif>", _set(DOUBLE, 8))


def _choose(e: Emitter, cases: list[tuple[ir.Value, Callable[[], ir.Value]]]) -> ir.Value:
    """The float64 value of the first case whose condition holds; the last needs none."""
    result = e.variable(ir.Constant(DOUBLE, 0.0))

    def branch(rest: list[tuple[ir.Value, Callable[[], ir.Value]]]) -> None:
        (condition, value), *others = rest
        if not others:
            e.builder.store(value(), result)
            return
        with e.builder.if_else(condition) as (then, otherwise):
            with then:
                e.builder.store(value(), result)
            with otherwise:
                branch(others)

    branch(cases)
    return e.builder.load(result)


def _get_real(e: Emitter, base: ir.Value, index: ir.Value, size: ir.Value) -> ir.Value:
    at = e.offset(base, index, size)
    single = e.builder.icmp_signed("==", size, I64(4))
    return _choose(
        e,
        [
            (single, lambda: e.builder.fpext(e.load(at, FLOAT), DOUBLE)),
            (single, lambda: e.load(at, DOUBLE)),
        ],
    )


def _set_real(e: Emitter, base: ir.Value, index: ir.Value, size: ir.Value, value: ir.Value) -> None:
    at = e.offset(base, index, size)
    with e.builder.if_else(e.builder.icmp_signed("==", size, I64(4))) as (then, otherwise):
        with then:
            e.store(e.builder.fptrunc(value, FLOAT), at)
        with otherwise:
            e.store(value, at)


def _read(e: Emitter, address: ir.Value, code: ir.Value) -> ir.Value:
    def case(name: str) -> tuple[ir.Value, Callable[[], ir.Value]]:
        is_it = e.builder.icmp_signed("==", code, I64(STORAGE_CODE[name]))
        return is_it, lambda: e.load_storage(address, name)

    return _choose(e, [case(name) for name in STORAGE_CODE])


def _write(e: Emitter, address: ir.Value, code: ir.Value, value: ir.Value) -> None:
    for name in STORAGE_CODE:
        with e.builder.if_then(e.builder.icmp_signed("==", code, I64(STORAGE_CODE[name]))):
            e.store_storage(value, address, name)


def _round_real(e: Emitter, value: ir.Value, size: ir.Value) -> ir.Value:
    single = e.builder.fpext(e.builder.fptrunc(value, FLOAT), DOUBLE)
    return e.builder.select(e.builder.icmp_signed("==", size, I64(4)), single, value)


def _smaller(e: Emitter, left: ir.Value, right: ir.Value) -> ir.Value:
    return e.minimum(left, right)


def _larger(e: Emitter, left: ir.Value, right: ir.Value) -> ir.Value:
    return e.builder.select(e.builder.icmp_signed(">", left, right), left, right)


# Of two integers; the built-ins cost a compilation for each pair of types.
smaller = inlined("ii>i", _smaller)
larger = inlined("ii>i", _larger)

# Accumulator-type values (size 4 or 8 bytes) as float64.
get_real = inlined("iii>f", _get_real)
set_real = inlined("iiif>", _set_real)
round_real = inlined("fi>f", _round_real)
# One value of a storage type, by its code, as float64; writing rounds once.
read_storage = inlined("ii>f", _read)
write_storage = inlined("iif>", _write)


def _add_atomic(e: Emitter, address: ir.Value, value: ir.Value) -> ir.Value:
    pointer = e.builder.inttoptr(address, I64.as_pointer())
    # Who counts last what several threads have done reads what they have written.
    return e.builder.atomic_rmw("add", pointer, value, "acq_rel")


def _get_atomic(e: Emitter, address: ir.Value) -> ir.Value:
    return e.builder.load_atomic(e.builder.inttoptr(address, I64.as_pointer()), "monotonic", 8)


def _get_acquire(e: Emitter, address: ir.Value) -> ir.Value:
    return e.builder.load_atomic(e.builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


def _set_release(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    pointer = e.builder.inttoptr(address, I64.as_pointer())
    e.builder.store_atomic(value, pointer, "release", 8)


add_atomic = inlined("ii>i", _add_atomic)
get_atomic = inlined("i>i", _get_atomic)
# What one thread wrote before it released, another sees after it has acquired.
get_acquire = inlined("i>i", _get_acquire)
set_release = inlined("ii>", _set_release)


def _clear(e: Emitter, address: ir.Value, size: ir.Value) -> None:
    target = e.builder.inttoptr(address, I8.as_pointer())
    memset = e.builder.module.declare_intrinsic("llvm.memset", [target.type, I64])
    e.builder.call(memset, [target, I8(0), size, I1(0)])


def _move(e: Emitter, target: ir.Value, source: ir.Value, size: ir.Value) -> None:
    pointers = [e.builder.inttoptr(address, I8.as_pointer()) for address in (target, source)]
    memcpy = e.builder.module.declare_intrinsic("llvm.memcpy", [p.type for p in pointers] + [I64])
    e.builder.call(memcpy, [*pointers, size, I1(0)])


# So many bytes. Of loops over addresses LLVM would make gathers and scatters.
clear = inlined("ii>", _clear)
copy_bytes = inlined("iii>", _move)
