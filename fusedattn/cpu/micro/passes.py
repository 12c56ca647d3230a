"""Passes over a tile of scores in natural units, between the product and the mask."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.interface import LOG2_E
from fusedattn.cpu.micro.base import Kernels
from fusedattn.cpu.simd import I32, Emitter

# (2**f - 1) / f on [-1/2, 1/2], minimax: errors 1.7e-10 and 1.7e-19.
EXP2M1 = {
    32: (
        0.6931471805599453,
        0.24022650922288757,
        0.055504108839096185,
        0.009618056678524637,
        0.001333350238616277,
        0.0001546144469856913,
        1.5297323760701075e-05,
    ),
    64: (
        0.6931471805599453,
        0.24022650695910072,
        0.055504108664821625,
        0.00961812910762848,
        0.001333355814640647,
        0.00015403530393370734,
        1.5252733841556773e-05,
        1.3215486808705563e-06,
        1.0178057087733941e-07,
        7.0548973041554995e-09,
        4.4558179083360645e-10,
        2.5729324177362305e-11,
    ),
}


class Passes(Kernels):
    """A new feature of the scores is one more pass."""

    def multiply(self, e: Emitter, s, n, factor) -> None:
        """``S * factor``."""
        by = e.splat(e.to_real(factor))
        self._each(e, s, n, lambda _v, _j, value: e.builder.fmul(value, by))

    def softcap(self, e: Emitter, s, n, cap) -> None:
        """``cap * tanh(S / cap)``, where tanh(a) = (exp(2a) - 1) / (exp(2a) + 1), by expm1."""
        build = e.builder
        limit = e.splat(e.to_real(cap))
        saturated = e.splat_const(10.0 if e.bits == 32 else 20.0)  # tanh rounds to 1 from here on

        def change(_v: int, _j: ir.Value, value: ir.Value) -> ir.Value:
            x = build.fdiv(value, limit)
            size = e.absolute(x)
            size = build.select(build.fcmp_ordered("<", saturated, size), saturated, size)
            exponent = build.fmul(size, e.splat_const(2.0 * LOG2_E))
            (power,), fractions = self._split_exponent(e, [exponent])
            (slope,) = self._polynomial(e, fractions, EXP2M1[e.bits])
            small = build.fmul(slope, fractions[0])
            grown = e.fma(power, small, build.fsub(power, e.splat_const(1.0)))
            tanh = build.fdiv(grown, build.fadd(grown, e.splat_const(2.0)))
            negative = build.fcmp_ordered("<", x, e.splat_const(0.0))
            return build.fmul(limit, build.select(negative, build.fneg(tanh), tanh))

        self._each(e, s, n, change)

    def alibi(self, e: Emitter, s, n, first_key, position, slope) -> None:
        """``S - slope[lane] * |position[lane] - key|``, the distance exact."""
        build = e.builder
        places = self._vectors(e, position, e.i32vec)
        slopes = [build.fneg(x) for x in self._vectors(e, slope)]

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            key = e.splat(build.trunc(build.add(first_key, j), I32))
            distance = build.sitofp(build.sub(places[v], key), e.vec)
            return e.fma(slopes[v], e.absolute(distance), value)

        self._each(e, s, n, change)

    def add(self, e: Emitter, s, n, bias) -> None:
        """``S[j][lane] + bias[j][lane]``; a bias of minus infinity hides whatever the score is."""
        build, hidden = e.builder, e.splat_const(float("-inf"))

        def change(v: int, j: ir.Value, value: ir.Value) -> ir.Value:
            added = self._load(e, e.pointer(e.offset(bias, j, self.row_bytes)), v)
            hides = build.fcmp_ordered("==", added, hidden)
            return build.select(hides, hidden, build.fadd(value, added))

        self._each(e, s, n, change)
