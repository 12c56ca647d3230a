"""Functions that users write, and everything that their results depend on.

A `score_mod` or a `mask_mod` is a plain Python function of scalars. Kernels compile it, so two
calls may share code only if the function is the same in every respect: its bytecode, its constants,
the values in its closure, the globals that it reads, and the same of each function that it calls.
`UserFunction.fingerprint` holds all of this and is taken anew at every call, so a changed constant
is a different function. What has no such value (a list, an array, an object) is refused: arrays
come in through ``aux``.
"""

from __future__ import annotations

import builtins
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from fusedattn import checks
from fusedattn.bytecode import facts_of
from fusedattn.checks import Array

# What a function is given before its aux arrays.
ARGUMENTS = {
    "score_mod": ("score", "batch", "head", "q_idx", "k_idx"),
    "mask_mod": ("batch", "head", "q_idx", "k_idx"),
    "score_mod_grad": ("score", "batch", "head", "q_idx", "k_idx"),
}

# Packages whose functions are as fixed as the language itself, and one that draws numbers.
_FIXED = ("numpy", "math", "cmath", "builtins", "operator", "_operator", "numba", "ml_dtypes")
_DRAWS = "numpy.random"


@dataclass(frozen=True, slots=True, eq=False)
class UserFunction:
    """A function with the arrays that it reads.

    Parameters
    ----------
    function : function
        The plain Python function; that of an ``@njit`` function is its ``py_func``.
    aux : tuple of ndarray
        Its further arguments.
    role : {"score_mod", "mask_mod", "score_mod_grad"}
        What it is, as error messages name it.
    fingerprint : tuple
        Everything that its code depends on; equal for functions that compute the same.
    """

    function: FunctionType
    aux: tuple[Array, ...]
    role: str
    fingerprint: tuple[Any, ...]

    @property
    def place(self) -> str:
        """Name, file and line, for messages."""
        return place_of(self.function, self.role)

    @property
    def aux_kinds(self) -> tuple[tuple[str, int], ...]:
        """Dtype and number of axes of each aux array: what compiled code is specialised on."""
        return tuple((array.dtype.name, array.ndim) for array in self.aux)

    def named_aux(self) -> dict[str, Array]:
        """Return the aux arrays under the names that messages use."""
        name = "aux" if self.role == "mask_mod" else "score_mod_aux"
        return {f"{name}[{i}]": array for i, array in enumerate(self.aux)}


def are_checked() -> bool:
    """Whether indices into aux arrays are to be checked: ``FUSEDATTN_CHECK_INDICES``."""
    return os.environ.get("FUSEDATTN_CHECK_INDICES", "0") not in ("", "0")


def digest_of(detail: object) -> str:
    """Hash of a fingerprint, or of a tuple that holds some, which every process computes alike."""
    import hashlib  # takes longer to import than all else here

    return hashlib.sha256(repr(_stable(detail)).encode()).hexdigest()


def place_of(function: FunctionType, role: str) -> str:
    """Name, file and line of a function, for messages."""
    code = function.__code__
    return f'{role} {function.__name__} (File "{code.co_filename}", line {code.co_firstlineno})'


def user_function(role: str, value: object, aux: object) -> UserFunction:
    """Check a function and its aux arrays.

    Parameters
    ----------
    role : {"score_mod", "mask_mod", "score_mod_grad"}
        The argument that it was given as.
    value : object
        A plain Python function, a lambda or an ``@njit`` function.
    aux : object
        A tuple of arrays.

    Returns
    -------
    UserFunction

    Raises
    ------
    TypeError, ValueError
        If it is no such function, takes another number of arguments, or reads what has no fixed
        value.

    Examples
    --------
    >>> slope = 0.5
    >>> def distance(score, batch, head, q_idx, k_idx):
    ...     return score - slope * abs(q_idx - k_idx)
    >>> before = user_function("score_mod", distance, ()).fingerprint
    >>> slope = 0.25
    >>> user_function("score_mod", distance, ()).fingerprint == before
    False
    """
    function = plain_function(value)
    if function is None:
        raise TypeError(
            f"{role} must be a Python function (or one compiled by numba.njit) of "
            f"({', '.join(ARGUMENTS[role])}, *aux), but is {checks.describe(value)}"
        )
    arrays = aux_arrays(role, aux)
    _check_arguments(function, role, len(arrays))
    return UserFunction(function, arrays, role, fingerprint(function, role))


