"""Scalar reads and writes at an address, for the macro loops.

Arrays as arguments would make Numba compile a kernel again for each layout, so kernels hold plain
int64 addresses. A table is an address and an index; every table below is one of these types.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numba
from llvmlite import ir

from fusedattn.cpu.simd import DOUBLE, I8, I32, I64, Emitter, emitted
from fusedattn.cpu.tile import Tile

# Kernels have no exceptions: a division by zero gives inf or NaN, as the arithmetic means it.
njit = partial(numba.njit, error_model="numpy")


def make_memory(tile: Tile) -> SimpleNamespace:
    """Return the intrinsics ``get_*(base, index)``, ``set_*(base, index, value)`` and their kin.

    ``i64``, ``i32`` and ``u8`` are integers, ``f64`` is float64, ``real`` the accumulator type
    (float64 in Python); ``element`` reads one value of the storage type as float64, ``put`` rounds
    a float64 to the type of out, ``bias`` reads one of the four float types by its code.
    """

    def get(kind: ir.Type, size: int):  # type: ignore[no-untyped-def]
        def write(e: Emitter, base: ir.Value, index: ir.Value) -> ir.Value:
            value = e.load(e.offset(base, index, size), kind)
            if kind == I8:
                return e.builder.zext(value, I64)
            return e.builder.sext(value, I64) if kind == I32 else value

        return write

    def put(kind: ir.Type, size: int):  # type: ignore[no-untyped-def]
        def write(e: Emitter, base: ir.Value, index: ir.Value, value: ir.Value) -> None:
            narrow = e.builder.trunc(value, kind) if kind in (I8, I32) else value
            e.store(narrow, e.offset(base, index, size))

        return write

    def get_real(e: Emitter, base: ir.Value, index: ir.Value) -> ir.Value:
        value = e.load(e.offset(base, index, e.bytes), e.real)
        return value if e.bits == 64 else e.builder.fpext(value, DOUBLE)

    def set_real(e: Emitter, base: ir.Value, index: ir.Value, value: ir.Value) -> None:
        e.store(e.to_real(value), e.offset(base, index, e.bytes))

    def element(e: Emitter, address: ir.Value) -> ir.Value:
        return Emitter(e.builder, 64, 1).load_storage(address, tile.storage)

    def put_out(e: Emitter, address: ir.Value, value: ir.Value) -> None:
        single = e.to_real(value)
        e.store_storage(single, address, tile.out_storage)

    def add_atomic(e: Emitter, address: ir.Value, value: ir.Value) -> ir.Value:
        pointer = e.builder.inttoptr(address, I64.as_pointer())
        return e.builder.atomic_rmw("add", pointer, value, "monotonic")

    def get_atomic(e: Emitter, address: ir.Value) -> ir.Value:
        pointer = e.builder.inttoptr(address, I64.as_pointer())
        return e.builder.load_atomic(pointer, "monotonic", 8)

    table = {
        "get_i64": ("ii>i", get(I64, 8)),
        "get_i32": ("ii>i", get(I32, 4)),
        "get_u8": ("ii>i", get(I8, 1)),
        "get_f64": ("ii>f", get(DOUBLE, 8)),
        "get_real": ("ii>f", get_real),
        "set_i64": ("iii>", put(I64, 8)),
        "set_i32": ("iii>", put(I32, 4)),
        "set_u8": ("iii>", put(I8, 1)),
        "set_f64": ("iif>", put(DOUBLE, 8)),
        "set_real": ("iif>", set_real),
        "element": ("i>f", element),
        "put_out": ("if>", put_out),
        "add_atomic": ("ii>i", add_atomic),
        "get_atomic": ("i>i", get_atomic),
    }
    for storage in ("float16", "bfloat16", "float32", "float64"):

        def read(e: Emitter, address: ir.Value, storage: str = storage) -> ir.Value:
            """Round to the accumulator first: that is the type in which a bias counts."""
            value = e.load_storage(address, storage)
            return value if e.bits == 64 else e.builder.fpext(value, DOUBLE)

        table[f"read_{storage}"] = ("i>f", read)
    return SimpleNamespace(
        **{
            name: emitted(name, signature, write, tile.bits, tile.width, inline=True)
            for name, (signature, write) in table.items()
        }
    )
