"""Aux arrays as a user's function sees them on a GPU: read-only, indexed by integers.

As on the CPU, an index counts from the end where it is negative and is held to the array, so an
element outside is never read; small integers are read as int64, half types in the accumulator's
type. A table is an address, lengths and strides in bytes, all of them int64, in registers. Each
compiler has a type of its own for it (`fusedattn.cuda.tables_mlir`, `fusedattn.cuda.tables_numba`);
what they have in common is here, and so is the table of the simulator.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HALF_TYPES = ("float16", "bfloat16")


class Kind(NamedTuple):
    """What code is compiled for: dtype and number of axes of an array."""

    storage: str
    ndim: int

    @property
    def words(self) -> int:
        """How many int64 describe an array besides its address: lengths, then strides in bytes."""
        return 2 * self.ndim


def kind_of(array: Array) -> Kind:
    """Return the kind of an array."""
    return Kind(array.dtype.name, array.ndim)


def describe(arrays: Iterable[Array]) -> list[int]:
    """Lengths and strides of each array; an empty one has a single place to be held to."""
    words: list[int] = []
    for array in arrays:
        words += array.shape if array.size else [1] * array.ndim
        words += array.strides if array.size else [0] * array.ndim
    return words


def element_type(types: Any, storage: str, real: Any) -> Any:
    """Type in which the elements of an array count, where scores are of the type ``real``."""
    if storage in HALF_TYPES:
        return real
    if storage == "bool":
        return types.boolean
    # Two uint8 would make an uint64, whose difference is never negative.
    is_narrow = storage.startswith(("int", "uint")) and storage != "uint64"
    return types.int64 if is_narrow else getattr(types, storage)


def result_of(types: Any, table: Any, index: Any) -> Any:
    """Type of what an index gives, an element or a table of what is left; None if it is none."""
    parts = tuple(index) if isinstance(index, types.BaseTuple) else (index,)
    if not all(isinstance(part, types.Integer) for part in parts) or len(parts) > table.ndim:
        return None
    left = table.ndim - len(parts)
    return type(table)(table.storage, table.dtype, left) if left else table.dtype


class HostTable:
    """A table in the simulator."""

    def __init__(self, array: Array, real: Any, index: tuple[int, ...] = ()) -> None:
        self._array = array if array.size else np.zeros((1,) * array.ndim, array.dtype)
        self._real, self._index = real, index
        self.shape = array.shape[len(index) :]
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        """Length of the first axis."""
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        """Read an element, or what is left to index."""
        parts = index if isinstance(index, tuple) else (index,)
        taken = list(self._index)
        for part in parts:
            if not isinstance(part, (int, np.integer)) or len(taken) == self._array.ndim:
                raise TypeError(f"an array of {self.ndim} axes takes no index {index!r}")
            length = self._array.shape[len(taken)]
            place = int(part) + length if part < 0 else int(part)
            taken.append(min(max(place, 0), length - 1))
        if len(taken) < self._array.ndim:
            return HostTable(self._array, self._real, tuple(taken))
        element = self._array[tuple(taken)]
        name = self._array.dtype.name
        if name in HALF_TYPES:
            return self._real(element)
        is_narrow = self._array.dtype.kind in "iu" and name != "uint64"
        return np.int64(element) if is_narrow else element
