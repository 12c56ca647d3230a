"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

The key of a file is what the machine code depends on: the source
of this package's kernels, the tile shape, the CPU and the versions of the compilers.
The files are those of `fusedattn.kernel_files`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedattn import kernel_files


@functools.cache
def _source_digest() -> bytes:
    """Digest of every file whose code ends up in a kernel."""
    package = Path(__file__).parents[1]
    names = ("bytecode.py", "functions.py", "masks.py", "philox.py")
    shared = [package / name for name in names]
    return kernel_files.digest_of(sorted([*package.glob("cpu/**/*.py"), *shared]))


def _key(detail: object) -> str:
    import llvmlite
    import numba
    from llvmlite import binding
    from numba.core import config as numba_config

    config: Any = numba_config  # its attributes are set when it is imported
    features = config.CPU_FEATURES  # an empty text is a choice
    parts = (
        sys.version,
        numba.__version__,
        llvmlite.__version__,
        binding.get_process_triple(),
        config.CPU_NAME or binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten() if features is None else features,
        config.OPT,
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
