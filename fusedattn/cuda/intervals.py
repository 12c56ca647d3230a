"""The intervals of `fusedattn.masks` in 32 bits, for kernels that are short of instructions.

Numba adds two int32 to an int64, and what follows is computed in 64 bits, in twice as many
instructions and more. Rows and keys are at most `masks.MAX_SEQLEN` and bounds are cut to that, so
no sum that is looked at leaves 32 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Intervals(NamedTuple):
    """Functions for kernels, by the names of those in `fusedattn.masks`, of int32."""

    row_interval: Any
    block_interval: Any
    common_interval: Any


def make(tools: Any) -> Intervals:
    """Return the functions, for one toolchain."""
    int32 = tools.types.int32

    def row_interval(row: Any, k_from: Any, k_to: Any, used_q: Any, used_k: Any) -> Any:
        low = min(max(int32(row + k_from), int32(0)), used_k)
        high = max(min(int32(row + k_to), used_k), low)
        counts = row < used_q
        return low if counts else int32(0), high if counts else int32(0)

    def block_interval(
        row_lo: Any, row_hi: Any, k_from: Any, k_to: Any, used_q: Any, used_k: Any
    ) -> Any:
        last = int32(min(row_hi, used_q) - 1)
        low = min(max(int32(row_lo + k_from), int32(0)), used_k)
        high = max(min(int32(last + k_to), used_k), low)
        counts = row_lo <= last
        return low if counts else int32(0), high if counts else int32(0)

    def common_interval(
        row_lo: Any, row_hi: Any, k_from: Any, k_to: Any, used_q: Any, used_k: Any
    ) -> Any:
        low = max(int32(int32(row_hi - 1) + k_from), int32(0))
        high = max(min(int32(row_lo + k_to), used_k), low)
        counts = row_hi <= used_q
        return low if counts else int32(0), high if counts else int32(0)

    return Intervals(*map(tools.device, (row_interval, block_interval, common_interval)))
