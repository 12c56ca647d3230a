"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

The key of a file is what the machine code depends on: the source of this package's kernels, the
tile shape, the CPU and the versions of the compilers. The files are those of
`fusedattn.kernel_files`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from fusedattn import kernel_files
from fusedattn.cpu.host import host_features, host_name


@functools.cache
def _source_digest() -> bytes:
    """Digest of every file whose code ends up in a kernel."""
    package = Path(__file__).parents[1]
    names = ("bytecode.py", "functions.py", "masks.py", "philox.py")
    shared = [package / name for name in names]
    return kernel_files.digest_of(sorted([*package.glob("cpu/**/*.py"), *shared]))


@functools.cache
def _versions() -> tuple[str, ...]:
    """Versions of the compilers, which need not be loaded for that."""
    return tuple(metadata.version(name) for name in ("numba", "llvmlite"))


def _key(detail: object) -> str:
    from llvmlite import binding

    parts = (
        sys.version,
        *_versions(),
        binding.get_process_triple(),
        host_name(),
        host_features(),
        os.environ.get("NUMBA_OPT"),
        detail,
    )
    return hashlib.sha256(_source_digest() + repr(parts).encode()).hexdigest()[:32]


def path_of(name: str, detail: object) -> Path:
    """Return the file of the code kept under a name and the details it depends on."""
    try:
        key = _key(detail)
    except OSError:  # the sources are not there to be read: nothing tells versions apart
        return kernel_files.NOWHERE
    return kernel_files.cache_dir() / f"{name}-{key}.bin"


def fetch(name: str, detail: object, make: Callable[[], bytes]) -> bytes:
    """Return the code kept under a name and the details it depends on, made if it is not there."""
    return kernel_files.fetch(path_of(name, detail), make)
