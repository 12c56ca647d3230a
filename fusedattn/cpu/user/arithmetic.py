"""exp and tanh for compiled functions: straight-line code, which LLVM turns into vectors.

Calls of a C library's functions keep a loop scalar, at ten times the cost. Errors are below 2 units
in the last place; exp covers the whole range, subnormal results too.

The reduction ``exp(x) = 2**n * 2**f`` takes ``ln 2`` in two parts, so that ``f`` keeps its digits
for large x: Cody & Waite, "Software manual for the elementary functions" (1980), chapter 6.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.interface import LOG2_E
from fusedattn.cpu.micro.base import EXPONENT_BITS, MANTISSA_BITS
from fusedattn.cpu.micro.passes import EXP2M1
from fusedattn.cpu.simd import DOUBLE, FLOAT

# Names in Numba's code, and what they become.
REPLACED = {
    "llvm.exp.f32": "fusedattn_exp_32",
    "llvm.exp.f64": "fusedattn_exp_64",
    "expf": "fusedattn_exp_32",
    "exp": "fusedattn_exp_64",
    "tanhf": "fusedattn_tanh_32",
    "tanh": "fusedattn_tanh_64",
}

# ln 2: a part with few bits, whose multiples are exact, and the rest.
_LN2 = {
    32: (0.693145751953125, 1.4286068203094172e-06),
    64: (0.6931471803691238, 1.9082149292705877e-10),
}
# Beyond these exp is inf or 0, and 2**n would leave two factors.
_RANGE = {32: (-110.0, 95.0), 64: (-760.0, 720.0)}
# tanh rounds to 1 from here on.
_SATURATED = {32: 10.0, 64: 20.0}


class _Scalar:
    """Writes scalar code of one type."""

    def __init__(self, module: ir.Module, name: str, bits: int) -> None:
        self.bits, self.real = bits, FLOAT if bits == 32 else DOUBLE
        self.integer = ir.IntType(bits)
        function = ir.Function(module, ir.FunctionType(self.real, [self.real]), name)
        function.attributes.add("alwaysinline")
        function.attributes.add("nounwind")
        self.argument = function.args[0]
        self.builder = ir.IRBuilder(function.append_basic_block())

    def number(self, value: float) -> ir.Constant:
        return ir.Constant(self.real, value)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return self.builder.fma(x, y, z)

    def choose_below(self, x: ir.Value, limit: float) -> ir.Value:
        """``limit < x ? limit : x``: a NaN stays one."""
        bound = self.number(limit)
        return self.builder.select(self.builder.fcmp_ordered("<", bound, x), bound, x)

    def choose_above(self, x: ir.Value, limit: float) -> ir.Value:
        bound = self.number(limit)
        return self.builder.select(self.builder.fcmp_ordered(">", bound, x), bound, x)

    def nearest(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the nearest integer as a real, and the same as an integer."""
        magic = 1.5 * 2.0 ** MANTISSA_BITS[self.bits]
        shifted = self.builder.fadd(x, self.number(magic))
        whole = self.builder.fsub(shifted, self.number(magic))
        base = ir.Constant(self.real, magic).bitcast(self.integer)
        return whole, self.builder.sub(self.builder.bitcast(shifted, self.integer), base)

    def power_of_two(self, n: ir.Value) -> ir.Value:
        bias, shift = EXPONENT_BITS[self.bits], MANTISSA_BITS[self.bits]
        exponent = self.builder.add(n, self.integer(bias))
        return self.builder.bitcast(self.builder.shl(exponent, self.integer(shift)), self.real)

    def exp2_minus_1(self, f: ir.Value) -> ir.Value:
        """``2**f - 1`` for ``|f| <= 1/2``."""
        coefficients = EXP2M1[self.bits]
        value: ir.Value = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = self.fma(value, f, self.number(coefficient))
        return self.builder.fmul(value, f)


def _exp(module: ir.Module, bits: int) -> None:
    s = _Scalar(module, f"fusedattn_exp_{bits}", bits)
    low, high = _RANGE[bits]
    x = s.choose_below(s.choose_above(s.argument, low), high)
    whole, n = s.nearest(s.builder.fmul(x, s.number(LOG2_E)))
    rest = x
    for part in _LN2[bits]:
        rest = s.fma(whole, s.number(-part), rest)
    fraction = s.builder.fmul(rest, s.number(LOG2_E))
    grown = s.builder.fadd(s.exp2_minus_1(fraction), s.number(1.0))
    # In two factors: each is a normal number, also where the result is none.
    half = s.builder.ashr(n, s.integer(1))
    first, second = s.power_of_two(half), s.power_of_two(s.builder.sub(n, half))
    s.builder.ret(s.builder.fmul(s.builder.fmul(grown, first), second))


def _tanh(module: ir.Module, bits: int) -> None:
    """``(exp(2|x|) - 1) / (exp(2|x|) + 1)`` with the sign of x, the numerator without loss."""
    s = _Scalar(module, f"fusedattn_tanh_{bits}", bits)
    build, x = s.builder, s.argument
    negative = build.fcmp_ordered("<", x, s.number(0.0))
    size = s.choose_below(build.select(negative, build.fneg(x), x), _SATURATED[bits])
    doubled = build.fmul(size, s.number(2.0))
    whole, n = s.nearest(build.fmul(doubled, s.number(LOG2_E)))
    rest = doubled
    for part in _LN2[bits]:
        rest = s.fma(whole, s.number(-part), rest)
    small = s.exp2_minus_1(build.fmul(rest, s.number(LOG2_E)))
    power = s.power_of_two(n)
    grown = s.fma(power, small, build.fsub(power, s.number(1.0)))
    tanh = build.fdiv(grown, build.fadd(grown, s.number(2.0)))
    build.ret(build.select(negative, build.fneg(tanh), tanh))


def arithmetic_module() -> ir.Module:
    """Return a module with the functions of `REPLACED`."""
    module = ir.Module(name="fusedattn_arithmetic")
    for bits in (32, 64):
        _exp(module, bits)
        _tanh(module, bits)
    return module


def replace_calls(code: str) -> str:
    """Let the code of a function call these functions instead of a C library's."""
    for old, new in REPLACED.items():
        code = code.replace(f"@{old}(", f"@{new}(").replace(f'@"{old}"(', f"@{new}(")
    return code
