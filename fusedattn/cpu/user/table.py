"""The type under which compiled functions see an aux array: read-only, indexed by integers.

An index counts from the end where it is negative, as in Python, and is held to the array: an
element outside is never read, whatever the index. (A kernel asks a function about hidden pairs too,
where ``table[q_idx - k_idx]`` may lie far outside; what it finds there does not matter.)
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin, lower_getattr
from numba.core.typing.templates import (
    AbstractTemplate,
    AttributeTemplate,
    infer_getattr,
    infer_global,
    signature,
)
from numba.extending import models, register_model

from fusedattn.cpu.simd import I64, MEMORY_TYPE, Emitter

# Dtypes that Numba has no type for on the CPU: their elements become reals when they are read.
HALF_TYPES = ("float16", "bfloat16")


class Table(types.Type):
    """An aux array of a storage type, whose elements are read as ``dtype``."""

    def __init__(self, storage: str, dtype: Any, ndim: int, name: str = "") -> None:
        self.storage, self.dtype, self.ndim = storage, dtype, ndim
        super().__init__(name=name or f"Table({storage}, {dtype}, {ndim})")

    @property
    def element(self) -> Any:
        """Type of an element as the function sees it."""
        return self.dtype

    def of_axes(self, ndim: int) -> Table:
        """Return the type of what is left of such a table where leading axes are indexed."""
        return Table(self.storage, self.dtype, ndim)


def table_type(storage: str, ndim: int, real: Any) -> Table:
    """Return the type of an aux array in a function whose scores are of the type ``real``."""
    if storage in HALF_TYPES:
        return Table(storage, real, ndim)
    if storage == "bool":
        return Table(storage, types.boolean, ndim)
    kind = getattr(types, storage)
    # Numba would make two uint8 an uint64, whose difference is never negative.
    is_narrow = isinstance(kind, types.Integer) and kind != types.uint64
    return Table(storage, types.int64 if is_narrow else kind, ndim)


def words_of(ndim: int) -> int:
    """How many int64 describe a table in memory: address, lengths, strides in bytes."""
    return 1 + 2 * ndim


def members_of(kind: Table) -> list[tuple[str, Any]]:
    """Return the members of a table in memory: strides are in bytes."""
    integers = types.UniTuple(types.int64, kind.ndim)
    return [("data", types.int64), ("shape", integers), ("strides", integers)]


@register_model(Table)
class _TableModel(models.StructModel):
    def __init__(self, manager: Any, kind: Table) -> None:
        super().__init__(manager, kind, members_of(kind))


def read_table(context: Any, builder: Any, kind: Table, words: Any, first: int) -> Any:
    """Load a table from its description, ``words`` of int64 from the ``first`` on."""
    loaded = [
        builder.load(builder.gep(words, [I64(first + i)])) for i in range(words_of(kind.ndim))
    ]
    table = cgutils.create_struct_proxy(kind)(context, builder)
    table.data = loaded[0]
    lengths, strides = loaded[1 : 1 + kind.ndim], loaded[1 + kind.ndim :]
    if kind.ndim:
        table.shape, table.strides = (
            context.make_tuple(builder, types.UniTuple(types.int64, kind.ndim), values)
            for values in (lengths, strides)
        )
    return table._getvalue()


def index_types(index: Any) -> tuple[Any, ...] | None:
    """Types of the integers of an index, None if it is something else."""
    parts: tuple[Any, ...] = (index,)
    if isinstance(index, types.BaseTuple):
        parts = tuple(part for part in index)  # type: ignore[attr-defined]
    return parts if all(isinstance(part, types.Integer) for part in parts) else None


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        del kws
        table, index = args
        if not isinstance(table, Table):
            return None
        parts = index_types(index)
        if parts is None or len(parts) > table.ndim:
            return None
        left = table.ndim - len(parts)
        return signature(table.of_axes(left) if left else table.element, table, index)


@lower_builtin(operator.getitem, Table, types.Any)
def _getitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    table, address, _ = followed(context, builder, sig, args)
    if isinstance(sig.return_type, Table):
        return rest_of(context, builder, table, sig.return_type, address)._getvalue()
    return read_element(context, builder, sig.args[0], address)


def followed(
    context: Any, builder: Any, sig: Any, args: Any
) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Follow an index into a table: the table, the address, and each (place, length) of an axis."""
    kind, index = sig.args
    table = cgutils.create_struct_proxy(kind)(context, builder, value=args[0])
    values = (
        cgutils.unpack_tuple(builder, args[1]) if isinstance(index, types.BaseTuple) else [args[1]]
    )
    lengths, strides = (cgutils.unpack_tuple(builder, t) for t in (table.shape, table.strides))
    address, places = table.data, []
    parts = index_types(index) or ()
    for value, part, length, stride in zip(values, parts, lengths, strides, strict=False):
        place = held(builder, context.cast(builder, value, part, types.int64), length)
        address = builder.add(address, builder.mul(place, stride))
        places.append((place, length))
    return table, address, places


