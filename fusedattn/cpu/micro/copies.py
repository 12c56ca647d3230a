"""Rows copied as reals, and the dot product of the exact path."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import DOUBLE, I8, I64, Emitter


class Copies(Kernels):
    """Plain movements of rows."""

    def stage(
        self, e: Emitter, target, target_stride, source, stride, step, n, columns, keep
    ) -> None:
        """Copy n rows as reals; those whose byte in ``keep``, if given, is 0 become 0."""
        rows = (target, target_stride, source, stride, step, n, columns, keep)
        self._copy(e, self.tile.storage, *rows)

    def copy(self, e: Emitter, *rows: ir.Value) -> None:
        """`stage` for rows that are reals already."""
        self._copy(e, f"float{self.tile.bits}", *rows)

    def _copy(
        self, e: Emitter, storage, target, target_stride, source, stride, step, n, columns, keep
    ) -> None:
        build, width = e.builder, self.tile.width
        blocks = self._blocks(e, columns, step, storage)
        with e.loop(n) as j:
            to, of = e.offset(target, j, target_stride), e.offset(source, j, stride)
            kept = e.variable(I8(1))
            with build.if_then(build.icmp_signed("!=", keep, I64(0))):
                build.store(e.load(build.add(keep, j), I8), kept)
            is_kept = build.icmp_unsigned("!=", build.load(kept), I8(0))
            with e.loop(blocks) as block:
                d = build.mul(block, I64(width))
                value = e.load_storage(e.offset(of, d, step), storage, width)
                value = build.select(is_kept, value, e.splat_const(0.0))
                e.store(value, e.offset(to, d, self.tile.real_bytes))
            done = build.mul(blocks, I64(width))
            with e.loop(build.sub(columns, done)) as i:
                d = build.add(done, i)
                value = e.load_storage(e.offset(of, d, step), storage)
                value = build.select(is_kept, value, ir.Constant(e.real, 0.0))
                e.store(value, e.offset(to, d, self.tile.real_bytes))

    def dot(self, e: Emitter, left, left_step, right, right_step, n) -> ir.Value:
        """A dot product in float64, four chains wide: for rows that need the exact path."""
        return self._dot(e, self.tile.storage, left, left_step, right, right_step, n)

    def _dot(self, e: Emitter, storage, left, left_step, right, right_step, n) -> ir.Value:
        build = e.builder
        exact = Emitter(build, 64, 1)
        sums = [e.variable(ir.Constant(DOUBLE, 0.0)) for _ in range(4)]

        def multiply(d: ir.Value, chain: int) -> None:
            x = exact.load_storage(e.offset(left, d, left_step), storage)
            y = exact.load_storage(e.offset(right, d, right_step), storage)
            build.store(exact.fma(x, y, build.load(sums[chain])), sums[chain])

        quarter = build.ashr(n, I64(2))
        with e.loop(quarter) as block:
            for chain in range(4):
                multiply(build.add(build.shl(block, I64(2)), I64(chain)), chain)
        done = build.shl(quarter, I64(2))
        with e.loop(build.sub(n, done)) as i:
            multiply(build.add(done, i), 0)
        low, high = (build.fadd(build.load(sums[i]), build.load(sums[i + 2])) for i in (0, 1))
        return build.fadd(low, high)
