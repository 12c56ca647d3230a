"""From shapes on the command line to arguments of `fusedattn.explain`."""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def shape(text: str) -> tuple[int, ...]:
    """Read a shape.

    Examples
    --------
    >>> shape("1,8,2048,64"), shape("8x2048x64")
    ((1, 8, 2048, 64), (8, 2048, 64))
    >>> shape("1,8,,64")
    Traceback (most recent call last):
    ValueError: '1,8,,64' is no shape; write it as 1,8,2048,64
    """
    if not re.fullmatch(r"\s*\(?\s*\d+(\s*[,x]\s*\d+)*\s*\)?\s*", text):
        raise ValueError(f"{text!r} is no shape; write it as 1,8,2048,64")
    return tuple(int(number) for number in re.findall(r"\d+", text))


def dtype(name: str) -> np.dtype[Any]:
    """Return one of the four storage types."""
    if name not in _DTYPES:
        raise ValueError(f"{name!r} is no storage type; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def window(text: str) -> tuple[int | None, int | None]:
    """Read a pair of sides, each a number or ``none``.

    Examples
    --------
    >>> window("127,0"), window("none,0")
    ((127, 0), (None, 0))
    """
    sides = [side.strip().lower() for side in text.split(",")]
    if len(sides) != 2 or not all(re.fullmatch(r"-?\d+|none", side) for side in sides):
        raise ValueError(f"{text!r} is no window; write it as LEFT,RIGHT, an open side as none")
    left, right = (None if side == "none" else int(side) for side in sides)
    return left, right


def stand_in(of_shape: tuple[int, ...], of_dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of any size that takes no memory: for what reads no elements.

    Its strides are those of a contiguous array, which one made by broadcasting does not have.
    """
    element = np.zeros((), of_dtype)
    sizes = [max(1, size) for size in of_shape]
    strides = tuple(element.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    if element.itemsize * math.prod(sizes) >= 2**63:
        raise ValueError(f"an array of shape {of_shape} is too large for any machine")
    return as_strided(element, of_shape, strides, writeable=False)
