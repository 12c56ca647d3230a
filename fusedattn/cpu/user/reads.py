"""Aux arrays whose elements are variables: which read is the one to differentiate by.

A function is run once for each of its reads. In a run the reads are counted; the wanted one gives
an element with the slope 1 and says where it was, all others give constants.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import operator
from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from fusedattn.cpu.simd import I64
from fusedattn.cpu.user.dual import Dual, make_dual
from fusedattn.cpu.user.table import Table, held, index_types, read_element

# What a run is told and says, int64 each: how many reads there were, which one is wanted, and the
# array and (flat, in C order) element that it found; the array is -1 if there was no such read.
STATE = ("count", "wanted", "array", "element")


class Observed(types.Type):
    """A table of floats, whose elements are read as duals."""

    def __init__(self, storage: str, dtype: Any, ndim: int, number: int, real: Any) -> None:
        self.storage, self.dtype, self.ndim = storage, dtype, ndim
        self.number, self.real = number, real
        super().__init__(name=f"Observed({storage}, {dtype}, {ndim}, {number}, {real})")


def observed(table: Table, number: int, real: Any) -> Any:
    """Return the type of a table that is observed, if its elements are floats."""
    if not isinstance(table.dtype, types.Float):
        return table
    return Observed(table.storage, table.dtype, table.ndim, number, real)


@register_model(Observed)
class _ObservedModel(models.StructModel):
    def __init__(self, manager: Any, kind: Observed) -> None:
        integers = types.UniTuple(types.int64, kind.ndim)
        members = [("data", types.int64), ("shape", integers), ("strides", integers)]
        # Of what was indexed already: the flat element so far.
        super().__init__(manager, kind, [*members, ("state", types.int64), ("first", types.int64)])


def with_state(context: Any, builder: Any, kind: Any, value: Any, state: Any) -> Any:
    """Return an observed table in LLVM that knows where its run is described."""
    if not isinstance(kind, Observed):
        return value
    table = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    table.state, table.first = state, I64(0)
    return table._getvalue()


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        del kws
        table, index = args
        if not isinstance(table, Observed):
            return None
        parts = index_types(index)
        if parts is None or len(parts) > table.ndim:
            return None
        left = table.ndim - len(parts)
        rest = Observed(table.storage, table.dtype, left, table.number, table.real)
        return signature(rest if left else Dual(table.real), table, index)


@lower_builtin(operator.getitem, Observed, types.Any)
def _getitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind, index = sig.args
    table = cgutils.create_struct_proxy(kind)(context, builder, value=args[0])
    parts = index_types(index) or ()
    values = (
        cgutils.unpack_tuple(builder, args[1]) if isinstance(index, types.BaseTuple) else [args[1]]
    )
    lengths, strides = (cgutils.unpack_tuple(builder, t) for t in (table.shape, table.strides))
    address, element = table.data, table.first
    for value, part, length, stride in zip(values, parts, lengths, strides, strict=False):
        place = held(builder, context.cast(builder, value, part, types.int64), length)
        address = builder.add(address, builder.mul(place, stride))
        element = builder.add(builder.mul(element, length), place)
    if isinstance(sig.return_type, Observed):
        rest = cgutils.create_struct_proxy(sig.return_type)(context, builder)
        rest.data, rest.state, rest.first, done = address, table.state, element, len(parts)
        left = types.UniTuple(types.int64, kind.ndim - done)
        rest.shape = context.make_tuple(builder, left, lengths[done:])
        rest.strides = context.make_tuple(builder, left, strides[done:])
        return rest._getvalue()
    plain = Table(kind.storage, kind.dtype, 1)
    value = context.cast(
        builder, read_element(context, builder, plain, address), kind.dtype, kind.real
    )
    state = builder.inttoptr(table.state, I64.as_pointer())
    count, wanted, array, found = (builder.gep(state, [I64(i)]) for i in range(len(STATE)))
    turn = builder.load(count)
    builder.store(builder.add(turn, I64(1)), count)
    is_wanted = builder.icmp_signed("==", turn, builder.load(wanted))
    builder.store(builder.select(is_wanted, I64(kind.number), builder.load(array)), array)
    builder.store(builder.select(is_wanted, element, builder.load(found)), found)
    one, zero = (context.get_constant(kind.real, number) for number in (1.0, 0.0))
    slope = builder.select(is_wanted, one, zero)
    return make_dual(context, builder, sig.return_type, value, slope)