def aux_arrays(role: str, aux: object) -> tuple[Array, ...]:
    """Check the arrays that a function reads."""
    name = "score_mod_aux" if role.startswith("score_mod") else "aux"
    if not isinstance(aux, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of arrays, but is {checks.describe(aux)}")
    return tuple(_aux_array(f"{name}[{i}]", array) for i, array in enumerate(aux))


def _aux_array(name: str, value: object) -> Array:
    array = checks.plain_array(name, value)
    if array.dtype in checks.ACCUMULATOR or (array.dtype.kind in "iub" and array.dtype.isnative):
        return array
    raise TypeError(
        f"{name} must have dtype {checks.FLOAT_NAMES}, an integer dtype or bool, in the machine's "
        f"byte order, but is an array of dtype {array.dtype.str!r} and shape {array.shape}"
    )


def plain_function(value: object) -> FunctionType | None:
    """Return the Python function itself, also of one compiled by Numba; None if it is neither."""
    inner = getattr(value, "py_func", value)
    return inner if isinstance(inner, FunctionType) else None


def _check_arguments(function: FunctionType, role: str, aux: int) -> None:
    wanted = ARGUMENTS[role]
    signature = inspect.signature(function)
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    try:
        signature.bind(*range(len(wanted) + aux))
        for name, parameter in signature.parameters.items():
            if parameter.kind in by_name:
                raise TypeError(f"takes {name} by name alone")
    except TypeError as error:
        raise TypeError(
            f"{place_of(function, role)} must take the {len(wanted)} arguments "
            f"({', '.join(wanted)}) and one for each aux array ({aux} here), but {error}"
        ) from None


def fingerprint(function: FunctionType, role: str) -> tuple[Any, ...]:
    """Return a hashable value that is equal for functions that compute the same."""
    return _function(function, place_of(function, role), ())


def outside(function: FunctionType, name: str) -> Any:
    """Value of a closure variable, global or builtin that a function reads.

    Raises
    ------
    NameError
        If there is none.
    """
    code = function.__code__
    if name in code.co_freevars and function.__closure__ is not None:
        try:
            return function.__closure__[code.co_freevars.index(name)].cell_contents
        except ValueError:  # an empty cell
            raise NameError(name) from None
    if name in function.__globals__:
        return function.__globals__[name]
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise NameError(name)


def rebuilt(
    function: FunctionType,
    replace: Callable[[Any], Any] = lambda value: value,
    wrap: Callable[[FunctionType], Any] = lambda copy: copy,
) -> FunctionType:
    """Copy a function with all that it reads from outside, as it is now.

    Parameters
    ----------
    function : FunctionType
        What is copied, together with each function of the user's that it calls.
    replace : callable
        Gives what takes the place of each outer value that is no function of the user's.
    wrap : callable
        Gives what takes the place of each function that it calls, from its copy.

    Returns
    -------
    FunctionType
        It sees no later change of a global, a closure variable or an attribute of a module.
    """
    return _rebuilt(function, replace, wrap, {})


def _rebuilt(
    function: FunctionType,
    replace: Callable[[Any], Any],
    wrap: Callable[[FunctionType], Any],
    known: dict[int, Any],
) -> FunctionType:
    code = function.__code__
    cells = tuple(CellType() for _ in code.co_freevars)
    names: dict[str, Any] = {"__builtins__": builtins}
    copy = FunctionType(code, names, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    known[id(function)] = wrap(copy)

    def new(value: Any, attributes: tuple[str, ...], old: Any) -> Any:
        if isinstance(value, ModuleType) and attributes and not _is_fixed(value.__name__):
            # A stand-in with just the attributes that are read: no later change reaches it.
            stand_in = old if isinstance(old, ModuleType) else ModuleType(value.__name__)
            before = getattr(stand_in, attributes[0], None)
            inner = new(getattr(value, attributes[0]), attributes[1:], before)
            setattr(stand_in, attributes[0], inner)
            return stand_in
        plain = plain_function(value)
        if plain is None or _is_fixed(plain.__module__):
            return replace(value)
        if id(plain) not in known:
            _rebuilt(plain, replace, wrap, known)
        return known[id(plain)]

    values: dict[str, Any] = {}
    for name, attributes in facts_of(code).names:
        values[name] = new(outside(function, name), attributes, values.get(name))
    for name, value in values.items():
        if name in code.co_freevars:
            cells[code.co_freevars.index(name)].cell_contents = value
        else:
            names[name] = value
    return copy


def explained(function: UserFunction, error: Exception) -> str:
    """Say what a compiler of Numba's kind could not compile, and where in the user's code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    code = function.function.__code__
    place = re.findall(rf'File "{re.escape(code.co_filename)}", line (\d+)', text)
    # Numba names files by their last part, too.
    place = place or re.findall(r'File "[^"]+", line (\d+)', text)
    noise = ("Failed in", "During:", "File ", "There are", "- ", "<source", "def ", "^", "This ")
    lines = [line.removeprefix(">>> ") for line in lines]
    told = [line for line in lines if line and not line.startswith(noise)][:2]
    line = f", line {place[-1]}" if place else ""
    source = f'{line[2:]} of "{code.co_filename}": ' if line else ""
    return f"{function.place} cannot be compiled: {source}{' '.join(told)}"


def _is_fixed(module: object) -> bool:
    """Whether a module belongs to a package whose functions never change."""
    name = str(module)
    return name.split(".")[0] in _FIXED and not f"{name}.".startswith(f"{_DRAWS}.")


def _function(function: FunctionType, place: str, within: tuple[CodeType, ...]) -> tuple[Any, ...]:
    code = function.__code__
    if code in within:
        return ("itself", within.index(code))
    within = (*within, code)
    facts = facts_of(code)
    if facts.refused is not None:
        raise TypeError(
            f"{place} must compute a number from numbers, as a kernel can, but "
            f"{function.__name__} (line {code.co_firstlineno}) {facts.refused}"
        )
    read = tuple(
        (name, attributes, *_resolved(function, name, attributes, place, within))
        for name, attributes in facts.names
    )
    defaults = _atom(function.__defaults__, place, within, "a default argument")
    return ("function", code, read, defaults)


def _resolved(
    function: FunctionType,
    name: str,
    attributes: tuple[str, ...],
    place: str,
    within: tuple[CodeType, ...],
) -> tuple[Any, ...]:
    """Follow attributes through modules, to the value that the code depends on."""
    try:
        value = outside(function, name)
        for attribute in attributes:
            if not isinstance(value, ModuleType):
                break
            value, name = getattr(value, attribute), f"{name}.{attribute}"
    except (NameError, AttributeError) as error:
        raise NameError(f"{place} reads what is not defined: {error}") from None
    return _atom(value, place, within, name)


def _atom(value: Any, place: str, within: tuple[CodeType, ...], name: str) -> tuple[Any, ...]:
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return (kind.__name__, value)
    if kind is float:
        return ("float", value.hex())
    if kind is complex:
        return ("complex", value.real.hex(), value.imag.hex())
    if isinstance(value, np.generic):
        return ("numpy", value.dtype.str, value.tobytes())
    if kind is tuple:
        return ("tuple", *(_atom(part, place, within, name) for part in value))
    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    plain = plain_function(value)
    if plain is not None and not _is_fixed(plain.__module__):
        return _function(plain, place, within)
    if value is print:
        raise TypeError(f"{place} prints, which a kernel cannot")
    module = str(getattr(value, "__module__", None))  # None for methods of objects
    if callable(value) and _is_fixed(module):
        label = getattr(value, "__qualname__", getattr(value, "__name__", repr(value)))
        return ("named", module, str(label))
    hint = ""
    if isinstance(value, (np.ndarray, list, dict, set)):
        hint = "; pass it as an array in aux, where its contents may change between calls"
    raise TypeError(
        f"{place} reads {name}, which is {checks.describe(value)}: not a number, a tuple of "
        f"numbers, a module or a function{hint}"
    )


def _stable(part: Any) -> Any:
    """Replace code objects by what decides their results: no file names, lines or addresses."""
    if isinstance(part, CodeType):
        return (
            part.co_code,
            part.co_argcount,
            part.co_kwonlyargcount,
            part.co_flags,
            part.co_names,
            part.co_varnames,
            part.co_freevars,
            part.co_cellvars,
            tuple(_stable(constant) for constant in part.co_consts),
        )
    if isinstance(part, tuple):
        return tuple(_stable(one) for one in part)
    if isinstance(part, frozenset):
        return ("frozenset", sorted(repr(_stable(one)) for one in part))
    return (type(part).__name__, part)