def rest_of(context: Any, builder: Any, table: Any, kind: Table, address: Any) -> Any:
    """Return the table of the last axes of a table, which begins at an address."""
    rest = cgutils.create_struct_proxy(kind)(context, builder)
    rest.data = address
    lengths, strides = (cgutils.unpack_tuple(builder, t) for t in (table.shape, table.strides))
    left = types.UniTuple(types.int64, kind.ndim)
    rest.shape = context.make_tuple(builder, left, lengths[-kind.ndim :])
    rest.strides = context.make_tuple(builder, left, strides[-kind.ndim :])
    return rest


def held(builder: Any, index: Any, length: Any) -> Any:
    """Count from the end where negative, then move into ``0 <= index < length``."""
    zero, last = I64(0), builder.sub(length, I64(1))
    wrapped = builder.add(index, length)
    index = builder.select(builder.icmp_signed("<", index, zero), wrapped, index)
    index = builder.select(builder.icmp_signed("<", index, zero), zero, index)
    return builder.select(builder.icmp_signed(">", index, last), last, index)


def read_element(context: Any, builder: Any, kind: Table, address: Any) -> Any:
    """Load one element as the type in which it counts."""
    if kind.storage in MEMORY_TYPE:
        return Emitter(builder, kind.dtype.bitwidth, 1).load_storage(address, kind.storage)
    if kind.storage == "bool":
        byte = builder.load(builder.inttoptr(address, ir.IntType(8).as_pointer()))
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))
    stored = getattr(types, kind.storage)
    memory = context.get_value_type(stored).as_pointer()
    element = builder.load(builder.inttoptr(address, memory))
    element.align = 1
    return context.cast(builder, element, stored, kind.dtype)


@infer_getattr
class _Attributes(AttributeTemplate):
    key = Table

    def resolve_shape(self, table: Table) -> Any:
        return types.UniTuple(types.int64, table.ndim)

    def resolve_ndim(self, table: Table) -> Any:
        del table
        return types.int64


@lower_getattr(Table, "shape")
def _shape(context: Any, builder: Any, kind: Table, value: Any) -> Any:
    return cgutils.create_struct_proxy(kind)(context, builder, value=value).shape


@lower_getattr(Table, "ndim")
def _ndim(context: Any, builder: Any, kind: Table, value: Any) -> Any:
    del context, builder, value
    return I64(kind.ndim)


@infer_global(len)
class _Len(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        del kws
        known = len(args) == 1 and isinstance(args[0], Table) and args[0].ndim
        return signature(types.int64, *args) if known else None


@lower_builtin(len, Table)
def _len(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    table = cgutils.create_struct_proxy(sig.args[0])(context, builder, value=args[0])
    return cgutils.unpack_tuple(builder, table.shape)[0]
