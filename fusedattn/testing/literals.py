"""Python source of arrays: short where it can be read, packed where it cannot."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn.block_mask import BlockMask
from fusedattn.testing import functions

# Arrays up to this many elements are written out.
_READABLE = 64


def source(value: Any) -> str:
    """Return an expression that makes an equal value.

    It needs ``numpy as np``, ``ml_dtypes``, ``inf``, ``nan``, `unpack`, `functions` and
    `make_block_mask`.

    Examples
    --------
    >>> source(np.array([[1.5, np.nan]], np.float32))
    'np.array([[1.5, nan]], np.float32)'
    >>> source(np.zeros((2, 3), bool))
    'np.full((2, 3), False, np.bool_)'
    """
    if isinstance(value, np.generic):
        return f"np.{value.dtype.name}({value.item()!r})"
    if isinstance(value, BlockMask):
        return functions.block_mask_source(value, source)
    if callable(value) and value in functions.SCORE_FUNCTIONS.values():
        return f"functions.{value.__name__}"
    if isinstance(value, tuple) and any(isinstance(part, np.ndarray) for part in value):
        return "(" + "".join(f"{source(part)}, " for part in value) + ")"
    if not isinstance(value, np.ndarray):
        return repr(value)
    name = _dtype_name(value.dtype)
    if value.size == 0:
        return f"np.zeros({value.shape}, {name})"
    first = value.reshape(-1)[:1]
    if value.size > 1 and value.tobytes() == first.tobytes() * value.size:
        return f"np.full({value.shape}, {_number(first[0])}, {name})"
    if value.size <= _READABLE:
        return f"np.array({_nested(value)}, {name})"
    return f'unpack("{_pack(value)}", {value.shape}, {name})'


def unpack(text: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return the array that `source` packed into text."""
    raw = zlib.decompress(base64.b85decode(text))
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()


def _pack(array: NDArray[Any]) -> str:
    return base64.b85encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def _dtype_name(dtype: np.dtype[Any]) -> str:
    if dtype == ml_dtypes.bfloat16:
        return "ml_dtypes.bfloat16"
    return "np.bool_" if dtype.kind == "b" else f"np.{dtype.name}"


def _nested(array: NDArray[Any]) -> str:
    if array.ndim == 0:
        return _number(array[()])
    return "[" + ", ".join(_nested(part) for part in array) + "]"


def _number(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, np.integer):
        return str(int(value))
    # A float32 needs fewer digits than the float64 of equal value.
    return str(value) if isinstance(value, np.float32) else repr(float(value))
