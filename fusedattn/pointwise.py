"""Values of a user's function in NumPy: on whole arrays where that is the same as one by one.

The function is written for scalars. Here it is run on arrays of them by a stand-in for a number,
`Numbers`, that does elementwise arithmetic and nothing else. Where the function asks for a truth
value (``if``, ``and``, ``min``), the pairs are parted into those for which it holds and those for
which it does not, and the function is run again on each part: every pair takes the path that it
would take alone. Whatever a stand-in cannot do is left to a loop over the pairs, which calls the
function with NumPy scalars.

In both, floating-point arithmetic is that of IEEE 754, as in compiled code: a division by zero
gives inf or NaN, and so do `math.exp` and `math.log`, which raise in plain Python.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.functions import UserFunction, rebuilt

Array = NDArray[Any]

# Functions of NumPy that are elementwise, and no ufuncs.
_ELEMENTWISE = (np.where, np.clip)
# In Python and in kernels ``True + True`` is 2.
_COUNTING = (np.add, np.subtract, np.negative)


class _NeedsLoop(Exception):
    """A stand-in was used as only a number can be."""


class _Parts(Exception):
    """A truth value was asked for that holds for some pairs and not for others."""

    def __init__(self, holds: Array) -> None:
        self.holds = holds


class Sloped:
    """A stand-in for a number with a slope, see `fusedattn.slopes`."""

    values: Any


class Numbers(np.lib.mixins.NDArrayOperatorsMixin):
    """A stand-in for a number: one for each pair."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        """Apply an elementwise function of NumPy."""
        if any(isinstance(x, Sloped) for x in inputs):
            return NotImplemented
        if method != "__call__" or keywords or ufunc.signature is not None:
            raise _NeedsLoop
        values = [_unwrap(x) for x in inputs]
        if ufunc in _COUNTING and all(np.asarray(x).dtype == bool for x in values):
            values = [np.asarray(x).astype(np.int64) for x in values]
        return _wrap(ufunc(*values))

    def __array_function__(self, function: Any, _types: Any, inputs: Any, keywords: Any) -> Any:
        """Apply one of the few others that are elementwise."""
        if any(isinstance(x, Sloped) for x in inputs):
            return NotImplemented
        if function not in _ELEMENTWISE or keywords:
            raise _NeedsLoop
        return _wrap(function(*map(_unwrap, inputs)))

    def __bool__(self) -> bool:
        """Whether it is true for all pairs; they part where it is true for some."""
        holds = self.values.astype(bool)
        if holds.all():
            return True
        if holds.any():
            raise _Parts(holds)
        return False

    def _only_a_number_can(self, *_: Any) -> Any:
        raise _NeedsLoop

    __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = _only_a_number_can
    __getattr__ = __getitem__ = __round__ = __array__ = _only_a_number_can
    __hash__ = None  # type: ignore[assignment]


class Table:
    """A stand-in for an aux array: ``table[i][j]`` is ``table[i, j]``, as it is for numbers."""

    def __init__(self, array: Array, index: tuple[Any, ...] = ()) -> None:
        self._array = array
        self._index = index
        self.shape = array.shape[len(index) :]
        self.ndim = len(self.shape)
        self.dtype = array.dtype

    def __getitem__(self, index: Any) -> Any:
        """Read an element for each pair, or what is left to index."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, (Numbers, int, np.integer)) for part in parts):
            raise _NeedsLoop
        parts = (*self._index, *parts)
        if len(parts) < self._array.ndim:
            return Table(self._array, parts)
        return _wrap(np.asarray(self._array[tuple(map(_unwrap, parts))]))

    def __len__(self) -> int:
        """Length of the first axis."""
        return int(self.shape[0])

    def __getattr__(self, name: str) -> Any:
        raise _NeedsLoop


def _unwrap(value: Any) -> Any:
    if isinstance(value, (Table, Sloped)):
        raise _NeedsLoop  # what takes plain numbers alone would lose a slope
    return value.values if isinstance(value, Numbers) else value


def _wrap(values: Any) -> Any:
    return Numbers(values) if isinstance(values, np.ndarray) and values.ndim else values


def evaluate(function: UserFunction, *arguments: Array) -> Array:
    """Call a function for each of some pairs.

    Parameters
    ----------
    function : UserFunction
        Its aux arrays are passed on; floating ones are read as float64, integers as int64.
    *arguments : ndarray, (pairs,)
        Its other arguments: scores (float64 or float32), batch, heads, rows and keys (int64).

    Returns
    -------
    ndarray, (pairs,)
        bool for a ``mask_mod``, else in the type of the scores.

    Raises
    ------
    TypeError, IndexError, NameError
        Naming the function, its file and line, and the pair at which it failed.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn.functions import user_function
    >>> later = user_function("mask_mod", lambda batch, head, q_idx, k_idx: k_idx > q_idx, ())
    >>> row, key = np.array([0, 1, 1]), np.array([1, 1, 2])
    >>> evaluate(later, row * 0, row * 0, row, key)
    array([ True, False,  True])
    """
    kind = np.dtype(bool) if function.role == "mask_mod" else arguments[0].dtype
    result = np.empty(arguments[-1].shape, kind)
    if not result.size:
        return result
    aux = [readable(array) for array in function.aux]
    call = in_numpy(function.function)
    with np.errstate(all="ignore"):
        # Whatever goes wrong for all pairs at once goes wrong again, or does not, for one alone.
        with contextlib.suppress(Exception):
            _fill(function, call, arguments, [Table(array) for array in aux], result)
            return result
        _loop(function, call, arguments, aux, result)
    return result


