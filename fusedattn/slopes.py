"""Derivatives of a user's function in NumPy, by dual numbers: a value and its slope.

Forward mode: each operation carries the slope of its result along, by the chain rule. One run
gives the derivative by one input, for all pairs at once: by the score, or by what one read of an
aux array gave. So a function that reads its arrays n times is run ``1 + n`` times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.functions import UserFunction
from fusedattn.pointwise import Numbers, Sloped, Table, evaluate, in_numpy, in_parts, readable

Array = NDArray[Any]


class NoRule(TypeError):
    """The function does what no rule of differentiation is known for."""


# Partial derivatives of the functions of NumPy: from the result and the inputs, one for each input.
_RULES: dict[np.ufunc, Callable[..., tuple[Any, ...]]] = {
    np.add: lambda r, x, y: (1.0, 1.0),
    np.subtract: lambda r, x, y: (1.0, -1.0),
    np.multiply: lambda r, x, y: (y, x),
    np.divide: lambda r, x, y: (1.0 / y, -r / y),
    np.remainder: lambda r, x, y: (1.0, -np.floor_divide(x, y)),
    np.power: lambda r, x, y: (y * np.power(x, y - 1.0), r * np.log(x)),
    np.maximum: lambda r, x, y: (x >= y, x < y),
    np.minimum: lambda r, x, y: (x <= y, x > y),
    np.hypot: lambda r, x, y: (x / r, y / r),
    np.arctan2: lambda r, y, x: (x / (x * x + y * y), -y / (x * x + y * y)),
    np.copysign: lambda r, x, y: (np.copysign(1.0, x) * np.copysign(1.0, y), 0.0),
    np.negative: lambda r, x: (-1.0,),
    np.positive: lambda r, x: (1.0,),
    np.absolute: lambda r, x: (np.sign(x),),
    np.fabs: lambda r, x: (np.sign(x),),
    np.square: lambda r, x: (2.0 * x,),
    np.reciprocal: lambda r, x: (-r * r,),
    np.sqrt: lambda r, x: (0.5 / r,),
    np.cbrt: lambda r, x: (1.0 / (3.0 * r * r),),
    np.exp: lambda r, x: (r,),
    np.exp2: lambda r, x: (r * np.log(2.0),),
    np.expm1: lambda r, x: (r + 1.0,),
    np.log: lambda r, x: (1.0 / x,),
    np.log2: lambda r, x: (1.0 / (x * np.log(2.0)),),
    np.log10: lambda r, x: (1.0 / (x * np.log(10.0)),),
    np.log1p: lambda r, x: (1.0 / (1.0 + x),),
    np.sin: lambda r, x: (np.cos(x),),
    np.cos: lambda r, x: (-np.sin(x),),
    np.tan: lambda r, x: (1.0 + r * r,),
    np.arcsin: lambda r, x: (1.0 / np.sqrt(1.0 - x * x),),
    np.arccos: lambda r, x: (-1.0 / np.sqrt(1.0 - x * x),),
    np.arctan: lambda r, x: (1.0 / (1.0 + x * x),),
    np.sinh: lambda r, x: (np.cosh(x),),
    np.cosh: lambda r, x: (np.sinh(x),),
    np.tanh: lambda r, x: (1.0 - r * r,),
    np.arcsinh: lambda r, x: (1.0 / np.sqrt(x * x + 1.0),),
    np.arccosh: lambda r, x: (1.0 / np.sqrt(x * x - 1.0),),
    np.arctanh: lambda r, x: (1.0 / (1.0 - x * x),),
}
# Constant between their jumps.
_FLAT = (
    np.floor, np.ceil, np.trunc, np.rint, np.sign, np.floor_divide, np.isnan, np.isinf,
    np.isfinite, np.signbit, np.less, np.less_equal, np.greater, np.greater_equal, np.equal,
    np.not_equal, np.logical_and, np.logical_or, np.logical_not,
)  # fmt: skip


class Dual(Sloped, np.lib.mixins.NDArrayOperatorsMixin):
    """A stand-in for a number with a slope: one of each for each pair."""

    def __init__(self, values: Any, slope: Any) -> None:
        self.values, self.slope = values, slope

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        """Apply an elementwise function of NumPy and its derivative."""
        if method != "__call__" or keywords:
            raise NoRule(f"{ufunc.__name__}.{method}")
        values = [_value(x) for x in inputs]
        result = ufunc(*values)
        if ufunc in _FLAT:
            return Numbers(np.asarray(result))
        if ufunc not in _RULES:
            raise NoRule(f"no rule for {ufunc.__name__}")
        slope: Any = 0.0
        for part, x in zip(_RULES[ufunc](result, *values), inputs, strict=True):
            slope = slope + _times(part, _slope(x))
        return Dual(result, slope)

    def __array_function__(self, function: Any, _types: Any, inputs: Any, keywords: Any) -> Any:
        """Apply `where` and `clip`."""
        if keywords or function not in (np.where, np.clip) or len(inputs) != 3:
            raise NoRule(f"no rule for {function.__name__}")
        if function is np.clip:
            return np.minimum(np.maximum(inputs[0], inputs[1]), inputs[2])
        chosen, one, other = inputs
        where = _value(chosen)
        slope = np.where(where, _slope(one), _slope(other))
        return Dual(np.where(where, _value(one), _value(other)), slope)

    def __bool__(self) -> bool:
        """Whether it is not 0 for all pairs; they part where it is for some."""
        return bool(Numbers(np.asarray(self.values)))

    def _only_a_number_can(self, *_: Any) -> Any:
        raise NoRule("a score or an element of aux is used as only a plain number can be")

    __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = _only_a_number_can
    __getitem__ = __round__ = __array__ = _only_a_number_can
    __hash__ = None  # type: ignore[assignment]


def _value(x: Any) -> Any:
    return x.values if isinstance(x, (Dual, Numbers)) else x


def _slope(x: Any) -> Any:
    return x.slope if isinstance(x, Dual) else 0.0


def _times(part: Any, slope: Any) -> Any:
    """Multiply a partial derivative, which may be infinite, by a slope, which then may be 0."""
    return np.where(np.equal(slope, 0.0), 0.0, part * slope)


class _Reads:
    """Counts the reads of floating aux arrays; one of them is the variable."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.count = wanted, 0
        self.number, self.index = -1, (np.zeros(0, np.int64),)


