"""Calls of the gradient under test: what goes in, how it lies in memory, what must come out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import reference
from fusedattn.problem import Gradients
from fusedattn.testing.buffers import Placed
from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import Kernel, dense, place, quietly, views_of

Array = NDArray[Any]

# The gradients that are one array each.
ARRAYS = Gradients._fields[:5]


@dataclass(frozen=True)
class Incoming:
    """What a gradient is given beside the arguments of the call; canonical axis order."""

    d_out: Array
    out: Array
    lse: Array
    d_lse: Array | None

    def change(self, **changes: Any) -> Incoming:
        """Copy with other arrays."""
        return dataclasses.replace(self, **changes)


def incoming(kernel: Kernel, case: Case) -> Incoming:
    """Draw what comes back, and compute out and lse: by the kernel itself where it reports an lse.

    A gradient may rest on its own forward: its weights are ``exp(score - lse)``, and where scores
    are large an lse made of other roundings would fit none of them.
    """
    problem, rng = case.problem, case.rng
    forward = case.change(return_lse=True) if kernel.can("return_lse") else case
    if kernel.gives_lse:
        out, lse = kernel(forward)
    else:
        out, lse = reference.forward(problem)
    assert lse is not None
    d_out = rng.standard_normal(problem.out_shape).astype(problem.out_dtype)
    d_lse = None
    if kernel.can("d_lse"):
        d_lse = rng.standard_normal(problem.lse_shape).astype(problem.accumulator)
    return Incoming(d_out, out, lse, d_lse)


def pull_back(kernel: Kernel, case: Case, given: Incoming) -> Gradients:
    """Call the gradient on fresh guarded copies and check what any call must keep to.

    No input and nothing around it is written, and each gradient has the shape and dtype of its
    operand and memory of its own. One that returns three gradients has none of bias and sinks; one
    that returns five has them where the operand was given, and None where it was not.
    """
    assert kernel.gradient is not None
    bshd = case.keywords.get("layout") == "bshd"
    placed = place(case)
    for name in ("d_out", "out", "lse", "d_lse"):
        array = getattr(given, name)
        if array is not None:
            how = dense(case, name, bshd and name in ("d_out", "out"))
            placed[name] = Placed(array, how)
    arguments: dict[str, Any] = {k: v for k, v in case.keywords.items() if k != "return_lse"}
    arguments |= views_of(placed, arguments)
    if bshd:
        for name in ("q", "k", "v", "d_out", "out"):
            arguments[name] = arguments[name].swapaxes(-3, -2)
    first = [arguments.pop(name) for name in ("d_out", "q", "k", "v", "out", "lse")]
    found = quietly(kernel.gradient, *first, **arguments)
    for name, buffer in placed.items():
        assert buffer.untouched(), f"the gradient wrote to its input {name}, or next to it"
        for label, array in zip(ARRAYS, found, strict=False):
            shared = isinstance(array, np.ndarray) and buffer.overlaps(array)
            assert not shared, f"{label} is a view of {name}"
    return _canonical(found, case, bshd)


def _canonical(found: Any, case: Case, bshd: bool) -> Gradients:
    is_some = isinstance(found, tuple) and len(found) in (3, 5, 6)
    assert is_some, f"the gradient returned {type(found).__name__}, expected 3 or 5 gradients"
    operands = [case.q, case.k, case.v, case.keywords.get("bias"), case.keywords.get("sinks")]
    arrays: list[Any] = []
    for name, array, operand in zip(ARRAYS, found, operands, strict=False):
        if operand is None:
            assert array is None, f"{name} is not None, but there is no such operand"
            arrays.append(None)
            continue
        assert isinstance(array, np.ndarray), f"{name} is of type {type(array).__name__}"
        assert array.dtype == operand.dtype, f"{name} has dtype {array.dtype}, not {operand.dtype}"
        view = array.swapaxes(-3, -2) if bshd and name in ("d_q", "d_k", "d_v") else array
        assert view.shape == operand.shape, f"{name} has shape {view.shape}, not {operand.shape}"
        arrays.append(view.copy())
    return Gradients(*[*arrays, None, None][:5])
