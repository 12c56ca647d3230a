"""The shape of a register tile: how many lanes, vectors and rows a kernel uses on this machine.

Lanes hold queries. A *panel* is `vectors * width` query rows; the micro-kernels multiply it by
`rows` keys (or value columns) at a time, so `rows * vectors` accumulators stay in registers. The
numbers depend on the instruction set, the element type, the head dims and, where query rows are few
(`FEW_ROWS`, `Isa.vector_rows`), on how many there are: neither threads nor other lengths nor
neighbours in the batch may move a bit of a result.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from fusedattn.cpu.host import host_features
from fusedattn.cpu.permission import may_use_tiles
from fusedattn.undisturbed import undisturbed

# Element types as they lie in memory, by NumPy's (and ml_dtypes') names, with their size in bytes.
STORAGE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# And the codes that stand for them in a record.
STORAGE_CODE = {name: code for code, name in enumerate(STORAGE_BYTES)}

# Bytes of packed queries and output accumulators that one work item may keep live: they are read
# once per key block and have to stay in a core's own cache.
ITEM_BYTES = 192 * 1024


# Up to so many query rows per head (whatever the number of heads: one head must not change the bits
# of another) the lanes lie along the head dim. Groups of rows then share each load of a key or
# value, and so many rows of a KV group make an item.
FEW_ROWS = 4
ROWS_TOGETHER = 4
ROWS_PER_ITEM = 16

BLOCK_K = 96
# The matrix unit adds the products of so many keys together: its tiles of scores begin at multiples
# of that, so that no other row decides which.
MATRIX_KEYS = 32
# Its larger blocks spare joining sums and outputs: 2 to 5 % of the time.
MATRIX_BLOCK_K = 128
# Keys per chunk of few rows: whole blocks, and enough work (0.1 ms and more at a head dim of 64) to
# be worth another thread.
CHUNK_KEYS = 21 * BLOCK_K


@dataclass(frozen=True, slots=True)
class Isa:
    """The vector unit of one machine: name, register width and the number of registers."""

    name: str
    vector_bytes: int
    registers: int
    matrix: bool = False  # with a matrix unit for bfloat16
    # Up to so many query rows per head do not earn back what it takes to copy keys and values of
    # float32 in three parts; whatever the number of heads, as with FEW_ROWS.
    vector_rows: int = 16


AVX512 = Isa("AVX-512", 64, 32)
AVX2 = Isa("AVX2", 32, 16)
AMX = Isa("AVX-512", 64, 32, matrix=True)
SIMD128 = Isa("128-bit SIMD", 16, 32)


@functools.cache
def host_isa() -> Isa:
    """Return the vector unit that is compiled for."""
    enabled = {word[1:] for word in undisturbed(host_features).split(",") if word.startswith("+")}
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= enabled:
        return AMX if {"amx-tile", "amx-bf16"} <= enabled and may_use_tiles() else AVX512
    if {"avx2", "fma", "f16c"} <= enabled:
        return AVX2
    return SIMD128


def takes_matrix(storage: str, seqlen_q: int) -> bool:
    """Whether products of so many query rows per head are the matrix unit's, if there is one."""
    return storage != "float32" or seqlen_q > host_isa().vector_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Everything that fixes the code of one kernel, and so the key under which it is cached."""

    storage: str  # element type of q, k and v in memory
    out_storage: str  # element type of out in memory
    width: int  # lanes per vector register
    vectors: int  # vectors per panel row
    rows: int  # keys, or value columns, per register tile
    block_k: int  # keys per tile of scores
    matrix: bool = False  # products of panels by the matrix unit

    @property
    def bits(self) -> int:
        """Bits of the accumulator type."""
        return 64 if self.storage == "float64" else 32

    @property
    def real_bytes(self) -> int:
        """Bytes of the accumulator type."""
        return self.bits // 8

    @property
    def parts(self) -> int:
        """How many parts of 8 digits each element has for the matrix unit."""
        return {"float32": 3, "float16": 2}.get(self.storage, 1)

    @property
    def lanes(self) -> int:
        """Query rows per panel."""
        return self.width * self.vectors

    @property
    def product_rows(self) -> tuple[int, ...]:
        """Keys per register tile of a product over queries, for tiles of 1, 2, ... vectors.

        There the lanes lie along the head dim, so the tiles do not depend on the panel.
        """
        return {64: (8, 8, 8, 6), 32: (6, 6), 16: (6, 6, 6)}[self.width * self.real_bytes]

    def takes_few(self, seqlen_q: int, head_dim: int, head_dim_v: int) -> bool:
        """Whether the products for few rows serve: lanes along the head dim, memory in order."""
        whole_vectors = min(head_dim, head_dim_v) >= self.width >= ROWS_TOGETHER
        return whole_vectors and seqlen_q <= FEW_ROWS

    def panels(self, head_dim: int, head_dim_v: int) -> int:
        """Return the largest number of panels that one work item should have."""
        query_bytes, most, room = self.real_bytes, 4, ITEM_BYTES
        if self.matrix:  # what is copied of keys and values serves many panels
            query_bytes, most, room = 2 * self.parts, 16, 2 * ITEM_BYTES
        panel = self.lanes * (head_dim * query_bytes + head_dim_v * self.real_bytes)
        return max(1, min(most, room // panel))


# Speed of a panel of so many vectors, relative to three: it shares each broadcast among fewer FMAs,
# and has fewer of them in flight.
_SPEED = {1: 0.6, 2: 0.95, 3: 1.0, 4: 1.02}


def tile_for(
    storage: str,
    out_storage: str,
    rows: int = 4096,
    isa: Isa | None = None,
    block_rows: int | None = None,
    *,
    matrix: bool = True,
) -> Tile:
    """Return the tile that serves an element type, and so many query rows, on a machine.

    Few rows take a narrower panel when that wastes fewer lanes, and so do the blocks of a block
    mask, ``block_rows`` high, where a panel would lie across several of them. Lanes do not know
    each other, so the width of the panel moves no bit. ``matrix``: whether to use a matrix unit.
    """
    isa = isa or host_isa()
    # rows * vectors accumulators, one row of the panel and a broadcast must fit the registers.
    # LLVM loads the keys of two steps at once on NEON, which takes some more.
    most, rows_in_registers = (3, 8) if isa.registers == 32 else (2, 6)
    matrix = matrix and isa.matrix and storage != "float64"
    if matrix:  # 2 x 2 tiles of sums, 2 of rows and 2 of lanes
        most = 2
    if isa.vector_bytes == 16:
        rows_in_registers = 6
    width = _width(storage, isa)
    vectors = _vectors(rows, width, most, block_rows)
    block_k = MATRIX_BLOCK_K if matrix else BLOCK_K
    return Tile(storage, out_storage, width, vectors, rows_in_registers, block_k, matrix)


def backward_tile_for(
    storage: str, out_storage: str, rows: int = 4096, isa: Isa | None = None
) -> Tile:
    """Return the tile of the backward pass, whose products over queries want wide panels."""
    isa = isa or host_isa()
    width = _width(storage, isa)
    vectors = _vectors(rows, width, 4)
    if isa.vector_bytes != AVX512.vector_bytes or vectors < 4:
        return tile_for(storage, out_storage, rows, isa, matrix=False)
    return Tile(storage, out_storage, width, vectors, 6, BLOCK_K)


def _width(storage: str, isa: Isa) -> int:
    return isa.vector_bytes // (8 if storage == "float64" else 4)


def _vectors(rows: int, width: int, most: int, block_rows: int | None = None) -> int:
    """Vectors per panel, at most so many, with which the rows take the least time."""

    def cost(vectors: int) -> float:
        lanes, blocks = vectors * width, 1.0
        if block_rows is not None:  # how many blocks a panel meets on average: it computes for all
            blocks += (lanes - math.gcd(lanes, block_rows)) / block_rows
        return blocks * -(-rows // lanes) * vectors / _SPEED[vectors]

    return min(range(most, 0, -1), key=cost)
