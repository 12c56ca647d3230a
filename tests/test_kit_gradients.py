"""Wrong gradients are killed, right ones pass."""

import numpy as np
import pytest

from fusedattn import attention, reference
from fusedattn.problem import make_problem
from fusedattn.testing import EVERYTHING, check_attention

SUPPORTS = EVERYTHING | {"d_lse"}


def forward(q, k, v, **keywords):
    return attention(q, k, v, backend="reference", **keywords)


def gradient(d_out, q, k, v, out, lse, *, d_lse=None, change=None, **keywords):
    problem = make_problem(q, k, v, **keywords)
    found = reference.backward(problem, d_out, out, lse, d_lse)
    return found if change is None else change(found, problem, d_out, d_lse)


def check(change=None, laws=("gradients", "adjoint"), **options):
    def pull_back(*arguments, **keywords):
        return gradient(*arguments, change=change, **keywords)

    return check_attention(
        forward,
        supports=SUPPORTS,
        dtypes=("float64",),
        gradient=pull_back,
        laws=laws,
        max_examples=options.get("max_examples", 40),
        seed=0,
    )


def without_delta(found, problem, d_out, d_lse):
    wide = reference.backward(problem, d_out, np.zeros(problem.out_shape), None, d_lse)
    return wide


def with_other(**changes):
    """Differentiate another problem than the one that was computed."""
    import dataclasses

    def change(found, problem, d_out, d_lse):
        other = dataclasses.replace(problem, **changes)
        return reference.backward(other, d_out, None, None, d_lse)

    return change


def first_head_only(found, problem, d_out, d_lse):
    if problem.group_size == 1:
        return found
    alone = d_out.copy()
    heads = np.arange(problem.num_heads) % problem.group_size != 0
    alone[..., heads, :, :] = 0
    return found._replace(d_v=reference.backward(problem, alone, None, None, d_lse).d_v)


def times(name, factor):
    def change(found, problem, d_out, d_lse):
        value = getattr(found, name)
        return found if value is None else found._replace(**{name: value * factor})

    return change


MUTANTS = {
    "d_q sign": times("d_q", -1),
    "d_k twice": times("d_k", 2),
    "d_v off by a millionth": times("d_v", 1 + 1e-6),
    "d_bias sign": times("d_bias", -1),
    "d_sinks sign": times("d_sinks", -1),
    "d_q without scale": lambda f, p, *_: f._replace(d_q=f.d_q / (p.scale or 1)),
    "delta left out": without_delta,
    "softcap not differentiated": with_other(softcap=None),
    "dropout not differentiated": with_other(dropout_p=0.0),
    "sinks forgotten": lambda f, p, d_out, d_lse: (
        f
        if p.sinks is None
        else with_other(sinks=None)(f, p, d_out, d_lse)._replace(d_sinks=f.d_sinks)
    ),
    "d_lse ignored": lambda f, p, d_out, d_lse: reference.backward(p, d_out),
    "one head of a group": first_head_only,
    "transposed heads": lambda f, *_: f._replace(d_k=f.d_k[..., ::-1, :, :].copy()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_gradient_is_killed(name):
    assert not check(MUTANTS[name], laws=("gradients",)).ok


def test_the_right_gradient_passes():
    report = check(max_examples=20)
    assert report.ok, report


def test_the_adjoint_identity_needs_no_reference():
    assert not check(times("d_q", 1.01), laws=("adjoint",)).ok
