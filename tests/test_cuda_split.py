"""Keys shared out among blocks of threads, and combined: the bits of a row are its own."""

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal

import fusedattn
from fusedattn import make_problem, merge
from fusedattn.cuda import combine, compiler, portable
from fusedattn.cuda.params import SPLIT_KEYS, SPLIT_QUERIES, span_of

SPLIT = portable._SIMULATED_SPLIT


@pytest.fixture(autouse=True)
def _simulator(monkeypatch):
    monkeypatch.setenv(compiler.VARIABLE, "simulator")


def simulated(*operands, **keywords):
    return fusedattn.attention(*operands, backend="cuda", **keywords)


def operands(keys, dtype=np.float32, rows=2):
    return normal(0, 1, 2, rows, 5), normal(1, 1, 1, keys, 5), normal(2, 1, 1, keys, 6)


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_splits_together_are_the_attention_over_all_keys(dtype, with_lse):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = (x.astype(kind) for x in operands(3 * SPLIT + 5))
    options = {"sinks": np.array([1.0, 3.0]), "causal": True, "q_offset": 3 * SPLIT + 3}
    got = simulated(q, k, v, return_lse=with_lse, **options)
    expected = fusedattn.attention(q, k, v, backend="reference", return_lse=True, **options)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-13}[dtype]
    pairs = zip(got, expected, strict=True) if with_lse else [(got, expected[0])]
    for one, other in pairs:
        np.testing.assert_allclose(
            one.astype(float), other.astype(float), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("options", [{}, {"sinks": np.array([1.0, 3.0], np.float32)}])
def test_splits_that_a_row_does_not_see_move_no_bit(options):
    q, k, v = operands(4 * SPLIT)
    k[..., 12:, :], v[..., 12:, :] = np.nan, np.inf
    whole = simulated(q, k[..., :12, :], v[..., :12, :], return_lse=True, **options)
    assert_same_bits(simulated(q, k, v, seqused_k=12, return_lse=True, **options), whole)


def test_a_nan_in_any_split_reaches_the_output_and_a_row_without_keys_is_0():
    for key in (0, SPLIT, 3 * SPLIT - 1):
        q, k, v = operands(3 * SPLIT)
        v[0, 0, key, 2] = np.nan
        mask = np.array([True, False])[:, None]
        out, lse = simulated(q, k, v, mask=mask, return_lse=True)
        assert np.isnan(out[..., 0, 2]).all()
        assert np.isfinite(np.delete(out[..., 0, :], 2, -1)).all()
        assert (out[..., 1, :] == 0).all()
        assert (lse[..., 1] == -np.inf).all()


def combined(partial, partial_lse, dtype=None):
    """Combine partial results ``(splits, batch, heads, rows, dim)``; ``out`` in another order."""
    _, batch, heads, rows, dim = partial.shape
    kind = np.dtype(dtype or partial.dtype)
    q = np.zeros((batch, heads, rows, 1), kind)
    out = np.zeros((batch, rows, dim, heads), kind).transpose(0, 3, 1, 2)
    problem = make_problem(q, q, np.zeros((batch, heads, rows, dim), kind), return_lse=True)
    lse = np.zeros(problem.lse_shape, partial.dtype)
    flat = np.lib.stride_tricks.as_strided(out, (out.size,), (out.itemsize,))
    tools = compiler.toolchain()
    parts = partial.ravel(), partial_lse.ravel()
    given = portable.bits_of(flat), lse.reshape(-1)
    combine.simulate(tools, problem, span_of(out), parts, *given)
    return out, lse


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_combining_is_merging(kind):
    partial, lse = normal(0, 5, 2, 1, 2, 6, dtype=kind), 3 * normal(1, 5, 2, 1, 2, dtype=kind)
    lse[1, 0], partial[1, 0] = -np.inf, np.nan
    expected = merge(*zip(partial, lse, strict=True))
    tolerance = 8 * np.finfo(kind).eps
    for one, other in zip(combined(partial, lse), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", [0, 1, 4])
def test_one_split_keeps_its_bits_whatever_the_empty_ones_hold(which):
    partial = np.full((5, 1, 2, 2, 5), np.nan, np.float32)
    lse = np.full(partial.shape[:-1], -np.inf, np.float32)
    partial[which], lse[which] = normal(0, 1, 2, 2, 5) * 1e30, normal(1, 1, 2, 2) * 50
    partial[which, ..., 0], lse[which, 0, 0] = -0.0, [-0.0, -np.inf]
    out, total = combined(partial, lse)
    expected = partial[which].copy()
    expected[0, 0, 1] = 0
    assert_same_bits((out, total), (expected, lse[which]))


def test_a_nan_is_not_lost_however_little_its_split_weighs():
    partial, lse = normal(0, 3, 1, 1, 3, 2), np.zeros((3, 1, 1, 3), np.float32)
    lse[0] = 1000
    partial[2, 0, 0, 0, 1] = np.nan
    lse[1, 0, 0, 1] = np.nan
    lse[2, 0, 0, 2] = np.inf
    out, total = combined(partial, lse)
    np.testing.assert_array_equal(np.isnan(out[0, 0]), [[False, True], [True, True], [True, True]])
    np.testing.assert_array_equal(np.isnan(total[0, 0]), [False, True, True])


def test_whether_keys_are_split_depends_on_the_number_of_queries_and_the_size_is_fixed():
    k = np.zeros((1, 1, 10 * SPLIT_KEYS + 1, 8), np.float32)
    for rows in (1, SPLIT_QUERIES, SPLIT_QUERIES + 1):
        for batch in (1, 3):
            q = np.zeros((batch, 4, rows, 8), np.float32)
            keys = np.broadcast_to(k, (batch, *k.shape[1:]))
            problem = make_problem(q, keys, keys)
            config = portable.config_of(problem, portable.tile_of(problem))
            assert portable.splits_of(problem, config) == (11 if rows <= SPLIT_QUERIES else 1)
            assert config.split in (0, SPLIT_KEYS)
            assert SPLIT_KEYS % config.block_k == 0


def test_where_a_gpu_has_no_pools_nothing_is_split():
    q, k = np.zeros((1, 4, 1, 8), np.float32), np.zeros((1, 4, 9999, 8), np.float32)
    problem = make_problem(q, k, k)
    assert portable.config_of(problem, portable.tile_of(problem), 0).split == 0
