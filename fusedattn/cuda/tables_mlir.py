"""Aux arrays for numba-cuda-mlir: the type of a table, and the code of its operations."""

# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from fusedattn.cuda.tables import Kind, element_type, result_of


@functools.cache
def table_class() -> Any:
    """Return the type of tables, which the compiler knows from then on."""
    from numba_cuda_mlir import extending, types
    from numba_cuda_mlir._mlir.dialects import arith, llvm
    from numba_cuda_mlir._mlir.extras import types as T
    from numba_cuda_mlir.lowering_utilities import convert
    from numba_cuda_mlir.models import StructModel
    from numba_cuda_mlir.numba_cuda.typing import templates

    class Table(types.Type):
        def __init__(self, storage: str, dtype: Any, ndim: int) -> None:
            self.storage, self.dtype, self.ndim = storage, dtype, ndim
            super().__init__(name=f"Table({storage}, {dtype}, {ndim})")

    @extending.register_model(Table)
    class _Model(StructModel):
        def __init__(self, manager: Any, kind: Any) -> None:
            members = [(f"word_{i}", types.int64) for i in range(1 + 2 * kind.ndim)]
            super().__init__(manager, kind, members)

    @extending.typing_registry.register_global(operator.getitem)
    class _GetItem(templates.AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            table, index = args
            result = result_of(types, table, index) if isinstance(table, Table) else None
            return None if result is None else templates.signature(result, table, index)

    @extending.typing_registry.register_global(len)
    class _Len(templates.AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            known = len(args) == 1 and isinstance(args[0], Table) and args[0].ndim
            return templates.signature(types.int64, *args) if known else None

    @extending.typing_registry.register_attr
    class _Attributes(templates.AttributeTemplate):
        key = Table

        def resolve_shape(self, table: Any) -> Any:
            return types.UniTuple(types.int64, table.ndim)

        def resolve_ndim(self, table: Any) -> Any:
            del table
            return types.int64

    def loaded(builder: Any, variable: Any) -> tuple[Any, list[Any]]:
        kind, struct = builder.get_numba_type(variable.name), builder.load_var(variable)
        return kind, [_member(struct, i) for i in range(1 + 2 * kind.ndim)]

    @extending.lower_builtin(operator.getitem, Table, types.Any)
    def _getitem(builder: Any, target: Any, args: Any, kwargs: Any) -> None:
        del kwargs
        kind, (address, *words) = loaded(builder, args[0])
        lengths, strides = words[: kind.ndim], words[kind.ndim :]
        index = builder.load_var(args[1])
        parts = index if isinstance(index, tuple) else (index,)
        zero, one = (arith.constant(T.i64(), number) for number in (0, 1))
        for part, length, stride in zip(parts, lengths, strides, strict=False):
            place = convert(part, T.i64())
            is_negative = arith.cmpi(arith.CmpIPredicate.slt, place, zero)
            place = arith.select(is_negative, arith.addi(place, length), place)
            place = arith.minsi(arith.maxsi(place, zero), arith.subi(length, one))
            address = arith.addi(address, arith.muli(place, stride))
        if len(parts) < kind.ndim:
            rest = _packed([address, *lengths[len(parts) :], *strides[len(parts) :]])
            builder.store_var(target, rest)
            return
        real = T.f64() if str(kind.dtype) == "float64" else T.f32()
        global_memory = 1
        place = llvm.inttoptr(llvm.PointerType.get(global_memory), address)
        builder.store_var(target, _element(kind.storage, place, real))

    @extending.lower_builtin(len, Table)
    def _len(builder: Any, target: Any, args: Any, kwargs: Any) -> None:
        del kwargs
        builder.store_var(target, loaded(builder, args[0])[1][1])

    @extending.lowering_registry.lower_getattr(Table, "shape")
    def _shape(context: Any, builder: Any, target: Any, value: Any) -> None:
        del context
        kind, words = loaded(builder, value)
        builder.store_var(target, tuple(words[1 : 1 + kind.ndim]))

    @extending.lowering_registry.lower_getattr(Table, "ndim")
    def _ndim(context: Any, builder: Any, target: Any, value: Any) -> None:
        del context
        kind = builder.get_numba_type(value.name)
        builder.store_var(target, arith.constant(T.i64(), kind.ndim))

    return Table


def _member(struct: Any, i: int) -> Any:
    from numba_cuda_mlir._mlir import ir
    from numba_cuda_mlir._mlir.dialects import llvm
    from numba_cuda_mlir._mlir.extras import types as T

    return llvm.extractvalue(T.i64(), struct, ir.DenseI64ArrayAttr.get([i]))


def _packed(words: list[Any]) -> Any:
    from numba_cuda_mlir._mlir import ir
    from numba_cuda_mlir._mlir.dialects import llvm
    from numba_cuda_mlir._mlir.extras import types as T

    struct = llvm.UndefOp(llvm.StructType.get_literal([T.i64()] * len(words))).result
    for i, word in enumerate(words):
        struct = llvm.insertvalue(struct, word, ir.DenseI64ArrayAttr.get([i]))
    return struct


def _element(storage: str, place: Any, real: Any) -> Any:
    """Load one element as the type in which it counts."""
    from numba_cuda_mlir._mlir.dialects import arith, llvm
    from numba_cuda_mlir._mlir.extras import types as T

    if storage in ("float32", "float64"):
        return llvm.load(T.f32() if storage == "float32" else T.f64(), place)
    if storage == "float16":
        return arith.extf(real, llvm.load(T.f16(), place))
    if storage == "bfloat16":
        word = arith.extui(T.i32(), llvm.load(T.i16(), place))
        single = arith.bitcast(T.f32(), arith.shli(word, arith.constant(T.i32(), 16)))
        return single if real == T.f32() else arith.extf(real, single)
    if storage == "bool":
        byte = llvm.load(T.i8(), place)
        return arith.cmpi(arith.CmpIPredicate.ne, byte, arith.constant(T.i8(), 0))
    bits = int(storage.removeprefix("u").removeprefix("int"))
    whole = llvm.load({8: T.i8, 16: T.i16, 32: T.i32, 64: T.i64}[bits](), place)
    if bits == 64:
        return whole
    return (arith.extui if storage.startswith("u") else arith.extsi)(T.i64(), whole)


def table_maker(
    kind: Kind, real: Any, wrap: Callable[[Any, int, Callable[..., Any]], Any]
) -> Callable[..., Any]:
    """Return ``make(address, *lengths, *strides)`` for kernels."""
    from numba_cuda_mlir import extending, types
    from numba_cuda_mlir._mlir.extras import types as T
    from numba_cuda_mlir.lowering_utilities import convert

    table = table_class()(kind.storage, element_type(types, kind.storage, real), kind.ndim)

    def emit(builder: Any, target: Any, args: Any, kwargs: Any) -> None:
        del kwargs
        words = [convert(value, T.i64()) for value in builder.load_vars(args)]
        builder.store_var(target, _packed(words))

    count = 1 + kind.words
    signature = table(*[types.int64] * count)
    made: Callable[..., Any] = wrap(
        extending.intrinsic, count, lambda context, *args: (signature, emit)
    )
    return made
