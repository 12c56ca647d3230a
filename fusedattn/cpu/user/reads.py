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
from numba.extending import models, register_model

from fusedattn.cpu.simd import I64
from fusedattn.cpu.user.dual import Dual, make_dual
from fusedattn.cpu.user.table import Table, followed, members_of, read_element, rest_of

# What a run is told and says, int64 each: how many reads there were, which one is wanted, and the
# array and (flat, in C order) element that it found; the array is -1 if there was no such read.
STATE = ("count", "wanted", "array", "element")


class Observed(Table):
    """A table of floats, whose elements are read as duals."""

    def __init__(self, storage: str, dtype: Any, ndim: int, number: int, real: Any) -> None:
        self.number, self.real = number, real
        name = f"Observed({storage}, {dtype}, {ndim}, {number}, {real})"
        super().__init__(storage, dtype, ndim, name)

    @property
    def element(self) -> Any:
        """Type of an element as the function sees it."""
        return Dual(self.real)

    def of_axes(self, ndim: int) -> Observed:
        """Return the type of what is left of such a table where leading axes are indexed."""
        return Observed(self.storage, self.dtype, ndim, self.number, self.real)


def observed(table: Table, number: int, real: Any) -> Any:
    """Return the type of a table that is observed, if its elements are floats."""
    if not isinstance(table.dtype, types.Float):
        return table
    return Observed(table.storage, table.dtype, table.ndim, number, real)


@register_model(Observed)
class _ObservedModel(models.StructModel):
    def __init__(self, manager: Any, kind: Observed) -> None:
        # Of what was indexed already: the flat element so far.
        more = [("state", types.int64), ("first", types.int64)]
        super().__init__(manager, kind, members_of(kind) + more)


def with_state(context: Any, builder: Any, kind: Any, value: Any, state: Any) -> Any:
    """Return an observed table in LLVM that knows where its run is described."""
    if not isinstance(kind, Observed):
        return value
    table = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    table.state, table.first = state, I64(0)
    return table._getvalue()


@lower_builtin(operator.getitem, Observed, types.Any)
def _getitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = sig.args[0]
    table, address, places = followed(context, builder, sig, args)
    element = table.first
    for place, length in places:
        element = builder.add(builder.mul(element, length), place)
    if isinstance(sig.return_type, Observed):
        rest = rest_of(context, builder, table, sig.return_type, address)
        rest.state, rest.first = table.state, element
        return rest._getvalue()
    value = context.cast(
        builder, read_element(context, builder, kind, address), kind.dtype, kind.real
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
