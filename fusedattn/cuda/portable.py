"""The portable kernel's tile shapes, and its launches on a GPU and in the simulator."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import compiler, driver, simt
from fusedattn.cuda.params import (
    HEADER,
    ITEM_SIZE,
    REALS,
    Span,
    heads_per_item,
    real_table,
    span_of,
    word_table,
)
from fusedattn.cuda.toolchains import Simulator
from fusedattn.problem import AttentionProblem, Lengths

Array = NDArray[Any]

# The simulator swaps a global module for the length of a launch.
_one_at_a_time = threading.Lock()

# Threads along rows and columns; rows, keys and columns of each; head dims and keys staged.
_MANY = (16, 16, 8, 4, 8, 16, 16)
_NARROW = (16, 16, 8, 4, 4, 16, 16)
_FEW = (8, 16, 2, 4, 8, 16, 16)
_DOUBLE = (16, 16, 4, 4, 4, 8, 8)
_SIMULATED = (2, 4, 2, 2, 2, 4, 4)

OPERANDS = ("q", "k", "v", "out", "lse", "mask", "bias", "slopes", "sinks")


def tile_of(problem: AttentionProblem) -> tuple[int, ...]:
    """Return the shape of the tile: decided by lengths, dims and dtype alone."""
    rows = heads_per_item(problem) * problem.seqlen_q
    if problem.dtype == np.float64:
        return _DOUBLE
    if rows <= 16:
        return _FEW
    return _NARROW if problem.head_dim_v <= 64 else _MANY


def config_of(problem: AttentionProblem, tile: tuple[int, ...]) -> simt.Config:
    """Return what the kernel for a problem is compiled for."""

    def name(array: Array | None) -> str | None:
        return None if array is None else array.dtype.name

    return simt.Config(
        problem.dtype.name,
        problem.out_dtype.name,
        name(problem.bias),
        name(problem.alibi_slopes),
        name(problem.sinks),
        problem.mask is not None,
        problem.softcap is not None,
        problem.dropout_p > 0.0,
        *tile,
    )


def kernel_of(config: simt.Config) -> compiler.Kernel:
    """Return the kernel to compile."""
    return compiler.Kernel("simt", simt.make, config, simt.parameters(config), config.threads)


def grid_of(problem: AttentionProblem, config: simt.Config) -> tuple[int, int, int]:
    """Blocks of threads: tiles of rows of all heads, times chunks of value columns."""
    rows = heads_per_item(problem) * problem.seqlen_q
    groups = problem.num_heads // heads_per_item(problem)
    row_blocks = -(-rows // config.block_q)
    return problem.batch_size * groups * row_blocks, -(-problem.head_dim_v // config.block_v), 1


def bits_of(array: Array) -> Array:
    """View an array as the elements that a kernel takes."""
    return array.view(compiler.ELEMENT[array.dtype.name])


def operands_of(problem: AttentionProblem, out: Array, lse: Array) -> dict[str, Array | None]:
    """Return the arrays of a problem by the kernel's names."""
    return {
        "q": problem.q,
        "k": problem.k,
        "v": problem.v,
        "out": out,
        "lse": lse,
        "mask": problem.mask,
        "bias": problem.bias,
        "slopes": problem.alibi_slopes,
        "sinks": problem.sinks,
    }


def spans_of(operands: dict[str, Array | None]) -> dict[str, Span]:
    """Where the elements of the operands lie; lse is contiguous."""
    spans = {}
    for name in OPERANDS:
        if name == "lse":
            continue
        array = operands[name]
        if array is not None:
            span = span_of(array)
            assert span is not None, "strides are looked at before"
            spans[name] = span
    return spans


def lengths_of(problem: AttentionProblem) -> Lengths:
    """Return the lengths of a problem."""
    return Lengths(problem.q_offset, problem.seqused_q, problem.seqused_k)


def simulate(problem: AttentionProblem, operands: dict[str, Array | None]) -> None:
    """Run the kernel in Numba's simulator, on contiguous arrays in host memory."""
    tools = compiler.toolchain()
    assert isinstance(tools, Simulator)
    config = config_of(problem, _SIMULATED)
    words = word_table(problem, spans_of(operands), config.block_q, lengths_of(problem))
    arguments = []
    for name, kind in zip(simt.PARAMETERS, simt.parameters(config), strict=True):
        array = {"words": words, "reals": real_table(problem)}.get(name, operands.get(name))
        if array is None or array.size == 0:
            arguments.append(np.zeros(1, compiler.ELEMENT[kind[1:-1]]))
        else:
            arguments.append(bits_of(flat_of(array)))
    with _one_at_a_time, tools.awake():
        kernel = tools.cuda.jit(tools.quiet(simt.make(tools, config)))
        kernel[grid_of(problem, config), (config.columns, config.rows)](*arguments)


def flat_of(array: Array) -> Array:
    """View an array in C order as the elements it holds, broadcast axes once."""
    pairs = zip(array.shape, array.strides, strict=True)
    stored = math.prod(n for n, stride in pairs if stride)
    return np.lib.stride_tricks.as_strided(array, (stored if array.size else 0,), (array.itemsize,))


class Prepared:
    """A launch on one GPU, for any number of calls that differ in addresses only."""

    def __init__(self, problem: AttentionProblem, where: driver.Device) -> None:
        self.where = where
        config = config_of(problem, tile_of(problem))
        kernel = kernel_of(config)
        self._function = where.function(kernel, lambda: compiler.compiled(kernel, where.chip))
        assert problem.out is not None
        operands = operands_of(problem, problem.out, problem.out)
        spans = spans_of(operands)
        self._words = driver.upload(
            where, word_table(problem, spans, config.block_q, lengths_of(problem))
        )
        self._reals = driver.upload(where, real_table(problem))
        self._grid, self._block = grid_of(problem, config), (config.columns, config.rows)
        self._tools = compiler.toolchain()
        words = HEADER + ITEM_SIZE * problem.batch_size
        self._arrays: list[tuple[str, int, int, int]] = []
        for name in simt.PARAMETERS:
            array = operands.get(name)
            low, length, size = 0, 1, 8
            if name in spans and array is not None:
                low, length, size = spans[name].low, spans[name].length, array.itemsize
            elif name == "lse":
                length, size = math.prod(problem.lse_shape), problem.accumulator.itemsize
            elif name == "words":
                length = words
            elif name == "reals":
                length, size = len(REALS), problem.accumulator.itemsize
            self._arrays.append((name, low, length, size))
        self._formats = "q" * sum(len(self._tools.array_words(0, 1, 1)) for _ in self._arrays)

    def run(self, addresses: dict[str, int], stream: int) -> None:
        """Start the kernel on arrays at these addresses; its context is current."""
        known = {**addresses, "words": self._words.address, "reals": self._reals.address}
        slots: list[int] = []
        for name, low, length, size in self._arrays:
            slots += self._tools.array_words(known.get(name, 0) + low, length, size)
        words = driver.Words(self._formats).fill(*slots)
        self._function.launch(self._grid, self._block, stream, words)
