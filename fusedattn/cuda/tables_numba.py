"""Aux arrays for numba-cuda: the type of a table, and the code of its operations."""

# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc,name-defined"

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

from fusedattn.cuda.tables import Kind, element_type, result_of


def _part(name: str) -> Any:
    """Return a module of numba-cuda, which lies in the place of numba's own."""
    return importlib.import_module(f"numba.cuda.{name}")


@functools.cache
def table_class() -> Any:
    """Return the type of tables, which the compiler knows from then on."""
    from llvmlite import ir

    cgutils, extending, types = _part("cgutils"), _part("extending"), _part("types")
    templates, imputils = _part("typing.templates"), _part("core.imputils")
    typing, lowering = _part("cudadecl").registry, _part("cudaimpl").registry
    word = ir.IntType(64)

    class Table(types.Type):
        def __init__(self, storage: str, dtype: Any, ndim: int) -> None:
            self.storage, self.dtype, self.ndim = storage, dtype, ndim
            super().__init__(name=f"Table({storage}, {dtype}, {ndim})")

    @extending.register_model(Table)
    class _Model(extending.core_models.StructModel):
        def __init__(self, manager: Any, kind: Any) -> None:
            members = [(f"word_{i}", types.int64) for i in range(1 + 2 * kind.ndim)]
            super().__init__(manager, kind, members)

    @typing.register_global(operator.getitem)
    class _GetItem(templates.AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            table, index = args
            result = result_of(types, table, index) if isinstance(table, Table) else None
            return None if result is None else templates.signature(result, table, index)

    @typing.register_global(len)
    class _Len(templates.AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            known = len(args) == 1 and isinstance(args[0], Table) and args[0].ndim
            return templates.signature(types.int64, *args) if known else None

    @typing.register_attr
    class _Attributes(templates.AttributeTemplate):
        key = Table

        def resolve_shape(self, table: Any) -> Any:
            return types.UniTuple(types.int64, table.ndim)

        def resolve_ndim(self, table: Any) -> Any:
            del table
            return types.int64

    @lowering.lower(operator.getitem, Table, types.Any)
    def _getitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, index = sig.args
        address, *words = cgutils.unpack_tuple(builder, args[0])
        lengths, strides = words[: kind.ndim], words[kind.ndim :]
        parts, values = (index,), [args[1]]
        if isinstance(index, types.BaseTuple):
            parts, values = tuple(index), cgutils.unpack_tuple(builder, args[1])
        for part, value, length, stride in zip(parts, values, lengths, strides, strict=False):
            place = context.cast(builder, value, part, types.int64)
            wrapped = builder.add(place, length)
            place = builder.select(builder.icmp_signed("<", place, word(0)), wrapped, place)
            place = builder.select(builder.icmp_signed("<", place, word(0)), word(0), place)
            last = builder.sub(length, word(1))
            place = builder.select(builder.icmp_signed(">", place, last), last, place)
            address = builder.add(address, builder.mul(place, stride))
        if len(parts) < kind.ndim:
            return _packed(builder, [address, *lengths[len(parts) :], *strides[len(parts) :]])
        return _element(builder, kind.storage, address, context.get_value_type(kind.dtype))

    @lowering.lower(len, Table)
    def _len(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.extract_value(args[0], 1)

    @lowering.lower_getattr(Table, "shape")
    def _shape(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        lengths = cgutils.unpack_tuple(builder, value)[1 : 1 + kind.ndim]
        shape = context.make_tuple(builder, types.UniTuple(types.int64, kind.ndim), lengths)
        return imputils.impl_ret_untracked(context, builder, types.int64, shape)

    @lowering.lower_getattr(Table, "ndim")
    def _ndim(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        del context, builder, value
        return word(kind.ndim)

    return Table


def _packed(builder: Any, words: list[Any]) -> Any:
    from llvmlite import ir

    struct = ir.Constant(ir.LiteralStructType([ir.IntType(64)] * len(words)), ir.Undefined)
    for i, word in enumerate(words):
        struct = builder.insert_value(struct, word, i)
    return struct


def _element(builder: Any, storage: str, address: Any, kind: Any) -> Any:
    """Load one element as the type in which it counts."""
    from llvmlite import ir

    def load(memory: Any) -> Any:
        global_memory = 1
        return builder.load(builder.inttoptr(address, memory.as_pointer(global_memory)))

    if storage in ("float32", "float64"):
        return load(ir.FloatType() if storage == "float32" else ir.DoubleType())
    if storage == "float16":
        return builder.fpext(load(ir.HalfType()), kind)
    if storage == "bfloat16":
        word = builder.shl(builder.zext(load(ir.IntType(16)), ir.IntType(32)), ir.IntType(32)(16))
        single = builder.bitcast(word, ir.FloatType())
        return single if isinstance(kind, ir.FloatType) else builder.fpext(single, kind)
    if storage == "bool":
        return builder.icmp_unsigned("!=", load(ir.IntType(8)), ir.IntType(8)(0))
    bits = int(storage.removeprefix("u").removeprefix("int"))
    whole = load(ir.IntType(bits))
    if bits == 64:
        return whole
    return (builder.zext if storage.startswith("u") else builder.sext)(whole, ir.IntType(64))


def table_maker(
    kind: Kind, real: Any, wrap: Callable[[Any, int, Callable[..., Any]], Any]
) -> Callable[..., Any]:
    """Return ``make(address, *lengths, *strides)`` for kernels."""
    types = _part("types")
    table = table_class()(kind.storage, element_type(types, kind.storage, real), kind.ndim)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _packed(builder, list(args))

    count = 1 + kind.words
    signature = table(*[types.int64] * count)
    made: Callable[..., Any] = wrap(
        _part("extending").intrinsic, count, lambda context, *args: (signature, emit)
    )
    return made
