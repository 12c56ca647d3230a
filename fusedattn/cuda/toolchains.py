"""What kernels are given by a toolchain, and the two compilers behind it.

Chosen by `fusedattn.cuda.compiler`; but for `tables_mlir` and `tables_numba` beside it, nothing
else imports one. The third is `fusedattn.cuda.simulator`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np

from fusedattn.cuda import tables_mlir, tables_numba
from fusedattn.cuda.inline import Block, Op, constraints_of
from fusedattn.cuda.tables import Kind, element_type
from fusedattn.undisturbed import undisturbed

MLIR, NUMBA, SIMULATOR = NAMES = ("numba-cuda-mlir", "numba-cuda", "simulator")


class Toolchain(Protocol):
    """What kernels may use: ``cuda``, ``types``, conversions of bits, and inline PTX."""

    name: str
    interprets: bool  # kernels and what they call are run as they are written
    cuda: Any
    types: Any

    def device(self, function: Callable[..., Any], **uses: Any) -> Any:
        """Make a scalar function callable from kernels; ``uses`` are such functions it calls."""

    def ltoir(self, function: Any, signature: Any, chip: str, threads: int) -> bytes:
        """Compile a kernel to LTO-IR for a chip such as ``sm_90a``."""

    def conversions(self) -> dict[str, Any]:
        """Return `float_as_int`, `int_as_float`, `half_to_float` and `float_to_half`."""

    def asm(self, op: Op | Block) -> Any:
        """Return a function for kernels that stands for inline PTX."""

    def array_words(self, address: int, length: int, itemsize: int) -> tuple[int, ...]:
        """Return the parameter words of a one-dimensional array argument."""

    def table(self, kind: Kind, real: Any) -> Any:
        """Return ``make(address, *lengths, *strides)``: an aux array, see `tables`."""

    def table_type(self, kind: Kind, real: Any) -> Any:
        """Return the type of what it makes."""

    def result_of(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Compile what `device` returned for some types, and return the type of its result."""


