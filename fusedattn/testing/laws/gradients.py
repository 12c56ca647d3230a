"""Laws of what the gradients are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fusedattn import reference
from fusedattn.problem import Gradients
from fusedattn.testing.cases import Case
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import COARSE, backward_budget
from fusedattn.testing.kernel import Kernel, OutsideDomain
from fusedattn.testing.laws.common import Array, full
from fusedattn.testing.laws.equality import hide_rows
from fusedattn.testing.pullback import ARRAYS, Incoming, incoming, pull_back
from fusedattn.testing.roundoff import largest, smallest_normal
from fusedattn.testing.rows import any_over, attended
from fusedattn.testing.tolerance import working_roundoff


def gradients_equal_reference(kernel: Kernel, case: Case) -> None:
    """Gradients of q, k, v, bias and sinks equal the reference's within their budgets.

    Domain: operands up to ``2**20``, whose products of four stay in range; forward has a wider one.
    If this does not hold a model trains on something else than its loss.
    """
    check_domain(case)
    given = incoming(kernel, case)
    assert_equal_reference(pull_back(kernel, case, given), case, given)


def check_domain(case: Case) -> None:
    """Raise `OutsideDomain` where products of four operands may leave the range."""
    problem = case.problem
    extra = (x for x in (problem.bias, problem.sinks) if x is not None)
    for array in (case.q, case.k, case.v, *extra):
        size = np.abs(array.astype(np.float64))
        if size[np.isfinite(size)].max(initial=0.0) > 2.0**20:
            raise OutsideDomain("operands beyond 2**20")


def assert_equal_reference(found: Gradients, case: Case, given: Incoming) -> None:
    """Assert that gradients are the reference's within their budgets, where there are any."""
    assert_equal(found, *reference_and_budget(case, given))


def assert_equal(found: Gradients, expected: Gradients, budget: Gradients) -> None:
    """Assert that gradients are within their budgets, where there are any, of what is expected."""
    for name, got, want, allowed in zip(ARRAYS, found[:5], expected[:5], budget[:5], strict=True):
        if got is not None and want is not None and allowed is not None:
            assert_within(got, want, allowed, name=name)


def reference_and_budget(case: Case, given: Incoming) -> tuple[Gradients, Gradients]:
    """Return the reference's gradients of a call, and how far from them others may be."""
    problem = case.problem
    # The reference's own result, before it is rounded to the type of each operand.
    wide = dataclasses.replace(
        problem,
        q=problem.q.astype(np.float64),
        k=problem.k.astype(np.float64),
        v=problem.v.astype(np.float64),
        bias=None if problem.bias is None else problem.bias.astype(np.float64),
        sinks=None if problem.sinks is None else problem.sinks.astype(np.float64),
    )
    expected = reference.backward(wide, given.d_out, None, None, given.d_lse)
    half = case.q.dtype if case.half_weights and case.q.dtype.itemsize == 2 else None
    return expected, backward_budget(problem, given.d_out, given.d_lse, rounds_weights_to=half)


def finite_gradients(kernel: Kernel, case: Case) -> None:
    """Finite operands give finite gradients wherever no sum of their terms can overflow.

    Logits and values stand at the end of the range; what comes back is scaled down until each
    gradient's terms, taken as positive numbers, add up to a quarter of the largest number at most.
    If this does not hold, one large activation turns all weights of a model into NaN.
    """
    given = incoming(kernel, case)
    room = _room(case, given)
    if not np.isfinite(room):
        raise OutsideDomain("values whose products overflow in float64")
    shrink = np.float64(min(1.0, room))
    given = given.change(
        d_out=_scaled(given.d_out, shrink),
        d_lse=None if given.d_lse is None else _scaled(given.d_lse, shrink),
    )
    for name, array in zip(ARRAYS, pull_back(kernel, case, given)[:5], strict=True):
        if array is not None:
            bad = ~np.isfinite(array.astype(np.float64))
            assert not bad.any(), (
                f"{int(bad.sum())} of {bad.size} elements of {name} are not finite"
            )


def _scaled(array: Array, factor: np.float64) -> Array:
    scaled: Array = (array.astype(np.float64) * factor).astype(array.dtype)
    return scaled


