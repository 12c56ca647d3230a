"""Arrays in guarded memory: poison on every side and in every gap."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Elements of poison before and after each array. Odd, so that no view starts on a vector boundary.
_GUARD = 33

# How the values of an array of at least two axes lie in memory.
PLACEMENTS = (
    "plain",  # C order
    "row_gap",  # rows further apart than they are long
    "seq_first",  # the two axes before the last are swapped
    "dim_first",  # the last two axes are swapped
    "fortran",  # the first axis runs fastest
    "reversed",  # negative strides
    "every_other",  # every second element of each axis
    "stride0_rows",  # all rows are one row
    "stride0_heads",  # all heads are one head
)


def same_everywhere(values: Array, placement: str) -> Array:
    """Make values constant along the axis that the placement gives stride 0."""
    axis = {"stride0_rows": -2, "stride0_heads": -3}.get(placement)
    if axis is None or values.ndim < -axis or values.shape[axis] < 2:
        return values
    first = np.take(values, [0], axis=axis)
    return np.ascontiguousarray(np.broadcast_to(first, values.shape))


class Placed:
    """Values in a buffer of their own, seen through `view`.

    Parameters
    ----------
    values : ndarray
        What the view shows at first.
    placement : str
        One of `PLACEMENTS`. Stride 0 is taken only where the values are the same along that axis.
    """

    def __init__(self, values: Array, placement: str = "plain") -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, but is {placement!r}")
        ndim = values.ndim
        axes, steps, pad = list(range(ndim)), [1] * ndim, [0] * ndim
        repeated = None
        if ndim >= 2 and placement == "row_gap":
            pad[-1] = 3
        elif ndim >= 3 and placement == "seq_first":
            axes[-3], axes[-2] = axes[-2], axes[-3]
        elif ndim >= 2 and placement == "dim_first":
            axes[-1], axes[-2] = axes[-2], axes[-1]
        elif placement == "fortran":
            axes.reverse()
        elif placement == "reversed":
            steps = [-1] * ndim
        elif placement == "every_other":
            steps = [2] * ndim
        elif placement.startswith("stride0"):
            repeated = ndim - (2 if placement == "stride0_rows" else 3)
            # Values that differ along that axis need their places: a law may have changed them.
            if repeated < 0 or values.size == 0 or not _constant(values, repeated):
                repeated = None
        stored = list(values.shape)
        if repeated is not None:
            stored[repeated] = 1
        extent = [stored[a] * abs(steps[a]) + pad[a] for a in axes]
        size = int(np.prod(extent, dtype=np.int64))
        self._buffer = np.full(size + 2 * _GUARD, poison(values.dtype), values.dtype)
        inside = self._buffer[_GUARD : _GUARD + size].reshape(extent)
        inside = inside.transpose(np.argsort(axes)) if ndim else inside
        window = tuple(
            slice(0, stored[a]) if steps[a] == 1 else slice(None, None, steps[a])
            for a in range(ndim)
        )
        view = inside[window]
        view[...] = values if repeated is None else np.take(values, [0], axis=repeated)
        self._stored = view
        self.view: Array = view if repeated is None else np.broadcast_to(view, values.shape)
        self._before = self._buffer.tobytes()

    def untouched(self) -> bool:
        """Whether no byte of the buffer has changed."""
        return self._buffer.tobytes() == self._before

    def untouched_outside(self) -> bool:
        """Whether no byte outside the view has changed, if the view held poison. Poisons it."""
        self._stored[...] = poison(self._stored.dtype)
        return self.untouched()

    def overlaps(self, array: Array) -> bool:
        """Whether an array lies in this buffer."""
        return bool(np.may_share_memory(array, self._buffer))


def _constant(values: Array, axis: int) -> bool:
    first = np.take(values, [0], axis=axis)
    return np.broadcast_to(first, values.shape).tobytes() == values.tobytes()


def poison(dtype: np.dtype[Any]) -> Any:
    """Value that should never be read."""
    if dtype.kind == "b":
        return True
    if dtype.kind in "iu":
        return np.iinfo(dtype).max
    return np.nan
