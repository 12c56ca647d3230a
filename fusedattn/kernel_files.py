"""Files with compiled code: whole and ours, or absent.

A file that cannot be read, is not whole, or was written under another name, counts as absent; one
that cannot be written is not missed. What a file's name has to depend on is its owner's business
(`fusedattn.cpu.cache`, `fusedattn.cuda.compiler`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_VARIABLE = "FUSEDATTN_CACHE_DIR"
_DIGEST_BYTES = hashlib.sha256().digest_size
# A folder in which nothing can be read or written.
NOWHERE = Path(os.devnull, "fusedattn")


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
        return NOWHERE


def digest_of(paths: Iterable[Path]) -> bytes:
    """Digest of the names and contents of source files; OSError where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _digest(path: Path, payload: bytes) -> bytes:
    """Digest of a file's name, which says what the code is, and its content."""
    return hashlib.sha256(path.name.encode() + b"\0" + payload).digest()


def read(path: Path) -> bytes | None:
    """Return what was written, or None if it is absent, unreadable or not whole."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, payload = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    return payload if _digest(path, payload) == digest else None


def write(path: Path, payload: bytes) -> None:
    """Write completely or not at all; a folder that cannot be written is not missed."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(path, payload) + payload)
        os.replace(temporary, path)
    except OSError:
        pass
    else:
        temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def fetch(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the code kept in a file, made and written if it is not there."""
    code = read(path)
    if code is None:
        code = make()
        write(path, code)
    return code
