"""From LLVM modules to native code: the worker, and the micro-kernels that it calls.

The worker is one function for all dtypes; the micro-kernels of a tile shape are a module of their
own, in groups. Both are compiled once per machine and kept on disk (`fusedattn.cpu.cache`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import llvmlite.binding as llvm
from numba.core import config as _config

from fusedattn.cpu.cache import fetch
from fusedattn.cpu.forward import RESCUE_SIGNATURES, worker
from fusedattn.cpu.half import link_half
from fusedattn.cpu.kernel import Entry, emit_program
from fusedattn.cpu.micro import BACKWARD_GROUPS, GROUPS, emit_module
from fusedattn.cpu.tile import Tile
from fusedattn.undisturbed import undisturbed

# Its attributes are set from the environment when Numba is imported.
config: Any = _config

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
    machine, features = host_machine(), config.CPU_FEATURES
    features = llvm.get_host_cpu_features().flatten() if features is None else features
    has_it = "+f16c" in features or machine.triple.startswith(("aarch64", "arm64"))
    return None if has_it else link_half(machine)


def load(code: bytes, names: Iterable[str]) -> Loaded:
    """Link object code into this process."""
    link_half_once()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Loaded({name: engine.get_function_address(name) for name in names}, engine)


def _program(name: str, *entries: Entry) -> Loaded:
    """Compile a program, or load it."""

    # More than the first level gains nothing for the macro loops, and takes a quarter of a second.
    def make() -> bytes:
        return bytes(compile_module(emit_program(entries), host_machine(), speed_level=1))

    code = fetch(name, "", make)
    return load(code, [entry.name for entry in entries])


def _worker(name: str, function: Any) -> Worker:
    """Compile a function ``(parameters, working memory) -> status``, or load it."""
    program = _program(name, Entry(name, function, "ii>i"))
    # ctypes lets go of the GIL for the length of the call.
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    native: Any = prototype(program.addresses[name])
    native.program = program  # keeps the code in memory
    return cast(Worker, native)


@once
def get_worker() -> Worker:
    """Return the native worker of the forward pass."""
    return _worker("worker", worker)


@once
def get_backward_worker() -> Worker:
    """Return the native worker of the backward pass."""
    from fusedattn.cpu.backward import backward_worker

    return _worker("backward_worker", backward_worker)


@once
def get_backward_rescue() -> Worker:
    """Return the native worker of its rescue, compiled on first use."""
    from fusedattn.cpu.backward_rescue import rescue_worker

    return _worker("backward_rescue", rescue_worker)


@once
def get_rescue() -> tuple[int, int]:
    """Return the addresses of `mark_visible` and `rescue`, compiled on first use."""
    from fusedattn.cpu import rescue

    entries = (Entry(n, getattr(rescue, n), kind) for n, kind in RESCUE_SIGNATURES.items())
    program = _program("rescue", *entries)
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
        cpu = config.CPU_NAME or llvm.get_host_cpu_name()
        features = config.CPU_FEATURES
        features = llvm.get_host_cpu_features().flatten() if features is None else features
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features or "", opt=3, jit=True
    )


def compile_micro(tile: Tile, group: str, machine: Any = None, *, assembly: bool = False) -> Any:
    """Compile a group of micro-kernels to object code, or to assembly for reading."""
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
