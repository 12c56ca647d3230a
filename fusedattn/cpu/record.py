"""A record in a kernel: the fields at an address as attributes."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from numba import from_dtype, types

from fusedattn.cpu.backward_params import BACKWARD
from fusedattn.cpu.params import PARAMS
from fusedattn.cpu.simd import make_intrinsic


def view_as(dtype: Any) -> Any:
    """Return an intrinsic ``view(address)``: a record of this NumPy dtype at an address."""
    record: Any = from_dtype(dtype)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return make_intrinsic(record(types.int64), codegen)


params_at = view_as(PARAMS)
backward_at = view_as(BACKWARD)
