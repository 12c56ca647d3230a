"""Combine partial results over disjoint keys: the second half of split-KV decoding.

Where queries are few, blocks of threads share out the keys: split ``s`` of a row holds the keys
``s * SPLIT_KEYS <= j < (s + 1) * SPLIT_KEYS`` (Flash-Decoding, Dao et al. 2023). Each leaves the
mean of its values and the logarithm of its sum, and this kernel weighs them together as
`fusedattn.merge` does. The size of a split is fixed and so is the order of the sums, so the bits of
a row depend on nothing but the row; one split that sees keys keeps its own bits.

Partial results lie in scratch memory, in the accumulator's type and in C order: outputs
``(splits, batch, num_heads, seqlen_q, head_dim_v)``, each over its own sum, then lse ``(splits,
batch, num_heads, seqlen_q)`` in natural log, -inf where a row sees no key of the split. The output
of such a one is not looked at.
"""

# "not a == b" is true of NaN with every compiler; "a != b" is not.
# ruff: noqa: SIM201
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import compiler, driver
from fusedattn.cuda.elements import make_storer
from fusedattn.cuda.launch import Argument, Launch
from fusedattn.cuda.params import SPLIT_KEYS, SPLIT_QUERIES, Span, item_offsets
from fusedattn.problem import AttentionProblem

Array = NDArray[Any]

PARAMETERS = ("partial", "partial_lse", "out", "lse", "words")
_SLOTS = (
    "splits", "num_heads", "seqlen_q", "head_dim_v", "return_lse",
    "out_head", "out_row", "out_last",
)  # fmt: skip
_HEADER = len(_SLOTS)  # where the output of each batch item begins follows

# Threads along the value columns, at most; threads that share the splits of a row.
_ON_GPU = (128, 4)
_SIMULATED = (4, 2)


class Config(NamedTuple):
    """What is fixed when the kernel is compiled."""

    real: str  # the accumulator's type
    out_storage: str
    columns: int
    groups: int


