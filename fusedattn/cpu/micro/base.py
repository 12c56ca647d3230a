"""What the micro-kernels share: how a tile lies in memory, the register tile, powers of two."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fusedattn.cpu.simd import I1, I64, Emitter
from fusedattn.cpu.tile import STORAGE_BYTES, Tile

EXPONENT_BITS = {32: 127, 64: 1023}
MANTISSA_BITS = {32: 23, 64: 52}


class Kernels:
    """Micro-kernels of one tile shape: a method emits the body of the one that has its name."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.row_bytes = tile.lanes * tile.real_bytes
        self.vector_bytes = tile.width * tile.real_bytes
        self.align = min(64, self.vector_bytes)

    def _load(self, e: Emitter, row: ir.Value, vector: int) -> ir.Value:
        return e.load_at(row, vector * self.vector_bytes, e.vec, self.align)

    def _store(self, e: Emitter, value: ir.Value, row: ir.Value, vector: int) -> None:
        e.store_at(value, row, vector * self.vector_bytes, self.align)

    def _each(self, e: Emitter, s: ir.Value, n: ir.Value, change: Any) -> None:
        """Replace every vector of ``n`` rows by ``change(vector index, row index, value)``."""
        with e.loop(n) as j:
            row = e.pointer(e.offset(s, j, self.row_bytes))
            for v in range(self.tile.vectors):
                self._store(e, change(v, j, self._load(e, row, v)), row, v)

    def _vectors(
        self, e: Emitter, address: ir.Value, kind: ir.Type | None = None
    ) -> list[ir.Value]:
        """Load one row of lanes as vectors of ``kind`` (default: of reals)."""
        kind = kind or e.vec
        size = self.tile.width * (4 if kind == e.i32vec else self.tile.real_bytes)
        return [
            e.load(e.offset(address, v, size), kind, min(size, 16))
            for v in range(self.tile.vectors)
        ]

    def _polynomial(
        self, e: Emitter, xs: list[ir.Value], coefficients: tuple[float, ...]
    ) -> list[ir.Value]:
        """Values of a polynomial, step by step for all: one alone would wait for its latency."""
        values = [e.splat_const(coefficients[-1])] * len(xs)
        for coefficient in reversed(coefficients[:-1]):
            constant = e.splat_const(coefficient)
            values = [e.fma(value, x, constant) for value, x in zip(values, xs, strict=True)]
        return values

    def _split_exponent(
        self, e: Emitter, xs: list[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """Return ``(2**n, x - n)`` for the integer n nearest to x, -EXPONENT_BITS <= n <= 0 or so.

        Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits; the exponent bias is
        in the constant already, so one shift makes the power. The power multiplies (it is not added
        to the exponent field), because a NaN must stay one whatever its payload.
        """
        mantissa, bias = MANTISSA_BITS[e.bits], EXPONENT_BITS[e.bits]
        magic = e.splat_const(1.5 * 2.0**mantissa + bias)
        build = e.builder
        shifted = [build.fadd(x, magic) for x in xs]
        whole = [build.fsub(x, magic) for x in shifted]
        fractions = [build.fsub(x, n) for x, n in zip(xs, whole, strict=True)]
        powers = [build.shl(build.bitcast(x, e.ivec), e.splat_int(mantissa)) for x in shifted]
        return [build.bitcast(power, e.vec) for power in powers], fractions

    def _register_tile(
        self,
        e: Emitter,
        rows: list[ir.Value],
        step: ir.Value,
        b: ir.Value,
        n: ir.Value,
        elsewhere: tuple[ir.Value, int] | None = None,
    ) -> list[list[ir.Value]]:
        """``sum_k a[m][k] * b[k][lane]`` for a handful of rows m: one FMA chain per accumulator.

        ``rows`` are byte pointers to a[m][0]; ``step`` is the distance of a[m][k] and a[m][k+1].
        ``elsewhere`` is the distance of b's rows and how many vectors of each to take, where b is
        no panel.
        """
        build, align = e.builder, 1 if elsewhere else self.align
        b_stride, vectors = elsewhere or (I64(self.row_bytes), self.tile.vectors)
        sums = [[e.variable(e.splat_const(0.0)) for _ in range(vectors)] for _ in rows]
        panel = e.pointer(b)

        def multiply(k: ir.Value) -> None:
            at = build.mul(k, b_stride)
            panel_row = [
                e.load_at(panel, build.add(at, I64(v * self.vector_bytes)), e.vec, align)
                for v in range(vectors)
            ]
            for m, row in enumerate(rows):
                scalar = e.splat(e.load_at(row, build.mul(k, step), e.real, 1))
                for v in range(vectors):
                    build.store(e.fma(scalar, panel_row[v], build.load(sums[m][v])), sums[m][v])

        # Two steps a turn: the loop's own instructions compete with the FMAs for their ports.
        pairs = build.ashr(n, I64(1))
        with e.loop(pairs) as pair:
            k = build.shl(pair, I64(1))
            multiply(k)
            multiply(build.add(k, I64(1)))
        with build.if_then(build.trunc(n, I1)):
            multiply(build.shl(pairs, I64(1)))
        return [[build.load(place) for place in row] for row in sums]

    def _blocks(self, e: Emitter, columns: ir.Value, step: ir.Value, storage: str) -> ir.Value:
        """How many blocks of ``width`` neighbours a row has: none when its stride is not dense."""
        dense = e.builder.icmp_signed("==", step, I64(STORAGE_BYTES[storage]))
        blocks = e.builder.sdiv(columns, I64(self.tile.width))
        return e.builder.select(dense, blocks, I64(0))
