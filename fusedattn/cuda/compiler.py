"""The one place that knows which compiler there is: kernels import from here alone.

Three toolchains compile the same kernels: numba-cuda-mlir (preferred), numba-cuda, and Numba's
CUDA simulator, which runs them as Python threads on a machine without a GPU. The environment
variable ``FUSEDATTN_CUDA_COMPILER`` names one of ``numba-cuda-mlir``, ``numba-cuda`` and
``simulator``; without it the simulator is taken where ``NUMBA_ENABLE_CUDASIM`` is set, else the
first compiler that is installed.

A kernel is a function ``make(toolchain, config) -> python function``: it closes over what the
toolchain offers (its ``cuda`` and ``types``, conversions, instructions from `fusedattn.cuda.ptx`)
and over the constants of its configuration. Compilers only make LTO-IR; one linker makes the cubin
of it, which is kept on disk, so that no later process needs a compiler.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import struct
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from fusedattn import kernel_files
from fusedattn.cuda.simulator import Simulator
from fusedattn.cuda.toolchains import (
    MLIR,
    NAMES,
    NUMBA,
    SIMULATOR,
    Mlir,
    NumbaCuda,
    Toolchain,
)
from fusedattn.cuda.unroll import unroll
from fusedattn.undisturbed import undisturbed

VARIABLE = "FUSEDATTN_CUDA_COMPILER"
_PACKAGES = {MLIR: "numba_cuda_mlir", NUMBA: "numba_cuda", SIMULATOR: "numba"}

# Storage types as a kernel sees them: half types travel as the integers that hold their bits.
ELEMENT = {
    "float16": "uint16",
    "bfloat16": "uint16",
    "float32": "float32",
    "float64": "float64",
    "bool": "uint8",
    "int64": "int64",
}


class Compiled(NamedTuple):
    """A kernel in machine code, the name of its entry, and what the assembler said about it."""

    cubin: bytes
    entry: str
    log: str


_TOOLCHAINS: dict[str, Callable[[], Toolchain]] = {
    MLIR: Mlir,
    NUMBA: NumbaCuda,
    SIMULATOR: Simulator,
}


def missing() -> list[str]:
    """Reasons why no toolchain can be chosen; empty if one can. Nothing is imported for it."""
    chosen = os.environ.get(VARIABLE)
    if chosen and chosen not in NAMES:
        return [f"{VARIABLE} must be one of {', '.join(NAMES)}, but is {chosen!r}"]
    names = [chosen] if chosen else [MLIR, NUMBA]
    if not chosen and _simulated():
        return []
    if any(importlib.util.find_spec(_PACKAGES[name]) for name in names):
        if chosen == SIMULATOR or importlib.util.find_spec("cuda.bindings"):
            return []
        return ["the package cuda-bindings is not installed (pip install 'fusedattn[cuda]')"]
    if chosen:
        return [f"{VARIABLE} asks for {chosen}, which is not installed"]
    return ["no CUDA compiler is installed (pip install 'fusedattn[cuda]')"]


def chosen_name() -> str:
    """Return the name of the toolchain that would be used, given that none is `missing`."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return chosen
    if _simulated():
        return SIMULATOR
    return MLIR if importlib.util.find_spec(_PACKAGES[MLIR]) else NUMBA


def _simulated() -> bool:
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@functools.cache
def _toolchain(name: str) -> Toolchain:
    return _TOOLCHAINS[name]()


def toolchain(name: str | None = None) -> Toolchain:
    """Return a toolchain, by default the one to be used; see the top of this module."""
    return _toolchain(name or chosen_name())


class Kernel(NamedTuple):
    """What has to be compiled: a maker, its configuration, and the types of its parameters.

    ``parameters`` are names of element types for arrays in square brackets, ``[float32]``, or of
    scalars, ``int32``.
    """

    name: str
    make: Callable[[Any, Any], Any]
    config: Any
    parameters: tuple[str, ...]
    threads: int

    def signature(self, types: Any) -> Any:
        """Numba's signature of the kernel."""
        arguments = []
        for parameter in self.parameters:
            if parameter.startswith("["):
                element = getattr(types, ELEMENT[parameter[1:-1]])
                arguments.append(types.Array(element, 1, "C"))
            else:
                arguments.append(getattr(types, parameter))
        return types.void(*arguments)


def build(kernel: Kernel, chip: str, tools: Any = None, options: tuple[str, ...] = ()) -> Compiled:
    """Compile and link a kernel for a chip such as ``sm_90a``; needs no GPU."""
    tools = tools or toolchain()
    made = undisturbed(kernel.make, tools, kernel.config)
    function = unroll(made, tools.types.uint64, len(kernel.parameters))
    code = undisturbed(tools.ltoir, function, kernel.signature(tools.types), chip, kernel.threads)
    cubin, log = _link(code, (f"-arch={chip}", "-lto", "-O3", "-Xptxas=-v", *options))
    return Compiled(cubin, entry_of(cubin), log)


def _link(code: bytes, options: tuple[str, ...]) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink

    def text(size: Callable[[Any], int], fill: Callable[[Any, Any], Any]) -> str:
        buffer = bytearray(size(handle))
        fill(handle, buffer)
        return buffer.decode(errors="replace").rstrip("\0")

    handle = nvjitlink.create(len(options), list(options))
    try:
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            said = text(nvjitlink.get_error_log_size, nvjitlink.get_error_log)
            raise RuntimeError(f"the CUDA linker failed: {said}") from error
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = text(nvjitlink.get_info_log_size, nvjitlink.get_info_log)
        return bytes(cubin), log
    finally:
        nvjitlink.destroy(handle)


def entry_of(cubin: bytes) -> str:
    """Return the name of the kernel in a cubin: an ELF file with one section ``.text.NAME``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    (strings,) = struct.unpack_from("<Q", cubin, table + names * size + 0x18)
    for index in range(count):
        (offset,) = struct.unpack_from("<I", cubin, table + index * size)
        name = cubin[strings + offset : cubin.index(b"\0", strings + offset)].decode()
        if name.startswith(".text."):
            return name.removeprefix(".text.")
    raise ValueError("the cubin holds no kernel")


@functools.cache
def _source_digest() -> bytes:
    package = Path(__file__).parents[1]
    shared = [package / "masks.py", package / "philox.py"]
    return kernel_files.digest_of(sorted([*package.glob("cuda/**/*.py"), *shared]))


@functools.cache
def _versions(name: str) -> Mapping[str, str]:
    wanted = (_PACKAGES[name], "numba", "llvmlite", "cuda-bindings", "nvidia-nvvm")
    found = {}
    for package in (*wanted, "nvidia-nvjitlink"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def cubin_path(kernel: Kernel, chip: str, name: str) -> Path:
    """Where the machine code of a kernel is kept: named for all that it depends on."""
    try:
        source = _source_digest()
    except OSError:  # the sources are not there to be read: nothing tells versions apart
        return kernel_files.NOWHERE
    parts = (kernel.config, kernel.parameters, kernel.threads, chip, name, sys.version)
    key = hashlib.sha256(source + repr((parts, sorted(_versions(name).items()))).encode())
    return kernel_files.cache_dir() / f"{kernel.name}-{key.hexdigest()[:32]}.cubin"


def compiled(kernel: Kernel, chip: str) -> Compiled:
    """Return the machine code of a kernel, from disk or compiled now."""
    path = cubin_path(kernel, chip, chosen_name())
    cubin = kernel_files.fetch(path, lambda: build(kernel, chip).cubin)
    return Compiled(cubin, entry_of(cubin), "")
