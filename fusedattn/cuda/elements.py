"""Elements of a storage type in global memory: how a kernel loads and stores one.

Half types travel as the integers that hold their bits.
"""

# "not x == x" is true of NaN with every compiler; "x != x" is not.
# ruff: noqa: SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any


def make_loader(tools: Any, storage: str, real: Any) -> Any:
    """Return ``load(array, index)``: one element in the accumulator's type."""
    bits = tools.conversions()
    if storage == "float16":
        half_to_float = bits["half_to_float"]

        def load(array, index):
            return real(half_to_float(array[index]))
    elif storage == "bfloat16":
        int_as_float, int32 = bits["int_as_float"], tools.types.int32

        def load(array, index):
            return real(int_as_float(int32(array[index]) << 16))
    else:

        def load(array, index):
            return real(array[index])

    return tools.device(load)


def make_storer(tools: Any, storage: str) -> Any:
    """Return ``store(array, index, x)``: round to nearest, ties to even."""
    bits = tools.conversions()
    types = tools.types
    if storage == "float16":
        float_to_half = bits["float_to_half"]

        def store(array, index, x):
            array[index] = float_to_half(x)
    elif storage == "bfloat16":
        float_as_int, uint32, uint16 = bits["float_as_int"], types.uint32, types.uint16

        def store(array, index, x):
            word = float_as_int(x) & 0xFFFFFFFF
            rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
            if not x == x:
                rounded = 0x7FC0  # rounding the bits of a NaN could carry into the sign
            array[index] = uint16(uint32(rounded))
    else:
        element = types.float64 if storage == "float64" else types.float32

        def store(array, index, x):
            array[index] = element(x)

    return tools.device(store)