def _room(case: Case, given: Incoming) -> float:
    """How often what comes back fits into the domain."""
    problem = case.problem
    q, k, v = (np.abs(x.astype(np.float64)) for x in (case.q, case.k, case.v))
    d_out = np.abs(given.d_out.astype(np.float64))
    scale = max(1.0, abs(problem.scale))
    keep = 1.0 / (1.0 - problem.dropout_p)
    with np.errstate(all="ignore"):
        d_lse = 0.0 if given.d_lse is None else float(np.abs(given.d_lse).max(initial=0.0))
        # Half of it: d_weight and delta, each a product of d_out with values.
        slope = 2 * keep * float(d_out.sum(-1).max(initial=0.0)) * float(v.max(initial=0.0)) + d_lse
        rows = problem.seqlen_q * problem.group_size
        pairs = problem.batch_size * problem.num_heads * problem.seqlen_q * problem.seqlen_k
        sizes = [
            (scale * slope * float(k.max(initial=0.0)), case.q.dtype),
            (scale * slope * rows * float(q.max(initial=0.0)), case.k.dtype),
            (keep * problem.group_size * float(d_out.sum(-2).max(initial=0.0)), case.v.dtype),
            (slope, problem.accumulator),
        ]
        for operand in (problem.bias, problem.sinks):
            if operand is not None:
                sizes.append((slope * pairs, operand.dtype))
        limit = largest(problem.accumulator)
        return (
            min(min(limit, largest(t)) / 8 / n for n, t in sizes if n > 0) if sizes[3][0] else 1.0
        )


def rows_without_keys_pull_nothing_back(kernel: Kernel, case: Case) -> None:
    """What comes back through a row that sees no key is ignored, NaN too, and its d_q is 0.

    With a sink such a row gives its d_lse to the sink, so only its d_out is ignored. If this does
    not hold, the NaN that a loss makes of padding rows reaches every weight.
    """
    case = hide_rows(case, kernel)
    problem = case.problem
    empty = ~any_over(attended(problem), -1)
    given = incoming(kernel, case)
    zeros = given.change(d_out=np.where(empty[..., None], 0, given.d_out).astype(given.d_out.dtype))
    dirty = given.change(
        d_out=np.where(empty[..., None], np.nan, given.d_out).astype(given.d_out.dtype)
    )
    if given.d_lse is not None:
        live = np.arange(problem.seqlen_q) < problem.seqused_q.reshape(*problem.batch_shape, 1, 1)
        idle = empty & ~(live & (problem.sinks is not None))
        dirty = dirty.change(d_lse=np.where(idle, np.nan, given.d_lse).astype(given.d_lse.dtype))
    found = pull_back(kernel, case, dirty)
    assert_equal_reference(found, case, zeros)
    assert not found.d_q[empty].any(), "d_q of a row without keys is not 0"


def d_lse_is_shared_out(kernel: Kernel, case: Case) -> None:
    """The gradient of the logits of a row adds up to its d_lse, also where logits are large.

    Adding a number to all logits of a row adds it to the lse and leaves out. Domain: no sinks; all
    logits are moved so far that a stored lse no longer gives the weights, and row_max and row_sum
    must be found again. If this does not hold, weights of the backward do not sum to 1.
    """
    problem = case.problem
    limit = COARSE / working_roundoff(problem)  # |lse| above it is coarse
    moved = float(case.rng.choice([4.0, 2.0**9])) * limit * float(case.rng.choice([-1.0, 1.0]))
    zeros = np.zeros((*problem.lse_shape, problem.seqlen_k))
    bias = full(case, "bias") if "bias" in case.keywords else zeros
    bias = bias.astype(problem.accumulator) + problem.accumulator.type(moved)
    case = case.change(bias=bias)
    given = incoming(kernel, case)
    coarse = np.abs(case.expected.lse) > 2 * limit if case.expected.lse is not None else False
    given = given.change(d_out=np.zeros_like(given.d_out))
    found = pull_back(kernel, case, given)
    if found.d_bias is None or given.d_lse is None:
        raise OutsideDomain("no gradient of bias")
    # Each of n weights and their sum is rounded a few times, and rescaled once a block at most.
    terms = problem.seqlen_k + 8
    d_lse = given.d_lse.astype(np.float64)
    budget = 8 * terms * (working_roundoff(problem) * np.abs(d_lse) + smallest_normal(bias.dtype))
    rows = coarse & any_over(attended(case.problem), -1)
    total = np.where(rows, found.d_bias.astype(np.float64).sum(-1), 0.0)
    assert_within(total, np.where(rows, d_lse, 0.0), budget, name="sum of d_bias over keys")


