"""How aux arrays reach a compiled function."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Stands for the elements of an empty array: an index into it is held to its only place.
_NOTHING = np.zeros(16, np.uint8)


def describe_tables(arrays: tuple[NDArray[Any], ...]) -> ctypes.Array[ctypes.c_int64]:
    """Address, lengths and strides in bytes of each array, as compiled functions read them."""
    words: list[int] = []
    for array in arrays:
        empty = array.size == 0
        holder = _NOTHING if empty else array
        words.append(holder.__array_interface__["data"][0])
        words += [1] * array.ndim if empty else array.shape
        words += [0] * array.ndim if empty else array.strides
    return (ctypes.c_int64 * max(1, len(words)))(*words)
