"""Launches of kernels whose parameters are flat arrays and addresses, given the addresses."""

from __future__ import annotations

import threading
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


def slots_of(arguments: Iterable[Argument], addresses: Mapping[str, int]) -> tuple[int, ...]:
    """Return what the parameters hold."""
    tools = compiler.toolchain()
    slots: list[int] = []
    for name, low, length, itemsize, bare in arguments:
        address = addresses.get(name, 0) + low
        slots += [address] if bare else tools.array_words(address, length, itemsize)
    return tuple(slots)


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
        tools = compiler.toolchain()
        # The words of all parameters for memory at address 0, and which of them are addresses.
        self._words: list[int] = []
        self._places: list[tuple[str, int, list[int]]] = []
        for name, low, length, itemsize, bare in arguments:
            words, moved = [
                [address] if bare else tools.array_words(address, length, itemsize)
                for address in (0, 1)
            ]
            first = len(self._words)
            found = [first + i for i, word in enumerate(words) if word != moved[i]]
            self._places.append((name, low, found))
            self._words += words
        self._local = threading.local()

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Start the kernel; its context is current. An array without an address is not read."""
        slots = self._words.copy()
        for name, low, places in self._places:
            address = addresses.get(name, 0) + low
            for place in places:
                slots[place] = address
        words = getattr(self._local, "words", None)
        if words is None:
            words = self._local.words = driver.Words("q" * len(slots))
        self._function.launch(self._grid, self._block, stream, words.fill(*slots))
