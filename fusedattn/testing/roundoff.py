"""Limits of the floating types, as Python floats."""

from functools import cache
from typing import Any

import ml_dtypes


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
