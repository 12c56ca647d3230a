"""The fused kernels compute what the specification says, on every vector unit."""

import numpy as np
import pytest
from cpu_backend import DTYPES, ISAS, attention_on, head_dims, normal, on_every_unit
from hypothesis import given, settings

from fusedattn import attention
from fusedattn.testing import EVERYTHING, Case, Sizes, attention_problems
from fusedattn.testing.laws.common import assert_equals_reference
from fusedattn.testing.laws.equality import equals_reference

# Around panels (4 to 48 rows), items (up to 4 panels), blocks of 96 or 128 keys and chains of 48
# dims.
AROUND = Sizes(
    seqlen_q=(1, 2, 3, 4, 5, 12, 13, 16, 17, 24, 25, 47, 48, 49, 96, 97, 192, 193, 250, 385),
    seqlen_k=(
        1,
        5,
        6,
        7,
        8,
        9,
        11,
        12,
        13,
        95,
        96,
        97,
        104,
        127,
        128,
        129,
        191,
        192,
        193,
        288,
        289,
        391,
    ),
    head_dim=(1, 2, 7, 8, 9, 15, 16, 17, 47, 48, 49, 64, 80, 95, 96, 97, 128, 145, 192, 256, 576),
    head_dim_v=(1, 5, 6, 7, 8, 9, 15, 16, 17, 31, 64, 80, 128, 192, 257, 576),
    num_heads_kv=(1, 2, 3),
    group_size=(1, 2, 3, 5, 8),
    batch=(1, 2),
)
EXAMPLES = settings().max_examples
cases = attention_problems(EVERYTHING, DTYPES, sizes=AROUND)
# The kernels of two types cover both ways to read K and V; those of the others are for deep runs.
two_types = attention_problems(EVERYTHING, DTYPES[:2], sizes=AROUND)


@settings(max_examples=EXAMPLES)
@given(case=two_types)
def test_equals_the_reference_around_the_edges_of_tiles(case):
    on_every_unit(equals_reference, case)


@pytest.mark.deep
@settings(max_examples=20 * EXAMPLES)
@given(case=cases | attention_problems(EVERYTHING, DTYPES))
def test_equals_the_reference_in_every_type(case):
    on_every_unit(equals_reference, case)


def check(case, *functions):
    for fn in functions or (attention,):
        out, lse = fn(case.q, case.k, case.v, **case.keywords, return_lse=True)
        assert_equals_reference(case.expected._replace(out=out, lse=lse), case)


def test_every_head_dim_to_576():
    for dim in range(1, 577):
        check(head_dims(dim))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim_to_576_in_every_type(dtype):
    for dim in range(1, 577):
        check(head_dims(dim, dtype), *map(attention_on, ISAS))


LONG = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (200, 10)},
    "lengths": {"seqused_q": np.array([450, 233]), "seqused_k": np.array([513, 650])},
    "mask": {"mask": np.random.default_rng(1).random((2, 1, 450, 650)) < 0.4},
    "padding": {"mask": np.arange(650) < 611},
    "bias": {"bias": normal(2, 2, 450, 650), "softcap": 3.0},
    "alibi": {"alibi_slopes": 2.0 ** -np.arange(1.0, 3.0)},
    "sinks": {"sinks": np.array([0.5, 8.0])},
    "dropout": {"dropout_p": 0.2, "seed": 3},
}


@pytest.mark.deep
@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_long_sequences_equal_the_reference(options):
    q, k, v = normal(0, 2, 2, 450, 64), normal(1, 2, 1, 650, 64), normal(2, 2, 1, 650, 64)
    check(Case(q, k, v, options))
