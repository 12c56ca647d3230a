"""Laws of the gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fusedattn import reference
from fusedattn.problem import Gradients
from fusedattn.testing.cases import Case
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.kernel import Kernel, OutsideDomain, quietly
from fusedattn.testing.laws.common import Array


def _pull_back(kernel: Kernel, case: Case) -> tuple[Array, Array | None, Gradients]:
    """Call the kernel's gradient; returns what came back and the gradients."""
    problem, rng = case.problem, case.rng
    rounded = dataclasses.replace(problem, return_lse=True)
    out, lse = reference.forward(rounded)
    d_out = rng.standard_normal(problem.out_shape).astype(problem.out_dtype)
    keywords: dict[str, Any] = {
        k: v for k, v in case.keywords.items() if k not in ("return_lse", "layout")
    }
    d_lse = None
    if kernel.can("d_lse"):
        d_lse = rng.standard_normal(problem.lse_shape).astype(problem.accumulator)
        keywords["d_lse"] = d_lse
    assert kernel.gradient is not None
    arrays = [d_out, case.q, case.k, case.v, out, lse]
    before = [array.tobytes() for array in arrays if array is not None]
    found = quietly(kernel.gradient, *arrays, **keywords)
    after = [array.tobytes() for array in arrays if array is not None]
    assert before == after, "the gradient wrote to one of its inputs"
    if not isinstance(found, Gradients):
        found = Gradients(*[*found, None, None][:5])
    return d_out, d_lse, found


def gradients_equal_reference(kernel: Kernel, case: Case) -> None:
    """Gradients of q, k, v, bias and sinks equal the reference's within their budgets.

    Domain: operands up to ``2**20``, whose products of four stay in range; forward has a wider one.
    If this does not hold a model trains on something else than its loss.
    """
    problem = case.problem
    extra = (x for x in (problem.bias, problem.sinks) if x is not None)
    for array in (case.q, case.k, case.v, *extra):
        size = np.abs(array.astype(np.float64))
        if size[np.isfinite(size)].max(initial=0.0) > 2.0**20:
            raise OutsideDomain("operands beyond 2**20")
    d_out, d_lse, found = _pull_back(kernel, case)
    # The reference's own result, before it is rounded to the type of each operand.
    wide = dataclasses.replace(
        problem,
        q=problem.q.astype(np.float64),
        k=problem.k.astype(np.float64),
        v=problem.v.astype(np.float64),
        bias=None if problem.bias is None else problem.bias.astype(np.float64),
        sinks=None if problem.sinks is None else problem.sinks.astype(np.float64),
    )
    expected = reference.backward(wide, d_out, None, None, d_lse)
    half = case.q.dtype if case.half_weights and case.q.dtype.itemsize == 2 else None
    budget = backward_budget(problem, d_out, d_lse, rounds_weights_to=half)
    for name, got, want, allowed in zip(Gradients._fields, found, expected, budget, strict=True):
        if got is None and name in ("d_bias", "d_sinks"):
            continue
        assert isinstance(got, np.ndarray), f"{name} is of type {type(got).__name__}"
        assert want is not None
        assert allowed is not None
        assert_within(got, want, allowed, name=name)


def adjoint_identity(kernel: Kernel, case: Case) -> None:
    """``<d_out, J x>`` equals ``<J^T d_out, x>``.

    The directional derivative ``J x`` is a central difference of the kernel's own forward. Domain:
    float64, moderate values. If this does not hold, forward and backward belong to different
    functions.
    """
    case = case.without("return_lse", "dropout_p", "seed", "layout")
    keep_d_lse = dataclasses.replace(kernel, supports=kernel.supports - {"d_lse"})
    d_out, _, found = _pull_back(keep_d_lse, case)
    rng = np.random.default_rng(case.seed + 1)
    moves = {name: rng.standard_normal(getattr(case, name).shape) for name in "qkv"}
    step = 2.0**-18
    ends = []
    for sign in (1, -1):
        moved = {n: getattr(case, n) + sign * step * moves[n] for n in "qkv"}
        ends.append(kernel(case.change(**moved)).out)
    forward = float((d_out * (ends[0] - ends[1])).sum() / (2 * step))
    terms = [np.asarray(found[i], np.float64) * moves[name] for i, name in enumerate("qkv")]
    backward = float(sum(term.sum() for term in terms))
    # The difference quotient is off by step**2 / 6 times a third derivative. Each derivative of a
    # softmax mean brings at most the spread of the logits per unit step and a small factor. The
    # rounding errors of both ends are divided by the step.
    scale = abs(case.problem.scale)
    spread = 1.0 + scale * max(
        float(np.abs(moves["q"]).sum(-1).max(initial=0.0) * np.abs(case.k).max(initial=0.0)),
        float(np.abs(case.q).max(initial=0.0) * np.abs(moves["k"]).sum(-1).max(initial=0.0)),
        float(np.abs(moves["q"]).sum(-1).max(initial=0.0) * np.abs(moves["k"]).max(initial=0.0)),
    )
    v_size = float(np.abs(case.v).max(initial=0.0) + np.abs(moves["v"]).max(initial=0.0))
    slack = float(np.abs(d_out).sum()) * v_size * (4 * spread) ** 3 * step**2
    slack += float((np.abs(d_out) * case.budget.out).sum()) / step
    assert abs(forward - backward) <= slack, (
        f"<d_out, J x> is {forward}, <J^T d_out, x> is {backward}: further apart than {slack:.3g}"
    )