class _Compiler:
    """What both compilers have in common."""

    name: str
    interprets = False
    cuda: Any
    types: Any
    tables: ModuleType

    def conversions(self) -> dict[str, Any]:
        """Functions of libdevice."""
        lib = self.cuda.libdevice
        return {
            "float_as_int": lib.float_as_int,
            "int_as_float": lib.int_as_float,
            "half_to_float": lib.half2float,
            "float_to_half": lib.float2half_rn,
        }

    def device(self, function: Callable[..., Any], **uses: Any) -> Any:
        """Compile as a device function."""
        if uses:
            function = FunctionType(function.__code__, {**function.__globals__, **uses})
        return self.cuda.jit(function, device=True)

    def table(self, kind: Kind, real: Any) -> Any:
        """Return an intrinsic that packs the words."""
        return self.tables.table_maker(kind, real, self._intrinsic)

    def table_type(self, kind: Kind, real: Any) -> Any:
        """Return the compiler's own type."""
        dtype = element_type(self.types, kind.storage, real)
        return self.tables.table_class()(kind.storage, dtype, kind.ndim)

    def result_of(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Compile as a device function, whichever GPU it is for."""
        with self.compiling_for((8, 0)):
            function.get_call_template(arguments, {})
        return function.overloads[arguments].signature.return_type

    def compiling_for(self, capability: tuple[int, int]) -> AbstractContextManager[None]:
        """Keep the compiler from asking for the GPU, which may be another one, or none."""
        raise NotImplementedError

    def _intrinsic(self, intrinsic: Any, arity: int, typing: Callable[..., Any]) -> Any:
        """Give a typing function the fixed number of arguments that Numba asks for."""
        names = ", ".join(("context", *(f"a{i}" for i in range(arity))))
        space: dict[str, Any] = {"typing": typing}
        exec(f"def op({names}):\n    return typing({names})", space)
        return intrinsic(space["op"])

    def _scalar(self, letter: str) -> Any:
        types = self.types
        return {"f": types.float32, "r": types.int32, "l": types.int64}[letter]

    def _signature(self, op: Op | Block, arguments: tuple[Any, ...]) -> Any:
        if isinstance(op, Op):
            result = self._scalar(op.result) if op.result else self.types.void
            return result(*map(self._scalar, op.arguments))
        count = len(op.arrays)
        return self.types.void(*arguments[:count], *map(self._scalar, op.scalars))


class Mlir(_Compiler):
    """numba-cuda-mlir."""

    name = MLIR
    tables = tables_mlir

    def __init__(self) -> None:
        cuda = undisturbed(importlib.import_module, "numba_cuda_mlir.cuda")
        self.cuda, self.types = cuda, importlib.import_module("numba_cuda_mlir.types")

    def asm(self, op: Op | Block) -> Any:
        """Emit `llvm.inline_asm`; array elements are loaded before it and stored after it."""
        from numba_cuda_mlir._mlir import ir
        from numba_cuda_mlir._mlir.dialects import llvm, memref
        from numba_cuda_mlir._mlir.extras import types as T
        from numba_cuda_mlir.extending import intrinsic
        from numba_cuda_mlir.lowering_utilities import convert, index_of

        kind = {"f": T.f32, "r": T.i32, "l": T.i64}
        constraints = constraints_of(op)

        def emit_op(builder: Any, target: Any, args: Any, kwargs: Any) -> None:
            assert isinstance(op, Op)
            values = zip(builder.load_vars(args), op.arguments, strict=True)
            operands = [convert(value, kind[letter]()) for value, letter in values]
            result = kind[op.result]() if op.result else None
            value = llvm.inline_asm(result, operands, op.text, constraints, has_side_effects=True)
            if op.result:
                builder.store_var(target, value)

        def emit_block(builder: Any, target: Any, args: Any, kwargs: Any) -> None:
            assert isinstance(op, Block)
            values = builder.load_vars(args)
            arrays, scalars = values[: len(op.arrays)], values[len(op.arrays) :]
            places = [
                (array, i, letter, written)
                for array, (letter, length, written) in zip(arrays, op.arrays, strict=True)
                for i in range(length)
            ]
            out = [place for place in places if place[3]]
            order = out + [place for place in places if not place[3]]
            operands = [memref.load(array, [index_of(i)]) for array, i, _, _ in order]
            pairs = zip(scalars, op.scalars, strict=True)
            operands += [convert(value, kind[letter]()) for value, letter in pairs]
            result = None
            if len(out) == 1:
                result = kind[out[0][2]]()
            elif out:
                result = llvm.StructType.get_literal([kind[letter]() for _, _, letter, _ in out])
            value = llvm.inline_asm(result, operands, op.text, constraints, has_side_effects=True)
            for position, (array, i, letter, _) in enumerate(out):
                element = value
                if len(out) > 1:
                    index = ir.DenseI64ArrayAttr.get([position])
                    element = llvm.extractvalue(kind[letter](), value, index)
                memref.store(element, array, [index_of(i)])

        emit = emit_op if isinstance(op, Op) else emit_block
        arity = len(op.arguments) if isinstance(op, Op) else len(op.arrays) + len(op.scalars)
        return self._intrinsic(
            intrinsic, arity, lambda context, *args: (self._signature(op, args), emit)
        )

    def result_of(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Compile as a device function; what the compiler cannot do it says in its own words."""
        try:
            return super().result_of(function, arguments)
        except RuntimeError as error:
            # A gap in the compiler is told as a bug of it, with the words themselves within.
            places = [line for line in str(error).splitlines() if line.startswith("File ")]
            raise RuntimeError("\n".join([str(error.__context__ or error), *places])) from None

    def array_words(self, address: int, length: int, itemsize: int) -> tuple[int, ...]:
        """A memref: where it was allocated, where it begins, offset, length, stride."""
        return address, address, 0, length, 1

    def ltoir(self, function: Any, signature: Any, chip: str, threads: int) -> bytes:
        """Compile to LTO-IR; the chip has to be named, and lto asked for, or code is slow."""
        options = {"chip": chip, "lto": True, "opt_level": 3, "launch_bounds": (threads, 1)}
        dispatcher = self.cuda.jit(function, **options)
        with self.compiling_for(_capability(chip)):
            code: bytes = dispatcher.compile(signature, output="ltoir").metadata["ltoir"]
        return code

    @contextlib.contextmanager
    def compiling_for(self, capability: tuple[int, int]) -> Iterator[None]:
        """Enter the capability where the compiler keeps that of the GPU."""
        from numba_cuda_mlir import tools
        from numba_cuda_mlir.extending import refresh_registries

        refresh_registries()  # or instructions made since the last compilation are not known
        before = tools._cached_cc
        tools._cached_cc = before or capability
        try:
            yield
        finally:
            tools._cached_cc = before


class NumbaCuda(_Compiler):
    """numba-cuda."""

    name = NUMBA
    tables = tables_numba

    def __init__(self) -> None:
        import numba

        # It looks this up while it is imported; NumPy 2.5 has no such name.
        name = "row_stack"
        missing = not hasattr(np, name)
        if missing:
            setattr(np, name, np.vstack)
        try:
            self.cuda = undisturbed(importlib.import_module, "numba.cuda")
        finally:
            if missing:
                delattr(np, name)
        self.types = numba.types
        importlib.import_module("numba.cuda.libdevice")

    def asm(self, op: Op | Block) -> Any:
        """Emit LLVM's inline asm; array elements are loaded before it and stored after it."""
        from llvmlite import ir
        from numba.cuda.extending import intrinsic

        kind = {"f": ir.FloatType(), "r": ir.IntType(32), "l": ir.IntType(64)}
        constraints = constraints_of(op)

        def emit_op(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            assert isinstance(op, Op)
            result = kind[op.result] if op.result else ir.VoidType()
            function = ir.FunctionType(result, [kind[letter] for letter in op.arguments])
            value = builder.asm(function, op.text, constraints, args, True)
            return value if op.result else context.get_dummy_value()

        def emit_block(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            assert isinstance(op, Block)
            read: list[tuple[Any, str]] = []
            out: list[tuple[Any, str]] = []
            described = zip(args, signature.args, op.arrays, strict=False)
            for value, array_type, (letter, length, written) in described:
                data = context.make_array(array_type)(context, builder, value).data
                places = [builder.gep(data, [ir.IntType(32)(i)]) for i in range(length)]
                (out if written else read).extend((place, letter) for place in places)
            operands = [builder.load(place) for place, _ in out + read]
            operands += args[len(op.arrays) :]
            result = ir.VoidType()
            if out:
                members = [kind[letter] for _, letter in out]
                result = members[0] if len(out) == 1 else ir.LiteralStructType(members)
            function = ir.FunctionType(result, [operand.type for operand in operands])
            value = builder.asm(function, op.text, constraints, operands, True)
            for index, (place, _) in enumerate(out):
                builder.store(builder.extract_value(value, index) if len(out) > 1 else value, place)
            return context.get_dummy_value()

        emit = emit_op if isinstance(op, Op) else emit_block
        arity = len(op.arguments) if isinstance(op, Op) else len(op.arrays) + len(op.scalars)
        return self._intrinsic(
            intrinsic, arity, lambda context, *args: (self._signature(op, args), emit)
        )

    def array_words(self, address: int, length: int, itemsize: int) -> tuple[int, ...]:
        """Numba's array: two owners, length, item size, address, shape, stride."""
        return 0, 0, length, itemsize, address, length, itemsize

    def ltoir(self, function: Any, signature: Any, chip: str, threads: int) -> bytes:
        """Compile to LTO-IR."""
        from numba.cuda import compiler

        capability = _capability(chip)
        with self.compiling_for(capability):
            code, _ = compiler.compile(
                function,
                signature,
                device=False,
                abi="numba",
                cc=capability,
                opt=True,
                output="ltoir",
                launch_bounds=(threads, 1),
            )
        return bytes(code)

    @contextlib.contextmanager
    def compiling_for(self, capability: tuple[int, int]) -> Iterator[None]:
        """Answer in the place of the GPU when device functions are compiled."""
        dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
        ask = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = ask


def _capability(chip: str) -> tuple[int, int]:
    digits = chip.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])
