"""Products by the matrix unit keep every law, and what it cannot do does not show."""

import dataclasses
import math

import numpy as np
import pytest
from cpu_backend import assert_same_bits, attention_on, normal, pretended
from hypothesis import settings
from test_cpu_hidden import HIDING, KEYS, POISON, ROWS

import fusedattn
from fusedattn import dropout_mask, make_block_mask
from fusedattn.cpu import tile
from fusedattn.cpu.tile import FEW_ROWS
from fusedattn.problem import make_problem
from fusedattn.reference import forward
from fusedattn.testing import EVERYTHING, PLACEMENTS, Placed, forward_budget
from fusedattn.testing.suite import make_suite

needs_matrix_unit = pytest.mark.skipif(
    not tile.host_isa().matrix, reason="no matrix unit, or the system does not allow it"
)
TYPES = ("bfloat16", "float16", "float32")
each_type = pytest.mark.parametrize("dtype", TYPES)
# By the matrix unit whatever the number of rows.
ALWAYS = dataclasses.replace(tile.AMX, vector_rows=0)
attention = attention_on(ALWAYS)
without = attention_on(tile.AVX512)
# Calls for each law: 6 in a default run.
EXAMPLES = settings().max_examples // 9

TestMatrix = needs_matrix_unit(
    make_suite(attention, supports=EVERYTHING, dtypes=TYPES, bitwise=True, max_examples=EXAMPLES)
)


