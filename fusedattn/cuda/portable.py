"""The portable kernel's tile shapes, and its launches on a GPU and in the simulator."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import combine, compiler, driver, simt, user
from fusedattn.cuda.launch import Argument, Launch
from fusedattn.cuda.params import (
    HEADER,
    ITEM_SIZE,
    REALS,
    SPLIT_KEYS,
    SPLIT_QUERIES,
    Span,
    enter_lengths,
    heads_per_item,
    lengths_of,
    real_table,
    span_of,
    word_table,
)
from fusedattn.cuda.simulator import Simulator
from fusedattn.problem import AttentionProblem, Lengths

Array = NDArray[Any]

# The simulator swaps a global module for the length of a launch.
_one_at_a_time = threading.Lock()

Tile = tuple[int, int, int, int, int, int, int]

# Threads along rows and columns; rows, keys and columns of each; head dims and keys staged.
_MANY = (16, 16, 8, 4, 8, 16, 16)
_NARROW = (16, 16, 8, 4, 4, 16, 16)
_FEW = (8, 16, 2, 4, 8, 16, 16)
_DOUBLE = (16, 16, 4, 4, 4, 8, 8)
_SIMULATED = (2, 4, 2, 2, 2, 4, 4)
_SIMULATED_SPLIT = 16  # keys

OPERANDS = ("q", "k", "v", "out", "lse", "mask", "bias", "slopes", "sinks")


def tile_of(problem: AttentionProblem) -> Tile:
    """Return the shape of the tile: decided by lengths, dims and dtype alone."""
    if problem.dtype == np.float64:
        return _DOUBLE
    if problem.seqlen_q <= SPLIT_QUERIES:
        return _FEW
    return _NARROW if problem.head_dim_v <= 64 else _MANY


def config_of(problem: AttentionProblem, tile: Tile, split: int = SPLIT_KEYS) -> simt.Config:
    """Return what the kernel for a problem is compiled for; `split` is 0 where no split may be."""

    def name(array: Array | None) -> str | None:
        return None if array is None else array.dtype.name

    is_cut = split > 0 and combine.splits_of(problem, split) > 1
    config = simt.Config(
        problem.dtype.name,
        problem.accumulator.name if is_cut else problem.out_dtype.name,
        name(problem.bias),
        name(problem.alibi_slopes),
        name(problem.sinks),
        problem.mask is not None,
        problem.softcap is not None,
        problem.dropout_p > 0.0,
        *tile,
    )
    return config._replace(split=split if is_cut else 0, functions=user.functions_of(problem))


def splits_of(problem: AttentionProblem, config: simt.Config) -> int:
    """Return how many blocks of threads share out the keys of a tile of rows."""
    return combine.splits_of(problem, config.split) if config.split else 1


def kernel_of(config: simt.Config) -> compiler.Kernel:
    """Return the kernel to compile."""
    return compiler.Kernel("simt", simt.make, config, simt.parameters(config), config.threads)


def grid_of(problem: AttentionProblem, config: simt.Config) -> tuple[int, int, int]:
    """Blocks of threads: tiles of rows of all heads and splits, times chunks of value columns."""
    rows = heads_per_item(problem) * problem.seqlen_q
    groups = problem.num_heads // heads_per_item(problem)
    tiles = problem.batch_size * groups * -(-rows // config.block_q)
    return tiles * splits_of(problem, config), -(-problem.head_dim_v // config.block_v), 1


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


def simulate(problem: AttentionProblem, operands: dict[str, Array | None]) -> None:
    """Run the kernel in Numba's simulator, on contiguous arrays in host memory."""
    tools = compiler.toolchain()
    assert isinstance(tools, Simulator)
    config = config_of(problem, _SIMULATED, _SIMULATED_SPLIT)
    splits, spans = splits_of(problem, config), spans_of(operands)
    given: dict[str, Array] = {
        name: bits_of(flat_of(array))
        for name, array in operands.items()
        if array is not None and array.size
    }
    given["words"] = word_table(problem, spans, config.block_q, lengths_of(problem))
    given["reals"] = real_table(problem)
    extra: dict[str, Any] = {}
    if config.functions is not None:
        given["kinds"] = user.kind_table(problem.block_mask)
        given["tables"] = user.word_table(config.functions, problem.block_mask)
        tables = user.host_tables(config.functions, problem.accumulator)
        extra = {f"aux_{i}": table for i, table in enumerate(tables)}
    out, lse = given["out"], given["lse"]
    if config.split:
        sizes = combine.scratch_bytes(problem, splits)
        scratch = np.full(sum(sizes), 0xFF, np.uint8).view(problem.accumulator)  # NaN
        given["out"], given["lse"] = np.split(scratch, [sizes[0] // scratch.itemsize])
    arguments = [
        extra[name] if name in extra else given.get(name, np.zeros(1, compiler.ELEMENT[kind[1:-1]]))
        for name, kind in zip(simt.names(config), simt.parameters(config), strict=True)
    ]
    with _one_at_a_time, tools.awake():
        kernel = tools.cuda.jit(tools.quiet(simt.make(tools, config)))
        kernel[grid_of(problem, config), (config.columns, config.rows)](*arguments)
        if config.split:
            parts = given["out"], given["lse"]
            combine.simulate(tools, problem, spans["out"], parts, out, lse)


def flat_of(array: Array) -> Array:
    """View an array in C order as the elements it holds, broadcast axes once."""
    pairs = zip(array.shape, array.strides, strict=True)
    stored = math.prod(n for n, stride in pairs if stride)
    return np.lib.stride_tricks.as_strided(array, (stored if array.size else 0,), (array.itemsize,))


class Prepared:
    """A launch on one GPU, for any number of calls that differ in addresses only."""

    def __init__(self, problem: AttentionProblem, where: driver.Device) -> None:
        self.where = where
        config = config_of(problem, tile_of(problem), SPLIT_KEYS if where.has_pools else 0)
        assert problem.out is not None
        operands = operands_of(problem, problem.out, problem.out)
        spans = spans_of(operands)
        lengths = lengths_of(problem)
        self._problem = problem
        self._table = word_table(problem, spans, config.block_q, lengths)
        self._words = driver.upload(where, self._table)
        self._reals = driver.upload(where, real_table(problem))
        self._combine: combine.Prepared | None = None
        real = problem.accumulator.itemsize
        known = {
            "lse": Argument("lse", 0, math.prod(problem.lse_shape), real),
            "words": Argument("words", 0, HEADER + ITEM_SIZE * problem.batch_size),
            "reals": Argument("reals", 0, len(REALS), real),
        }
        for name, span in spans.items():
            array = operands[name]
            assert array is not None
            known[name] = Argument(name, span.low, span.length, array.itemsize)
        if config.split:
            splits = splits_of(problem, config)
            self._combine = combine.Prepared(problem, spans["out"], splits, where)
            for name, size in zip(("out", "lse"), self._combine.sizes, strict=True):
                known[name] = Argument(name, 0, size // real, real)
        self._functions: user.Operands | None = None
        if config.functions is not None:
            self._functions = user.Operands(config.functions, problem.block_mask, where)
            known |= {one.name: one for one in self._functions.arguments}
        arguments = [known.get(name, Argument(name)) for name in simt.names(config)]
        grid, block = grid_of(problem, config), (config.columns, config.rows)
        self._launch = Launch(kernel_of(config), where, grid, block, arguments)

    def tables(self, lengths: Lengths) -> dict[str, Array]:
        """Return what `run` is to be given in host memory for a call with other lengths."""
        return {"words": enter_lengths(self._table.copy(), self._problem, lengths)}

    def run(
        self, addresses: dict[str, int], stream: int, in_host: dict[str, Array] | None = None
    ) -> None:
        """Start the kernel on arrays at these addresses; its context is current.

        Arrays `in_host` memory, dense in C order, are copied first: they may be written again as
        soon as this returns.
        """
        with contextlib.ExitStack() as stack:
            known = {**addresses, "words": self._words.address, "reals": self._reals.address}
            known |= stack.enter_context(driver.all_copied(self.where, in_host or {}, stream))
            if self._functions is not None:
                known |= self._functions.addresses(known)
            if self._combine is None:
                self._launch.run(known, stream)
                return
            sizes = self._combine.sizes
            scratch = stack.enter_context(driver.scratch(self.where, sum(sizes), stream))
            self._launch.run({**known, "out": scratch, "lse": scratch + sizes[0]}, stream)
            self._combine.run(scratch, addresses, stream)
