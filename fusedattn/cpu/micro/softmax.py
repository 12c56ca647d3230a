"""The softmax pass over a tile of scores, and the selection of what a row does not see."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir

from fusedattn.cpu.interface import UNSEEN
from fusedattn.cpu.micro.base import EXPONENT_BITS, MANTISSA_BITS, Kernels
from fusedattn.cpu.simd import I1, I8, I32, I64, Emitter

# 2**f on [-1/2, 1/2], minimax, constant first: errors 2.0e-9 and 3.2e-18.
EXP2 = {
    32: (
        1.0,
        0.6931472067028326,
        0.24022650922288757,
        0.05550327226670302,
        0.009618056678524637,
        0.0013400428177615838,
        0.0001546144469856913,
    ),
    64: (
        1.0,
        0.6931471805599453,
        0.24022650695910158,
        0.055504108664821625,
        0.009618129107587256,
        0.001333355814640647,
        0.00015403530463724353,
        1.5252733841556773e-05,
        1.3215432535912375e-06,
        1.0178057087733941e-07,
        7.074194297288521e-09,
        4.4558179083360645e-10,
    ),
}


Exponent = Callable[[ir.Value, int], ir.Value]


class Maxima(NamedTuple):
    """What the maxima of a tile make of its scores."""

    factor: ir.Value  # to log2 units
    shift: list[ir.Value]  # the running maximum of each vector
    rescale: list[ir.Value]  # alpha
    any_large: ir.Value  # bits of lanes whose maximum is large


class Softmax(Kernels):
    """Scores become weights."""

    def weights(self, e: Emitter, s, n, to_log2, running_max, alpha, row_sum) -> None:
        """Scores to unnormalised weights ``2**(to_log2 * s - max)``; updates the running state.

        ``alpha`` becomes the power of two by which what was accumulated before must be rescaled.
        """
        build, vectors = e.builder, range(self.tile.vectors)
        maxima = self._raise_maxima(e, s, n, to_log2, running_max, alpha)
        sums = [e.variable(e.splat_const(0.0)) for _ in vectors]

        def to_weights(exponent: Exponent) -> None:
            with e.loop(n) as j:
                row = e.pointer(e.offset(s, j, self.row_bytes))
                exponents = [exponent(self._load(e, row, v), v) for v in vectors]
                for v, weight in enumerate(self._weights(e, exponents)):
                    self._store(e, weight, row, v)
                    build.store(build.fadd(build.load(sums[v]), weight), sums[v])

        with self._each_exponent(e, maxima) as (then, other, fused, rounded_first):
            with then:
                to_weights(fused)
            with other:
                to_weights(rounded_first)
        self._add_to_sums(e, row_sum, maxima, sums)

    def _raise_maxima(self, e: Emitter, s, n, to_log2, running_max, alpha) -> Maxima:
        """Bring the running maxima up to date with a tile of scores, and write ``alpha``."""
        build, vectors = e.builder, range(self.tile.vectors)
        factor = e.splat(e.to_real(to_log2))
        lowest = e.splat_const(UNSEEN[e.bits])

        # Two maxima in turn: one chain would wait for its own latency.
        largest = [[e.variable(lowest) for _ in vectors] for _ in range(2)]

        def maximise(j: ir.Value, turn: int) -> None:
            row = e.pointer(e.offset(s, j, self.row_bytes))
            for v in vectors:
                value = e.larger(self._load(e, row, v), build.load(largest[turn][v]))
                build.store(value, largest[turn][v])

        pairs = build.ashr(n, I64(1))
        with e.loop(pairs) as pair:
            maximise(build.shl(pair, I64(1)), 0)
            maximise(build.add(build.shl(pair, I64(1)), I64(1)), 1)
        with build.if_then(build.trunc(n, I1)):
            maximise(build.shl(pairs, I64(1)), 0)

        old = self._vectors(e, running_max)
        shift, rescale = [], []
        any_large = e.variable(ir.Constant(ir.IntType(self.tile.width), 0))
        for v in vectors:
            row_max = e.larger(build.load(largest[0][v]), build.load(largest[1][v]))
            new = e.larger(e.ceil(build.fmul(row_max, factor)), old[v])
            shift.append(new)
            fall = e.larger(build.fsub(old[v], new), self._floor(e))
            (power,), _ = self._split_exponent(e, [fall])
            rescale.append(power)
            e.store(new, e.offset(running_max, v, self.vector_bytes), 16)
            e.store(power, e.offset(alpha, v, self.vector_bytes), 16)
            bits = build.bitcast(self._is_large(e, new), ir.IntType(self.tile.width))
            build.store(build.or_(build.load(any_large), bits), any_large)
        return Maxima(factor, shift, rescale, build.load(any_large))

    @contextmanager
    def _each_exponent(self, e: Emitter, maxima: Maxima) -> Iterator[Any]:
        """Two branches, and how each finds the exponent of a weight from a score and its vector."""
        build, (factor, shift, _, any_large) = e.builder, maxima

        def fused(score: ir.Value, v: int) -> ir.Value:
            return e.fma(score, factor, build.fneg(shift[v]))

        def rounded_first(score: ir.Value, v: int) -> ir.Value:
            # A large maximum is itself a rounded product: the exponent must see the same rounding
            # or it can come out far above zero. Lane by lane: neighbours must not move a bit.
            product = build.fsub(build.fmul(score, factor), shift[v])
            return build.select(self._is_large(e, shift[v]), product, fused(score, v))

        none = build.icmp_unsigned("==", any_large, any_large.type(0))
        with build.if_else(none) as (then, other):
            yield then, other, fused, rounded_first

    def _weights(self, e: Emitter, exponents: list[ir.Value]) -> list[ir.Value]:
        return self._exp2(e, [e.at_least(x, self._floor(e)) for x in exponents])

    def _exp2(self, e: Emitter, xs: list[ir.Value]) -> list[ir.Value]:
        """Powers of two, 0 at the floor."""
        powers, fractions = self._split_exponent(e, xs)
        values = self._polynomial(e, fractions, EXP2[e.bits])
        return [e.builder.fmul(x, power) for x, power in zip(values, powers, strict=True)]

    def _add_to_sums(self, e: Emitter, row_sum, maxima: Maxima, sums: list[ir.Value]) -> None:
        before = self._vectors(e, row_sum)
        for v, place in enumerate(sums):
            total = e.fma(before[v], maxima.rescale[v], e.builder.load(place))
            e.store(total, e.offset(row_sum, v, self.vector_bytes), 16)

    def _floor(self, e: Emitter) -> ir.Constant:
        """The exponent that makes a weight 0."""
        return e.splat_const(-float(EXPONENT_BITS[e.bits]))

    def _is_large(self, e: Emitter, x: ir.Value) -> ir.Value:
        limit = e.splat_const(2.0 ** (MANTISSA_BITS[e.bits] - 1))
        return e.builder.fcmp_ordered(">=", e.absolute(x), limit)

    def hide_outside(self, e: Emitter, s, n, first_key, low, high) -> None:
        """Minus infinity where not ``low[lane] <= first_key + j < high[lane]``."""
        build = e.builder
        lows, highs = self._vectors(e, low, e.i32vec), self._vectors(e, high, e.i32vec)
        widths = [build.sub(b, a) for a, b in zip(lows, highs, strict=True)]

        def hide(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            key = e.splat(build.trunc(build.add(first_key, j), I32))
            seen = build.icmp_unsigned("<", build.sub(key, lows[v]), widths[v])
            return build.select(seen, value, e.splat_const(float("-inf")))

        self._each(e, s, n, hide)

    def mark_hidden(self, e: Emitter, s, n, shown) -> None:
        """``shown[j][lane]`` becomes 0 where the score is minus infinity, else 1."""
        build, byte_vec = e.builder, ir.VectorType(I8, self.tile.width)
        hidden = e.splat_const(float("-inf"))
        with e.loop(n) as j:
            row = e.pointer(e.offset(s, j, self.row_bytes))
            for v in range(self.tile.vectors):
                seen = build.fcmp_unordered("!=", self._load(e, row, v), hidden)
                at = build.add(e.offset(shown, j, self.tile.lanes), I64(v * self.tile.width))
                e.store(build.zext(seen, byte_vec), at)

    def hide_masked(self, e: Emitter, s, n, mask) -> None:
        """Minus infinity where the byte ``mask[j][lane]`` is 0."""
        build, byte_vec = e.builder, ir.VectorType(I8, self.tile.width)

        def hide(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            at = e.offset(mask, j, self.tile.lanes)
            seen = e.load(build.add(at, I64(v * self.tile.width)), byte_vec)
            kept = build.icmp_unsigned("!=", seen, e.splat_int(0, byte_vec))
            return build.select(kept, value, e.splat_const(float("-inf")))

        self._each(e, s, n, hide)
