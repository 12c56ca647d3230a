"""The fused gradients are those of the specification, on every vector unit."""

import dataclasses

import numpy as np
import pytest
from cpu_backend import DTYPES, ISAS, gradient_kernel_on, gradient_on, head_dims, normal
from hypothesis import given, note, reject, settings

from fusedattn import attention, attention_backward, reference
from fusedattn.cpu.tile import AVX512
from fusedattn.problem import Gradients, make_problem
from fusedattn.testing import EVERYTHING, Case, Sizes, attention_problems
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.kernel import OutsideDomain
from fusedattn.testing.laws import SMALL
from fusedattn.testing.laws.gradients import (
    adjoint_identity,
    assert_equal,
    check_domain,
    reference_and_budget,
)
from fusedattn.testing.pullback import incoming, pull_back

# Around panels (4 to 48 rows), blocks of keys and register tiles of products.
AROUND = Sizes(
    seqlen_q=(1, 2, 3, 5, 12, 13, 16, 17, 24, 25, 47, 48, 49, 96, 97, 145, 250),
    seqlen_k=(1, 5, 6, 7, 8, 9, 13, 47, 48, 49, 95, 96, 97, 104, 191, 193, 289),
    head_dim=(1, 2, 7, 8, 15, 16, 17, 48, 49, 64, 80, 97, 128, 145, 256),
    head_dim_v=(1, 5, 8, 9, 16, 17, 31, 64, 80, 128, 192),
    num_heads_kv=(1, 2, 3),
    group_size=(1, 2, 3, 8),
    batch=(1, 2),
)
EXAMPLES = settings().max_examples
# No budget is derived for the gradient of a score_mod.
KEYWORDS = EVERYTHING - {"score_mod", "score_mod_aux"}
two_types = attention_problems(KEYWORDS, DTYPES[:2], sizes=AROUND)
every_type = attention_problems(KEYWORDS, DTYPES, sizes=AROUND)


def gradients_equal(case):
    """Hold every vector unit to the law of the kit; what is expected is computed once for all."""
    try:
        check_domain(case)
    except OutsideDomain:
        reject()
    wanted = None
    for isa in ISAS:
        note(isa.name)
        kernel = gradient_kernel_on(isa)
        given = incoming(kernel, case)  # draws the same d_out and d_lse each time
        wanted = wanted or reference_and_budget(case, given)
        assert_equal(pull_back(kernel, case, given), *wanted)


@settings(max_examples=EXAMPLES // 6)
@given(case=two_types)
def test_gradients_equal_the_reference_around_the_edges_of_tiles(case):
    gradients_equal(case)


@pytest.mark.deep
@settings(max_examples=20 * EXAMPLES)
@given(case=every_type | attention_problems(KEYWORDS, DTYPES))
def test_gradients_equal_the_reference_in_every_type(case):
    gradients_equal(case)


@settings(max_examples=EXAMPLES // 6)
@given(case=attention_problems(KEYWORDS, ("float64",), tame=True, sizes=SMALL))
def test_the_adjoint_identity_holds(case):
    adjoint_identity(gradient_kernel_on(AVX512), case)


def check(case, *functions):
    """Hold every gradient to its budget, given what the CPU's own forward returns."""
    problem = make_problem(case.q, case.k, case.v, **case.keywords)
    out, lse = attention(case.q, case.k, case.v, **case.keywords, return_lse=True)
    rng = np.random.default_rng(case.seed)
    d_out = rng.standard_normal(out.shape).astype(out.dtype)
    d_lse = rng.standard_normal(lse.shape).astype(lse.dtype)
    # The reference's own result, before it is rounded to the type of each operand.
    exact = {name: getattr(problem, name).astype(np.float64) for name in "qkv"}
    for name in ("bias", "sinks"):
        operand = getattr(problem, name)
        if operand is not None:
            exact[name] = operand.astype(problem.accumulator).astype(np.float64)
    wide = dataclasses.replace(problem, **exact)
    expected = reference.backward(wide, d_out, None, None, d_lse)
    budget = backward_budget(problem, d_out, d_lse)
    for fn in functions or (attention_backward,):
        found = fn(d_out, case.q, case.k, case.v, out, lse, d_lse=d_lse, **case.keywords)
        for name, got, want, allowed in zip(
            Gradients._fields, found, expected, budget, strict=True
        ):
            assert (got is None) == (want is None)
            if want is not None:
                assert got.dtype == getattr(problem, name.removeprefix("d_")).dtype
                assert_within(got, want, allowed, name=name)


def test_every_head_dim_to_576():
    for dim in (*range(1, 160), *range(160, 577, 13), 576):
        check(head_dims(dim))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim_to_576_in_every_type(dtype):
    for dim in range(1, 577):
        check(head_dims(dim, dtype), *map(gradient_on, ISAS))


LONG = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (60, 10)},
    "lengths": {"seqused_q": np.array([150, 83]), "seqused_k": np.array([113, 250])},
    "mask": {"mask": np.random.default_rng(1).random((2, 1, 150, 250)) < 0.4},
    "padding": {"mask": np.arange(250) < 211},
    "alibi": {"alibi_slopes": 2.0 ** -np.arange(1.0, 3.0)},
    "sinks": {"sinks": np.array([0.5, 8.0])},
    "softcap": {"softcap": 3.0},
    "dropout": {"dropout_p": 0.2, "seed": 3},
}


