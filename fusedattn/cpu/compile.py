"""From emitters to native code: the worker through Numba, the micro-kernels through LLVM.

The worker is one function for all dtypes; the micro-kernels of a tile shape are a module of their
own, in groups. Both are compiled once per machine and kept on disk (`fusedattn.cpu.cache`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import llvmlite.binding as llvm
from numba.core import config as _config
from numba.core.ccallback import CFunc

from fusedattn.cpu.cache import KernelCache, fetch
from fusedattn.cpu.forward import RESCUE_SIGNATURES, worker
from fusedattn.cpu.half import link_half
from fusedattn.cpu.memory import compile_kernels, numba_signature
from fusedattn.cpu.micro import BACKWARD_GROUPS, GROUPS, emit_module
from fusedattn.cpu.tile import Tile
from fusedattn.undisturbed import undisturbed

# Its attributes are set from the environment when Numba is imported.
config: Any = _config

Worker = Callable[[int, int], int]

_rescue: list[Any] = []


class Micro(NamedTuple):
    """Some micro-kernels: addresses by name, and what keeps them in memory."""

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


def _compile(name: str, function: Any, signature: str) -> Any:
    """Compile one entry point through Numba, or load it; ``.address`` is where it lies."""
    link_half_once()
    kind = numba_signature(signature)
    compiled: Any = CFunc(
        function, (kind.args, kind.return_type), locals={}, options={"error_model": "numpy"}
    )
    compiled._cache = KernelCache(name, compile_kernels)
    compiled.compile()
    return compiled


def _worker(name: str, function: Any) -> Worker:
    """Compile a function ``(parameters, working memory) -> status``, or load it."""
    compiled = _compile(name, function, "ii>i")
    # ctypes lets go of the GIL for the length of the call.
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    native: Any = prototype(compiled.address)
    native.compiled = compiled  # keeps the code in memory
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

    mark_visible, whole_rescue = (
        _compile(name, getattr(rescue, name), signature)
        for name, signature in RESCUE_SIGNATURES.items()
    )
    _rescue[:] = mark_visible, whole_rescue
    return mark_visible.address, whole_rescue.address


def known_rescue() -> tuple[int, int] | None:
    """Return what `get_rescue` returned, or None if it was not needed yet."""
    return get_rescue() if _rescue else None


@once
def get_micro(tile: Tile, group: str) -> Micro:
    """Return a group of micro-kernels for a tile shape."""
    link_half_once()
    name = f"{group}-{tile.storage}-{tile.out_storage}"
    code = fetch(name, tile, lambda: compile_micro(tile, group))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    names = (GROUPS | BACKWARD_GROUPS)[group]
    addresses = {name: engine.get_function_address(name) for name in names}
    return Micro(addresses, engine)


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
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module) if assembly else machine.emit_object(module)
