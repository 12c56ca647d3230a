"""A record in a kernel: the fields at an address as attributes."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from numba import from_dtype, types
from numba.extending import intrinsic

from fusedattn.cpu.backward_params import BACKWARD
from fusedattn.cpu.params import PARAMS


def view_as(dtype: Any) -> Any:
    """Return an intrinsic ``view(address)``: a record of this NumPy dtype at an address."""
    record: Any = from_dtype(dtype)

    @intrinsic
    def view(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(sig.return_type))

        return record(types.int64), codegen

    return view


params_at = view_as(PARAMS)
backward_at = view_as(BACKWARD)
