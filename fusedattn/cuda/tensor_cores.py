"""The Hopper kernel's tile shapes, the problems it takes, and its launches."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import (
    combine,
    compiler,
    driver,
    hopper,
    hopper_blocks,
    hopper_operands,
    hopper_tiles,
    launch,
    user,
)
from fusedattn.cuda.params import SPLIT_KEYS, SPLIT_QUERIES, lengths_of, span_of, unit_heads
from fusedattn.cuda.schedule import schedule
from fusedattn.masks import MAX_SEQLEN, relative_bounds
from fusedattn.problem import AttentionProblem, Lengths, batch_offsets

Array = NDArray[Any]


# Up to so many keys, sequences are short.
_SHORT = 1024
# Maps of operands that are remembered, of 384 bytes each.
_MAPS = 1024


def dims_of(problem: AttentionProblem) -> tuple[int, int] | None:
    """Head dims of the smallest kernel that holds the problem's."""
    for dims, dims_v in hopper_tiles.PLAIN_TILES:
        if problem.head_dim <= dims and problem.head_dim_v <= dims_v:
            return dims, dims_v
    return None


def config_of(problem: AttentionProblem) -> hopper.Config:
    """Return what the kernel for a problem is compiled for."""
    dims = dims_of(problem)
    assert dims is not None, "looked at before"
    storage, out_storage = problem.dtype.name, problem.out_dtype.name
    features = hopper_operands.features_of(problem)
    if problem.seqlen_q > SPLIT_QUERIES:
        cut = problem.causal or problem.window_size != (None, None)
        tile = hopper_tiles.tile_for(dims, features, short=cut and problem.seqlen_k <= _SHORT)
        packed, split_keys = unit_heads(problem, 64 * tile.warpgroups) > 1, 0
    else:
        tile, packed, split_keys = hopper_tiles.FEW_TILES[dims], True, SPLIT_KEYS
        if problem.seqlen_k > SPLIT_KEYS:
            out_storage = "float32"
    return hopper.Config(
        storage,
        out_storage,
        *dims,
        **tile._asdict(),
        packed=packed,
        split_keys=split_keys,
        features=features,
        vectors=out_storage != "float32" and _has_vectors(problem.out),
    )


def _has_vectors(out: Array | None) -> bool:
    """Whether rows of out lie at multiples of 16 bytes; new ones do."""
    return out is None or not any(step % 16 for step in (address_of(out), *out.strides[:-1]))


def kernel_of(config: hopper.Config) -> compiler.Kernel:
    """Return the kernel to compile."""
    parameters = hopper.parameters(config)
    return compiler.Kernel("hopper", hopper.make, config, parameters, config.threads)


def unsupported(problem: AttentionProblem) -> list[str]:
    """Reasons why the kernel does not take a problem, given the GPU; the portable one does."""
    reasons = []
    if problem.dtype.itemsize != 2:
        reasons.append(f"{problem.dtype} is no half type")
    if not 2.0**-100 < problem.scale < 2.0**100:
        reasons.append("scale is not positive, or far from 1")
    if dims_of(problem) is None:
        reasons.append("head dims beyond 256")
    if problem.head_dim % 8 or problem.head_dim_v % 8:
        reasons.append("head dims are no multiples of 8")
    if problem.seqlen_k == 0:
        reasons.append("there are no keys")
    for name in ("q", "k", "v"):
        if layout_of(getattr(problem, name)) is None:
            reasons.append(f"the strides or the address of {name} do not suit TMA")
    if problem.out is not None and (
        problem.out.strides[-1] != problem.out.itemsize
        or any(stride % (2 * problem.out.itemsize) for stride in problem.out.strides[:-1])
        or address_of(problem.out) % 8
    ):
        reasons.append("rows of out are not dense, or not aligned")
    return reasons + hopper_operands.unsupported(problem)


def address_of(array: Array) -> int:
    """Return the address of the first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def layout_of(array: Array) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return sizes and strides ``(dim, row, head, batch)`` for TMA, or None if it cannot do it."""
    *leading, heads, rows, dim = array.shape
    *steps, head, row, last = array.strides
    if (last != array.itemsize and dim > 1) or address_of(array) % 16:
        return None
    batch, size = 0, 1
    for n, step in zip(reversed(leading), reversed(steps), strict=True):
        if n == 1:
            continue
        if size > 1 and step != batch * size:
            return None
        batch, size = (step if size == 1 else batch), size * n
    # The stride of an axis of length 1 is never used, but has to look well.
    strides = []
    for n, step in ((rows, row), (heads, head), (size, batch)):
        step = 16 * dim if n == 1 else step
        if step <= 0 or step % 16 or step >= 2**40:
            return None
        strides.append(step)
    return (dim, rows, heads, size), tuple(strides)


