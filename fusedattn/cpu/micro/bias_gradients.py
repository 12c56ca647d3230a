"""The gradient of the bias: a tile of gradients of scores, added where its bias came from."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I64, Emitter


class BiasGradients(Kernels):
    """One kernel for each way to broadcast: over keys, over rows, over neither."""

    def sum_keys(self, e: Emitter, tile, n, target) -> None:
        """``target[lane] += sum_j tile[j][lane]``."""
        build = e.builder
        sums = [e.variable(e.splat_const(0.0)) for _ in range(self.tile.vectors)]
        with e.loop(n) as j:
            row = e.pointer(e.offset(tile, j, self.row_bytes))
            for v, total in enumerate(sums):
                build.store(build.fadd(build.load(total), self._load(e, row, v)), total)
        row = e.pointer(target)
        for v, total in enumerate(sums):
            self._store(e, build.fadd(self._load(e, row, v), build.load(total)), row, v)

    def sum_lanes(self, e: Emitter, tile, n, first, last, target) -> None:
        """``target[j] += sum of tile[j][lane]`` over ``first <= lane < last``."""
        build, width, size = e.builder, self.tile.width, self.tile.real_bytes
        lanes = ir.VectorType(I64, width)

        def inside(v: int) -> ir.Value:
            index = ir.Constant(lanes, [v * width + i for i in range(width)])
            begun = build.icmp_signed(">=", index, e.splat(first))
            return build.and_(begun, build.icmp_signed("<", index, e.splat(last)))

        chosen = [inside(v) for v in range(self.tile.vectors)]

        def across(j: ir.Value) -> ir.Value:
            row, total = e.pointer(e.offset(tile, j, self.row_bytes)), e.splat_const(0.0)
            for v, is_inside in enumerate(chosen):
                value = build.select(is_inside, self._load(e, row, v), e.splat_const(0.0))
                total = build.fadd(total, value)
            return total

        blocks = build.sdiv(n, I64(width))
        with e.loop(blocks) as block:
            j = build.mul(block, I64(width))
            sums = e.sum_of_each([across(build.add(j, I64(i))) for i in range(width)])
            place = e.offset(target, j, size)
            e.store(build.fadd(e.load(place, e.vec), sums), place)
        done = build.mul(blocks, I64(width))
        with e.loop(build.sub(n, done)) as i:
            j = build.add(done, i)
            # One sum in the lane of each key: in the order of a block's, wherever the block ends.
            sums = e.sum_of_each([across(j)] * width)
            place = e.offset(target, j, size)
            total = build.extract_element(sums, ir.Constant(ir.IntType(32), 0))
            e.store(build.fadd(e.load(place, e.real), total), place)

    def add_rows(self, e: Emitter, tile, n, table, offset, count) -> None:
        """``row[lane][j] += tile[j][lane]`` for the first ``count`` lanes.

        ``table`` holds the addresses of the rows; lanes may share one, so they go one by one.
        """
        build, width, size = e.builder, self.tile.width, self.tile.real_bytes
        blocks = build.sdiv(n, I64(width))
        with e.loop(blocks) as block:
            first = build.mul(block, I64(width))
            at = build.add(offset, build.mul(first, I64(size)))
            for v in range(self.tile.vectors):
                rows = [
                    self._load(
                        e, e.pointer(e.offset(tile, build.add(first, I64(i)), self.row_bytes)), v
                    )
                    for i in range(width)
                ]
                for lane, values in enumerate(e.transpose(rows), start=v * width):
                    with build.if_then(build.icmp_signed(">", count, I64(lane))):
                        place = build.add(e.load(e.offset(table, lane, 8), I64, 8), at)
                        e.store(build.fadd(e.load(place, e.vec), values), place)
        done = build.mul(blocks, I64(width))
        with e.loop(build.sub(n, done)) as i, e.loop(count) as lane:
            key = build.add(done, i)
            row = e.load(e.offset(table, lane, 8), I64, 8)
            place = build.add(row, build.add(offset, build.mul(key, I64(size))))
            value = e.load(e.offset(e.offset(tile, key, self.row_bytes), lane, size), e.real)
            e.store(build.fadd(e.load(place, e.real), value), place)
