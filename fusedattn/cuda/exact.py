"""The Hopper kernel for float32: its tile shapes, the problems it takes, and its launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import compiler, driver, hopper_exact, launch
from fusedattn.cuda.params import lengths_of
from fusedattn.cuda.schedule import schedule
from fusedattn.cuda.tensor_cores import address_of, bounds_of
from fusedattn.problem import AttentionProblem, Lengths, batch_offsets

Array = NDArray[Any]

# By head dims, rounded up: keys of a tile, and stages, as many as shared memory holds.
_TILES = {64: (64, 2), 128: (64, 1)}
# Registers of a thread that loads, and of one that computes.
_REGISTERS = (88, 208)


def config_of(problem: AttentionProblem) -> hopper_exact.Config:
    """Return what the kernel for a problem is compiled for."""
    assert problem.out is not None
    dims = dims_of(problem)
    vectors = all(is_dense(getattr(problem, name), 4) for name in ("q", "k", "v"))
    pairs = is_dense(problem.out, 2)
    return hopper_exact.Config(dims, dims, *_TILES[dims], vectors, pairs, _REGISTERS)


def dims_of(problem: AttentionProblem) -> int:
    """Head dims of the smallest kernel that holds the problem's."""
    return next(n for n in _TILES if max(problem.head_dim, problem.head_dim_v) <= n)


def tile_of(problem: AttentionProblem) -> tuple[int, int]:
    """Rows and keys of a tile."""
    return hopper_exact.BLOCK_Q, _TILES[dims_of(problem)][0]


def is_dense(array: Array, count: int) -> bool:
    """Whether elements of a row can be accessed so many at a time."""
    size = count * array.itemsize
    steps = (stride for n, stride in zip(array.shape[:-1], array.strides, strict=False) if n > 1)
    return (
        array.shape[-1] % count == 0
        and array.strides[-1] == array.itemsize
        and address_of(array) % size == 0
        and all(step % size == 0 for step in steps)
    )


def kernel_of(config: hopper_exact.Config) -> compiler.Kernel:
    """Return the kernel to compile."""
    parameters = hopper_exact.PARAMETERS
    return compiler.Kernel("exact", hopper_exact.make, config, parameters, config.threads)


def unsupported(problem: AttentionProblem) -> list[str]:
    """Reasons why the kernel does not take a problem, given the GPU; the portable one does."""
    reasons = []
    if problem.dtype != np.float32:
        reasons.append(f"{problem.dtype} is not float32")
    options = {
        "mask": problem.mask,
        "bias": problem.bias,
        "alibi_slopes": problem.alibi_slopes,
        "softcap": problem.softcap,
        "sinks": problem.sinks,
        "dropout": problem.dropout_p or None,
    }
    reasons += [
        f"{name} is not implemented in it" for name, value in options.items() if value is not None
    ]
    if not 2.0**-100 < problem.scale < 2.0**100:
        reasons.append("scale is not positive, or far from 1")
    if max(problem.head_dim, problem.head_dim_v) > max(_TILES):
        reasons.append(f"head dims beyond {max(_TILES)}")
    if problem.seqlen_k == 0:
        reasons.append("there are no keys")
    return reasons


class Launch(NamedTuple):
    """What a launch is given besides addresses."""

    config: hopper_exact.Config
    order: Array  # see `schedule`
    numbers: tuple[int | float, ...]

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return int(self.order.shape[1])

    def arguments(
        self, addresses: dict[str, int], items: int, order: int
    ) -> tuple[int | float, ...]:
        """Return the kernel's arguments, given where all that it is given lies; no lse: 0."""
        return (*self.changing(addresses, items), order, *self.numbers)

    def changing(self, addresses: dict[str, int], items: int) -> tuple[int, ...]:
        """Return the first arguments, which change from call to call."""
        q, k, v, out = (addresses[name] for name in ("q", "k", "v", "out"))
        return q, k, v, out, addresses.get("lse", 0), items


def launch_of(
    problem: AttentionProblem, config: hopper_exact.Config, multiprocessors: int
) -> Launch:
    """Return how a problem is shared out."""
    assert problem.out is not None
    order = schedule(problem, (config.block_q, config.block_k), multiprocessors)
    arrays = (problem.q, problem.k, problem.v, problem.out)
    numbers = (
        *(stride for array in arrays for stride in array.strides[-3:]),
        *(problem.num_heads, problem.group_size, problem.seqlen_q),
        *(problem.head_dim, problem.head_dim_v, order.shape[0] * order.shape[1]),
        problem.scale / math.log(2.0),
    )
    return Launch(config, order, numbers)


def item_table(problem: AttentionProblem) -> Array:
    """What the kernel looks up for each item of the batch; see `hopper_exact.ITEM_BYTES`."""
    assert problem.out is not None
    table = np.zeros((problem.batch_size, hopper_exact.ITEM_BYTES), np.uint8)
    table[:, :16] = bounds_of(problem, lengths_of(problem)).view(np.uint8)
    arrays = (problem.q, problem.k, problem.v, problem.out)
    offsets = np.stack(
        [batch_offsets(problem.batch_shape, array.strides) for array in arrays], axis=-1
    )
    table[:, 16:] = offsets.view(np.uint8)
    return table


class Prepared(launch.Prepared):
    """A launch on one GPU, for any number of calls that differ in addresses only."""

    def __init__(self, problem: AttentionProblem, where: driver.Device) -> None:
        self._launch = launch_of(problem, config_of(problem), where.multiprocessors)
        self._problem = problem
        config, order = self._launch.config, self._launch.order
        kernel, blocks = kernel_of(config), self._launch.grid
        super().__init__(kernel, where, config.shared, blocks, item_table(problem), order)

    def _enter_lengths(self, table: Array, lengths: Lengths) -> None:
        table[:, :16] = bounds_of(self._problem, lengths).view(np.uint8)

    def _make_words(self) -> driver.Words:
        addresses = dict.fromkeys(("q", "k", "v", "out"), 0)
        values = self._launch.arguments(addresses, self._items.address, self._order.address)
        return driver.Words(hopper_exact.FORMATS, values)

    def _run(self, addresses: dict[str, int], stream: int) -> None:
        words = self._words()
        words.enter(
            0, self._launch.changing(addresses, addresses.get("items", self._items.address))
        )
        self._launch_with(words, stream)
