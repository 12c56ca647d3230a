"""From emitters to native code: the worker through Numba, the micro-kernels through LLVM.

The worker is one function for all dtypes; the micro-kernels of a tile shape are a module of their
own. Both are compiled once per machine and kept on disk (`fusedattn.cpu.cache`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba.core import config
from numba.core.ccallback import CFunc

from fusedattn.cpu.cache import KernelCache, fetch
from fusedattn.cpu.forward import WORKER_SIGNATURE, worker
from fusedattn.cpu.micro import SIGNATURES, emit_module
from fusedattn.cpu.tile import Tile

Worker = Callable[[int, int], int]

_lock = threading.RLock()
_micro: dict[Tile, Micro] = {}


class Micro(NamedTuple):
    """The micro-kernels of a tile shape: addresses by name, and what keeps them in memory."""

    addresses: dict[str, int]
    engine: Any


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread compile; the others wait and find the result."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def locked(*arguments: Any) -> Any:
        with _lock:
            return cached(*arguments)

    return locked


@once
def get_worker() -> Worker:
    """Return the native worker ``(parameters, working memory) -> items done``."""
    signature = (WORKER_SIGNATURE.args, WORKER_SIGNATURE.return_type)
    compiled = CFunc(worker, signature, locals={}, options={"error_model": "numpy"})
    compiled._cache = KernelCache()
    compiled.compile()
    # ctypes lets go of the GIL for the length of the call.
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    native = prototype(compiled.address)
    native.compiled = compiled  # type: ignore[attr-defined]  # keep the code in memory
    return native


@once
def get_micro(tile: Tile) -> Micro:
    """Return the micro-kernels of a tile shape."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = fetch(f"micro-{tile.storage}-{tile.out_storage}", tile, lambda: compile_micro(tile))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    addresses = {name: engine.get_function_address(name) for name in SIGNATURES}
    return Micro(addresses, engine)


def host_machine(cpu: str | None = None, features: str | None = None, triple: str | None = None) -> Any:
    """Return LLVM's machine for this host, or for another one that is named."""
    triple = triple or llvm.get_process_triple()
    if cpu is None:
        cpu = config.CPU_NAME or llvm.get_host_cpu_name()
        features = config.CPU_FEATURES
        features = llvm.get_host_cpu_features().flatten() if features is None else features
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features or "", opt=3, reloc="static" if False else "default", jit=True
    )


def compile_micro(tile: Tile, machine: Any = None, *, assembly: bool = False) -> Any:
    """Compile the micro-kernels of a tile to object code, or to assembly for reading."""
    machine = machine or host_machine()
    module = llvm.parse_assembly(str(emit_module(tile)))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module) if assembly else machine.emit_object(module)
