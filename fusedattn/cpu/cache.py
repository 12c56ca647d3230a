"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

Numba's own cache looks at the file of the function it compiles and would run stale code after a
change to the emitters in another file. Here the key is what the machine code depends on: the
source of this package's kernels, the tile, the CPU and the versions of the compilers. A file that
cannot be read, or is not whole, counts as absent; one that cannot be written is not missed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusedattn.cpu.tile import Tile

_VARIABLE = "FUSEDATTN_CACHE_DIR"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_dir() -> Path:
    """Return the folder for compiled kernels; ``FUSEDATTN_CACHE_DIR`` overrides the default."""
    chosen = os.environ.get(_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fusedattn"


@functools.cache
def _source_digest() -> bytes:
    """Digest of every file whose code ends up in a kernel."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.glob("cpu/*.py"), package / "masks.py", package / "philox.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _key(tile: Tile) -> str:
    import llvmlite
    import numba
    from llvmlite import binding
    from numba.core import config

    features = config.CPU_FEATURES or binding.get_host_cpu_features().flatten()
    parts = (
        sys.version,
        numba.__version__,
        llvmlite.__version__,
        binding.get_default_triple(),
        config.CPU_NAME or binding.get_host_cpu_name(),
        features,
        config.OPT,
        tile,
    )
    return hashlib.sha256(_source_digest() + repr(parts).encode()).hexdigest()[:32]


class KernelCache:
    """The two methods that Numba calls on a function's cache, for one kernel."""

    def __init__(self, tile: Tile) -> None:
        self.path = cache_dir() / f"{tile.storage}-{tile.out_storage}-{_key(tile)}.bin"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None."""
        del signature
        from numba.core.compiler import CompileResult

        try:
            whole = self.path.read_bytes()
            digest, payload = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            target_context.refresh()
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # whatever is wrong with it, compiling again is right
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Write the compiled kernel: completely or not at all."""
        del signature
        from numba.core import serialize

        payload = serialize.dumps(data._reduce())
        temporary = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".partial-")
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, self.path)
        except OSError:  # read-only or full: the next process compiles again
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
