"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

Numba's own cache looks at the file of the function it compiles and would run stale code after a
change to the emitters in another file. Here the key is what the machine code depends on: the source
of this package's kernels, the tile shape, the CPU and the versions of the compilers.
The files are those of `fusedattn.kernel_files`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
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


def _path(name: str, detail: object) -> Path:
    try:
        key = _key(detail)
    except OSError:  # the sources are not there to be read: nothing tells versions apart
        return kernel_files.NOWHERE
    return kernel_files.cache_dir() / f"{name}-{key}.bin"


def fetch(name: str, detail: object, make: Callable[[], bytes]) -> bytes:
    """Return the code kept under a name and the details it depends on, made if it is not there."""
    return kernel_files.fetch(_path(name, detail), make)


class KernelCache:
    """The two methods that Numba calls on the cache of a function, for one entry point."""

    def __init__(self, name: str, before_compiling: Callable[[], None]) -> None:
        self.path = _path(name, "")
        self.before_compiling = before_compiling

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled function, or None when it has to be compiled."""
        del signature
        from numba.core.compiler import CompileResult

        payload = kernel_files.read(self.path)
        # Whatever is wrong with a file, compiling again is right.
        with contextlib.suppress(Exception):
            if payload is not None:
                target_context.refresh()
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        self.before_compiling()
        return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep the compiled function."""
        del signature
        from numba.core import serialize

        kernel_files.write(self.path, serialize.dumps(data._reduce()))
