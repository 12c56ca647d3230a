"""A user's function compiled by Numba for scalars, ready to be called from code that we write."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numba import njit as _njit
from numba import types
from numba.core import cgutils
from numba.core import config as _config
from numba.core.errors import NumbaError

from fusedattn.block_mask import Predicate
from fusedattn.cpu.simd import I1, I64
from fusedattn.cpu.user.dual import Dual, make_dual, parts_of
from fusedattn.cpu.user.reads import observed
from fusedattn.cpu.user.table import Table, read_table, table_type, words_of
from fusedattn.functions import UserFunction, explained, rebuilt
from fusedattn.pointwise import wrong_type

# Batch, head, row and key.
_INDICES = (types.int64,) * 4

njit: Any = _njit
config: Any = _config
_OPTIONS = {
    "error_model": "numpy",
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class Typed:
    """A user's function compiled by Numba for one type of scores."""

    def __init__(self, function: UserFunction, real: Any, *, reads: bool = False) -> None:
        self.function = function
        tables: tuple[Table, ...] = tuple(
            table_type(name, ndim, real) for name, ndim in function.aux_kinds
        )
        if reads:
            tables = tuple(observed(table, number, real) for number, table in enumerate(tables))
        self.tables = tables
        self.real = real
        rest = (*_INDICES, *tables)
        if function.role == "mask_mod":
            self.arguments, compiled = rest, _typed(function, rest)
        else:
            # A dual keeps its type beside constants. What it cannot do, a plain number may.
            self.arguments = (Dual(real), *rest)
            try:
                compiled = _typed(function, self.arguments)
            except TypeError:
                self.arguments = (real, *rest)
                compiled = _typed(function, self.arguments)
        self.result = compiled.signature.return_type
        self._check_result()
        self.context = compiled.target_context
        self.name = compiled.fndesc.llvm_func_name
        self.code = str(compiled.library.get_llvm_str())

    def _check_result(self) -> None:
        is_bool = isinstance(self.result, types.Boolean)
        is_real = isinstance(self.result, (types.Float, types.Integer, Dual))
        if not (is_bool if self.function.role == "mask_mod" else is_real):
            raise TypeError(wrong_type(self.function, str(self.result)))

    def call(self, builder: Any, scalars: list[Any], tables: list[Any]) -> Any:
        """Call the function; its result in Numba's type."""
        convention = self.context.call_conv
        kind = convention.get_function_type(self.result, self.arguments)
        function = cgutils.get_or_insert_function(builder.module, kind, self.name)
        _, result = convention.call_function(
            builder, function, self.result, self.arguments, [*scalars, *tables]
        )
        return result

    def score(self, builder: Any, score: Any, where: list[Any], tables: list[Any]) -> Any:
        """Call a score_mod; its result as a real."""
        return self.dual(builder, score, None, where, tables)[0]

    def dual(
        self, builder: Any, score: Any, seed: Any, where: list[Any], tables: list[Any]
    ) -> tuple[Any, Any]:
        """Call a score_mod of a score with a slope; its result and the slope of that."""
        kind = self.arguments[0]
        if isinstance(kind, Dual):
            score = make_dual(self.context, builder, kind, score, seed)
        result = self.call(builder, [score, *where], tables)
        if isinstance(self.result, Dual):
            return parts_of(self.context, builder, self.result, result)
        zero = self.context.get_constant(self.real, 0.0)
        return self.context.cast(builder, result, self.result, self.real), zero

    def check_derivative(self) -> None:
        """Refuse what could be compiled for plain numbers alone."""
        if not isinstance(self.arguments[0], Dual):
            raise TypeError(
                f"{self.function.place} cannot be differentiated by compiled code; give its "
                "derivative by the score as score_mod_grad"
            )

    def load_tables(self, builder: Any, words: Any, first: int) -> list[Any]:
        """Load the aux arrays, whose descriptions begin at a word."""
        loaded = []
        for table in self.tables:
            loaded.append(read_table(self.context, builder, table, words, first))
            first += words_of(table.ndim)
        return loaded

    @property
    def words(self) -> int:
        """Length of the descriptions of the aux arrays."""
        return sum(words_of(table.ndim) for table in self.tables)


def _select(condition: Any, true: Any, false: Any) -> Any:
    return true if condition else false


def _clip(value: Any, low: Any, high: Any) -> Any:
    return min(max(value, low), high)


