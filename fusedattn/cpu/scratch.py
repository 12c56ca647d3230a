"""Working memory of a thread, kept from call to call."""

from __future__ import annotations

import threading

import numpy as np

_scratch = threading.local()


def working_memory(size: int) -> int:
    """Address of at least ``size`` bytes that belong to this thread, on a cache line."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.nbytes < size + 64:
        buffer = _scratch.buffer = np.empty(size + 64, np.uint8)
        _scratch.address = -(-buffer.ctypes.data // 64) * 64
    address: int = _scratch.address
    return address
