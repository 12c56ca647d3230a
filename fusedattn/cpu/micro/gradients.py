"""The backward pass of a tile: weights and their gradients, and products over the queries.

The tiles of the forward pass again, ``S[key][lane]`` with queries across the lanes. One thing is
new: the gradients of keys and values are sums over queries, so there the lanes lie along the head
dim, the tile enters by broadcast, and rows of queries or of d_out enter as they lie in memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fusedattn.cpu.micro.base import EXPONENT_BITS
from fusedattn.cpu.micro.copies import Copies
from fusedattn.cpu.micro.dropout import Dropout
from fusedattn.cpu.micro.softmax import Softmax
from fusedattn.cpu.micro.transposed import Transposed
from fusedattn.cpu.simd import I8, I64, Emitter


class Gradients(Softmax, Dropout):
    """Scores become weights and gradients of scores, in place."""

    def differentiate(
        self, e: Emitter, s, d_weights, n, to_log2, shift, factor, delta, keep
    ) -> None:
        """``S`` becomes the weights, ``d_weights`` the gradient of the scores.

        The weight is ``2**(to_log2 * s - shift[lane]) * factor[lane]``, and what comes back through
        the scores ``weight * (d_weight - delta[lane])``. Where the score is minus infinity both are
        0, whatever stands beside it: what a row does not see must not reach it as ``0 * NaN``.
        """
        del keep
        arguments = (s, d_weights, n, to_log2, shift, factor, delta)
        self._differentiate(e, *arguments, lambda _j, _v, weight, d_weight: (weight, d_weight))

    def differentiate_dropped(
        self, e: Emitter, s, d_weights, n, to_log2, shift, factor, delta, keep
    ) -> None:
        """`differentiate` with dropout: ``keep`` holds ``1 / (1 - p)``, or 0 where it drops."""
        build, zero = e.builder, e.splat_const(0.0)

        def drop(j: ir.Value, v: int, weight: ir.Value, d_weight: ir.Value) -> Any:
            scale = self._load(e, e.pointer(e.offset(keep, j, self.row_bytes)), v)
            kept = build.fcmp_ordered("!=", scale, zero)
            return tuple(
                build.select(kept, build.fmul(value, scale), zero) for value in (weight, d_weight)
            )

        self._differentiate(e, s, d_weights, n, to_log2, shift, factor, delta, drop)

    def _differentiate(
        self, e: Emitter, s, d_weights, n, to_log2, shift, factor, delta, drop: Any
    ) -> None:
        build, vectors = e.builder, range(self.tile.vectors)
        scale = e.splat(e.to_real(to_log2))
        zero, hidden = e.splat_const(0.0), e.splat_const(float("-inf"))
        floor, most = e.splat_const(-float(EXPONENT_BITS[e.bits])), e.splat_const(1.0)
        shifts, factors, deltas = (self._vectors(e, table) for table in (shift, factor, delta))
        none = ir.Constant(ir.IntType(self.tile.width), 0)
        any_large = none
        for v in vectors:
            bits = build.bitcast(self._is_large(e, shifts[v]), none.type)
            any_large = build.or_(any_large, bits)

        def walk(exponent: Any) -> None:
            with e.loop(n) as j:
                row = e.pointer(e.offset(s, j, self.row_bytes))
                d_row = e.pointer(e.offset(d_weights, j, self.row_bytes))
                for v in vectors:
                    score = self._load(e, row, v)
                    sees = build.fcmp_unordered("!=", score, hidden)
                    x = e.at_least(exponent(score, v), floor)
                    # No weight is above 1. Where an lse is too coarse to say so, it must not
                    # become infinite.
                    x = build.select(build.fcmp_ordered(">", x, most), most, x)
                    (weight,) = self._exp2(e, [x])
                    weight = build.select(sees, build.fmul(weight, factors[v]), zero)
                    used, d_weight = drop(j, v, weight, self._load(e, d_row, v))
                    d_score = build.fmul(weight, build.fsub(d_weight, deltas[v]))
                    self._store(e, used, row, v)
                    self._store(e, build.select(sees, d_score, zero), d_row, v)

        def fused(score: ir.Value, v: int) -> ir.Value:
            return e.fma(score, scale, build.fneg(shifts[v]))

        def rounded_first(score: ir.Value, v: int) -> ir.Value:
            # As in `weights`: the exponent must see the rounding that its maximum saw.
            product = build.fsub(build.fmul(score, scale), shifts[v])
            return build.select(self._is_large(e, shifts[v]), product, fused(score, v))

        with build.if_else(build.icmp_unsigned("==", any_large, none)) as (then, otherwise):
            with then:
                walk(fused)
            with otherwise:
                walk(rounded_first)

    def keep_tile(
        self, e: Emitter, target, n, first_key, threshold, seed, rows, heads, batch, scale
    ) -> None:
        """``target[key][lane]``: ``scale`` where dropout keeps the entry and 0 where it drops it.

        Drawn once for the weights and for what comes back through them.
        """
        value = e.splat(e.to_real(scale))

        def change(kept: ir.Value, row: ir.Value, v: int) -> None:
            self._store(e, e.builder.select(kept, value, e.splat_const(0.0)), row, v)

        self._draw(e, target, n, first_key, threshold, seed, rows, heads, batch, change)

    def softcap_slope(self, e: Emitter, s, n, cap, slope) -> None:
        """``slope = 1 - (S / cap)**2``, the derivative of what `softcap` has just made."""
        build, limit = e.builder, e.splat(e.to_real(cap))

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            tanh = build.fdiv(value, limit)
            bend = e.fma(build.fneg(tanh), tanh, e.splat_const(1.0))
            self._store(e, bend, e.pointer(e.offset(slope, j, self.row_bytes)), v)
            return value

        self._each(e, s, n, change)

    def bend(self, e: Emitter, d_scores, n, slope) -> None:
        """``d_scores * slope``; 0 stays 0 beside whatever a hidden score left in ``slope``."""
        build, zero = e.builder, e.splat_const(0.0)

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            factor = self._load(e, e.pointer(e.offset(slope, j, self.row_bytes)), v)
            bent = build.fmul(value, factor)
            return build.select(build.fcmp_ordered("==", value, zero), zero, bent)

        self._each(e, d_scores, n, change)

    def products(
        self, e: Emitter, tile, keys, rows, stride, count, target, target_stride, vectors
    ) -> None:
        """``target[j] += sum_q tile[j][q] * rows[q]`` for ``count`` queries, a few keys at a time.

        Rows and targets are ``vectors`` whole vectors. Each sum begins at zero, as in `accumulate`.
        """
        build, size = e.builder, self.tile.real_bytes
        shapes = self.tile.product_rows
        # As few groups of columns as there can be, of about the same number of vectors.
        groups = build.sdiv(build.add(vectors, I64(len(shapes) - 1)), I64(len(shapes)))
        wide = build.sdiv(build.add(vectors, build.sub(groups, I64(1))), groups)
        narrow_groups = build.sub(build.mul(groups, wide), vectors)
        wide_groups = build.sub(groups, narrow_groups)
        column = e.variable(I64(0))

        def block(width: int) -> None:
            """All keys against ``width`` vectors of columns."""
            at = build.mul(build.load(column), I64(self.vector_bytes))
            source, place = build.add(rows, at), build.add(target, at)

            def group(first: ir.Value, many: int, done: ir.Value) -> None:
                at = [e.offset(tile, build.add(first, I64(m)), self.row_bytes) for m in range(many)]
                scalars = [e.pointer(address) for address in at]
                sums = self._register_tile(e, scalars, I64(size), source, count, (stride, width))
                for m in range(many):
                    key = build.add(first, I64(m))
                    with build.if_then(build.icmp_signed(">=", key, done)):
                        row = e.pointer(e.offset(place, key, target_stride))
                        for v in range(width):
                            total = build.fadd(self._load(e, row, v), sums[m][v])
                            self._store(e, total, row, v)

            self._in_groups(e, keys, shapes[width - 1], group)
            build.store(build.add(build.load(column), I64(width)), column)

        for width in range(len(shapes), 0, -1):
            is_wide = build.icmp_signed("==", wide, I64(width))
            is_narrow = build.icmp_signed("==", wide, I64(width + 1))
            turns = build.select(is_narrow, narrow_groups, I64(0))
            with e.loop(build.select(is_wide, wide_groups, turns)):
                block(width)

    def _in_groups(self, e: Emitter, n: ir.Value, many: int, group: Any) -> None:
        """``group(first, size, first one that is new)`` over n rows; the last two may overlap."""
        build = e.builder
        with build.if_else(build.icmp_signed(">=", n, I64(many))) as (then, otherwise):
            with then:
                last = build.sub(n, I64(many))
                with e.loop(build.sdiv(build.add(n, I64(many - 1)), I64(many))) as g:
                    done = build.mul(g, I64(many))
                    group(e.minimum(done, last), many, done)
            with otherwise, e.loop(n) as j:
                group(j, 1, j)


class GradientRows(Transposed, Copies):
    """Rows of d_out, which has the type of out, and of gradients, which have that of q."""

    def pack_d_out(self, e: Emitter, target, table, step, columns, sign) -> None:
        """`pack` for rows of the type of out."""
        self._pack(e, self.tile.out_storage, target, table, step, columns, sign)

    def stage_d_out(self, e: Emitter, *rows: ir.Value) -> None:
        """`stage` for rows of the type of out."""
        self._copy(e, self.tile.out_storage, *rows)

    def dot_out(self, e: Emitter, *arguments: ir.Value) -> ir.Value:
        """`dot` for rows of the type of out."""
        return self._dot(e, self.tile.out_storage, *arguments)

    def unpack_d_q(self, e: Emitter, *arguments: ir.Value) -> None:
        """`unpack` to the type of q."""
        self._unpack(e, self.tile.storage, *arguments)

    def write_rows(
        self, e: Emitter, target, stride, step, source, source_stride, n, columns, factor, bad
    ) -> None:
        """``target[j][d] = source[j][d] * factor`` in the type of q; ``bad[j]``: 1 if not finite.

        Adding +0 turns -0 into +0, as in `unpack`.
        """
        build, width, storage = e.builder, self.tile.width, self.tile.storage
        blocks = self._blocks(e, columns, step, storage)
        done = build.mul(blocks, I64(width))
        single, zero = e.to_real(factor), ir.Constant(e.real, 0.0)
        many, zeros = e.splat(single), e.splat_const(0.0)
        with e.loop(n) as j:
            to, of = e.offset(target, j, stride), e.offset(source, j, source_stride)
            seen, seen_alone = e.variable(zeros), e.variable(zero)
            with e.loop(blocks) as block:
                d = build.mul(block, I64(width))
                value = e.load(e.offset(of, d, self.tile.real_bytes), e.vec)
                value = e.fma(value, many, zeros)
                build.store(e.fma(value, zeros, build.load(seen)), seen)
                e.store_storage(value, e.offset(to, d, step), storage)
            with e.loop(build.sub(columns, done)) as i:
                d = build.add(done, i)
                value = e.load(e.offset(of, d, self.tile.real_bytes), e.real)
                value = e.fma(value, single, zero)
                build.store(e.fma(value, zero, build.load(seen_alone)), seen_alone)
                e.store_storage(value, e.offset(to, d, step), storage)
            lanes = build.fcmp_unordered("uno", build.load(seen), zeros)
            bits = build.bitcast(lanes, ir.IntType(width))
            is_bad = build.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))
            alone = build.fcmp_unordered("uno", build.load(seen_alone), zero)
            e.store(build.zext(build.or_(is_bad, alone), I8), build.add(bad, j))