@pytest.mark.deep
@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_long_sequences_equal_the_reference(options):
    q, k, v = normal(0, 2, 2, 150, 64), normal(1, 2, 1, 250, 64), normal(2, 2, 1, 250, 64)
    check(Case(q, k, v, options))


# Every way to broadcast a bias against (2, 4, 70, 130).
BIAS_SHAPES = [
    (*batch, *heads, *rows, *keys)
    for keys in [(130,), (1,)]
    for rows in [(70,), (1,)]
    for heads in [(4,), (1,)]
    for batch in [(2,), (1,), ()]
]
BIAS_SHAPES += [(70, 130), (70, 1), (130,), (1,), ()]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_the_gradient_of_a_bias_is_summed_over_what_it_was_broadcast_over(shape):
    q, k, v = normal(0, 2, 4, 70, 9), normal(1, 2, 2, 130, 9), normal(2, 2, 2, 130, 9)
    bias = normal(3, *shape)
    for options in ({}, {"causal": True, "softcap": 2.0}):
        check(Case(q, k, v, {"bias": bias, **options}))
    check(Case(q, k, v, {"bias": bias.astype(np.float16), "dropout_p": 0.3, "seed": 1}))
    check(Case(*(x.reshape(1, 2, *x.shape[1:]) for x in (q, k, v)), {"bias": bias}))


def test_a_bias_for_some_of_the_leading_axes():
    q, k, v = (normal(i, 2, 3, 2, n, 8) for i, n in enumerate((33, 50, 50)))
    for shape in ((2, 1, 2, 33, 50), (1, 3, 1, 33, 50), (3, 1, 1, 50), (2, 1, 1, 33, 1)):
        check(Case(q, k, v, {"bias": normal(4, *shape)}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_of_the_scores_in_other_types(dtype):
    """Bias and sinks have gradients of their own type, out may be float32."""
    q, k, v = (normal(i, 2, n, 16, dtype=dtype) for i, n in enumerate((40, 60, 60)))
    for other in DTYPES:
        options = {"bias": normal(3, 40, 60, dtype=other), "sinks": normal(4, 2, dtype=other)}
        check(Case(q, k, v, options))
    check(Case(q, k, v, {"out_dtype": np.float32}))


def test_few_rows_of_many_heads_share_a_panel():
    for rows in (1, 2, 3, 5, 17):
        q, k, v = normal(0, 8, rows, 16), normal(1, 2, 200, 16), normal(2, 2, 200, 16)
        for options in ({}, {"causal": True}, {"bias": normal(3, rows, 200)},
                        {"bias": normal(3, 8, 1, 200)}, {"dropout_p": 0.2, "seed": 1},
                        {"mask": normal(4, 8, rows, 200) > 0}):  # fmt: skip
            check(Case(q, k, v, options), gradient_on(AVX512))
