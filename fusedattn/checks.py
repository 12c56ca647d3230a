"""Checks of single arguments: each returns the canonical value or raises.

Every message names the argument, says what it is (type, dtype, shape or value) and what was
expected. `fusedattn.operands` and `fusedattn.problem` put them together; no backend checks again.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)

# The storage types, each with the type that its products and sums are accumulated in. Looked up by
# dtype, which also refuses every byte order but the machine's own.
ACCUMULATOR: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float16): _FLOAT32,
    np.dtype(ml_dtypes.bfloat16): _FLOAT32,
    _FLOAT32: _FLOAT32,
    _FLOAT64: _FLOAT64,
}
FLOAT_NAMES = "float16, bfloat16, float32 or float64"
_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in (_FLOAT32, _FLOAT64)}

# Bounded effort for the exact overlap test, which is exponential in the worst case.
_OVERLAP_WORK = 100_000


def describe(value: object) -> str:
    """Say what a value is, briefly, for the middle of an error message."""
    if type(value) is np.ndarray:
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    if value is None or isinstance(value, (bool, int, float, complex, str, tuple, np.generic)):
        return f"{value!r} ({type(value).__name__})"
    return f"of type {type(value).__module__}.{type(value).__qualname__}"


def plain_array(name: str, value: object) -> Array:
    """Return the array itself; subclasses change what products mean and are refused."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.memmap):
        return value.view(np.ndarray)
    raise TypeError(f"{name} must be a numpy.ndarray, but is {describe(value)}")


def float_array(name: str, value: object) -> Array:
    """Return an array of one of the four float dtypes."""
    array = plain_array(name, value)
    if array.dtype in ACCUMULATOR:
        return array
    if not array.dtype.isnative and array.dtype.newbyteorder("=") in ACCUMULATOR:
        raise TypeError(
            f"{name} must be in the machine's byte order, but has dtype {array.dtype.str!r}; "
            f"convert it with {name}.astype({array.dtype.newbyteorder('=').name!r})"
        )
    raise TypeError(
        f"{name} must have dtype {FLOAT_NAMES}, but is an array of dtype {array.dtype} "
        f"and shape {array.shape}"
    )


def bool_array(name: str, value: object) -> Array:
    """Return a boolean array."""
    array = plain_array(name, value)
    if array.dtype.kind != "b":
        raise TypeError(
            f"{name} must have dtype bool (True = attend), but is an array of dtype {array.dtype} "
            f"and shape {array.shape}; additive masks go into bias"
        )
    return array


def companion(
    name: str, value: object, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str, what: str
) -> Array:
    """Return an array that must have exactly this shape and dtype: `what` says whose they are."""
    array = float_array(name, value)
    if array.dtype != dtype:
        raise TypeError(
            f"{name} must have dtype {dtype} ({what}), but has dtype {array.dtype} "
            f"and shape {array.shape}"
        )
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, but has shape {array.shape}")
    return array


def broadcast(name: str, array: Array, shape: tuple[int, ...], axes: str) -> Array:
    """View the array in the full shape, with stride 0 where it is broadcast."""
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to {axes} = {shape}, but has shape {array.shape}"
        ) from None


def flag(name: str, value: object) -> bool:
    """Return a bool; a count or an array here is a mistaken argument."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, but is {describe(value)}")


def real(name: str, value: object) -> float:
    """Return a finite Python float."""
    if type(value) is not float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            raise TypeError(f"{name} must be a real number, but is {describe(value)}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, but is {value!r}")
    return value


def real_in(name: str, value: object, dtype: np.dtype[Any]) -> float:
    """Return a Python float that stays finite in the accumulator's type."""
    number = real(name, value)
    if abs(number) > _LARGEST[dtype]:
        raise ValueError(
            f"{name} must be finite in {dtype}, the type it is used in, but is {number!r}"
        )
    return number


def softcap(value: object, dtype: np.dtype[Any]) -> float:
    """Return a softcap above 0, also after conversion to the accumulator's type."""
    number = real_in("softcap", value, dtype)
    if not dtype.type(number) > 0:
        raise ValueError(
            f"softcap must be None (off) or a number > 0 in {dtype}, but is {number!r}"
        )
    return number


def integer(name: str, value: object, low: int, high: int) -> int:
    """Return a Python int in ``low <= value <= high``; bool is refused."""
    number = _index(value)
    if number is None:
        raise TypeError(f"{name} must be an int, but is {describe(value)}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be in the range {low} to {high}, but is {number}")
    return number


