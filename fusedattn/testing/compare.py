"""Comparison with a budget, in which NaN never passes by accident."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Budget(NamedTuple):
    """Largest permitted ``|actual - reference|`` of the two results, elementwise."""

    out: NDArray[np.float64]
    lse: NDArray[np.float64]


def assert_within(
    actual: NDArray[Any], expected: NDArray[Any], budget: NDArray[Any] | float, *, name: str = "out"
) -> None:
    """Assert ``|actual - expected| <= budget`` in every element, so that NaN fails.

    NaN is demanded exactly where `expected` has it, infinities with their sign.

    Raises
    ------
    AssertionError
        Naming the worst element, its index, its error and its budget.

    Examples
    --------
    >>> import numpy as np
    >>> assert_within(np.array([1.0, np.nan]), np.array([1.0, np.nan]), 0.0)
    >>> assert_within(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.25)
    Traceback (most recent call last):
    AssertionError: out[1] is 2.5, expected 2.0: error 0.5 is 2 times the budget 0.25 (1 of 2 ...)
    """
    assert actual.shape == expected.shape, (
        f"{name} has shape {actual.shape}, expected {expected.shape}"
    )
    if actual.size == 0:
        return
    got, want = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    allowed = np.broadcast_to(np.asarray(budget, np.float64), want.shape)
    with np.errstate(all="ignore"):
        error = np.where(got == want, 0.0, np.abs(got - want))
        error = np.where(np.isnan(got) & np.isnan(want), 0.0, error)
        fine = (error <= allowed) & (np.isfinite(want) | (error == 0))
        if fine.all():
            return
        ratio = np.where(fine, -1.0, np.where(error > 0, error / allowed, np.inf))
    worst = np.unravel_index(int(np.argmax(np.nan_to_num(ratio, nan=np.inf))), want.shape)
    place = ", ".join(str(int(i)) for i in worst)
    raise AssertionError(
        f"{name}[{place}] is {got[worst]!s}, expected {want[worst]!s}: error {error[worst]:.3g} is "
        f"{error[worst] / allowed[worst] if allowed[worst] > 0 else np.inf:.3g} times the budget "
        f"{allowed[worst]:.3g} ({int((~fine).sum())} of {want.size} elements are outside)"
    )
