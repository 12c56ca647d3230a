"""Functions of the user's in kernels: from a `score_mod` or a block mask to device functions.

A kernel that takes them has further parameters, the same for each kernel, in the order of
`names_of`: the kinds of the blocks of a block mask (uint8, flat), a table of int64 (how the kinds
lie, then lengths and strides of each aux array, `fusedattn.cuda.tables`), and the address of each
aux array. It hands all of them on to the functions that `device_functions` makes, which are asked
about one pair of a query and a key at a time.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.block_mask import BlockMask, Predicate
from fusedattn.cuda import driver
from fusedattn.cuda.launch import Argument
from fusedattn.cuda.tables import HostTable, describe, kind_of
from fusedattn.functions import UserFunction, digest_of, explained, rebuilt
from fusedattn.masks import EDGE, FULL
from fusedattn.pointwise import in_numpy, wrong_type
from fusedattn.problem import AttentionProblem

Array = NDArray[Any]

# What the table begins with: strides of the kinds by item, head and block of rows; a block's sides.
_ITEM, _HEAD, _BLOCK_ROW, _ROWS, _KEYS = range(5)
_KINDS_WORDS = 5


@dataclass(frozen=True)
class Functions:
    """The functions of a problem, as a kernel is compiled with them.

    Two are equal if they compute the same from arrays of the same kinds, and `repr` says no more:
    what is compiled is remembered, in memory and on disk, by it.
    """

    digest: str
    score_mod: UserFunction | None = field(compare=False, repr=False)
    predicate: Predicate | None = field(compare=False, repr=False)

    def users(self) -> list[UserFunction]:
        """All functions, in the order of their aux arrays among the parameters."""
        found = [] if self.score_mod is None else [self.score_mod]
        leaves = () if self.predicate is None else self.predicate.leaves()
        return [*found, *(leaf.leaf for leaf in leaves if leaf.leaf is not None)]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The aux arrays of all functions."""
        return tuple(array for function in self.users() for array in function.aux)


def functions_of(problem: AttentionProblem) -> Functions | None:
    """Return the functions of a problem, None if it has none."""
    score_mod = problem.score_mod
    predicate = None if problem.block_mask is None else problem.block_mask.predicate
    if score_mod is None and predicate is None:
        return None
    one = None if score_mod is None else (score_mod.fingerprint, score_mod.aux_kinds)
    other = None if predicate is None else predicate.structure()
    return Functions(digest_of((one, other)), score_mod, predicate)


def names_of(functions: Functions | None) -> tuple[str, ...]:
    """Names of the further parameters of a kernel."""
    if functions is None:
        return ()
    return ("kinds", "tables", *(f"aux_{i}" for i in range(len(functions.arrays))))


def parameters_of(functions: Functions | None) -> tuple[str, ...]:
    """Their types: two flat arrays, and addresses."""
    names = names_of(functions)
    return ("[bool]", "[int64]", *["int64"] * (len(names) - 2)) if names else ()


def word_table(functions: Functions, block_mask: BlockMask | None) -> NDArray[np.int64]:
    """Return what the parameter ``tables`` holds."""
    words = [0, 0, 0, 1, 1]
    if block_mask is not None:
        items, heads, rows, keys = block_mask.kinds.shape
        words[_ITEM] = heads * rows * keys if items > 1 else 0
        words[_HEAD] = rows * keys if heads > 1 else 0
        words[_BLOCK_ROW] = keys
        words[_ROWS], words[_KEYS] = block_mask.block
    return np.array(words + describe(functions.arrays), np.int64)


def kind_table(block_mask: BlockMask | None) -> NDArray[np.uint8]:
    """Return what the parameter ``kinds`` holds."""
    if block_mask is None or not block_mask.kinds.size:
        return np.zeros(1, np.uint8)
    return np.array(block_mask.kinds, order="C").reshape(-1)


def host_tables(functions: Functions, accumulator: np.dtype[Any]) -> tuple[HostTable, ...]:
    """Return what the simulator passes for the addresses of aux arrays."""
    return tuple(HostTable(array, accumulator.type) for array in functions.arrays)