def adjoint_identity(kernel: Kernel, case: Case) -> None:
    """``<d_out, J x>`` equals ``<J^T d_out, x>``, for all operands at once.

    The directional derivative ``J x`` is a central difference of the kernel's own forward. Domain:
    float64, moderate values. If this does not hold, forward and backward belong to different
    functions.
    """
    given = incoming(kernel, case)
    if not (kernel.gives_lse and kernel.can("d_lse")):
        given = given.change(d_lse=None)
    found = pull_back(kernel, case, given)
    rng = np.random.default_rng(case.seed + 1)
    moves: dict[str, Array] = {}
    for name, gradient in zip(("q", "k", "v", "bias", "sinks"), found[:5], strict=True):
        if gradient is not None:
            moves[name] = rng.standard_normal(gradient.shape)
    step, slack = _step(case, given, moves)
    forward, backward = _difference(kernel, case, given, moves, step), 0.0
    for name, move in moves.items():
        backward += float((getattr(found, f"d_{name}").astype(np.float64) * move).sum())
    assert abs(forward - backward) <= slack, (
        f"<d_out, J x> is {forward}, <J^T d_out, x> is {backward}: further apart than {slack:.3g}"
    )


def _difference(
    kernel: Kernel, case: Case, given: Incoming, moves: dict[str, Array], step: float
) -> float:
    """Central difference of ``<d_out, out> + <d_lse, lse>`` along the moves."""
    case = case.change(return_lse=True) if given.d_lse is not None else case
    ends = []
    for sign in (1, -1):
        moved: dict[str, Any] = {}
        for name, move in moves.items():
            old = getattr(case, name) if name in "qkv" else case.keywords[name]
            moved[name] = old + sign * step * move
        ends.append(kernel(case.change(**moved)))
    total = float((given.d_out * (ends[0].out - ends[1].out)).sum())
    if given.d_lse is not None and ends[0].lse is not None and ends[1].lse is not None:
        finite = np.isfinite(ends[0].lse)
        change = np.where(finite, ends[0].lse, 0.0) - np.where(finite, ends[1].lse, 0.0)
        total += float((given.d_lse * change).sum())
    return total / (2 * step)


def _step(case: Case, given: Incoming, moves: dict[str, Array]) -> tuple[float, float]:
    """Return the step whose difference has the smallest bound of its error, and that bound.

    The difference is off by step**2 / 6 times a third derivative. Each derivative of a softmax mean
    brings at most the spread of the logits per unit step and a small factor; the third derivative
    of the lse is bounded by that spread alone. Rounding errors of both ends are divided by the
    step. The sum of both, bent * step**2 + rounded / step, is least at (rounded / (2 bent))**(1/3).
    """

    def size(array: Array) -> float:
        return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))

    of_q, of_k = (float(np.abs(moves[n]).sum(-1).max(initial=0.0)) for n in "qk")
    products = max(of_q * size(case.k), size(case.q) * of_k, of_q * size(moves["k"]))
    spread = 1.0 + abs(case.problem.scale) * products
    spread += sum(size(moves[name]) for name in ("bias", "sinks") if name in moves)
    v_size = (size(case.v) + size(moves["v"])) / (1.0 - case.problem.dropout_p)
    d_out = np.abs(given.d_out)
    bent, rounded = float(d_out.sum()) * v_size, float((d_out * case.budget.out).sum())
    if given.d_lse is not None:
        d_lse = np.abs(given.d_lse)
        bent += float(d_lse.sum())
        rounded += float((d_lse * case.budget.lse).sum())
    bent *= (4 * spread) ** 3
    step = min(2.0**-18, (rounded / (2 * bent)) ** (1 / 3)) if bent and rounded else 2.0**-18
    return step, bent * step**2 + rounded / step
