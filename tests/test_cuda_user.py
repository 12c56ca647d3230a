"""Functions of the user's in the portable CUDA kernel, in Numba's simulator; no GPU needed."""

import math

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal

import fusedattn
from fusedattn import make_block_mask
from fusedattn.cuda import compiler, simt


@pytest.fixture(autouse=True)
def _simulator(monkeypatch):
    monkeypatch.setenv(compiler.VARIABLE, "simulator")


def simulated(*operands, **keywords):
    return fusedattn.attention(*operands, backend="cuda", return_lse=True, **keywords)


def reference(*operands, **keywords):
    return fusedattn.attention(*operands, backend="reference", return_lse=True, **keywords)


def operands(rows=6, keys=11):
    return normal(0, 2, 2, rows, 3), normal(1, 2, 1, keys, 3), normal(2, 2, 1, keys, 4)


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def everything(score, batch, head, q_idx, k_idx, table, scale=2.0):
    if (q_idx + k_idx) % 5 == 4:
        return -math.inf
    return math.tanh(score / scale) + table[head, k_idx - q_idx] * (batch + 1)


@pytest.mark.parametrize("rows", [6, 17])  # keys are split, and are not
def test_a_score_mod_comes_before_softcap_alibi_bias_and_mask(rows):
    q, k, v = operands(rows, 18)
    options = {
        "score_mod": everything,
        "score_mod_aux": (normal(3, 2, 60),),
        "softcap": 3.0,
        "alibi_slopes": np.array([0.1, 0.3]),
        "bias": normal(4, rows, 18),
        "mask": np.arange(18) % 7 > 0,
        "causal": True,
        "q_offset": 12,
    }
    assert_close(simulated(q, k, v, **options), reference(q, k, v, **options))


def test_minus_infinity_hides_a_key_and_hidden_pairs_are_not_asked_about():
    q, k, v = operands()
    v[:, :, 4], k[:, :, 6] = np.nan, np.nan

    def odd(score, batch, head, q_idx, k_idx):
        return -math.inf if k_idx == 4 or k_idx == 6 or q_idx == 2 else score

    got = simulated(q, k, v, score_mod=odd)
    rows = np.arange(6)[:, None] != 2
    expected = simulated(q, k, v, mask=rows & ~np.isin(np.arange(11), [4, 6]))
    assert_same_bits(got, expected)
    assert (got[0][:, :, 2] == 0).all()

    def fails(score, batch, head, q_idx, k_idx):
        return score if k_idx <= q_idx else math.nan

    assert_same_bits(
        simulated(q, q, q, score_mod=fails, causal=True), simulated(q, q, q, causal=True)
    )


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "uint16", "int32", "bool"],
)
def test_aux_arrays_of_every_dtype_and_stride(dtype):
    q, k, v = operands()
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    table = (np.arange(4 * 60).reshape(60, 4) % 5).astype(kind)

    def mod(score, batch, head, q_idx, k_idx, t, one):
        small = 0.1 * (t[head][q_idx] - t[head, k_idx]) if one[()] > 1 else score
        return score + small * t.shape[1] / len(t) + t.ndim

    if dtype == "bool":  # True - True is for numbers alone

        def mod(score, batch, head, q_idx, k_idx, t, one):
            return score if t[head, k_idx] else score - 1.0

    options = {"score_mod": mod, "score_mod_aux": (table[::-2].T, np.array(2, np.int16))}
    assert_close(simulated(q, k, v, **options), reference(q, k, v, **options))


def test_an_index_outside_reads_the_nearest_element():
    q, k, v = operands()
    table = np.arange(8.0)

    def outside(score, batch, head, q_idx, k_idx, table, empty):
        return score + table[q_idx + k_idx] + table[q_idx - k_idx] + empty[k_idx]

    row, key = np.arange(6)[:, None], np.arange(11)
    wrapped = np.where(row < key, np.maximum(row - key + 8, 0), row - key)
    bias = table[np.minimum(row + key, 7)] + table[wrapped]
    got = simulated(q, k, v, score_mod=outside, score_mod_aux=(table, np.zeros(0)))
    assert_close(got, simulated(q, k, v, bias=bias))


def of_heads(batch, head, q_idx, k_idx):
    return (q_idx + k_idx + batch) % (head + 2) == 0


def near(batch, head, q_idx, k_idx, width):
    return abs(q_idx - k_idx) < width[()]


# Tiles have 4 rows and 8 keys; up to 16 rows, keys are split.
OTHERS = [(3, (1, 1)), (3, (16, 40)), (17, (9, 20))]


@pytest.mark.parametrize(
    ("rows", "block"),
    [
        *((3, (4, 8)), (3, (2, 3)), (17, (3, 5))),
        *(pytest.param(*one, marks=pytest.mark.deep) for one in OTHERS),
    ],
)
def test_a_block_mask_has_the_bits_of_its_dense_mask(rows, block):
    q, k, v = operands(rows, 21)
    shape = (rows, 21)
    some = make_block_mask(near, None, None, *shape, aux=(np.array(4),), block=block)
    own = make_block_mask(of_heads, 2, 2, *shape, block=block)
    late = make_block_mask(lambda b, h, q, k: k > 2 * h + 4, None, 2, *shape, block=block)
    # Asked about the first item and head for all of them.
    first = make_block_mask(lambda b, h, q, k: (b + 2 * h) * k < 9, None, None, *shape, block=block)
    mask = (some | ~own) & late & first
    k[:, :, 3], v[:, :, 2], v[:, :, 14] = np.inf, np.nan, np.nan  # the last one is seen by some
    dense = np.broadcast_to(mask.to_mask(), (2, 2, *shape))
    assert_same_bits(simulated(q, k, v, block_mask=mask), simulated(q, k, v, mask=dense))


@pytest.mark.parametrize("rows", [3, 17])
def test_tiles_of_empty_blocks_are_not_loaded(rows, monkeypatch):
    q, k, v = normal(0, 1, 1, rows, 2), normal(1, 1, 1, 64, 3)[..., :2], normal(2, 1, 1, 64, 3)
    loaded, make_loader = set(), simt.make_loader

    def noting(*arguments):
        load = make_loader(*arguments)

        def noted(array, index):
            if array.shape == (v.size,):
                loaded.add(index // v.shape[-1])
            return load(array, index)

        return noted

    monkeypatch.setattr(simt, "make_loader", noting)
    some = make_block_mask(lambda b, h, q, k: k // 8 in (1, 6), None, None, rows, 64, block=(2, 4))
    simulated(q, k, v, block_mask=some)
    assert loaded == {*range(8, 16), *range(48, 56)}


def test_a_block_mask_meets_what_else_hides_and_changes_scores():
    q, k, v = operands(9, 21)
    mask = make_block_mask(near, None, None, 9, 21, aux=(np.array(6),), block=(2, 6))
    options = {
        "score_mod": everything,
        "score_mod_aux": (normal(3, 2, 40),),
        "causal": True,
        "seqused_k": np.array([21, 14]),
        "mask": np.arange(21) % 4 > 0,
        "dropout_p": 0.3,
        "seed": 5,
        "sinks": np.array([0.5, -1.0]),
    }
    got = simulated(q, k, v, block_mask=mask, **options)
    assert_close(got, reference(q, k, v, block_mask=mask, **options))


def test_a_mistake_is_told_with_its_place():
    q, k, v = operands()
    with pytest.raises(TypeError, match=r"score_mod <lambda> .* must return a real number"):
        simulated(q, k, v, score_mod=lambda score, b, h, q, k: q > k)
