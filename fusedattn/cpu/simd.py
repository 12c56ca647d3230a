"""Vector instructions for Numba: LLVM IR from Python, and the ways it meets a compiled function.

Numba's own code generator turns a scalar loop into vectors only where LLVM's cost model agrees;
the micro-kernels need exact register tiles instead. A Python function writes their LLVM IR through
an `Emitter`. `define` makes it a function of a module of its own, which is optimised once however
many kernels call it, through `native`; `inlined` is for the few instructions of a load or store.

All arguments are addresses and counts (int64) or scalars (float64).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BYTES = I8.as_pointer()

Writer = Callable[..., "ir.Value | None"]

MEMORY_TYPE = {"float16": HALF, "bfloat16": I16, "float32": FLOAT, "float64": DOUBLE}


class Emitter:
    """Writes vector code for one element type (``bits``) and one vector ``width``.

    Addresses are int64 values throughout: ``load`` and ``store`` turn them into pointers.
    """

    def __init__(self, builder: ir.IRBuilder, bits: int, width: int) -> None:
        self.builder = builder
        self.bits = bits
        self.width = width
        self.bytes = bits // 8
        self.real = FLOAT if bits == 32 else DOUBLE
        self.integer = ir.IntType(bits)
        self.vec = ir.VectorType(self.real, width)
        self.ivec = ir.VectorType(self.integer, width)
        self.i32vec = ir.VectorType(I32, width)

    # --- constants and scalars -----------------------------------------------------------------

    def splat_const(self, value: float) -> ir.Constant:
        """A vector of one real constant."""
        return ir.Constant(self.vec, [value] * self.width)

    def splat_int(self, value: int, vector: ir.VectorType | None = None) -> ir.Constant:
        """A vector of one integer constant."""
        return ir.Constant(vector or self.ivec, [value] * self.width)

    def offset(self, address: ir.Value, count: ir.Value | int, step: ir.Value | int) -> ir.Value:
        """``address + count * step`` in bytes."""
        count = I64(count) if isinstance(count, int) else count
        step = I64(step) if isinstance(step, int) else step
        return self.builder.add(address, self.builder.mul(count, step))

    def minimum(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """The smaller of two signed integers."""
        return self.builder.select(self.builder.icmp_signed("<", left, right), left, right)

    def to_real(self, double: ir.Value) -> ir.Value:
        """A float64 scalar in the element type."""
        return double if self.bits == 64 else self.builder.fptrunc(double, self.real)

    # --- memory --------------------------------------------------------------------------------

    def load(self, address: ir.Value, type_: ir.Type, align: int = 1) -> ir.Value:
        """Load a value of ``type_``."""
        value = self.builder.load(self.builder.inttoptr(address, type_.as_pointer()))
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        """Store a value."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = align

    def load_at(self, base: ir.Value, byte: ir.Value | int, type_: ir.Type, align: int) -> ir.Value:
        """Load from ``base`` (a byte pointer) at a byte offset: keeps base + offset addressing."""
        byte = I64(byte) if isinstance(byte, int) else byte
        place = self.builder.gep(base, [byte])
        value = self.builder.load(self.builder.bitcast(place, type_.as_pointer()))
        value.align = align
        return value

    def store_at(self, value: ir.Value, base: ir.Value, byte: ir.Value | int, align: int) -> None:
        """Store to ``base`` (a byte pointer) at a byte offset."""
        byte = I64(byte) if isinstance(byte, int) else byte
        place = self.builder.gep(base, [byte])
        pointer = self.builder.bitcast(place, value.type.as_pointer())
        self.builder.store(value, pointer).align = align

    def pointer(self, address: ir.Value) -> ir.Value:
        """An address as a byte pointer."""
        return self.builder.inttoptr(address, BYTES)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line that will be read soon; any address will do."""
        kind = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
        module = self.builder.module
        function = cgutils.get_or_insert_function(module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [self.pointer(address), I32(0), I32(2), I32(1)])

    def load_storage(self, address: ir.Value, storage: str, lanes: int = 1) -> ir.Value:
        """Load one element, or ``lanes`` neighbours, of a storage type as element-type values."""
        memory = MEMORY_TYPE[storage]
        shape = (lambda t: ir.VectorType(t, lanes)) if lanes > 1 else (lambda t: t)
        value = self.load(address, shape(memory))
        target = shape(self.real)
        if storage == "bfloat16":
            wide = self.builder.zext(value, shape(I32))
            shift = ir.Constant(shape(I32), [16] * lanes) if lanes > 1 else I32(16)
            value = self.builder.bitcast(self.builder.shl(wide, shift), shape(FLOAT))
        size = {"float16": 16, "bfloat16": 32, "float32": 32, "float64": 64}[storage]
        if size < self.bits:
            return self.builder.fpext(value, target)
        return value if size == self.bits else self.builder.fptrunc(value, target)

    def store_storage(self, value: ir.Value, address: ir.Value, storage: str) -> None:
        """Store element-type values, rounded once to nearest even, in a storage type."""
        lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
        shape = (lambda t: ir.VectorType(t, lanes)) if lanes > 1 else (lambda t: t)
        if storage in ("float16", "bfloat16") and self.bits == 64:
            value = self._round_to_odd(value, shape)
        if storage == "bfloat16":
            value = self._to_bfloat16(value, shape)
        elif storage == "float16":
            value = self.builder.fptrunc(value, shape(HALF))
        elif storage == "float32" and self.bits == 64:
            value = self.builder.fptrunc(value, shape(FLOAT))
        self.store(value, address)

    def _fill(self, type_: ir.Type, value: int) -> ir.Constant:
        vector = isinstance(type_, ir.VectorType)
        return ir.Constant(type_, [value] * type_.count if vector else value)

    def _round_to_odd(self, value: ir.Value, shape: Callable[[ir.Type], ir.Type]) -> ir.Value:
        """float64 to float32 such that rounding again, to a half type, is like rounding once.

        The 29 bits that float32 drops are folded into its last bit: Boldo & Melquiond, "Emulation
        of FMA and correctly rounded sums" (2008), section 3.
        """
        build, wide = self.builder, shape(I64)
        raw = build.bitcast(value, wide)
        low = self._fill(wide, (1 << 29) - 1)
        is_cut = build.icmp_unsigned("!=", build.and_(raw, low), self._fill(wide, 0))
        last = build.select(is_cut, self._fill(wide, 1 << 29), self._fill(wide, 0))
        odd = build.bitcast(build.or_(build.and_(raw, build.not_(low)), last), value.type)
        is_number = build.fcmp_ordered("ord", value, value)
        return build.fptrunc(build.select(is_number, odd, value), shape(FLOAT))

    def _to_bfloat16(self, value: ir.Value, shape: Callable[[ir.Type], ir.Type]) -> ir.Value:
        build, word = self.builder, shape(I32)
        raw = build.bitcast(value, word)
        odd = build.and_(build.lshr(raw, self._fill(word, 16)), self._fill(word, 1))
        rounded = build.add(raw, build.add(odd, self._fill(word, 0x7FFF)))
        quiet = build.or_(raw, self._fill(word, 0x00400000))  # a NaN must not round up to inf
        is_number = build.fcmp_ordered("ord", value, value)
        chosen = build.select(is_number, rounded, quiet)
        return build.trunc(build.lshr(chosen, self._fill(word, 16)), shape(I16))

    # --- vectors -------------------------------------------------------------------------------

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A vector whose lanes all hold ``scalar``."""
        kind = ir.VectorType(scalar.type, self.width)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, I32(0))
        lanes = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x * y + z``, rounded once."""
        return self._intrinsic("fma", x, y, z)

    def ceil(self, x: ir.Value) -> ir.Value:
        """The next integer from above."""
        return self._intrinsic("ceil", x)

    def absolute(self, x: ir.Value) -> ir.Value:
        """The magnitude."""
        return self._intrinsic("fabs", x)

    def _intrinsic(self, name: str, *operands: ir.Value) -> ir.Value:
        kind = operands[0].type
        suffix = (
            f"v{self.width}f{self.bits}" if isinstance(kind, ir.VectorType) else f"f{self.bits}"
        )
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(kind, [kind] * len(operands)),
            f"llvm.{name}.{suffix}",
        )
        return self.builder.call(function, operands)

    def larger(self, x: ir.Value, other: ir.Value) -> ir.Value:
        """``x > other ? x : other``: a NaN in ``x`` gives ``other``."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, other), x, other)

    def at_least(self, x: ir.Value, floor: ir.Value) -> ir.Value:
        """``floor > x ? floor : x``: a NaN in ``x`` stays one. The order of operands is the law."""
        return self.builder.select(self.builder.fcmp_ordered(">", floor, x), floor, x)

    def transpose(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Transpose ``width`` vectors of ``width`` elements in log2(width) rounds of shuffles."""
        rows = list(rows)
        width, half = len(rows), len(rows) // 2
        while half:
            low = [i if not i & half else i - half + width for i in range(width)]
            high = [i + half if not i & half else i + width for i in range(width)]
            merged = list(rows)
            for i in range(width):
                if not i & half:
                    top, bottom = rows[i], rows[i + half]
                    merged[i] = self.shuffle(top, bottom, low)
                    merged[i + half] = self.shuffle(top, bottom, high)
            rows, half = merged, half // 2
        return rows

    def sum_of_each(self, rows: Sequence[ir.Value]) -> ir.Value:
        """The sums of ``width`` vectors as one vector: transpose and add, halving in each round."""
        rows, width = list(rows), len(rows)
        half = width // 2
        while half:
            # Lanes are in groups of 2 * half: keep the low half of one and the high of the other.
            low = [i if not i & half else i - half + width for i in range(width)]
            high = [i + half if not i & half else i + width for i in range(width)]
            rows = [
                self.builder.fadd(
                    self.shuffle(rows[i], rows[i + half], low),
                    self.shuffle(rows[i], rows[i + half], high),
                )
                for i in range(half)
            ]
            half //= 2
        return rows[0]

    def shuffle(self, left: ir.Value, right: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Lanes of two vectors, those of ``right`` numbered after those of ``left``."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(left, right, mask)

    # --- control flow --------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: ir.Value | int) -> Iterator[ir.Value]:
        """Run the body for index 0 to ``count - 1``."""
        count = I64(count) if isinstance(count, int) else count
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    def variable(self, initial: ir.Value) -> ir.Value:
        """A variable that LLVM keeps in a register; read and written through the builder."""
        place = cgutils.alloca_once(self.builder, initial.type)
        self.builder.store(initial, place)
        return place


def define(
    module: ir.Module, name: str, signature: str, write: Writer, bits: int, width: int
) -> ir.Function:
    """Add a function to a module: ``write(emitter, *arguments)`` emits its body.

    Parameters
    ----------
    module : ir.Module
        Where the function goes.
    name : str
        Its symbol.
    signature : str
        One letter per argument, ``i`` (int64) or ``f`` (float64), then ``>`` and the result: ``i``,
        ``f`` or nothing.
    write : callable
        Emits the body and returns the result, if there is one.
    bits, width : int
        Element type and vector width of the emitter.
    """
    function = ir.Function(module, _llvm_signature(signature), name)
    function.attributes.add("nounwind")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = write(Emitter(builder, bits, width), *function.args)
    if value is None:
        builder.ret_void()
    else:
        builder.ret(value)
    return function


def native(signature: str) -> Any:
    """Return a Numba intrinsic ``call(address, *arguments)`` for native code of this signature."""

    def call(builder: ir.IRBuilder, address: ir.Value, *arguments: ir.Value) -> ir.Value:
        pointer = builder.inttoptr(address, _llvm_signature(signature).as_pointer())
        return builder.call(pointer, arguments)

    return _intrinsic("i" + signature, call)


def inlined(signature: str, write: Writer) -> Any:
    """Return a Numba intrinsic whose few instructions stand where it is called."""

    def emit(builder: ir.IRBuilder, *arguments: ir.Value) -> ir.Value | None:
        return write(Emitter(builder, 64, 1), *arguments)

    return _intrinsic(signature, emit)


def numba_signature(signature: str) -> Any:
    """Return the Numba signature of one in letters; ``b`` is a bool, ``ii`` as result a pair."""
    kinds = {"i": types.int64, "f": types.float64, "b": types.boolean, "": types.void}
    parameters, result = signature.split(">")
    returned = kinds[result] if len(result) < 2 else types.UniTuple(types.int64, len(result))
    return returned(*(kinds[letter] for letter in parameters))


def make_intrinsic(signature: Any, codegen: Callable[..., Any]) -> Any:
    """Return a Numba intrinsic: ``codegen(context, builder, signature, values)`` emits it."""

    def typing(*_: Any) -> Any:
        return signature, codegen

    # Numba takes the arity from the signature and folds a true *arguments into a tuple.
    kind = inspect.Parameter.POSITIONAL_ONLY
    names = ["typing_context", *(f"argument_{i}" for i in range(len(signature.args)))]
    typing.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    return intrinsic(typing)


def _llvm_signature(signature: str) -> ir.FunctionType:
    parameters, result = signature.split(">")
    kinds = {"i": I64, "f": DOUBLE, "": ir.VoidType()}
    return ir.FunctionType(kinds[result], [kinds[letter] for letter in parameters])


def _intrinsic(signature: str, emit: Callable[..., ir.Value | None]) -> Any:
    def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if value is None else value

    return make_intrinsic(numba_signature(signature), codegen)
