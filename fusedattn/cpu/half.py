"""Conversion of float16 where the processor has no instruction for it.

LLVM then calls two functions of its compiler's runtime library, which a Python process does not
hold, and ends the process over it. Here they are: integer arithmetic and one exact product.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir

from fusedattn.cpu.simd import FLOAT, HALF, I16, I32

EXTEND, TRUNCATE = "__extendhfsf2", "__truncsfhf2"


def _extend(build: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Return a float16 as float32.

    The exponent biases differ by 112, and a product by 2**112 makes it right for subnormals too.
    """
    raw = build.zext(build.bitcast(half, I16), I32)
    sign = build.shl(build.and_(raw, I32(0x8000)), I32(16))
    size = build.and_(raw, I32(0x7FFF))
    digits = build.shl(size, I32(13))
    scaled = build.fmul(build.bitcast(digits, FLOAT), ir.Constant(FLOAT, 2.0**112))
    quiet = build.select(build.icmp_unsigned(">", size, I32(0x7C00)), I32(0x400000), I32(0))
    special = build.or_(build.or_(digits, I32(0x7F800000)), quiet)
    is_special = build.icmp_unsigned(">=", size, I32(0x7C00))
    return build.bitcast(
        build.or_(build.select(is_special, special, build.bitcast(scaled, I32)), sign), FLOAT
    )


def _truncate(build: ir.IRBuilder, single: ir.Value) -> ir.Value:
    """Return a float32 as float16, rounded to nearest even."""
    raw = build.bitcast(single, I32)
    size = build.and_(raw, I32(0x7FFFFFFF))
    # In range, half a unit less a little, plus the last bit that stays, rounds to nearest even. A
    # carry out of the digits raises the exponent, at the end of the range to infinity.
    last = build.and_(build.lshr(size, I32(13)), I32(1))
    moved = build.add(build.sub(size, I32((127 - 15) << 23)), build.add(last, I32(0xFFF)))
    normal = build.lshr(moved, I32(13))
    # Beside 1/2 the units of float32 are those of float16's subnormals.
    half = build.fadd(build.bitcast(size, FLOAT), ir.Constant(FLOAT, 0.5))
    subnormal = build.sub(build.bitcast(half, I32), I32(126 << 23))
    digits = build.and_(build.lshr(size, I32(13)), I32(0x3FF))
    nan = build.or_(digits, I32(0x7E00))
    large = build.select(build.icmp_unsigned(">", size, I32(0x7F800000)), nan, I32(0x7C00))
    value = build.select(build.icmp_unsigned("<", size, I32(113 << 23)), subnormal, normal)
    value = build.select(build.icmp_unsigned(">=", size, I32(143 << 23)), large, value)
    sign = build.and_(build.lshr(raw, I32(16)), I32(0x8000))
    return build.bitcast(build.trunc(build.or_(value, sign), I16), HALF)


def emit_half() -> ir.Module:
    """Return a module with both functions, under the names that LLVM calls."""
    module = ir.Module(name="fusedattn_half")
    for name, result, argument, write in (
        (EXTEND, FLOAT, HALF, _extend),
        (TRUNCATE, HALF, FLOAT, _truncate),
    ):
        function = ir.Function(module, ir.FunctionType(result, [argument]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(write(builder, function.args[0]))
    return module


def link_half(machine: llvm.TargetMachine) -> llvm.ExecutionEngine:
    """Make both functions known to all code that is linked from now on; keep what is returned."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(emit_half())), machine)
    engine.finalize_object()
    for name in (EXTEND, TRUNCATE):
        llvm.add_symbol(name, engine.get_function_address(name))
    return engine