class _DualTable(Table):
    """A floating aux array whose elements are variables."""

    def __init__(self, array: Array, number: int, reads: _Reads, index: tuple[Any, ...]) -> None:
        super().__init__(array, index)
        self._number, self._reads = number, reads

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, Table):
            return _DualTable(self._array, self._number, self._reads, found._index)
        reads, turn = self._reads, self._reads.count
        reads.count += 1
        if turn == reads.wanted:
            parts = index if isinstance(index, tuple) else (index,)
            reads.number = self._number
            reads.index = tuple(_value(part) for part in (*self._index, *parts))
        return Dual(_value(found), 1.0 if turn == reads.wanted else 0.0)


def d_score(
    function: UserFunction, grad: UserFunction | None, scores: Array, *where: Array
) -> Array:
    """Return the derivative of a score_mod by the score, for each of some pairs.

    Parameters
    ----------
    function : UserFunction
        The score_mod.
    grad : UserFunction or None
        Its derivative, where the user gives it.
    scores, *where : ndarray, (pairs,)
        Scores, batch, heads, rows and keys.

    Raises
    ------
    TypeError
        If the function cannot be differentiated: then the user has to give its derivative.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn.functions import user_function
    >>> f = user_function("score_mod", lambda score, b, h, q, k: score * score / 2, ())
    >>> d_score(f, None, np.array([1.0, -3.0]), *np.zeros((4, 2), np.int64))
    array([ 1., -3.])
    """
    if grad is not None:
        return evaluate(grad, scores, *where)
    result = np.empty(scores.shape, scores.dtype)
    if not result.size:
        return result
    for pairs, (found, _) in _runs(function, -1, 1.0, scores, where):
        result[pairs] = _slope(found)
    return result


def add_to_aux(
    function: UserFunction, sums: list[Array | None], d_result: Array, scores: Array, *where: Array
) -> None:
    """Add the gradients by the elements of the aux arrays, given those by the results.

    ``sums`` holds an accumulator for each floating array and None for the others. Pairs are added
    in their order, so the same call gives the same bits.
    """
    shares: list[tuple[Array, int, tuple[Any, ...], Array]] = []
    turn, more = 0, scores.size > 0
    while more:
        more = False
        for pairs, (found, reads) in _runs(function, turn, 0.0, scores, where):
            more = more or reads.count > turn + 1
            if reads.count > turn:
                slope = np.broadcast_to(_slope(found), pairs.shape)
                shares.append((pairs, reads.number, reads.index, slope))
        turn += 1
    for pairs, number, index, slope in shares:
        total = sums[number]
        assert total is not None
        places = tuple(np.broadcast_to(part, pairs.shape) for part in index)
        np.add.at(total, places, _times(slope, d_result[pairs]))


def _runs(
    function: UserFunction, wanted: int, seed: float, scores: Array, where: tuple[Array, ...]
) -> Any:
    """Run the function on dual numbers: the ``wanted``-th read is the variable, or the score."""
    call = in_numpy(function.function)

    def run(pairs: Array) -> Any:
        reads = _Reads(wanted)
        tables = [
            Table(readable(array))
            if array.dtype.kind in "iub"
            else _DualTable(array.astype(np.float64), number, reads, ())
            for number, array in enumerate(function.aux)
        ]
        score = Dual(scores[pairs], seed)
        return call(score, *(Numbers(part[pairs]) for part in where), *tables), reads

    try:
        with np.errstate(all="ignore"):
            yield from in_parts(scores.size, run)
    except Exception as error:
        raise TypeError(
            f"{function.place} cannot be differentiated ({error}); give its derivative by the "
            "score as score_mod_grad"
        ) from None
