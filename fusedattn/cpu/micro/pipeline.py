"""The softmax of one tile beside products of its neighbours.

Both units of a core work together. The matrix unit needs 16 cycles for an instruction, in which the
vector unit could do 16 products of its own and as many other operations. A processor looks some
hundred instructions ahead, so it finds work for both only if both stand close to each other. So
while the weights of a tile are made, the values of the one before are accumulated, and then the
scores of the next one made.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from fusedattn.cpu.interface import LIFT
from fusedattn.cpu.micro.base import EXPONENT_BITS, Kernels
from fusedattn.cpu.micro.matrix import ROW_TILES, SCORE_PAIRS, VALUE_PAIRS, Matrix
from fusedattn.cpu.micro.parts import ROWS, filled
from fusedattn.cpu.micro.softmax import EXP2, Exponent, Softmax
from fusedattn.cpu.simd import I16, I32, I64, Emitter
from fusedattn.cpu.tile import MATRIX_KEYS

# Pairs of keys in a group, whose scores are made in one step.
PAIRS_OF_KEYS = ROW_TILES * ROWS // 2
# Fractions of them are counted in units of this.
UNIT_BITS = 16


class Pipeline(Matrix, Softmax):
    """Weights of a tile, weighted values of the one before, and scores of the next."""

    def weights_and_products(
        self,
        e: Emitter,
        s, n, to_log2, running_max, alpha, row_sum, parts,
        values, v_part, v_stride, old_n, old_parts, o, columns, old_alpha, product,
        k, k_part, k_stride, next_n, queries, q_part, head_dim,
    ) -> None:  # fmt: skip
        """What `weights`, `split_weights` and the products of both neighbours would do.

        The next scores take the place of those that have become weights. ``old_n`` and ``next_n``
        may be 0.
        """
        build, vectors = e.builder, range(self.tile.vectors)
        maxima = self._raise_maxima(e, s, n, to_log2, running_max, alpha)
        self._fill_group(e, s, n, float("-inf"))
        total = build.ashr(filled(e, n, MATRIX_KEYS), I64(1))
        sums = [e.variable(e.splat_const(0.0)) for _ in vectors]
        done = e.variable(I64(0))
        pace = Pace(self, e, total, old_n, columns, next_n, head_dim)

        def weigh_until(limit: ir.Value, exponent: Exponent) -> None:
            first = build.load(done)
            limit = e.minimum(limit, total)
            with e.loop(build.sub(limit, first)) as i:
                pair = build.add(first, i)
                row = e.offset(s, pair, 2 * self.row_bytes)
                rows = [e.pointer(build.add(row, I64(m * self.row_bytes))) for m in range(2)]
                loaded = [exponent(self._load(e, at, v), v) for v in vectors for at in rows]
                found = self._lifted_weights(e, loaded)
                for v in vectors:
                    pair_of_weights = found[2 * v : 2 * v + 2]
                    for weight in pair_of_weights:
                        build.store(build.fadd(build.load(sums[v]), weight), sums[v])
                    self._store_weights(e, pair_of_weights, parts, pair, v)
            build.store(limit, done)

        def products(exponent: Exponent | None) -> None:
            """Both; make the weights beside them, if there is a way to make them."""
            of_values = of_scores = None
            if exponent is not None:
                of_values = pace.of_values(lambda limit: weigh_until(limit, exponent))
                of_scores = pace.of_scores(lambda limit: weigh_until(limit, exponent))
            old = (values, v_part, v_stride, old_n, old_parts, o, columns, old_alpha, product)
            with build.if_then(build.icmp_signed(">", old_n, I64(0)), likely=True):
                self._weighted_values(e, *old, of_values)
            self._scores(e, k, k_part, k_stride, next_n, queries, q_part, s, head_dim, of_scores)

        with self._each_exponent(e, maxima) as (then, other, fused, rounded_first):
            with then:
                products(fused)
                weigh_until(total, fused)
            with other:
                weigh_until(total, rounded_first)
                products(None)
        for place in sums:
            build.store(build.fmul(build.load(place), e.splat_const(1.0 / LIFT)), place)
        self._add_to_sums(e, row_sum, maxima, sums)

    def _lifted_weights(self, e: Emitter, xs: list[ir.Value]) -> list[ir.Value]:
        """``LIFT * 2**x``, with the digits of `_weights`: its polynomial, fractions and floor.

        By two instructions of AVX-512, which every processor with a matrix unit has: what is left
        of x without its nearest integer, and a product with a power of two.
        """
        build, none, all_lanes = e.builder, e.splat_const(0.0), I16(-1)
        now, reals = I32(4), [e.vec] * 3  # round as the processor is set
        reduce = self._avx512(e, "reduce", [e.vec, I32, e.vec, I16, I32])
        scale = self._avx512(e, "scalef", [*reals, I16, I32])
        fractions = [build.call(reduce, [x, I32(0), none, all_lanes, now]) for x in xs]
        values = self._polynomial(e, fractions, tuple(LIFT * c for c in EXP2[e.bits]))
        floor = e.splat_const(0.5 - EXPONENT_BITS[e.bits])  # what rounds to the floor is 0; NaN not
        kept = [build.bitcast(build.fcmp_unordered(">=", x, floor), I16) for x in xs]
        whole = [build.fsub(x, fraction) for x, fraction in zip(xs, fractions, strict=True)]
        return [
            build.call(scale, [value, n, none, lanes, now])
            for value, n, lanes in zip(values, whole, kept, strict=True)
        ]

    def _avx512(self, e: Emitter, name: str, kinds: list[ir.Type]) -> ir.Function:
        kind = ir.FunctionType(e.vec, kinds)
        name = f"llvm.x86.avx512.mask.{name}.ps.512"
        return cgutils.get_or_insert_function(e.builder.module, kind, name)


class Pace:
    """How many pairs of keys have their weights at the end of each turn of the products."""

    def __init__(self, kernels: Kernels, e: Emitter, total, old_n, columns, next_n, head_dim):
        """``total`` pairs; products of ``old_n`` values and for ``next_n`` scores."""
        self.e, build, parts = e, e.builder, kernels.tile.parts
        self.value_turns, self.score_turns = len(VALUE_PAIRS[parts]), len(SCORE_PAIRS[parts])
        self.old_groups, next_groups, dims, steps = (
            build.ashr(filled(e, size, MATRIX_KEYS), I64(5))
            for size in (old_n, next_n, head_dim, columns)
        )
        groups = build.mul(steps, self.old_groups)
        self.all_of_values = build.mul(groups, I64(self.value_turns))
        self.of_group = build.mul(dims, I64(self.score_turns))
        turns = build.add(self.all_of_values, build.mul(next_groups, self.of_group))
        self.share = self._share(total, turns)
        self.share_of_group = self._share(I64(PAIRS_OF_KEYS), self.of_group)

    def of_values(self, weigh_until: Callable[[ir.Value], None]) -> Any:
        """What stands beside the products of old values."""
        build = self.e.builder

        def beside(first: ir.Value, group: ir.Value) -> Callable[[int], None]:
            step = build.ashr(first, I64(5))
            group = build.add(build.mul(step, self.old_groups), group)
            before = build.mul(group, I64(self.value_turns))
            return lambda turn: weigh_until(self._pairs(before, turn, self.share))

        return beside

    def of_scores(self, weigh_until: Callable[[ir.Value], None]) -> Any:
        """What stands beside the products for the next scores.

        At the end of each group of keys, whose scores are about to go there, at least its pairs.
        """
        build = self.e.builder

        def beside(first: ir.Value) -> Callable[[ir.Value], Callable[[int], None]]:
            group = build.ashr(first, I64(5))
            before_group = build.add(self.all_of_values, build.mul(group, self.of_group))

            def of_step(step: ir.Value) -> Callable[[int], None]:
                in_group = build.mul(step, I64(self.score_turns))
                before = build.add(before_group, in_group)

                def weigh(turn: int) -> None:
                    least = self._pairs(in_group, turn, self.share_of_group)
                    least = build.add(build.ashr(first, I64(1)), least)
                    pairs = self._pairs(before, turn, self.share)
                    is_less = build.icmp_signed("<", pairs, least)
                    weigh_until(build.select(is_less, least, pairs))

                return weigh

            return of_step

        return beside

    def _share(self, pairs: ir.Value, turns: ir.Value) -> ir.Value:
        """Pairs of a turn, rounded up: at the end of the turns all of them are behind."""
        build = self.e.builder
        units = build.add(build.shl(pairs, I64(UNIT_BITS)), build.sub(turns, I64(1)))
        is_none = build.icmp_signed("==", turns, I64(0))
        return build.sdiv(units, build.select(is_none, I64(1), turns))

    def _pairs(self, before: ir.Value, turn: int, share: ir.Value) -> ir.Value:
        """Pairs at the end of a turn."""
        build = self.e.builder
        turns = build.add(before, I64(turn + 1))
        return build.ashr(build.mul(turns, share), I64(UNIT_BITS))
