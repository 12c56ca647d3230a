"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

Numba's own cache looks at the file of the function it compiles and would run stale code after a
change to the emitters in another file. Here the key is what the machine code depends on: the source
of this package's kernels, the tile shape, the CPU and the versions of the compilers. A file that
cannot be read, or is not whole, counts as absent; one that cannot be written is not missed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VARIABLE = "FUSEDATTN_CACHE_DIR"
_DIGEST_BYTES = hashlib.sha256().digest_size
# A folder in which nothing can be read or written.
_NOWHERE = Path(os.devnull, "fusedattn")


def cache_dir() -> Path:
    """Return the folder for compiled kernels; ``FUSEDATTN_CACHE_DIR`` overrides the default.

    Where the user has no home, nothing is kept.
    """
    chosen = os.environ.get(_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fusedattn"
    except RuntimeError:
        return _NOWHERE


@functools.cache
def _source_digest() -> bytes:
    """Digest of every file whose code ends up in a kernel."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    others = (package / name for name in ("functions.py", "masks.py", "philox.py"))
    for path in sorted([*package.glob("cpu/**/*.py"), *others]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


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
        return _NOWHERE
    return cache_dir() / f"{name}-{key}.bin"


def _read(path: Path) -> bytes | None:
    """Return what was written, or None if it is absent, unreadable or not whole."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, payload = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _write(path: Path, payload: bytes) -> None:
    """Write completely or not at all; a folder that cannot be written is not missed."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, path)
    except OSError:
        pass
    else:
        temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def fetch(name: str, detail: object, make: Callable[[], bytes]) -> bytes:
    """Return the code kept under a name and the details it depends on, made if it is not there."""
    path = _path(name, detail)
    code = _read(path)
    if code is None:
        code = make()
        _write(path, code)
    return code


class KernelCache:
    """The two methods that Numba calls on the cache of a function, for one entry point."""

    def __init__(self, name: str, before_compiling: Callable[[], None]) -> None:
        self.path = _path(name, "")
        self.before_compiling = before_compiling

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled function, or None when it has to be compiled."""
        del signature
        from numba.core.compiler import CompileResult

        payload = _read(self.path)
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

        _write(self.path, serialize.dumps(data._reduce()))