@functools.cache
def _numpy_of_scalars() -> ModuleType:
    """NumPy, but for ``where`` and ``clip``, which Numba knows of arrays alone.

    (Under the name of NumPy, for its error messages.)
    """
    module = ModuleType("numpy")
    module.__dict__.update(np.__dict__)
    module.__dict__.update(where=njit(**_OPTIONS)(_select), clip=njit(**_OPTIONS)(_clip))
    names = ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "sin", "cos")
    module.__dict__.update({name: getattr(math, name) for name in names})
    module.__dict__.update(abs=abs, absolute=abs, arctan=math.atan, maximum=max, minimum=min)
    return module


def _for_numba(value: Any) -> Any:
    if value is np:
        return _numpy_of_scalars()
    is_array_function = value is np.where or value is np.clip
    return _numpy_of_scalars().__dict__[value.__name__] if is_array_function else value


def _positional(function: Any, count: int, compiled: Callable[[Any], Any]) -> Any:
    """Give a function as many arguments as it is called with: not more with defaults, nor ``*``."""
    code = function.__code__
    if code.co_argcount == count and not code.co_flags & inspect.CO_VARARGS:
        return function
    names = ", ".join(f"argument_{i}" for i in range(count))
    return eval(f"lambda {names}: function({names})", {"function": compiled(function)})


def _typed(function: UserFunction, arguments: tuple[Any, ...]) -> Any:
    """Compile through Numba, telling mistakes as mistakes of the user's function."""
    if config.DISABLE_JIT:
        raise RuntimeError(
            f"{function.place} cannot be compiled while NUMBA_DISABLE_JIT is set; unset it, or "
            'take backend="reference"'
        )
    parts: list[Any] = []

    def compiled(part: Any) -> Any:
        parts.append(njit(**_OPTIONS)(part))
        return parts[-1]

    plain = rebuilt(function.function, _for_numba, compiled)
    dispatcher = compiled(_positional(plain, len(arguments), compiled))
    try:
        dispatcher.compile(arguments)
    except (NumbaError, NotImplementedError) as error:
        raise TypeError(explained(function, error)) from None
    for part in parts:
        _check_powers(function, part)
    return dispatcher.overloads[arguments]


def _check_powers(function: UserFunction, part: Any) -> None:
    """Refuse ``2 ** -head``: Python makes it a float, Numba a whole number, which is 0."""
    for version in part.overloads.values():
        found = version.type_annotation
        for expression, signature in found.calltypes.items():
            if getattr(expression, "op", None) not in ("binop", "inplace_binop"):
                continue
            is_power = expression.fn in (operator.pow, operator.ipow)
            if not is_power or not all(isinstance(kind, types.Integer) for kind in signature.args):
                continue
            exponent = getattr(found.typemap[expression.rhs.name], "literal_value", -1)
            if exponent < 0:
                raise TypeError(
                    f"{function.place} cannot be compiled: line {expression.loc.line} of "
                    f'"{expression.loc.filename}": a power of two integers is wrong where the '
                    "exponent is negative; make one of them a float, as in 2.0 ** n"
                ) from None


class Joined:
    """The functions of a predicate, or the one of a score_mod, side by side in one module."""

    def __init__(self, predicate: Predicate, real: Any) -> None:
        self.predicate = predicate
        self.typed: dict[int, tuple[Typed, int]] = {}
        first = 0
        for leaf in predicate.leaves():
            assert leaf.leaf is not None
            typed = Typed(leaf.leaf, real)
            self.typed[id(leaf)] = (typed, first)
            first += typed.words

    def load(self, builder: Any, words: Any) -> dict[int, list[Any]]:
        """Load the aux arrays of each function."""
        return {
            leaf: typed.load_tables(builder, words, first)
            for leaf, (typed, first) in self.typed.items()
        }

    def call(
        self, builder: Any, part: Predicate, tables: dict[int, list[Any]], where: list[Any]
    ) -> Any:
        """Evaluate a part of the predicate, to one bit."""
        if part.leaf is not None:
            typed, _ = self.typed[id(part)]
            batch, head, row, key = where
            batch = batch if part.by_batch else I64(0)
            head = head if part.by_head else I64(0)
            result = typed.call(builder, [batch, head, row, key], tables[id(part)])
            return result if result.type == I1 else builder.trunc(result, I1)
        first, *others = (self.call(builder, inner, tables, where) for inner in part.parts)
        if part.operation == "not":
            return builder.not_(first)
        join = builder.and_ if part.operation == "and" else builder.or_
        return join(first, others[0])

    @property
    def codes(self) -> list[str]:
        """Code of the functions."""
        return [typed.code for typed, _ in self.typed.values()]
