"""A row that sees one key has its value: nothing is rounded."""

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import DTYPES, ISAS, assert_same_bits, attention_on, normal
from test_cpu_matrix import ALWAYS

from fusedattn.cpu import tile

every_isa = pytest.mark.parametrize(
    "isa",
    [
        *ISAS,
        pytest.param(
            ALWAYS,
            marks=pytest.mark.skipif(not tile.host_isa().matrix, reason="no matrix unit"),
        ),
    ],
    ids=[*(isa.name for isa in ISAS), "AMX"],
)

# Options, and which key each of the rows given sees: row -> key.
ONE = {
    "causal": ({"causal": True, "q_offset": 0}, lambda rows: {0: 0}),
    "window": (
        {"window_size": (0, 0), "q_offset": 3},
        lambda rows: {i: i + 3 for i in range(rows)},
    ),
    "length": ({"seqused_k": 1}, lambda rows: dict.fromkeys(range(rows), 0)),
    "biased": (
        {"seqused_k": 1, "bias": np.array([2.5]), "softcap": 3.0, "alibi_slopes": np.ones(4)},
        lambda rows: dict.fromkeys(range(rows), 0),
    ),
}


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("how", ONE)
def test_a_row_that_sees_one_key_has_its_value(isa, dtype, rows, how):
    options, chosen = ONE[how]
    q = 3 * normal(0, 2, 4, rows, 40, dtype=dtype)
    k, v = (normal(i, 2, 2, 60, dim, dtype=dtype) for i, dim in ((1, 40), (2, 33)))
    v[..., 0, 0] = ml_dtypes.finfo(dtype).max
    out = attention_on(isa)(q, k, v, **options)
    for row, key in chosen(rows).items():
        assert_same_bits(out[:, :, row], np.repeat(v[:, :, key], 2, axis=1))


@every_isa
def test_a_sink_and_dropout_still_count(isa):
    q, k, v = (normal(i, 1, 1, 20, 16) for i in range(3))
    run = attention_on(isa)
    half, lse = run(q, k, v, seqused_k=1, sinks=np.zeros(1), scale=0.0, return_lse=True)
    np.testing.assert_allclose(half[0, 0], np.broadcast_to(v[0, 0, :1] / 2, (20, 16)), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(2.0), rtol=1e-6)
    dropped = run(q, k, v, seqused_k=1, dropout_p=0.5, seed=3)[0, 0]
    kept = dropped.any(axis=1)
    assert 0 < kept.sum() < 20
    np.testing.assert_allclose(dropped[kept], np.repeat(2 * v[0, 0, :1], kept.sum(), 0), rtol=1e-6)


@every_isa
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on(isa, poison):
    q, k, v = (normal(i, 1, 1, 20, 16) for i in range(3))
    run = attention_on(isa)
    v[0, 0, 0, 5] = poison
    out = run(q, k, v, seqused_k=1)
    assert_same_bits(out[0, 0], np.repeat(v[0, 0, :1], 20, 0))
    k[0, 0, 0, 0] = np.nan
    assert np.isnan(run(q, k, v, seqused_k=1)).all()