class Operands:
    """What the functions of one problem read, on one GPU: uploaded once, but for a score_mod's aux.

    The addresses of those come with each call, under the names ``score_mod_aux_0`` and on.
    """

    def __init__(
        self, functions: Functions, block_mask: BlockMask | None, where: driver.Device
    ) -> None:
        kinds, table = kind_table(block_mask), word_table(functions, block_mask)
        self._kinds, self._table = driver.upload(where, kinds), driver.upload(where, table)
        self.arguments = [
            Argument("kinds", 0, len(kinds), 1),
            Argument("tables", 0, len(table)),
            *(Argument(name, bare=True) for name in names_of(functions)[2:]),
        ]
        score_mod = functions.score_mod
        own = 0 if score_mod is None else len(score_mod.aux)
        self._arrays = functions.arrays
        self.changes = own > 0  # addresses come with each call
        # Those of a block mask never change: it holds copies.
        self._held = {
            i: driver.upload(where, np.ascontiguousarray(array).reshape(-1))
            for i, array in enumerate(self._arrays)
            if i >= own
        }

    def addresses(self, given: dict[str, int]) -> dict[str, int]:
        """Return the addresses of the further parameters, given those of a score_mod's aux."""
        found = {"kinds": self._kinds.address, "tables": self._table.address}
        for i, array in enumerate(self._arrays):
            if i in self._held:
                found[f"aux_{i}"] = self._held[i].address
            else:  # an index into an empty array is held to its only place, somewhere
                known = given.get(f"score_mod_aux_{i}", 0)
                found[f"aux_{i}"] = known if array.size else self._table.address
        return found


class DeviceFunctions(NamedTuple):
    """What a kernel calls; ``extra`` are its further parameters."""

    modify: Any = None  # (score, batch, head, q_idx, k_idx, *extra) -> score
    shows: Any = None  # (batch, head, q_idx, k_idx, *extra) -> bool
    asks: Any = None  # the same in partial blocks, by the function alone
    kind_at: Any = None  # (batch, head, q_idx, k_idx, *extra) -> SKIP, FULL or EDGE of the block
    place_of: Any = None  # (batch, head, q_idx, *extra) -> where the kinds of a row's blocks begin
    kind_in: Any = None  # (place, block of keys, *extra) -> the same as `kind_at`
    keys: Any = None  # (*extra) -> keys of a block


def device_functions(tools: Any, functions: Functions, real: Any) -> DeviceFunctions:
    """Make the functions that a kernel calls, for one toolchain.

    Raises
    ------
    TypeError
        If the compiler cannot compile a function: it names the function, its file and line, and
        what the compiler said.
    """
    space: dict[str, Any] = {
        "real": real,
        "int64": tools.types.int64,
        "unsigned": tools.types.uint64,
    }
    given: dict[int, str] = {}
    number, word = 0, _KINDS_WORDS
    for position, function in enumerate(functions.users()):
        tables = []
        for array in function.aux:
            kind = kind_of(array)
            space[f"table_{number}"] = tools.table(kind, real)
            words = [f"tables[unsigned({word + i})]" for i in range(kind.words)]
            tables.append(f"table_{number}({', '.join([f'aux_{number}', *words])})")
            number, word = number + 1, word + kind.words
        space[f"user_{position}"] = _device_function(tools, function, real)
        given[position] = "".join(f", {table}" for table in tables)
    extra = ", ".join(names_of(functions))
    where = "batch, head, row, key"

    def made(name: str, arguments: str, *body: str) -> Any:
        lines = [f"def {name}({arguments}):", *body]
        exec(compile("\n    ".join(lines), "<functions>", "exec"), space)
        space[name] = tools.device(space[name])
        return space[name]

    modify = shows = asks = None
    place_of = made(
        "place_of", f"batch, head, row, {extra}",
        f"place = batch * tables[{_ITEM}] + head * tables[{_HEAD}]",
        f"return place + row // tables[{_ROWS}] * tables[{_BLOCK_ROW}]",
    )  # fmt: skip
    kind_in = made(
        "kind_in", f"place, block, {extra}", "return int64(kinds[unsigned(place + block)])"
    )
    kind_at = made(
        "kind_at", f"{where}, {extra}",
        f"return kind_in(place_of(batch, head, row, {extra}), key // tables[{_KEYS}], {extra})",
    )  # fmt: skip
    keys = made("keys_of", extra, f"return tables[{_KEYS}]")
    first_leaf = 0
    if functions.score_mod is not None:
        first_leaf = 1
        modify = made(
            "modify", f"score, {where}, {extra}",
            f"return real(user_0(score, int64(batch), int64(head), int64(row), int64(key)"
            f"{given[0]}))",
        )  # fmt: skip
    if functions.predicate is not None:
        places = iter(range(first_leaf, len(given)))
        asks = made(
            "asks", f"{where}, {extra}",
            f"return {_expression(functions.predicate, places, given)}",
        )  # fmt: skip
        shows = made(
            "shows", f"{where}, {extra}",
            f"kind = kind_at({where}, {extra})",
            f"seen = kind == {FULL}",
            f"if kind == {EDGE}:",
            f"    seen = asks({where}, {extra})",
            "return seen",
        )  # fmt: skip
    return DeviceFunctions(modify, shows, asks, kind_at, place_of, kind_in, keys)


