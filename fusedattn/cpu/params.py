"""How a problem reaches a kernel: one vector of int64, whose slots are named here and only here.

Kernels take a single argument, so one compilation serves every shape, stride and option. Floats
lie in their slots by their bits. Addresses of the caller's arrays are those of item 0; what each
batch item adds stands in the ``*_offsets`` tables, so any leading axes with any strides will do.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu.micro import LOG2_E
from fusedattn.cpu.tile import STORAGE_BYTES, Tile
from fusedattn.problem import AttentionProblem

STORAGE_NAME = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
}
STORAGE_CODE = {name: code for code, name in enumerate(STORAGE_BYTES)}


class Slot(IntEnum):
    """Names of the slots."""

    def _generate_next_value_(name, start, count, last_values):  # type: ignore[no-untyped-def,override] # noqa: N805
        return count

    # Work: items are handed out by an atomic counter.
    COUNTER = auto()
    ITEMS = auto()
    PANELS = auto()
    HEADS_PER_ITEM = auto()  # query heads of one KV group that share the lanes of an item
    HEAD_GROUPS = auto()
    ROW_BLOCKS = auto()
    # Shapes.
    NUM_HEADS = auto()
    GROUP_SIZE = auto()
    SEQLEN_Q = auto()
    SEQLEN_K = auto()
    HEAD_DIM = auto()
    HEAD_DIM_V = auto()
    # Operands: address, strides in bytes, offset per batch item.
    Q = auto()
    Q_HEAD = auto()
    Q_ROW = auto()
    Q_DIM = auto()
    Q_OFFSETS = auto()
    K = auto()
    K_HEAD = auto()
    K_ROW = auto()
    K_DIM = auto()
    K_OFFSETS = auto()
    V = auto()
    V_HEAD = auto()
    V_ROW = auto()
    V_DIM = auto()
    V_OFFSETS = auto()
    OUT = auto()
    OUT_HEAD = auto()
    OUT_ROW = auto()
    OUT_DIM = auto()
    OUT_OFFSETS = auto()
    MASK = auto()
    MASK_HEAD = auto()
    MASK_ROW = auto()
    MASK_KEY = auto()
    MASK_OFFSETS = auto()
    BIAS = auto()
    BIAS_HEAD = auto()
    BIAS_ROW = auto()
    BIAS_KEY = auto()
    BIAS_OFFSETS = auto()
    BIAS_CODE = auto()
    LSE = auto()  # accumulator type, contiguous (batch, head, row)
    SLOPES = auto()  # float64, contiguous (batch, head)
    SINKS = auto()  # float64, contiguous (head)
    # One int64 per batch item.
    K_FROM = auto()
    K_TO = auto()
    SEQUSED_Q = auto()
    SEQUSED_K = auto()
    POSITION = auto()
    # Scores.
    NATURAL_UNITS = auto()  # 1: scale first, then passes in natural units; 0: straight to log2
    SCALE = auto()
    TO_LOG2 = auto()
    QUERY_SIGN = auto()
    SOFTCAP = auto()
    EXACT = auto()  # 1: each row takes the exact path
    # Dropout.
    DROPOUT = auto()
    THRESHOLD = auto()
    SEED = auto()
    KEEP_SCALE = auto()
    # Copies of key and value blocks as reals.
    STAGE_K = auto()
    STAGE_V = auto()
    # Places in a thread's working memory, in bytes from its start.
    AT_QUERIES = auto()
    AT_OUTPUT = auto()
    AT_SCORES = auto()
    AT_BIAS = auto()
    AT_MASK = auto()
    AT_KEYS = auto()
    AT_VALUES = auto()
    AT_SEEN_VALUES = auto()
    AT_SEEN = auto()
    AT_MAX = auto()
    AT_SUM = auto()
    AT_ALPHA = auto()
    AT_FACTOR = auto()
    AT_CHECK = auto()
    AT_Q_ROWS = auto()
    AT_OUT_ROWS = auto()
    AT_MASK_ROWS = auto()
    AT_BIAS_ROWS = auto()
    AT_LOW = auto()
    AT_HIGH = auto()
    AT_POSITION = auto()
    AT_ROW = auto()
    AT_HEAD = auto()
    AT_SLOPE = auto()
    AT_BOUNDS = auto()
    AT_BAD = auto()
    AT_EXACT = auto()
    KEYS_STRIDE = auto()
    VALUES_STRIDE = auto()
    SCRATCH_BYTES = auto()


class Lowered(NamedTuple):
    """The vector, and the arrays whose addresses it holds."""

    vector: NDArray[np.int64]
    keep_alive: list[NDArray[np.generic]]

    @property
    def address(self) -> int:
        """Address of slot 0."""
        return self.vector.ctypes.data

    def __getitem__(self, slot: Slot) -> int:  # type: ignore[override]
        return int(self.vector[slot])


def lower(problem: AttentionProblem, tile: Tile, out: NDArray, lse: NDArray | None) -> Lowered:
    """Write a problem into a parameter vector for the kernels of ``tile``."""
    vector = np.zeros(len(Slot), np.int64)
    reals = vector.view(np.float64)
    keep: list[NDArray] = []

    def table(values: NDArray) -> int:
        keep.append(values)
        return values.ctypes.data

    def operand(first: Slot, array: NDArray) -> None:
        """Address, three strides and the batch table, in five slots from ``first``."""
        vector[first] = array.ctypes.data
        vector[first + 1 : first + 4] = array.strides[-3:]
        vector[first + 4] = table(_batch_offsets(array))
        keep.append(array)

    for slot, array in ((Slot.Q, problem.q), (Slot.K, problem.k), (Slot.V, problem.v)):
        operand(slot, array)
    operand(Slot.OUT, out)
    if problem.mask is not None:
        operand(Slot.MASK, problem.mask)
    if problem.bias is not None:
        operand(Slot.BIAS, problem.bias)
        vector[Slot.BIAS_CODE] = STORAGE_CODE[STORAGE_NAME[problem.bias.dtype]]
    if lse is not None:
        vector[Slot.LSE] = table(lse)
    # Slopes and sinks count in the accumulator type, whatever they are stored in.
    if problem.alibi_slopes is not None:
        slopes = problem.alibi_slopes.astype(problem.accumulator).astype(np.float64, order="C")
        vector[Slot.SLOPES] = table(slopes)
    if problem.sinks is not None:
        sinks = problem.sinks.astype(problem.accumulator).astype(np.float64, order="C")
        vector[Slot.SINKS] = table(sinks)
    k_from, k_to = problem.key_bounds
    vector[Slot.K_FROM], vector[Slot.K_TO] = table(k_from), table(k_to)
    vector[Slot.SEQUSED_Q] = table(problem.seqused_q)
    vector[Slot.SEQUSED_K] = table(problem.seqused_k)
    vector[Slot.POSITION] = table(problem.q_offset)

    vector[Slot.NUM_HEADS], vector[Slot.GROUP_SIZE] = problem.num_heads, problem.group_size
    vector[Slot.SEQLEN_Q], vector[Slot.SEQLEN_K] = problem.seqlen_q, problem.seqlen_k
    vector[Slot.HEAD_DIM], vector[Slot.HEAD_DIM_V] = problem.head_dim, problem.head_dim_v
    _lower_scores(problem, vector, reals)
    _lower_work(problem, tile, vector, table)
    _lower_scratch(problem, tile, vector)
    return Lowered(vector, keep)


def _batch_offsets(array: NDArray) -> NDArray[np.int64]:
    """Bytes from the first batch item to each other one, flat in C order."""
    offsets = np.zeros(1, np.int64)
    for length, stride in zip(array.shape[:-3], array.strides[:-3], strict=True):
        steps = np.arange(length, dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps).ravel()
    return offsets


def _lower_scores(problem: AttentionProblem, vector: NDArray, reals: NDArray) -> None:
    """Units of the scores, softcap and dropout."""
    natural = (
        problem.softcap is not None or problem.bias is not None or problem.alibi_slopes is not None
    )
    scale = problem.scale
    # A factor near the ends of the type's range would lose bits or overflow on its own; nobody
    # means it, but it has an exact answer.
    exponent = 100 if problem.accumulator == np.float32 else 900
    vector[Slot.EXACT] = scale != 0.0 and not 2.0**-exponent < abs(scale) < 2.0**exponent
    vector[Slot.NATURAL_UNITS] = natural
    reals[Slot.SCALE] = scale
    if natural:
        reals[Slot.TO_LOG2], reals[Slot.QUERY_SIGN] = LOG2_E, 1.0
    else:  # the softmax pass wants a positive factor: the sign, or a zero, goes into the queries
        reals[Slot.TO_LOG2] = abs(scale) * LOG2_E if scale else 1.0
        reals[Slot.QUERY_SIGN] = np.sign(scale)
    reals[Slot.SOFTCAP] = problem.softcap or 0.0
    if problem.dropout_p > 0.0:
        vector[Slot.DROPOUT] = 1
        vector[Slot.THRESHOLD] = int(problem.dropout_p * 2.0**32)
        vector[Slot.SEED] = np.uint64(problem.seed).view(np.int64)
    reals[Slot.KEEP_SCALE] = 1.0 / (1.0 - problem.dropout_p)


def _lower_work(problem: AttentionProblem, tile: Tile, vector: NDArray, table) -> None:  # type: ignore[no-untyped-def]
    """Cut the output into items: (batch, group of heads, block of rows)."""
    panels = tile.panels(problem.head_dim, problem.head_dim_v)
    block = panels * tile.lanes
    # The heads of a KV group read the same keys. Where one head cannot fill an item's lanes, the
    # whole group lies across them.
    heads = problem.group_size if problem.seqlen_q * 2 <= block else 1
    groups = problem.num_heads // heads
    row_blocks = -(-heads * problem.seqlen_q // block)
    vector[Slot.PANELS], vector[Slot.HEADS_PER_ITEM] = panels, heads
    vector[Slot.HEAD_GROUPS], vector[Slot.ROW_BLOCKS] = groups, row_blocks
    vector[Slot.ITEMS] = problem.batch_size * groups * row_blocks
    vector[Slot.COUNTER] = table(np.zeros(8, np.int64))
    dense_k = problem.k.strides[-1] == tile.real_bytes and problem.k.itemsize == tile.real_bytes
    dense_v = problem.v.strides[-1] == tile.real_bytes and problem.v.itemsize == tile.real_bytes
    vector[Slot.STAGE_K], vector[Slot.STAGE_V] = not dense_k, not dense_v


def _lower_scratch(problem: AttentionProblem, tile: Tile, vector: NDArray) -> None:
    """Lay out the working memory of one thread."""
    size, lanes, keys = tile.real_bytes, tile.lanes, tile.block_k
    all_lanes = int(vector[Slot.PANELS]) * lanes
    # An odd number of cache lines per row keeps the rows of a block out of each other's sets.
    k_stride = (-(-problem.head_dim * size // 64) | 1) * 64
    v_stride = (-(-problem.head_dim_v * size // 64) | 1) * 64
    vector[Slot.KEYS_STRIDE], vector[Slot.VALUES_STRIDE] = k_stride, v_stride
    layout = {
        Slot.AT_QUERIES: all_lanes * problem.head_dim * size,
        Slot.AT_OUTPUT: all_lanes * problem.head_dim_v * size,
        Slot.AT_SCORES: keys * lanes * size,
        Slot.AT_BIAS: keys * lanes * size,
        Slot.AT_MASK: keys * lanes,
        Slot.AT_KEYS: keys * k_stride,
        Slot.AT_VALUES: keys * v_stride,
        Slot.AT_SEEN_VALUES: keys * v_stride,
        Slot.AT_SEEN: 3 * keys,
        Slot.AT_MAX: all_lanes * size,
        Slot.AT_SUM: all_lanes * size,
        Slot.AT_ALPHA: lanes * size,
        Slot.AT_FACTOR: all_lanes * size,
        Slot.AT_CHECK: all_lanes * size,
        Slot.AT_Q_ROWS: all_lanes * 8,
        Slot.AT_OUT_ROWS: all_lanes * 8,
        Slot.AT_MASK_ROWS: all_lanes * 8,
        Slot.AT_BIAS_ROWS: all_lanes * 8,
        Slot.AT_LOW: all_lanes * 4,
        Slot.AT_HIGH: all_lanes * 4,
        Slot.AT_POSITION: all_lanes * 4,
        Slot.AT_ROW: all_lanes * 4,
        Slot.AT_HEAD: all_lanes * 4,
        Slot.AT_SLOPE: all_lanes * size,
        Slot.AT_BOUNDS: 4 * 8 * int(vector[Slot.PANELS]),
        Slot.AT_BAD: all_lanes * 8,
        Slot.AT_EXACT: problem.head_dim_v * 4 * 8,
    }
    at = 0
    for slot, length in layout.items():
        vector[slot] = at
        at += -(-length // 64) * 64
    vector[Slot.SCRATCH_BYTES] = at