def dropout(dropout_p: object, seed: object) -> tuple[float, int]:
    """Return the probability and the seed, which is needed with dropout and ignored without."""
    probability = real("dropout_p", dropout_p)
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout_p must be in the range [0, 1), but is {probability!r}")
    if seed is not None:
        return probability, integer("seed", seed, 0, 2**64 - 1)
    if probability:
        raise ValueError(
            "seed must be an int in the range [0, 2**64) when dropout_p > 0, but is None "
            f"(dropout_p is {probability!r})"
        )
    return probability, 0


def _index(value: object) -> int | None:
    """Convert what acts as an integer, and is neither a bool nor an array."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_, np.ndarray)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def batch_integers(
    name: str, value: object, batch_shape: tuple[int, ...], size: int, low: int, high: int
) -> NDArray[np.int64]:
    """Return one int64 per batch item, flat in C order; always a copy."""
    filled = np.empty(size, np.int64)
    if not isinstance(value, np.ndarray):
        number = _index(value)
        if number is None:
            raise TypeError(
                f"{name} must be an int or an array of integers that broadcasts to the leading "
                f"axes {batch_shape}, but is {describe(value)}"
            )
        if not low <= number <= high:
            raise ValueError(f"{name} must be in the range {low} to {high}, but is {number}")
        filled.fill(number)
        return filled
    array = plain_array(name, value)
    if array.dtype.kind not in "iu" or not array.dtype.isnative:
        raise TypeError(
            f"{name} must have an integer dtype in the machine's byte order, but is an array of "
            f"dtype {array.dtype.str!r} and shape {array.shape}"
        )
    if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
        raise ValueError(
            f"{name} must be in the range {low} to {high}, but holds values from "
            f"{int(array.min())} to {int(array.max())}"
        )
    filled.reshape(batch_shape)[...] = broadcast(name, array, batch_shape, "the leading axes")
    return filled


def window(value: object, unbounded: int) -> tuple[int | None, int | None]:
    """Return ``(left, right)``, each None or an int in ``0 <= side <= unbounded``."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(
            "window_size must be a pair (left, right), each None (open) or an int >= 0, but is "
            f"{describe(value)}; the last n keys of a causal mask are causal=True, "
            "window_size=(n - 1, 0)"
        )
    sides: list[int | None] = []
    for position, side in enumerate(value):
        number = None if side is None else _index(side)
        if number is None and side is not None:
            raise TypeError(
                f"window_size[{position}] must be None (open) or an int >= 0, but is "
                f"{describe(side)}"
            )
        if number is not None and number < 0:
            raise ValueError(
                f"window_size[{position}] must be None (open) or an int >= 0, but is {number}; "
                "a side without a limit is None, not -1"
            )
        sides.append(None if number is None else min(number, unbounded))
    return sides[0], sides[1]


def storage_dtype(name: str, value: Any) -> np.dtype[Any]:
    """Return one of the four float dtypes; None, which NumPy takes for float64, is none."""
    try:
        dtype: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in ACCUMULATOR:
        raise TypeError(f"{name} must hold {FLOAT_NAMES}, but holds {value!r}")
    return dtype


def output_dtype(value: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of `out`: that of q, or float32."""
    if value is None:
        return dtype
    try:
        wanted: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"out_dtype must be a dtype, but is {describe(value)}") from None
    if wanted not in (dtype, _FLOAT32) or not wanted.isnative:
        raise TypeError(
            f"out_dtype must be None, q's dtype ({dtype}) or float32, but is {wanted.str!r} "
            f"({wanted.name})"
        )
    return wanted


def output(
    value: object, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Array | None]
) -> Array:
    """Return the caller's `out` if the result can be written there without harm."""
    out = plain_array("out", value)
    if out.dtype != dtype:
        raise TypeError(
            f"out must have dtype {dtype} (q's, or out_dtype where given), but is an array of "
            f"dtype {out.dtype.str!r} and shape {out.shape}"
        )
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, but has shape {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"out must be writeable, but is a read-only array of shape {out.shape}")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(
            f"out must have a place of its own for each element, but has shape {out.shape} and "
            f"strides {out.strides}"
        )
    for name, array in inputs.items():
        if array is not None and _overlap(out, array):
            raise ValueError(
                f"out must not overlap an input, but out (shape {out.shape}) shares memory with "
                f"{name} (shape {array.shape})"
            )
    return out


def _overlaps_itself(array: Array) -> bool:
    """Whether two indices may meet in memory; sure for every view made by slicing and swapping."""
    reach = array.itemsize
    for stride, length in sorted(
        (abs(stride), length)
        for stride, length in zip(array.strides, array.shape, strict=True)
        if length > 1
    ):
        if stride < reach:
            return array.size > 0
        reach += stride * (length - 1)
    return False


def _overlap(first: Array, second: Array) -> bool:
    if not np.may_share_memory(first, second):
        return False
    try:
        return np.shares_memory(first, second, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
