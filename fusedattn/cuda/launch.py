"""Launches of kernels whose parameters are flat arrays and addresses, given the addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fusedattn.cuda import compiler, driver


class Argument(NamedTuple):
    """A parameter: its name, and what of the memory behind its address an array covers."""

    name: str
    low: int = 0  # bytes from the address given to the lowest one; not positive
    length: int = 1
    itemsize: int = 8
    bare: bool = False  # the parameter is the address itself


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
        each = len(self._tools.array_words(0, 1, 1))
        self._formats = "q" * sum(1 if one.bare else each for one in self._arguments)

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Start the kernel; its context is current. An array without an address is not read."""
        slots: list[int] = []
        for name, low, length, itemsize, bare in self._arguments:
            address = addresses.get(name, 0) + low
            slots += [address] if bare else self._tools.array_words(address, length, itemsize)
        words = driver.Words(self._formats).fill(*slots)
        self._function.launch(self._grid, self._block, stream, words)