def operands(dtype, rows=300, keys=400, dim=40, dim_v=33, heads=2, heads_kv=1, batch=1):
    shapes = (heads, rows, dim), (heads_kv, keys, dim), (heads_kv, keys, dim_v)
    return [normal(i, batch, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


@needs_matrix_unit
@each_type
@pytest.mark.parametrize("hiding", HIDING)
def test_hidden_poison_changes_no_bit(dtype, hiding):
    options, seen = HIDING[hiding]
    options = {**options, "return_lse": True}
    q, k, v = (normal(i, 1, n, 24, dtype=dtype) for i, n in enumerate((ROWS, KEYS, KEYS)))
    clean = attention(q, k, v, **options)
    for j in (0, 40, 63, 64, 127, 128, KEYS - 1):
        blind = ~seen[:, j]
        if not blind.any():
            continue
        for value in (*POISON.values(), 1e-40):  # the last is subnormal in bfloat16
            for name in "kv":
                poisoned = {"k": k.copy(), "v": v.copy()}
                poisoned[name][:, j, 5:7] = value
                out, lse = attention(q, **poisoned, **options)
                assert_same_bits(out[:, blind], clean[0][:, blind])
                assert_same_bits(lse[:, blind], clean[1][:, blind])
                if not blind.all() and (np.isnan(value) or (name == "v" and np.isinf(value))):
                    assert not np.isfinite(out[:, ~blind, 5:7].astype(np.float32)).any()


@needs_matrix_unit
@each_type
def test_poison_in_a_dropped_value_changes_no_bit(dtype):
    kept = dropout_mask((1, ROWS, KEYS), 0.5, 9)[0]
    options = {"dropout_p": 0.5, "seed": 9, "return_lse": True, "window_size": (70, 60)}
    q, k, v = (normal(i, 1, n, 24, dtype=dtype) for i, n in enumerate((ROWS, KEYS, KEYS)))
    clean = attention(q, k, v, **options)
    distance = np.arange(KEYS) - (np.arange(ROWS)[:, None] + KEYS - ROWS)
    for j in (0, 50, 128):
        used = kept[:, j] & (distance[:, j] >= -70) & (distance[:, j] <= 60)
        poisoned = v.copy()
        poisoned[:, j, 3] = np.nan
        out, lse = attention(q, k, poisoned, **options)
        assert_same_bits(out[:, ~used], clean[0][:, ~used])
        assert_same_bits(lse[:, ~used], clean[1][:, ~used])
        assert np.isnan(out[:, used, 3]).all()


CHUNKING = {
    "causal": {"causal": True},
    "narrow window": {"window_size": (20, 7)},
    "wide window": {"window_size": (130, 0), "softcap": 3.0},
}


@needs_matrix_unit
@each_type
@pytest.mark.parametrize("options", CHUNKING.values(), ids=CHUNKING)
def test_prefill_in_chunks_has_the_bits_of_prefill_in_one_call(dtype, options):
    """Groups of keys whose products are added together begin where they do in the whole."""
    rows, cached = 333, 150
    q, k, v = operands(dtype, rows=rows, keys=rows + cached)
    whole = attention(q, k, v, q_offset=cached, return_lse=True, **options)
    for size in (FEW_ROWS + 1, 31, 47, 97, 200):
        for begin in range(0, rows, size):
            part = slice(begin, begin + size if begin + size + FEW_ROWS < rows else rows)
            seen = part.stop + cached if "causal" in options else rows + cached
            arrays = q[:, :, part], k[:, :, :seen], v[:, :, :seen]
            chunk = attention(*arrays, q_offset=begin + cached, return_lse=True, **options)
            assert_same_bits(chunk, tuple(x[:, :, part] for x in whole))
            if part.stop == rows:
                break


@needs_matrix_unit
@each_type
def test_a_row_has_the_same_bits_in_every_lane_of_every_panel(dtype):
    q, k, v = operands(dtype, heads=1, rows=400, keys=301)
    mask, bias = np.random.default_rng(0).random((400, 301)) < 0.3, normal(9, 400, 301)
    out, lse = attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    rng = np.random.default_rng(1)
    for rows in (FEW_ROWS + 1, 16, 33, 97, 257, 385):
        chosen = rng.permutation(400)[:rows]
        some = attention(
            q[:, :, chosen], k, v, mask=mask[chosen], bias=bias[chosen], return_lse=True
        )
        assert_same_bits(some, (out[:, :, chosen], lse[:, :, chosen]))


@needs_matrix_unit
@each_type
def test_threads_strides_and_grouped_heads_move_no_bit(dtype):
    arrays = operands(dtype, batch=6, heads=4, heads_kv=2)
    options = {"causal": True, "sinks": np.arange(4.0), "return_lse": True}
    expected = attention(*arrays, **options)
    before = fusedattn.get_num_threads()
    for threads in (1, 2, 5):
        fusedattn.set_num_threads(threads)
        assert_same_bits(attention(*arrays, **options), expected)
    fusedattn.set_num_threads(before)
    for placement in PLACEMENTS:
        if not placement.startswith("stride0"):
            views = [Placed(x, placement).view for x in arrays]
            assert_same_bits(attention(*views, **options), expected)
    q, k, v = arrays
    assert_same_bits(attention(q, k.repeat(2, 1), v.repeat(2, 1), **options), expected)


TINY = 2.0**-133  # the smallest bfloat16


@needs_matrix_unit
def test_values_that_are_subnormal_are_numbers():
    q, k, v = operands("bfloat16", rows=40, keys=200)
    v = (np.round(v.astype(np.float64) * 20) * TINY).astype(v.dtype)
    assert 0 < np.abs(v.astype(np.float64)).max() < 2.0**-126
    out = attention(q, k, v, causal=True, out_dtype=np.float32)
    expected = forward(make_problem(q, k, v, causal=True, out_dtype=np.float32)).out
    # What sums of subnormal float32 may miss, one unit for each block of keys and some.
    assert (np.abs(out.astype(np.float64) - expected) <= 8 * 2.0**-149).all()
    assert (expected != 0).mean() > 0.9


@needs_matrix_unit
@pytest.mark.parametrize("tiny", ["q", "k", "both"])
def test_queries_and_keys_that_are_subnormal_are_numbers(tiny):
    """Their products with numbers of the other end of the range decide the weights."""
    q, k, v = (x.astype(np.float64) for x in operands("bfloat16", rows=40, keys=200))
    half = np.arange(40) < (20 if tiny == "both" else 40)  # one of a pair is large
    tiny_q = half if tiny != "k" else ~half
    dtype = operands("bfloat16", 1, 1)[0].dtype
    units, large = np.round(40 * q) * TINY, 2.0**120
    q = np.where(tiny_q, units, q * large).astype(dtype)
    k = np.where(tiny_q, k * large, np.round(40 * k) * TINY).astype(dtype)
    options = {"scale": 2.0**7, "causal": True, "return_lse": True}
    out, lse = attention(q, k, v.astype(dtype), **options, out_dtype=np.float32)
    problem = make_problem(q, k, v.astype(dtype), **options, out_dtype=np.float32)
    expected = forward(problem)
    np.testing.assert_allclose(out, expected.out, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse, expected.lse, rtol=2e-6, atol=2e-6)
    assert np.ptp(expected.lse) > 0.1


@needs_matrix_unit
def test_a_neighbour_with_subnormal_numbers_moves_no_bit():
    """Whoever has such numbers is computed with more products, beside rows that need none."""
    q, k, v = operands("bfloat16", rows=70, keys=200)
    q[:, :, 7], k[:, :, 9, 3], v[:, :, 11, 4] = np.inf, -np.inf, -np.inf
    q[:, :, 8, 0], k[:, :, 10, 2] = -np.inf, np.nan
    mask = np.random.default_rng(2).random((70, 200)) < 0.5
    mask[:, 10], mask[:, 77], mask[5] = False, False, False
    options = {"mask": mask, "return_lse": True, "out_dtype": np.float32}
    expected = attention(q, k, v, **options)
    weighs_nothing = mask[:, 9] & (q[0, 0, :, 3] > 0)
    assert np.isfinite(expected[1][..., weighs_nothing]).any()
    q[:, :, 5, ::2], k[:, :, 77], v[:, :, 77, ::3] = TINY, 3 * TINY, 5 * TINY
    assert_same_bits(attention(q, k, v, **options), expected)


@needs_matrix_unit
def test_float32_values_that_are_subnormal_are_numbers():
    q, k, v = operands("float32", rows=40, keys=200)
    v = np.round(v * 2000) * np.float32(2.0**-149)
    assert 0 < np.abs(v).max() < 2.0**-126
    out = attention(q, k, v, causal=True)
    expected = forward(make_problem(q, k, v, causal=True)).out
    assert (np.abs(out - expected) <= 8 * 2.0**-149).all()
    assert (expected != 0).mean() > 0.9


@needs_matrix_unit
@pytest.mark.parametrize("size", [2.0**55, 2.0**56, 2.0**100, np.finfo(np.float32).max])
def test_a_neighbour_beyond_the_parts_of_float32_moves_no_bit(size):
    """Who sees such numbers is computed in float64; who does not, as if they were not there."""
    q, k, v = operands("float32", rows=70, keys=200)
    mask = np.random.default_rng(3).random((70, 200)) < 0.5
    sees_v = mask[:, 11]
    blind = ~(mask[:, 9] | sees_v | (np.arange(70) == 5))
    options = {"mask": mask, "return_lse": True}
    clean = attention(q, k, v, **options)
    q[:, :, 5, 0], k[:, :, 9, 3], v[:, :, 11, 4] = -size, size, size
    out, lse = attention(q, k, v, **options)
    assert_same_bits((out[:, :, blind], lse[:, :, blind]), tuple(x[:, :, blind] for x in clean))
    problem = make_problem(q, k, v, **options)
    budget, expected = forward_budget(problem), forward(problem)
    assert (np.abs(out - expected.out) <= budget.out).all()
    assert (np.abs(lse - expected.lse) <= budget.lse).all()
    assert np.abs(out[:, :, sees_v, 4]).max() > size / 1e4


@needs_matrix_unit
def test_every_part_of_a_float32_counts():
    """Weights of 1 and 0 bring back the values, and equal scores differ by their last digit."""
    rng = np.random.default_rng(4)
    keys = 80
    k, scale = np.eye(keys, dtype=np.float32)[None] * 16, math.log(2)
    v = (1 + rng.random((1, keys, 48), np.float32)) * np.float32(2.0) ** rng.integers(
        -60, 50, (1, keys, 48)
    ).astype(np.float32)
    assert_same_bits(attention(k, k, v, scale=scale), v)
    assert_same_bits(attention(k, k, -v, scale=scale), -v)
    q = np.nextafter(np.ones((1, 32, 1), np.float32), np.float32(2))
    lse = attention(q, q[:, :1], q[:, :1], scale=1.0, return_lse=True)[1]
    assert (np.abs(lse - (1 + 2.0**-22)) < 2.0**-24).all()


BLOCKS = ((128, 128), (32, 40), (7, 13))


@needs_matrix_unit
@each_type
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_block_mask_of_any_grid_has_the_bits_of_a_dense_one(dtype, block, with_mask):
    """Its first kept key is seldom where a group of the matrix unit begins."""
    q, k, v = operands(dtype, rows=300, keys=330)
    seen = np.random.default_rng(5).random((300, 330)) < 0.4
    documents = make_block_mask(
        lambda b, h, q_idx, k_idx: (q_idx // 70 == k_idx // 70) & (k_idx % 77 > 5),
        1, 1, 300, 330, block=block,
    )  # fmt: skip
    rows, keys = np.arange(300)[:, None], np.arange(330)
    dense = (rows // 70 == keys // 70) & (keys % 77 > 5)
    options = {"mask": seen} if with_mask else {}
    mine = attention(q, k, v, block_mask=documents, return_lse=True, **options)
    dense = dense & seen if with_mask else dense
    assert_same_bits(mine, attention(q, k, v, mask=dense, return_lse=True))


@needs_matrix_unit
@pytest.mark.parametrize("scale", [2.0**63, 2.0**64, 2.0**90, 2.0**99])
def test_no_scale_shows_what_the_matrix_unit_flushes(scale):
    """Products below 2**-126, scaled, move a weight by some units of float32."""
    one = operands("bfloat16")[0].dtype.type(1)
    q = np.full((1, 20, 512), one * 2.0**-64, one.dtype)
    k = np.full((1, 2, 512), one * 2.0**-63, one.dtype)
    k[:, 1] *= -1
    v = np.eye(2, dtype=one.dtype)[None]
    out = attention(q, k, v, scale=scale, out_dtype=np.float32)
    expected = forward(make_problem(q, k, v, scale=scale, out_dtype=np.float32)).out
    assert np.abs(out - expected).max() <= 2.0**-23


@needs_matrix_unit
@each_type
def test_errors_are_no_larger_than_those_of_multiply_adds(dtype):
    for dim in (64, 192):
        q, k, v = operands(dtype, rows=200, keys=900, dim=dim, dim_v=dim)
        options = {"causal": True, "out_dtype": np.float32}
        exact = forward(make_problem(q, k, v, **options)).out
        mine, other = (f(q, k, v, **options) - exact for f in (attention, without))
        assert np.sqrt(np.mean(mine**2)) <= np.sqrt(np.mean(other**2))


# --- which machines -----------------------------------------------------------------------------

AVX512 = "+avx512f,+avx512dq,+avx512bw,+avx512vl"


@pytest.mark.parametrize(
    ("features", "allowed", "found"),
    [
        (f"{AVX512},+amx-tile,+amx-bf16", True, tile.AMX),
        (f"{AVX512},+amx-tile,+amx-bf16", False, tile.AVX512),
        (f"{AVX512},+amx-tile", True, tile.AVX512),
        (AVX512, True, tile.AVX512),
        ("+avx2,+fma,+f16c,+amx-tile,+amx-bf16", True, tile.AVX2),
    ],
)
def test_the_matrix_unit_is_used_where_both_processor_and_system_have_it(
    monkeypatch, features, allowed, found
):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    monkeypatch.setattr(tile, "may_use_tiles", lambda: allowed)
    assert tile.host_isa.__wrapped__() == found


def test_explain_names_the_matrix_unit():
    def text(rows, dtype):
        q = np.zeros((1, rows, 64), dtype)
        with pretended(tile.AMX):
            return str(fusedattn.explain(q, q, q))

    for dtype in TYPES:
        assert "AVX-512 and AMX" in text(100, dtype)
        assert "AMX" not in text(FEW_ROWS, dtype)
        assert ("AMX" in text(tile.AMX.vector_rows, dtype)) == (dtype != "float32")
    assert "AMX" not in text(100, "float64")
