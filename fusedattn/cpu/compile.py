"""From LLVM modules to native code: the worker, and the micro-kernels that it calls.

The worker is one function for all dtypes; the micro-kernels of a tile shape are a module of their
own, in groups. Both are compiled once per machine and kept on disk (`fusedattn.cpu.cache`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple, cast

import llvmlite.binding as llvm

from fusedattn.cpu.cache import fetch
from fusedattn.cpu.host import host_features, host_name
from fusedattn.cpu.interface import BACKWARD_GROUPS, GROUPS, RESCUE_SIGNATURES
from fusedattn.cpu.tile import Tile
from fusedattn.undisturbed import undisturbed

Worker = Callable[[int, int], int]

_rescue: list[Any] = []


class Loaded(NamedTuple):
    """Some C functions: addresses by name, and what keeps them in memory."""

    addresses: dict[str, int]
    engine: Any


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread compile; the others wait, and whoever comes later finds the result.

    So does whoever comes again after an interrupt.
    """
    results: dict[Any, Any] = {}

    def make(arguments: tuple[Any, ...]) -> None:
        if arguments not in results:
            results[arguments] = function(*arguments)

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        if arguments not in results:
            undisturbed(make, arguments)
        return results[arguments]

    return wrapper


@once
def link_half_once() -> Any:
    """Provide the conversion of float16 where the processor may not have it."""
    machine, features = host_machine(), host_features()
    has_it = "+f16c" in features or machine.triple.startswith(("aarch64", "arm64"))
    if has_it:
        return None
    from fusedattn.cpu.half import link_half

    return link_half(machine)


def load(code: bytes, names: Iterable[str]) -> Loaded:
    """Link object code into this process."""
    link_half_once()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Loaded({name: engine.get_function_address(name) for name in names}, engine)


def _program(name: str, module: str, signatures: dict[str, str]) -> Loaded:
    """Compile a program, or load it: C functions of these names, from kernels of a module.

    Its module, and with it Numba, is loaded to compile alone.
    """

    def make() -> bytes:
        from fusedattn.cpu.kernel import Entry, emit_program

        kernels = import_module(f"fusedattn.cpu.{module}")
        entries = [Entry(name, getattr(kernels, name), kind) for name, kind in signatures.items()]
        # More than the first level gains nothing for them, and takes a quarter of a second.
        return bytes(compile_module(emit_program(entries), host_machine(), speed_level=1))

    return load(fetch(name, "", make), signatures)


def _worker(name: str, module: str) -> Worker:
    """Compile a function ``(parameters, working memory) -> status``, or load it."""
    program = _program(name, module, {name: "ii>i"})
    # ctypes lets go of the GIL for the length of the call.
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    native: Any = prototype(program.addresses[name])
    native.program = program  # keeps the code in memory
    return cast(Worker, native)


@once
def get_worker() -> Worker:
    """Return the native worker of the forward pass."""
    return _worker("worker", "forward")


@once
def get_backward_worker() -> Worker:
    """Return the native worker of the backward pass."""
    return _worker("backward_worker", "backward")


@once
def get_backward_rescue() -> Worker:
    """Return the native worker of its rescue, compiled on first use."""
    return _worker("rescue_worker", "backward_rescue")


@once
def get_rescue() -> tuple[int, int]:
    """Return the addresses of `mark_visible` and `rescue`, compiled on first use."""
    program = _program("rescue", "rescue", RESCUE_SIGNATURES)
    _rescue.append(program)  # keeps the code in memory
    mark_visible, whole = program.addresses.values()
    return mark_visible, whole


def known_rescue() -> tuple[int, int] | None:
    """Return what `get_rescue` returned, or None if it was not needed yet."""
    return get_rescue() if _rescue else None


@once
def get_micro(tile: Tile, group: str) -> Loaded:
    """Return a group of micro-kernels for a tile shape."""
    name = f"{group}-{tile.storage}-{tile.out_storage}"
    code = fetch(name, tile, lambda: compile_micro(tile, group))
    return load(code, (GROUPS | BACKWARD_GROUPS)[group])


def host_machine(
    cpu: str | None = None, features: str | None = None, triple: str | None = None
) -> Any:
    """Return LLVM's machine for this host, or for another one that is named."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = triple or llvm.get_process_triple()
    if cpu is None:
        cpu, features = host_name(), host_features()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features or "", opt=3, jit=True
    )


def compile_micro(tile: Tile, group: str, machine: Any = None, *, assembly: bool = False) -> Any:
    """Compile a group of micro-kernels to object code, or to assembly for reading."""
    from fusedattn.cpu.micro import emit_module

    machine = machine or host_machine()
    module = llvm.parse_assembly(str(emit_module(tile, group)))
    return compile_module(module, machine, assembly=assembly)


def compile_module(
    module: Any, machine: Any, *, speed_level: int = 3, assembly: bool = False
) -> Any:
    """Optimise a module and compile it."""
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module) if assembly else machine.emit_object(module)
