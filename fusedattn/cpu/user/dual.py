"""Scores in compiled functions: numbers of the accumulator's type that carry a slope along.

Two purposes, one type. Arithmetic between a score and a constant stays in the accumulator's type,
as it does between NumPy arrays and Python numbers (Numba's own rules make float64 of float32 and an
int, which halves the width of a vector). And the slope is the derivative by what it was seeded
with: forward-mode dual numbers. Where nobody asks for the slope, LLVM drops its arithmetic.

A function may do more with a score than there are rules for here; it is then compiled for plain
numbers, and has no derivative of ours.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from numba import njit as _njit
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_cast
from numba.core.typeconv.castgraph import Conversion
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model
from numba.extending import overload as _overload

njit: Any = _njit
intrinsic: Any = _intrinsic
overload: Any = _overload
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True}


class Dual(types.Type):
    """A number and its slope, both of one real type."""

    def __init__(self, real: Any) -> None:
        self.real = real
        super().__init__(name=f"Dual({real})")

    def can_convert_from(self, typing_context: Any, other: Any) -> Any:
        """Plain numbers are duals without a slope."""
        del typing_context
        plain = isinstance(types.unliteral(other), (types.Number, types.Boolean))
        return Conversion.safe if plain else None

    def unify(self, typing_context: Any, other: Any) -> Any:
        """What is a dual on one path and a number on another is a dual."""
        del typing_context
        plain = isinstance(types.unliteral(other), (types.Number, types.Boolean))
        return self if plain else None


@register_model(Dual)
class _DualModel(models.StructModel):
    def __init__(self, manager: Any, kind: Dual) -> None:
        super().__init__(manager, kind, [("value", kind.real), ("slope", kind.real)])


@lower_cast(types.Number, Dual)
@lower_cast(types.Boolean, Dual)
@lower_cast(types.IntegerLiteral, Dual)
@lower_cast(types.BooleanLiteral, Dual)
def _from_number(context: Any, builder: Any, kind: Any, target: Dual, value: Any) -> Any:
    plain = types.unliteral(kind)
    if isinstance(kind, types.Literal):
        value = context.cast(builder, value, kind, plain)
    return make_dual(context, builder, target, context.cast(builder, value, plain, target.real))


def make_dual(context: Any, builder: Any, kind: Dual, value: Any, slope: Any = None) -> Any:
    """Return a dual in LLVM; without a slope it is a constant."""
    dual = cgutils.create_struct_proxy(kind)(context, builder)
    dual.value = value
    dual.slope = context.get_constant(kind.real, 0.0) if slope is None else slope
    return dual._getvalue()


def parts_of(context: Any, builder: Any, kind: Any, value: Any) -> tuple[Any, Any]:
    """Return value and slope in LLVM."""
    dual = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    return dual.value, dual.slope


# --- for the rules below: parts of a dual or a number, and back -----------------------------------


@intrinsic
def _dual(typing_context, value, slope):
    kind = Dual(value)

    def codegen(context, builder, signature, arguments):
        return make_dual(context, builder, kind, *arguments)

    del typing_context
    return kind(value, value if slope == value else slope), codegen


def _part(position: int) -> Any:
    @intrinsic
    def part(typing_context, dual):
        if not isinstance(dual, Dual):
            return None

        def codegen(context, builder, signature, arguments):
            return parts_of(context, builder, dual, arguments[0])[position]

        del typing_context
        return dual.real(dual), codegen

    return part


_value_of, _slope_of = _part(0), _part(1)


def _value(x, real):
    raise NotImplementedError


def _slope(x, real):
    raise NotImplementedError


@overload(_value, inline="always")
def _overload_value(x, real):
    if isinstance(x, Dual):
        return lambda x, real: _value_of(x)
    return lambda x, real: real(x)


@overload(_slope, inline="always")
def _overload_slope(x, real):
    if isinstance(x, Dual):
        return lambda x, real: _slope_of(x)
    return lambda x, real: real(0.0)


def _times(part, slope):
    raise NotImplementedError


@overload(_times, jit_options=_OPTIONS)
def _overload_times(part, slope):
    """A partial derivative may be infinite where the slope is 0."""
    del part
    real = slope

    def run(part, slope):
        return real(0) if slope == real(0) else part * slope

    return run


def _real_of(*kinds: Any) -> Any:
    """Real type of the duals among these types, None if there are none or something else is."""
    found = [kind.real for kind in kinds if isinstance(kind, Dual)]
    others = [types.unliteral(kind) for kind in kinds if not isinstance(kind, Dual)]
    plain = all(isinstance(kind, (types.Number, types.Boolean)) for kind in others)
    return found[0] if found and plain else None


def _one(function: Any, value: Callable[..., Any], slope: Callable[..., Any]) -> None:
    """Overload a function of one number: ``slope(x, result)`` is its derivative."""
    value, slope = (njit(**_OPTIONS)(f) for f in (value, slope))

    @overload(function, jit_options=_OPTIONS)
    def rule(x):
        if not isinstance(x, Dual):
            return None
        real = x.real

        def run(x):
            a = _value_of(x)
            result = real(value(a))
            return _dual(result, _times(real(slope(a, result)), _slope_of(x)))

        return run


def _two(
    function: Any, value: Callable[..., Any], left: Callable[..., Any], right: Callable[..., Any]
) -> None:
    """Overload a function of two numbers by its two partial derivatives ``(x, y, result)``."""
    value, left, right = (njit(**_OPTIONS)(f) for f in (value, left, right))

    @overload(function, jit_options=_OPTIONS)
    def rule(x, y):
        real = _real_of(x, y)
        if real is None:
            return None

        def run(x, y):
            a, b = _value(x, real), _value(y, real)
            result = real(value(a, b))
            from_left = _times(real(left(a, b, result)), _slope(x, real))
            return _dual(result, from_left + _times(real(right(a, b, result)), _slope(y, real)))

        return run


def _compare(function: Any) -> None:
    """Overload a comparison: a truth value, which has no slope."""

    @overload(function, jit_options=_OPTIONS)
    def rule(x, y):
        real = _real_of(x, y)
        if real is None:
            return None
        return lambda x, y: function(_value(x, real), _value(y, real))


_two(operator.add, lambda x, y: x + y, lambda x, y, r: 1, lambda x, y, r: 1)
_two(operator.sub, lambda x, y: x - y, lambda x, y, r: 1, lambda x, y, r: -1)
_two(operator.mul, lambda x, y: x * y, lambda x, y, r: y, lambda x, y, r: x)
_two(operator.truediv, lambda x, y: x / y, lambda x, y, r: 1 / y, lambda x, y, r: -r / y)
_two(
    operator.pow,
    lambda x, y: x**y,
    lambda x, y, r: y * x ** (y - 1),
    lambda x, y, r: r * math.log(x),
)
for _function in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    _compare(_function)
_one(operator.neg, lambda x: -x, lambda x, r: -1)
_one(operator.pos, lambda x: x, lambda x, r: 1)
_one(abs, lambda x: abs(x), lambda x, r: 1 if x > 0 else -1)
_one(math.fabs, lambda x: abs(x), lambda x, r: 1 if x > 0 else -1)
_one(math.exp, lambda x: math.exp(x), lambda x, r: r)
_one(math.expm1, lambda x: math.expm1(x), lambda x, r: r + 1)
_one(math.log, lambda x: math.log(x), lambda x, r: 1 / x)
_one(math.log1p, lambda x: math.log1p(x), lambda x, r: 1 / (1 + x))
_one(math.sqrt, lambda x: math.sqrt(x), lambda x, r: 0.5 / r)
_one(math.tanh, lambda x: math.tanh(x), lambda x, r: 1 - r * r)
_one(math.sin, lambda x: math.sin(x), lambda x, r: math.cos(x))
_one(math.cos, lambda x: math.cos(x), lambda x, r: -math.sin(x))
_one(math.atan, lambda x: math.atan(x), lambda x, r: 1 / (1 + x * x))
_two(
    max,
    lambda x, y: y if y > x else x,
    lambda x, y, r: 0 if y > x else 1,
    lambda x, y, r: 1 if y > x else 0,
)
_two(
    min,
    lambda x, y: y if y < x else x,
    lambda x, y, r: 0 if y < x else 1,
    lambda x, y, r: 1 if y < x else 0,
)


@overload(float, jit_options=_OPTIONS)
def _float(x):
    return (lambda x: x) if isinstance(x, Dual) else None