class Box(NamedTuple):
    """What a tensor map says of an operand: where its elements lie, and what a tile loads."""

    sizes: tuple[int, ...]  # dim, row, head, batch
    strides: tuple[int, ...]  # bytes of all but the first
    rows: int
    heads: int


def boxes_of(problem: AttentionProblem, config: hopper.Config) -> tuple[Box, Box, Box]:
    """Return how q, k and v are loaded."""
    rows, heads = config.block_q, 1
    if config.packed:
        rows, heads = problem.seqlen_q, unit_heads(problem, config.block_q)
    loaded = ((rows, heads), (config.block_k, 1), (config.block_k, 1))
    boxes = []
    for name, tile in zip(("q", "k", "v"), loaded, strict=True):
        layout = layout_of(getattr(problem, name))
        assert layout is not None, "looked at before"
        boxes.append(Box(*layout, *tile))
    return boxes[0], boxes[1], boxes[2]


def encode(address: int, box: Box, dtype: str) -> bytes:
    """Return the map of an operand at an address."""
    api = driver.api()
    kinds = api.CUtensorMapDataType
    integers = api.cuuint64_t, api.cuuint32_t
    result = driver.check(
        api.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
            if dtype == "bfloat16"
            else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            4,
            address,
            [integers[0](n) for n in box.sizes],
            [integers[0](n) for n in box.strides],
            [integers[1](n) for n in (hopper.PANEL, box.rows, box.heads, 1)],
            [integers[1](1)] * 4,
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            api.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(result.getPtr(), 128)


class Launch(NamedTuple):
    """What a launch is given besides addresses."""

    config: hopper.Config
    order: Array  # see `schedule`, and `hopper_blocks.order_with`
    grid: int  # blocks of threads
    splits: int
    out_item: int  # bytes of a batch item of a partial result
    numbers: tuple[int | float, ...]
    operands: tuple[int | float, ...]  # numbers that features ask for

    def arguments(
        self, maps: int, addresses: Mapping[str, int], tables: tuple[int, int, int]
    ) -> tuple[int | float, ...]:
        """Return the kernel's arguments, given where all that it is given lies; no lse: 0.

        The tables are those of items, of the order and of places.
        """
        items, order, places = tables
        changing = self.changing(maps, addresses, items)
        operands = self.operand_addresses(addresses)
        return (*changing, order, *self.numbers, *operands, places, *self.operands)

    def changing(self, maps: int, addresses: Mapping[str, int], items: int) -> tuple[int, ...]:
        """Return the first arguments, which change from call to call."""
        out, lse = addresses["out"], addresses.get("lse", 0)
        return maps, maps + 128, maps + 256, out, lse, items

    @property
    def operands_at(self) -> int:
        """Where the arguments that are addresses of operands begin."""
        return 7 + len(self.numbers)

    def operand_addresses(self, addresses: Mapping[str, int]) -> tuple[int, ...]:
        """Return those arguments."""
        return tuple(addresses.get(name, 0) for name in hopper_operands.OPERANDS)


def launch_of(problem: AttentionProblem, config: hopper.Config, multiprocessors: int) -> Launch:
    """Return how a problem is shared out."""
    tile = config.block_q, config.block_k
    packed, split_keys = config.packed, config.split_keys
    together = unit_heads(problem, config.block_q) if packed else 1
    walks = None
    if problem.block_mask is not None:
        walks = hopper_blocks.walks_of(problem.block_mask, tile, together, packed=packed)
    order = schedule(
        problem, tile, multiprocessors, packed=packed, split_keys=split_keys,
        kept=None if walks is None else hopper_blocks.is_kept(walks),
    )  # fmt: skip
    splits = -(-problem.seqlen_k // config.split_keys) if config.split_keys else 1
    if splits > 1:  # partial results, one split after the other
        row = problem.head_dim_v * 4
        head = row * problem.seqlen_q
    else:
        assert problem.out is not None
        *_, head, row, _ = problem.out.strides
    numbers = (
        *(head, row, problem.batch_size * problem.num_heads * problem.seqlen_q),
        *(problem.num_heads, problem.group_size, problem.seqlen_q, problem.head_dim_v, together),
        *(
            order.shape[0] * order.shape[1],
            hopper_operands.exponent_factor(problem, config.features),
        ),
    )
    operands = hopper_operands.numbers_of(problem)
    grid = order.shape[1]
    if walks is not None:
        order = hopper_blocks.order_with(order, walks, together, config.block_q)
    return Launch(config, order, grid, splits, problem.num_heads * head, numbers, operands)


class Prepared(launch.Prepared):
    """A launch on one GPU, for any number of calls that differ in addresses only."""

    def __init__(self, problem: AttentionProblem, where: driver.Device) -> None:
        self._launch = launch_of(problem, config_of(problem), where.multiprocessors)
        self._problem = problem
        config, order = self._launch.config, self._launch.order
        table, kernel = item_table(problem, self._launch), kernel_of(config)
        super().__init__(kernel, where, config.shared, self._launch.grid, table, order)
        self._boxes = boxes_of(problem, config)
        self._dtype = problem.dtype.name
        self._places = driver.upload(where, hopper_operands.place_table(problem))
        operands = hopper_operands.operands_of(problem).values()
        self._has_operands = any(array is not None for array in operands)
        self._functions: user.Operands | None = None
        if config.features.functions is not None:
            self._functions = user.Operands(config.features.functions, problem.block_mask, where)
        self._combine = None
        if self._launch.splits > 1:
            span = span_of(problem.out) if problem.out is not None else None
            assert span is not None, "looked at before"
            self._combine = combine.Prepared(problem, span, self._launch.splits, where)
        self._maps: dict[tuple[int, int, int], driver.Memory] = {}

    def _enter_lengths(self, table: Array, lengths: Lengths) -> None:
        _enter(table, self._problem, lengths)

    def _make_words(self) -> driver.Words:
        tables = (self._items.address, self._order.address, self._places.address)
        values = self._launch.arguments(0, {"out": 0}, tables)
        others: tuple[int, ...] = ()
        if self._functions is not None:
            others = launch.slots_of(self._functions.arguments, self._functions.addresses({}))
        return driver.Words(hopper.FORMATS + "q" * len(others), (*values, *others))

    def _run(self, addresses: dict[str, int], stream: int) -> None:
        key = addresses["q"], addresses["k"], addresses["v"]
        maps = self._maps.get(key) or self._make_maps(key)
        if self._combine is None:
            self._start(maps, addresses, stream)
            return
        outputs, lse = self._combine.sizes
        with driver.scratch(self.where, outputs + lse, stream) as scratch:
            parts = {**addresses, "out": scratch, "lse": scratch + outputs}
            self._start(maps, parts, stream)
            self._combine.run(scratch, addresses, stream)

    def _start(self, maps: driver.Memory, addresses: Mapping[str, int], stream: int) -> None:
        words, functions = self._words(), self._functions
        items = addresses.get("items", self._items.address)
        words.enter(0, self._launch.changing(maps.address, addresses, items))
        if self._has_operands:
            words.enter(self._launch.operands_at, self._launch.operand_addresses(addresses))
        if functions is not None and functions.changes:
            given = functions.addresses(dict(addresses))
            words.enter(len(hopper.FORMATS), launch.slots_of(functions.arguments, given))
        self._launch_with(words, stream)

    def _make_maps(self, key: tuple[int, int, int]) -> driver.Memory:
        code = b"".join(
            encode(address, box, self._dtype) for address, box in zip(key, self._boxes, strict=True)
        )
        maps = driver.upload(self.where, np.frombuffer(code, np.uint8))
        while len(self._maps) >= _MAPS:
            del self._maps[next(iter(self._maps))]
        self._maps[key] = maps
        return maps


def item_table(problem: AttentionProblem, launch: Launch) -> Array:
    """What the kernel looks up for each item of the batch; see `hopper.ITEM_BYTES`."""
    if launch.splits > 1:
        offsets = np.arange(problem.batch_size, dtype=np.int64) * launch.out_item
    else:
        assert problem.out is not None
        offsets = batch_offsets(problem.batch_shape, problem.out.strides)
    table = np.zeros((problem.batch_size, hopper.ITEM_BYTES), np.uint8)
    _enter(table, problem, lengths_of(problem))
    table[:, 16:24] = offsets[:, None].view(np.uint8)
    return table


def _enter(table: Array, problem: AttentionProblem, lengths: Lengths) -> None:
    """Enter what depends on the lengths of a call."""
    table[:, :16] = bounds_of(problem, lengths).view(np.uint8)
    table[:, 24:28] = np.asarray(lengths.q_offset, np.int32)[:, None].view(np.uint8)


def bounds_of(problem: AttentionProblem, lengths: Lengths) -> NDArray[np.int32]:
    """Return ``(k_from, k_to, seqused_q, seqused_k)`` of each item of the batch."""
    k_from, k_to = relative_bounds(problem.causal, problem.window_size, 0)
    # A bound past every position is none; the kernel reads int32.
    bounds = np.stack(
        [
            np.clip(lengths.q_offset + k_from, -MAX_SEQLEN, MAX_SEQLEN),
            np.clip(lengths.q_offset + k_to, -MAX_SEQLEN, MAX_SEQLEN),
            lengths.seqused_q,
            lengths.seqused_k,
        ],
        axis=-1,
    )
    return bounds.astype(np.int32)
