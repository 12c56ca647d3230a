"""Laws about what a gradient may depend on."""

from __future__ import annotations

import numpy as np

from fusedattn.problem import Gradients
from fusedattn.testing.buffers import PLACEMENTS
from fusedattn.testing.cases import Case
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.kernel import Kernel
from fusedattn.testing.laws.common import (
    Bool,
    assert_close,
    assert_same_bits,
    replaced,
    take_item,
)
from fusedattn.testing.pullback import ARRAYS, Incoming, incoming, pull_back
from fusedattn.testing.rows import any_over, attended

_Where = dict[str, Bool]


def _assert_same(
    found: Gradients,
    expected: Gradients,
    case: Case,
    given: Incoming,
    bitwise: bool,
    where: _Where | None = None,
) -> None:
    """Assert that gradients agree, to the bit or within the budget; `where` names and chooses."""
    budget = None if bitwise else backward_budget(case.problem, given.d_out, given.d_lse)
    for name in ARRAYS if where is None else where:
        one, other = getattr(found, name), getattr(expected, name)
        if one is None or other is None:
            continue
        chosen = None if where is None else np.broadcast_to(where[name], one.shape)
        if budget is None:
            assert_same_bits(one, other, name, chosen)
        else:
            assert_close(one, other, 2 * getattr(budget, name), name, chosen)


def hidden_entries_do_not_leak_into_gradients(kernel: Kernel, case: Case) -> None:
    """NaN in a key, value or row changes no gradient of what does not see it or is not seen by it.

    Within the budget: what a NaN has spoilt may be mended in another order of summation. Needs
    ``hidden_nan``. If this does not hold, a NaN in one document of a batch spoils the gradients of
    its neighbours: ``0 * NaN`` is NaN.
    """
    problem, rng = case.problem, case.rng
    seen = attended(problem)
    if seen.size == 0:
        return
    given = incoming(kernel, case)
    clean = pull_back(kernel, case, given)
    key, row = int(rng.integers(problem.seqlen_k)), int(rng.integers(problem.seqlen_q))

    at_key = np.arange(problem.seqlen_k)[:, None] == key
    junk = rng.choice([np.nan, np.inf, -np.inf])
    dirty = replaced(case, {"k": (at_key, junk), "v": (at_key, junk)})
    # What the row stores has gone bad with it.
    spoilt = seen[..., key]
    worse = given.change(
        out=np.where(spoilt[..., None], np.nan, given.out).astype(given.out.dtype),
        lse=np.where(spoilt, np.nan, given.lse).astype(given.lse.dtype),
    )
    found = pull_back(kernel, dirty, worse)
    _assert_same(found, clean, case, given, False, {"d_q": ~spoilt[..., None]})

    at_row = np.arange(problem.seqlen_q)[:, None] == row
    dirty = replaced(case, {"q": (at_row, junk)})
    worse = given.change(
        d_out=np.where(at_row, np.nan, given.d_out).astype(given.d_out.dtype),
        out=np.where(at_row, np.nan, given.out).astype(given.out.dtype),
        lse=np.where(at_row[:, 0], np.nan, given.lse).astype(given.lse.dtype),
    )
    found = pull_back(kernel, dirty, worse)
    groups = (*problem.batch_shape, problem.num_heads_kv, problem.group_size, problem.seqlen_k)
    untouched = ~any_over(seen[..., row, :].reshape(groups), -2)[..., None]
    _assert_same(found, clean, case, given, False, {"d_k": untouched, "d_v": untouched})


def same_call_same_gradients(kernel: Kernel, case: Case) -> None:
    """The same call gives the same bits of each gradient, also after other calls.

    If this does not hold, sums are added up in the order in which threads happen to finish, and no
    training run can be repeated.
    """
    given = incoming(kernel, case)
    first = pull_back(kernel, case, given)
    pull_back(kernel, case, given.change(d_out=-given.d_out))
    for _ in range(3):
        _assert_same(pull_back(kernel, case, given), first, case, given, bitwise=True)


def threads_do_not_matter_to_gradients(kernel: Kernel, case: Case) -> None:
    """The number of threads changes no gradient, to the bit where declared.

    Needs ``set_threads``. If this does not hold, a model trains differently on another machine.
    """
    assert kernel.set_threads is not None
    given = incoming(kernel, case)
    results = []
    try:
        for count in (1, 2, 3):
            kernel.set_threads(count)
            results.append(pull_back(kernel, case, given))
    finally:
        kernel.set_threads(1)
    for other in results[1:]:
        _assert_same(other, results[0], case, given, kernel.bitwise)


def gradients_of_batch_items_are_independent(kernel: Kernel, case: Case) -> None:
    """Gradients of a batch item depend on neither its neighbours nor its place among them.

    To the bit where declared. Domain: no dropout; gradients of bias and sinks, which items may
    share, aside. If this does not hold, a sample's gradient changes with the batch it comes in.
    """
    problem, rng = case.problem, case.rng
    if problem.batch_size == 0:
        return
    given = incoming(kernel, case)
    whole = pull_back(kernel, case, given)
    shape = problem.batch_shape
    index = tuple(int(i) for i in np.unravel_index(int(rng.integers(problem.batch_size)), shape))
    alone = take_item(case, index)
    part = Incoming(
        given.d_out[index][None],
        given.out[index][None],
        given.lse[index][None],
        None if given.d_lse is None else given.d_lse[index][None],
    )
    d_q, d_k, d_v = (x[index][None] for x in whole[:3])
    item = Gradients(d_q, d_k, d_v, None, None)
    _assert_same(pull_back(kernel, alone, part), item, alone, part, kernel.bitwise)


def memory_layout_does_not_matter_to_gradients(kernel: Kernel, case: Case) -> None:
    """Strides and layout of the operands and of what comes back change no gradient.

    To the bit where declared. If this does not hold, the transposed view that a loss hands back
    gives another gradient than its copy.
    """
    rng = case.rng
    plain = case.change(placement={}).without("layout")
    names = ["q", "k", "v", "d_out", "out", "lse", "d_lse"]
    names += [name for name in ("mask", "bias") if name in case.keywords]
    moved = plain
    if kernel.can("strides"):
        moved = plain.change(placement={name: str(rng.choice(PLACEMENTS[:7])) for name in names})
    if kernel.can("layout") and rng.random() < 0.5:
        moved = moved.change(layout="bshd")
    given = incoming(kernel, plain)
    _assert_same(
        pull_back(kernel, moved, given),
        pull_back(kernel, plain, given),
        plain,
        given,
        kernel.bitwise,
    )
