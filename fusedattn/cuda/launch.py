"""Launches of kernels, prepared once and then given addresses."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fusedattn.cuda import compiler, driver
from fusedattn.problem import Lengths

Array = NDArray[Any]


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
    """A kernel of flat arrays on one GPU, for any number of calls that differ in addresses only."""

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


class Prepared(ABC):
    """A kernel on one GPU whose tiles are shared out beforehand, for any number of calls.

    They differ in addresses and in the lengths of batch items. All other parameters are entered
    once for each thread that calls.
    """

    def __init__(
        self,
        kernel: compiler.Kernel,
        where: driver.Device,
        shared: int,
        blocks: int,
        table: Array,
        order: Array,
    ) -> None:
        self.where = where
        self._function = where.function(
            kernel, lambda: compiler.compiled(kernel, where.chip), shared
        )
        self._grid, self._block = (blocks, 1, 1), (kernel.threads, 1)
        self._table, self._items = table, driver.upload(where, table)
        self._order = driver.upload(where, order)
        self._local = threading.local()

    def tables(self, lengths: Lengths) -> dict[str, Array]:
        """Return what `run` is to be given in host memory for a call with other lengths."""
        table = self._table.copy()
        self._enter_lengths(table, lengths)
        return {"items": table}

    def run(
        self, addresses: dict[str, int], stream: int, in_host: dict[str, Array] | None = None
    ) -> None:
        """Start the kernel on arrays at these addresses; its context is current.

        Arrays `in_host` memory are copied first.
        """
        if in_host:
            with driver.all_copied(self.where, in_host, stream) as copies:
                self._run(addresses | copies, stream)
        else:
            self._run(addresses, stream)

    def _words(self) -> driver.Words:
        """Return this thread's parameters, with all that is the same for every call."""
        words: driver.Words | None = getattr(self._local, "words", None)
        if words is None:
            words = self._local.words = self._make_words()
        return words

    def _launch_with(self, words: driver.Words, stream: int) -> None:
        self._function.launch(self._grid, self._block, stream, words)

    @abstractmethod
    def _enter_lengths(self, table: Array, lengths: Lengths) -> None:
        """Enter the lengths of a call into the table of items."""

    @abstractmethod
    def _make_words(self) -> driver.Words:
        """Return the parameters, with all that is the same for every call."""

    @abstractmethod
    def _run(self, addresses: dict[str, int], stream: int) -> None:
        """Start what there is to start."""
