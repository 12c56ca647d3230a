"""Limits of the floating types, and what a relative error of an exponent does to a weight."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# Exponents beyond this have left the range in which exp() of a float64 is finite.
EXP_LIMIT = 700.0


@cache
def _limits(dtype: Any) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def unit_roundoff(dtype: Any) -> float:
    """Half the distance from 1 to the next larger number of a floating type."""
    return float(_limits(dtype).eps) / 2


def smallest_normal(dtype: Any) -> float:
    """Smallest positive normal number of a floating type."""
    return float(_limits(dtype).smallest_normal)


def smallest_subnormal(dtype: Any) -> float:
    """Smallest positive number of a floating type."""
    return float(_limits(dtype).smallest_subnormal)


def largest(dtype: Any) -> float:
    """Largest finite number of a floating type."""
    return float(_limits(dtype).max)


def change_of_weight(log_w: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """``w * expm1(error)``, also where ``w`` underflows and the error is huge."""
    w = np.exp(log_w)
    large = np.exp(np.minimum(log_w + error, EXP_LIMIT)) - w
    return np.where(error < 1, w * np.expm1(np.minimum(error, 1.0)), large)
