"""The system's permission to use the tiles of Intel AMX, which a process must ask for.

Their 8 KiB are more than a thread's saved state holds otherwise, so Linux (from 5.16 on) wants to
be asked before the first use, once for all threads of the process and of those that it forks.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

# Linux on x86-64: number of the system call arch_prctl, its request, and the state of the tiles.
_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18


@functools.cache
def may_use_tiles() -> bool:
    """Ask for permission; False where the system does not give it or does not know the question."""
    if (
        sys.platform != "linux"
        or platform.machine() != "x86_64"
        or ctypes.sizeof(ctypes.c_void_p) != 8
    ):
        return False
    request = ctypes.CDLL(None).syscall
    request.restype = ctypes.c_long
    return bool(request(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILES))) == 0)