def _expression(part: Predicate, places: Any, given: dict[int, str]) -> str:
    """Write a part of a predicate, whose leaves come in the order of their functions."""
    if part.leaf is not None:
        position = next(places)
        batch = "int64(batch)" if part.by_batch else "int64(0)"
        head = "int64(head)" if part.by_head else "int64(0)"
        return f"user_{position}({batch}, {head}, int64(row), int64(key){given[position]})"
    parts = [_expression(inner, places, given) for inner in part.parts]
    if part.operation == "not":
        return f"(not {parts[0]})"
    return f"({f' {part.operation} '.join(parts)})"


# --- one function ---------------------------------------------------------------------------------


def _device_function(tools: Any, function: UserFunction, real: Any) -> Any:
    """Make a function callable from device functions."""
    if tools.interprets:
        return _checked(function)
    if _recurs(function.fingerprint):
        raise TypeError(f"{function.place} cannot be compiled: a function in it calls itself")
    types = tools.types
    indices = (types.int64,) * 4
    arguments = indices if function.role == "mask_mod" else (real, *indices)
    tables = tuple(tools.table_type(kind_of(array), real) for array in function.aux)
    arguments = (*arguments, *tables)
    try:
        tried, parts = _compilable(tools, function, len(arguments), real)
        result = tools.result_of(tried, arguments)
    except Exception as error:  # compilers raise whatever comes up within them
        raise TypeError(explained(function, error)) from None
    is_bool = isinstance(result, types.Boolean)
    is_real = isinstance(result, (types.Float, types.Integer)) and not is_bool
    if not (is_bool if function.role == "mask_mod" else is_real):
        raise TypeError(wrong_type(function, str(result)))
    _check_powers(tools, function, parts)
    # What was compiled just now may be for another GPU.
    return _compilable(tools, function, len(arguments), real)[0]


def _recurs(part: Any) -> bool:
    """Whether a function calls itself, by its fingerprint."""
    if not isinstance(part, tuple):
        return False
    ends_so = len(part) > 1 and part[-2] == "itself" and isinstance(part[-1], int)
    return ends_so or any(map(_recurs, part))


def _compilable(tools: Any, function: UserFunction, count: int, real: Any) -> tuple[Any, list[Any]]:
    """Return what `tools.device` makes of a function, and all that it made on the way."""
    parts: list[Any] = []
    narrow = _narrowing(real is tools.types.float32)

    def compiled(part: FunctionType) -> Any:
        part.__code__ = part.__code__.replace(co_consts=narrow(part.__code__.co_consts))
        part.__defaults__ = narrow(part.__defaults__)
        parts.append(tools.device(part))
        return parts[-1]

    plain = rebuilt(function.function, _numpy_of_scalars(tools, narrow), compiled)
    return compiled(_positional(plain, count, compiled)), parts