def readable(array: Array) -> Array:
    """Return an aux array as it is computed with: in float64, int64, uint64 or bool, read-only."""
    kind = {"f": np.float64, "V": np.float64, "i": np.int64, "u": np.int64}.get(array.dtype.kind)
    is_wide = kind is None or array.dtype == np.uint64
    view = array.view() if is_wide else array.astype(kind)
    view.flags.writeable = False
    return view


def in_parts(size: int, run: Callable[[Array], Any]) -> Iterator[tuple[Array, Any]]:
    """Run something on all pairs at once, or part by part where their paths part."""
    waiting = [np.arange(size)]
    while waiting:
        pairs = waiting.pop()
        try:
            found = run(pairs)
        except _Parts as parts:
            waiting += [pairs[parts.holds], pairs[~parts.holds]]
        else:
            yield pairs, found


def _fill(
    function: UserFunction,
    call: Callable[..., Any],
    arguments: tuple[Array, ...],
    aux: list[Table],
    result: Array,
) -> None:
    """Call the function on all pairs."""

    def run(pairs: Array) -> Any:
        return call(*(Numbers(argument[pairs]) for argument in arguments), *aux)

    for pairs, found in in_parts(result.size, run):
        values = _unwrap(found)
        _check_type(function, np.asarray(values)[..., None].reshape(-1)[0], values)
        result[pairs] = values


def _loop(
    function: UserFunction,
    call: Callable[..., Any],
    arguments: tuple[Array, ...],
    aux: list[Array],
    result: Array,
) -> None:
    for pair in range(result.size):
        numbers = [argument[pair] for argument in arguments]
        try:
            value = call(*numbers, *aux)
        except Exception as error:
            kind = type(error) if type(error) in (IndexError, NameError) else TypeError
            raise kind(
                f"{function.place} failed in line {_line_of(function, error)} for "
                f"{_at(numbers[-4:])}: {type(error).__name__}: {error}"
            ) from None
        _check_type(function, value, value)
        result[pair] = value


def _line_of(function: UserFunction, error: Exception) -> int:
    """Return the last line of the function that was at work when it failed."""
    code = function.function.__code__
    lines = [
        frame.tb_lineno
        for frame in _frames(error.__traceback__)
        if frame.tb_frame.f_code.co_filename == code.co_filename
    ]
    return lines[-1] if lines else code.co_firstlineno


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _at(indices: list[Any]) -> str:
    batch, head, row, key = (int(index) for index in indices)
    return f"batch {batch}, head {head}, q_idx {row}, k_idx {key}"


def _check_type(function: UserFunction, sample: Any, values: Any) -> None:
    """Check that a result is a bool where it says who attends, and a real number elsewhere."""
    is_bool = isinstance(sample, (bool, np.bool_))
    is_real = isinstance(sample, (int, float, np.integer, np.floating)) and not is_bool
    if not (is_bool if function.role == "mask_mod" else is_real):
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(wrong_type(function, str(kind)))


def wrong_type(function: UserFunction, kind: str) -> str:
    """Say that a function returned something else than it must."""
    wanted = "a bool" if function.role == "mask_mod" else "a real number"
    return f"{function.place} must return {wanted}, but returned {kind}"


# --- the same function, with NumPy's functions in the place of Python's ---------------------------


def in_numpy(function: FunctionType) -> FunctionType:
    """Copy a function such that it, and each that it calls, computes with NumPy's functions."""
    return rebuilt(function, _numpy_like)


def _numpy_like(value: Any) -> Any:
    if value is math:
        return _math()
    if getattr(value, "__module__", None) == "math":
        return getattr(_math(), value.__name__)
    if value is int:
        return _as_integer(np.trunc)
    return _as_float if value is float else value


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        arrays = np.broadcast_arrays(*map(_unwrap, arguments))
        values = [function(*each) for each in zip(*(a.ravel() for a in arrays), strict=True)]
        return _wrap(np.array(values).reshape(arrays[0].shape)[()])

    return call


def _as_integer(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(value: Any) -> Any:
        # A whole number has no slope.
        plain = value.values if isinstance(value, Sloped) else _unwrap(value)
        return _wrap(np.asarray(function(plain)).astype(np.int64)[()])

    return call


def _as_float(value: Any) -> Any:
    if isinstance(value, Sloped):
        return value
    return _wrap(np.asarray(_unwrap(value)).astype(np.float64)[()])


_OTHER_NAMES = {
    "acos": "arccos", "asin": "arcsin", "atan": "arctan", "atan2": "arctan2", "acosh": "arccosh",
    "asinh": "arcsinh", "atanh": "arctanh", "pow": "power",
}  # fmt: skip


@functools.cache
def _math() -> SimpleNamespace:
    """Functions of `math` by those of NumPy, which know NaN, inf and arrays."""
    own: dict[str, Any] = {}
    for name in dir(math):
        value = getattr(math, name)
        twin = getattr(np, _OTHER_NAMES.get(name, name), None)
        if not callable(value):
            own[name] = value
        else:
            own[name] = twin if isinstance(twin, np.ufunc) else _elementwise(value)
    for name in ("floor", "ceil", "trunc"):
        own[name] = _as_integer(getattr(np, name))
    return SimpleNamespace(**own)