def make(tools: Any, config: Config) -> Any:
    """Return the kernel, a Python function for one toolchain."""
    cuda, types = tools.cuda, tools.types
    real = types.float64 if config.real == "float64" else types.float32
    int64 = types.int64
    store = make_storer(tools, config.out_storage)
    exp, log = math.exp, math.log
    NO_KEY = -math.inf
    NOTHING = -0.0  # what keeps every number, -0.0 too, when it is added to it
    COLUMNS, GROUPS = config.columns, config.groups
    HEADER = _HEADER
    SPLITS, NUM_HEADS, SEQLEN_Q, HEAD_DIM_V, RETURN_LSE, HEAD, ROW, LAST = range(_HEADER)

    def kernel(partial, partial_lse, out, lse, words):
        row_parts = cuda.shared.array(GROUPS, real)  # of the row, one for each group of threads
        column_parts = cuda.shared.array(GROUPS * COLUMNS, real)
        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        row, rows = int64(cuda.blockIdx.x), int64(cuda.gridDim.x)
        column = int64(cuda.blockIdx.y) * COLUMNS + tx
        splits, head_dim_v = words[SPLITS], words[HEAD_DIM_V]
        # Threads past the last column work on the last one, and store nothing.
        held = min(column, head_dim_v - 1)

        largest = real(NO_KEY)
        split = ty
        while split < splits:
            x = partial_lse[split * rows + row]
            if x > largest or not x == x:  # keeps NaN
                largest = x
            split += GROUPS
        if tx == 0:
            row_parts[ty] = largest
        cuda.syncthreads()
        for group in range(GROUPS):
            x = row_parts[group]
            if x > largest or not x == x:
                largest = x
        cuda.syncthreads()
        # A row without any key has nothing to shift by; -inf - -inf would be NaN.
        shift = largest
        if largest == real(NO_KEY):
            shift = real(0)

        row_sum, acc = real(0), real(NOTHING)
        split = ty
        while split < splits:
            part = split * rows + row
            x, value = partial_lse[part], partial[part * head_dim_v + held]
            if x == real(NO_KEY):  # a weight of 0, and no branch: loads do not wait for each other
                value = real(NOTHING)
            weight = real(exp(x - shift))
            row_sum += weight
            acc += weight * value
            split += GROUPS
        if tx == 0:
            row_parts[ty] = row_sum
        column_parts[ty * COLUMNS + tx] = acc
        cuda.syncthreads()

        if ty == 0:
            total, acc = real(0), real(NOTHING)
            for group in range(GROUPS):
                total += row_parts[group]
                acc += column_parts[group * COLUMNS + tx]
            if largest == real(NO_KEY):
                acc, total = real(0), real(1)
            if column < head_dim_v:
                head = row // words[SEQLEN_Q]
                place = words[HEADER + head // words[NUM_HEADS]]
                place += head % words[NUM_HEADS] * words[HEAD] + row % words[SEQLEN_Q] * words[ROW]
                store(out, place + column * words[LAST], acc / total)
                if words[RETURN_LSE] != 0 and column == 0:
                    if not total == real(1):  # one split keeps its bits
                        largest += real(log(total))
                    lse[row] = largest

    return kernel


def splits_of(problem: AttentionProblem, keys: int = SPLIT_KEYS) -> int:
    """Return into how many splits of so many keys a problem is cut.

    Whether it is cut at all depends on the number of queries alone; to leave a single split as it
    is moves no bit.
    """
    few = problem.seqlen_q <= SPLIT_QUERIES
    return max(1, -(-problem.seqlen_k // keys)) if few else 1


def partial_shape(problem: AttentionProblem, splits: int) -> tuple[int, ...]:
    """Return the shape of the partial outputs."""
    shape = problem.batch_size, problem.num_heads, problem.seqlen_q, problem.head_dim_v
    return (splits, *shape)


def scratch_bytes(problem: AttentionProblem, splits: int) -> tuple[int, int]:
    """Return the sizes of the partial outputs, and of the lse behind them."""
    *rows, dim = partial_shape(problem, splits)
    size = math.prod(rows) * problem.accumulator.itemsize
    return size * dim, size


def word_table(problem: AttentionProblem, span: Span, splits: int) -> NDArray[np.int64]:
    """Lower a problem, whose output has this span, to the table of integers."""
    header = {
        "splits": splits,
        "num_heads": problem.num_heads,
        "seqlen_q": problem.seqlen_q,
        "head_dim_v": problem.head_dim_v,
        "return_lse": problem.return_lse,
    }
    header |= dict(zip(("out_head", "out_row", "out_last"), span.strides[-3:], strict=True))
    offsets = item_offsets(span, problem.batch_shape, 3)
    return np.array([*(header[name] for name in _SLOTS), *offsets], np.int64)


def config_of(problem: AttentionProblem, shape: tuple[int, int] = _ON_GPU) -> Config:
    """Return what the kernel for a problem is compiled for."""
    columns, groups = shape
    columns = min(columns, -(-problem.head_dim_v // 32) * 32)
    return Config(problem.accumulator.name, problem.out_dtype.name, columns, groups)


def kernel_of(config: Config) -> compiler.Kernel:
    """Return the kernel to compile."""
    names = (config.real, config.real, config.out_storage, config.real, "int64")
    parameters = tuple(f"[{name}]" for name in names)
    return compiler.Kernel("combine", make, config, parameters, config.columns * config.groups)


def _grid(problem: AttentionProblem, config: Config) -> tuple[int, int, int]:
    rows = problem.batch_size * problem.num_heads * problem.seqlen_q
    return rows, -(-problem.head_dim_v // config.columns), 1


def simulate(
    tools: Any, problem: AttentionProblem, span: Span, parts: tuple[Array, Array], *to: Array
) -> None:
    """Combine flat partial outputs and lse into flat ``out`` and ``lse``, in the simulator."""
    config = config_of(problem, _SIMULATED)
    words = word_table(problem, span, len(parts[1]) // math.prod(problem.lse_shape))
    kernel = tools.cuda.jit(tools.quiet(make(tools, config)))
    kernel[_grid(problem, config), (config.columns, config.groups)](*parts, *to, words)


class Prepared:
    """A launch on one GPU, after that of a kernel which leaves partial results.

    Parameters
    ----------
    problem : AttentionProblem
        With an ``out`` whose strides say where results go.
    span : Span
        Of that ``out``.
    splits : int
        How many partial results there are.
    where : Device
        The GPU.
    """

    def __init__(
        self, problem: AttentionProblem, span: Span, splits: int, where: driver.Device
    ) -> None:
        config = config_of(problem)
        real, rows = problem.accumulator.itemsize, math.prod(problem.lse_shape)
        self.sizes = scratch_bytes(problem, splits)
        table = word_table(problem, span, splits)
        self._words = driver.upload(where, table)
        arguments = (
            Argument("partial", 0, self.sizes[0] // real, real),
            Argument("partial_lse", 0, self.sizes[1] // real, real),
            Argument("out", span.low, span.length, problem.out_dtype.itemsize),
            Argument("lse", 0, rows, real),
            Argument("words", 0, len(table)),
        )
        block = config.columns, config.groups
        self._launch = Launch(kernel_of(config), where, _grid(problem, config), block, arguments)

    def run(self, scratch: int, addresses: dict[str, int], stream: int) -> None:
        """Combine what lies in scratch memory into ``out`` and, where asked for, ``lse``."""
        partial = {"partial": scratch, "partial_lse": scratch + self.sizes[0]}
        known = {**addresses, **partial, "words": self._words.address}
        self._launch.run(known, stream)
