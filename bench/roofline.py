"""What the machine can do: multiply-adds from registers, and reading memory from end to end.

Both loops are emitted by the library's own emitter and do nothing else. They run on as many
threads as the cases and take their turns in the same rounds, so that a change of clock or a
neighbour that takes memory bandwidth hits numerator and denominator alike.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from bench.cases import Case
from fusedattn.cpu.compile import compile_module, host_machine, load
from fusedattn.cpu.simd import DOUBLE, I64, Emitter, define
from fusedattn.cpu.tile import host_isa

# So many independent sums hide the latency of a multiply-add on every processor: two units of four
# to six cycles. Two registers hold the factors.
REGISTERS_LEFT = 4
FMA_STEPS = 4_000_000
# Several streams with a prefetch read a little faster than one does without.
STREAMS, STREAM_VECTORS, PREFETCH_BYTES = 4, 4, 2048
ALIGNMENT = 4096


class Probe(NamedTuple):
    """A call and what it does each time: floating-point operations, or bytes read."""

    kind: str  # "fma" or "read"
    call: Callable[[], object]
    work: int


def _sums() -> int:
    return host_isa().registers - REGISTERS_LEFT


def _width() -> int:
    return host_isa().vector_bytes // 4


def _write_fma(emit: Emitter, steps: ir.Value, factor: ir.Value, term: ir.Value) -> ir.Value:
    """``sum = sum * factor + term`` for every sum, in every step."""
    factor, term = emit.splat(emit.to_real(factor)), emit.splat(emit.to_real(term))
    places = [emit.variable(emit.splat_const(float(i))) for i in range(_sums())]
    with emit.loop(steps):
        for place in places:
            emit.builder.store(emit.fma(emit.builder.load(place), factor, term), place)
    total = functools.reduce(emit.builder.fadd, [emit.builder.load(place) for place in places])
    return emit.builder.fpext(emit.builder.extract_element(total, I64(0)), DOUBLE)


def _write_read(emit: Emitter, address: ir.Value, steps: ir.Value) -> ir.Value:
    """Combine all vectors by exclusive or: in each step a few of each stream."""
    vector_bytes = emit.width * emit.bytes
    step_bytes = STREAM_VECTORS * vector_bytes
    places = [emit.variable(emit.splat_int(0)) for _ in range(STREAMS * STREAM_VECTORS)]
    with emit.loop(steps) as step:
        for i, place in enumerate(places):
            stream, vector = divmod(i, STREAM_VECTORS)
            start = emit.offset(address, emit.builder.mul(steps, I64(step_bytes)), stream)
            here = emit.offset(emit.offset(start, step, step_bytes), vector, vector_bytes)
            emit.prefetch(emit.offset(here, 1, PREFETCH_BYTES))
            loaded = emit.load(here, emit.ivec, vector_bytes)
            emit.builder.store(emit.builder.xor(emit.builder.load(place), loaded), place)
    vectors = [emit.builder.load(place) for place in places]
    total = functools.reduce(emit.builder.xor, vectors)
    lanes = [emit.builder.extract_element(total, I64(i)) for i in range(emit.width)]
    return emit.builder.zext(functools.reduce(emit.builder.xor, lanes), I64)


def compile_loops(machine: Any = None, *, assembly: bool = False) -> Any:
    """Compile both loops to object code, or to assembly for reading."""
    machine = machine or host_machine()
    module = ir.Module("roofline")
    define(module, "fma", "iff>f", _write_fma, 32, _width())
    define(module, "read", "ii>i", _write_read, 32, _width())
    return compile_module(llvm.parse_assembly(str(module)), machine, assembly=assembly)


@functools.cache
def _loops() -> tuple[Any, Any, Any]:
    loops = load(compile_loops(), ("fma", "read"))
    i, f = ctypes.c_int64, ctypes.c_double
    fma = ctypes.CFUNCTYPE(f, i, f, f)(loops.addresses["fma"])
    read = ctypes.CFUNCTYPE(i, i, i)(loops.addresses["read"])
    return fma, read, loops  # which keeps the code in memory


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def fma_probe(threads: int) -> Probe:
    """Multiply-adds in float32: a multiply-add counts as two operations."""
    fma, *_ = _loops()

    def one(_: int) -> float:
        return float(fma(FMA_STEPS, 0.5, 1.0))

    work = 2 * FMA_STEPS * _sums() * _width() * threads
    return Probe("fma", lambda: list(_pool(threads).map(one, range(threads))), work)


def read_probe(threads: int, size: int) -> Probe:
    """Read ``size`` bytes again and again, each thread a part of its own.

    Of the size that the case reads: what of it stays in caches between two calls, stays there for
    the case as well.
    """
    _, read, _ = _loops()
    step = STREAMS * STREAM_VECTORS * host_isa().vector_bytes
    steps = max(1, size // (step * threads))
    whole = np.ones(steps * step * threads + ALIGNMENT, np.uint8)
    start = -(-whole.ctypes.data // ALIGNMENT) * ALIGNMENT

    def one(part: int, _memory: object = whole) -> int:
        return int(read(start + part * steps * step, steps))

    return Probe(
        "read", lambda: list(_pool(threads).map(one, range(threads))), steps * step * threads
    )


def probe_for(case: Case, threads: int) -> Probe:
    """Return the loop that bounds a case."""
    if case.bound_by_memory:
        return read_probe(threads, case.bytes_moved)
    return fma_probe(threads)