def _checked(function: UserFunction) -> Callable[..., Any]:
    """Return the function for an interpreter: with NumPy's arithmetic, and its result looked at."""
    call, wants_bool = in_numpy(function.function), function.role == "mask_mod"

    def checked(*arguments: Any) -> Any:
        result = call(*arguments)
        is_bool = isinstance(result, (bool, np.bool_))
        is_real = isinstance(result, (int, float, np.integer, np.floating)) and not is_bool
        if not (is_bool if wants_bool else is_real):
            raise TypeError(wrong_type(function, type(result).__name__))
        return result

    return checked


def _positional(function: FunctionType, count: int, compiled: Callable[[Any], Any]) -> FunctionType:
    """Give a function as many arguments as it is called with: not more with defaults, nor ``*``."""
    code = function.__code__
    takes_rest = bool(code.co_flags & inspect.CO_VARARGS)
    if code.co_argcount == count and not takes_rest:
        return function
    names = [f"argument_{i}" for i in range(count)]
    passed = ", ".join(names)
    if takes_rest:
        # The rest comes as the tuple that it is within the function: compilers know no ``*rest``.
        named = code.co_argcount
        passed = ", ".join([*names[:named], f"({''.join(f'{n}, ' for n in names[named:])})"])
        whole = code.replace(co_argcount=named + 1, co_flags=code.co_flags & ~inspect.CO_VARARGS)
        function = FunctionType(
            whole, function.__globals__, function.__name__, None, function.__closure__
        )
    space = {"function": compiled(function)}
    made: FunctionType = eval(f"lambda {', '.join(names)}: function({passed})", space)
    return made


def _select(condition: Any, true: Any, false: Any) -> Any:
    return true if condition else false


def _clip(value: Any, low: Any, high: Any) -> Any:
    return min(max(value, low), high)


def _narrowing(single: bool) -> Callable[[Any], Any]:
    """What takes the place of a float of Python's, and of those in a tuple: a float32 beside those.

    So a score times a number stays a float32, as in NumPy, where compilers would make both float64.
    """

    def narrow(value: Any) -> Any:
        if type(value) is float and single:
            return np.float32(value)
        return tuple(map(narrow, value)) if type(value) is tuple else value

    return narrow


def _numpy_of_scalars(tools: Any, narrow: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What takes the place of outer values: functions of NumPy by those of numbers."""
    module = ModuleType("numpy")
    own = {"where": tools.device(_select), "clip": tools.device(_clip)}
    names = ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "sin", "cos")
    own |= {name: getattr(math, name) for name in names}
    own |= {"abs": abs, "absolute": abs, "arctan": math.atan, "maximum": max, "minimum": min}
    module.__dict__.update({**np.__dict__, **own})

    def replaced(value: Any) -> Any:
        if value is np:
            return module
        name = getattr(value, "__name__", None)
        of_numpy = isinstance(name, str) and name in own and getattr(np, name, None) is value
        return own[name] if of_numpy and isinstance(name, str) else narrow(value)

    return replaced


def _check_powers(tools: Any, function: UserFunction, parts: list[Any]) -> None:
    """Refuse ``2 ** -head``: Python makes it a float, compilers a whole number, which is 0."""
    integer = tools.types.Integer
    for found in (version.type_annotation for part in parts for version in part.overloads.values()):
        for expression, signature in found.calltypes.items():
            if getattr(expression, "op", None) not in ("binop", "inplace_binop"):
                continue
            is_power = expression.fn in (operator.pow, operator.ipow)
            if not is_power or not all(isinstance(kind, integer) for kind in signature.args):
                continue
            exponent = getattr(found.typemap[expression.rhs.name], "literal_value", -1)
            if exponent < 0:
                raise TypeError(
                    f"{function.place} cannot be compiled: line {expression.loc.line} of "
                    f'"{expression.loc.filename}": a power of two integers is wrong where the '
                    "exponent is negative; make one of them a float, as in 2.0 ** n"
                )
