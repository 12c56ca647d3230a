"""Launches of kernels whose parameters are flat arrays, given the addresses of the arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fusedattn.cuda import compiler, driver


class Argument(NamedTuple):
    """An array parameter: its name, and what of the memory behind its address it covers."""

    name: str
    low: int = 0  # bytes from the address given to the lowest one; not positive
    length: int = 1
    itemsize: int = 8


class Launch:
    """One kernel on one GPU, for any number of calls that differ in addresses only."""

    def __init__(
        self,
        kernel: compiler.Kernel,
        where: driver.Device,
        grid: tuple[int, int, int],
        block: tuple[int, int],
        arguments: Iterable[Argument],
    ) -> None:
        self._function = where.function(kernel, lambda: compiler.compiled(kernel, where.chip))
        self._grid, self._block = grid, block
        self._arguments = tuple(arguments)
        self._tools = compiler.toolchain()
        self._formats = "q" * sum(len(self._tools.array_words(0, 1, 1)) for _ in self._arguments)

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Start the kernel; its context is current. An array without an address is not read."""
        slots: list[int] = []
        for name, low, length, itemsize in self._arguments:
            slots += self._tools.array_words(addresses.get(name, 0) + low, length, itemsize)
        words = driver.Words(self._formats).fill(*slots)
        self._function.launch(self._grid, self._block, stream, words)
