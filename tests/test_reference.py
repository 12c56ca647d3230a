"""The specification against independent oracles: scipy and known answers."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from reference_calls import FEATURES, SHAPE, operands
from scipy.special import logsumexp, softmax

from fusedattn import reference
from fusedattn.problem import make_problem

BFLOAT16 = ml_dtypes.bfloat16


def item(value, index, length):
    """One batch item's entry of an int or an array over the leading axes."""
    return length if value is None else np.broadcast_to(value, SHAPE[:2])[index]


def oracle_row(q, k, v, index, head, i, kept, options):
    """One row by the definition: a list of the keys seen, scipy's softmax over it."""
    get = options.get
    used_q = item(get("seqused_q"), index, SHAPE[3])
    used_k = item(get("seqused_k"), index, SHAPE[4])
    p = i + item(get("q_offset"), index, used_k - used_q)
    left, right = get("window_size") or (None, None)
    if i >= used_q:
        return np.zeros(v.shape[-1]), -np.inf
    full = (*SHAPE[:3], *SHAPE[3:])
    bias = np.broadcast_to(get("bias", 0.0), full)[(*index, head, i)]
    mask = np.broadcast_to(get("mask", True), full)[(*index, head, i)]
    slopes = np.broadcast_to(get("alibi_slopes", np.zeros(4)), SHAPE[:3])[(*index, head)]
    keys, scores = [], []
    for j in range(used_k):
        outside = (left is not None and j < p - left) or (right is not None and j > p + right)
        if outside or (get("causal") and j > p) or not mask[j] or bias[j] == -np.inf:
            continue
        score = get("scale", q.shape[-1] ** -0.5) * float(q[i] @ k[j])
        if "softcap" in options:
            score = options["softcap"] * np.tanh(score / options["softcap"])
        keys.append(j)
        scores.append(score - slopes * abs(p - j) + bias[j])
    logits = [*scores, options["sinks"][head]] if "sinks" in options else scores
    if not logits or np.max(logits) == -np.inf:
        return np.zeros(v.shape[-1]), -np.inf
    weights = softmax(logits)[: len(keys)]
    factors = [kept[(*index, head, i, j)] / (1 - get("dropout_p", 0.0)) for j in keys]
    rows = [w * f * v[j] for w, f, j in zip(weights, factors, keys, strict=True)]
    return np.sum(rows, axis=0) if rows else np.zeros(v.shape[-1]), logsumexp(logits)


@pytest.mark.parametrize("feature", FEATURES)
def test_forward_equals_the_definition_row_by_row(feature):
    options = FEATURES[feature]
    q, k, v = operands(np.random.default_rng(0))
    problem = make_problem(q, k, v, return_lse=True, **options)
    result = reference.forward(problem)
    kept = np.ones(SHAPE)
    if "dropout_p" in options:
        kept = reference.keep_mask(SHAPE, options["dropout_p"], options["seed"])
    for index in np.ndindex(*SHAPE[:2]):
        for head, i in np.ndindex(SHAPE[2], SHAPE[3]):
            kv = (*index, head // 2)
            out, lse = oracle_row(q[(*index, head)], k[kv], v[kv], index, head, i, kept, options)
            where = (*index, head, i)
            np.testing.assert_allclose(result.out[where], out, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(result.lse[where], lse, rtol=1e-12, atol=1e-13)


def test_a_row_without_keys_is_zero_and_minus_inf():
    q, k, v = operands(np.random.default_rng(0))
    for options in (dict(mask=np.zeros((), bool)), dict(seqused_k=0), dict(bias=np.array(-np.inf))):
        out, lse = reference.forward(make_problem(q, k, v, return_lse=True, **options))
        assert (out == 0).all()
        assert np.isneginf(lse).all()


def test_a_row_without_keys_has_its_sink_as_lse():
    q, k, v = operands(np.random.default_rng(0))
    sinks = np.array([1.0, -2.0, 0.0, -np.inf])
    out, lse = reference.forward(
        make_problem(q, k, v, sinks=sinks, seqused_k=0, seqused_q=3, return_lse=True)
    )
    assert (out == 0).all()
    np.testing.assert_array_equal(lse[..., :3], np.broadcast_to(sinks[:, None], (2, 3, 4, 3)))
    assert np.isneginf(lse[..., 3:]).all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)]
)
def test_axes_of_length_zero(shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = np.ones((batch, heads, seqlen_q, 5)), np.ones((batch, heads, seqlen_k, 5))
    problem = make_problem(q, k, k, sinks=np.zeros(heads), return_lse=True, dropout_p=0.5, seed=0)
    out, lse = reference.forward(problem)
    assert (out.shape, lse.shape) == ((batch, heads, seqlen_q, 5), (batch, heads, seqlen_q))
    gradients = reference.backward(problem, np.ones(out.shape), out, lse, np.ones(lse.shape))
    assert (gradients.d_q.shape, gradients.d_k.shape) == (q.shape, k.shape)
    assert reference.weights(problem).shape == shape


def hidden_and_seen():
    """Rows 0 to 2 see keys 0 to 2; row 3 sees key 3 too; nobody sees key 4."""
    mask = np.zeros((4, 5), bool)
    mask[:, :3] = True
    mask[3, 3] = True
    rng = np.random.default_rng(11)
    return mask, *(rng.standard_normal((1, n, 2)) for n in (4, 5, 5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_hidden_keys_do_not_leak(name, bad):
    mask, q, k, v = hidden_and_seen()
    clean = reference.forward(make_problem(q, k, v, mask=mask, return_lse=True))
    broken = {"k": k.copy(), "v": v.copy()}
    broken[name][0, 3:] = bad
    problem = make_problem(q, **broken, mask=mask, return_lse=True)
    out, lse = reference.forward(problem)
    np.testing.assert_array_equal(out[0, :3], clean.out[0, :3])
    np.testing.assert_array_equal(lse[0, :3], clean.lse[0, :3])
    if name == "v":
        assert not np.isfinite(out[0, 3]).any()
    gradients = reference.backward(problem, np.ones(out.shape), out, lse)
    assert np.isfinite(gradients.d_q[0, :3]).all()
    assert (gradients.d_k[0, 4] == 0).all()
    assert (gradients.d_v[0, 4] == 0).all()


def test_a_nan_in_a_seen_value_stays_in_its_column():
    mask, q, k, v = hidden_and_seen()
    v[0, 3, 1] = np.nan
    out, lse = reference.forward(make_problem(q, k, v, mask=mask, return_lse=True))
    expected = np.zeros((4, 2), bool)
    expected[3, 1] = True
    np.testing.assert_array_equal(np.isnan(out[0]), expected)
    assert np.isfinite(lse).all()


def test_a_nan_in_a_seen_key_takes_its_row():
    mask, q, k, v = hidden_and_seen()
    k[0, 3, 1] = np.nan
    out, lse = reference.forward(make_problem(q, k, v, mask=mask, return_lse=True))
    np.testing.assert_array_equal(np.isnan(out[0]).all(axis=1), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(lse[0]), [False, False, False, True])


def test_a_nan_bias_under_a_mask_does_not_matter():
    mask, q, k, v = hidden_and_seen()
    bias = np.where(mask, 0.25, np.nan)
    hidden = reference.forward(make_problem(q, k, v, mask=mask, bias=bias))
    plain = reference.forward(make_problem(q, k, v, mask=mask, bias=np.array(0.25)))
    np.testing.assert_array_equal(hidden.out, plain.out)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bias_of_minus_inf_hides_as_the_mask_does(bad):
    mask, q, k, v = hidden_and_seen()
    k[0, 3:] = bad
    v[0, 3:] = bad
    bias = np.where(mask, 0.0, -np.inf)
    by_bias = reference.forward(make_problem(q, k, v, bias=bias, return_lse=True))
    by_mask = reference.forward(make_problem(q, k, v, mask=mask, return_lse=True))
    np.testing.assert_array_equal(by_bias.out, by_mask.out)
    np.testing.assert_array_equal(by_bias.lse, by_mask.lse)
    assert np.isfinite(by_bias.out[0, :3]).all()


def test_scores_of_minus_inf_weigh_nothing_and_plus_inf_is_nan():
    q, k, v = np.array([[[1.0]]]), np.array([[[-np.inf], [0.5]]]), np.array([[[3.0], [4.0]]])
    out, lse = reference.forward(make_problem(q, k, v, return_lse=True))
    assert (out.item(), lse.item()) == (4.0, 0.5)
    out, lse = reference.forward(make_problem(-q, k, v, return_lse=True))
    assert np.isnan(out.item())
    assert np.isnan(lse.item())


def test_a_dropped_entry_is_skipped_not_multiplied():
    keep = reference.keep_mask((1, 1, 64), 0.5, 3)[0, 0]
    v = np.where(keep, 1.0, np.nan)[None, :, None]
    q, k = np.zeros((1, 1, 4)), np.zeros((1, 64, 4))
    problem = make_problem(q, k, v, dropout_p=0.5, seed=3, return_lse=True)
    out, lse = reference.forward(problem)
    np.testing.assert_allclose(out.item(), 2 * keep.sum() / 64)
    np.testing.assert_allclose(lse.item(), np.log(64))
    np.testing.assert_array_equal(reference.weights(problem)[0, 0] > 0, keep)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("signs", [[1.0], [-1.0], [1.0, -1.0]])
def test_values_at_the_largest_number_stay_finite_and_in_their_hull(dtype, signs):
    largest = ml_dtypes.finfo(dtype).max
    rng = np.random.default_rng(12)
    q, k = (rng.standard_normal((1, n, 4)).astype(dtype) for n in (30, 50))
    v = np.resize(np.array(signs), (1, 50, 1)).astype(dtype) * largest
    out = reference.forward(make_problem(q, k, v)).out
    assert np.isfinite(out).all()
    if len(signs) == 1:
        np.testing.assert_allclose(out.astype(np.float64), float(v[0, 0, 0]), rtol=1e-14)


def test_scores_up_to_a_quarter_of_the_largest_number_stay_finite():
    quarter = np.finfo(np.float64).max / 4
    q, k = np.array([[[1.0]], [[-1.0]]]), np.array([[[quarter], [-quarter], [0.0]]] * 2)
    v = np.array([[[1.0], [2.0], [3.0]]] * 2)
    out, lse = reference.forward(make_problem(q, k, v, return_lse=True))
    assert out.ravel().tolist() == [1.0, 2.0]
    assert lse.ravel().tolist() == [quarter, quarter]


def test_bias_slopes_and_sinks_are_read_in_the_accumulator_type():
    q = np.zeros((1, 2, 4), np.float32)
    bias = np.array([np.finfo(np.float64).min, 0.1])
    out, lse = reference.forward(make_problem(q, q, q + 1, bias=bias, return_lse=True))
    np.testing.assert_array_equal(lse, np.float32(0.1))
    np.testing.assert_array_equal(out, 1.0)


def test_out_is_rounded_once():
    # 1 + 2^-8 is halfway between two bfloat16 numbers; what lies just above it must go up, but a
    # detour through float32 drops the small part first and then rounds the tie to even.
    value = np.array([1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 0.0, np.inf])
    rounded = reference._round(value, np.dtype(BFLOAT16)).astype(np.float64)
    assert rounded.tolist() == [1 + 2.0**-7, -1 - 2.0**-7, 1.0, 0.0, np.inf]
    rng = np.random.default_rng(13)
    values = rng.standard_normal(10_000) * 2.0 ** rng.integers(-130, 127, 10_000)
    nearest = reference._round(values, np.dtype(BFLOAT16)).astype(np.float64)
    spacing = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(nearest), 2.0**-126))) - 7, -133)
    assert (np.abs(nearest - values) <= spacing / 2).all()


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "expected"),
    [
        (np.float16, None, np.float16),
        (BFLOAT16, "float32", np.float32),
        (np.float64, np.float32, np.float32),
    ],
)
def test_out_and_gradients_have_their_types(dtype, out_dtype, expected):
    q, k, v = (x.astype(dtype) for x in operands(np.random.default_rng(0)))
    problem = make_problem(q, k, v, out_dtype=out_dtype, return_lse=True, sinks=np.zeros(4))
    out, lse = reference.forward(problem)
    assert (out.dtype, lse.dtype) == (expected, problem.accumulator)
    gradients = reference.backward(problem, out, out, lse)
    assert gradients.d_q.dtype == gradients.d_k.dtype == gradients.d_v.dtype == dtype
    assert gradients.d_sinks.dtype == np.float64


def test_the_result_is_written_into_out():
    q, k, v = operands(np.random.default_rng(0))
    out = np.full((2, 3, 5, 4, 3), np.nan)
    problem = make_problem(*(x.swapaxes(-3, -2) for x in (q, k, v)), layout="bshd", out=out)
    result = reference.forward(problem)
    np.testing.assert_array_equal(problem.restore(result.out), out)
    np.testing.assert_array_equal(reference.forward(make_problem(q, k, v)).out, result.out)


# Random123, tests/kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    drawn = reference.philox4x32(tuple(np.array([c], np.uint64) for c in counter), key)
    assert tuple(int(word[0]) for word in drawn) == words


def test_each_entry_reads_its_own_word():
    shape, seed, p = (2, 3, 4, 5, 10), 0x0123456789ABCDEF, 0.3
    keep = reference.keep_mask(shape, p, seed)
    for *item_index, head, row, key in itertools.islice(np.ndindex(*shape), 0, None, 7):
        batch = int(np.ravel_multi_index(item_index, shape[:2]))
        counter = tuple(np.array([c], np.uint64) for c in (key // 4, row, head, batch))
        words = reference.philox4x32(counter, (0x89ABCDEF, 0x01234567))
        kept = int(words[key % 4][0]) >= int(p * 2**32)
        assert keep[(*item_index, head, row, key)] == kept


def test_dropout_keeps_its_share():
    n = 200_000
    for p in (0.0, 0.1, 0.5, 0.999):
        dropped = n - reference.keep_mask((1, 1, n), p, 42).sum()
        assert abs(dropped - n * p) <= 5 * np.sqrt(n * p * (1 - p))


def test_weights_times_values_are_the_output():
    q, k, v = operands(np.random.default_rng(14))
    for options in FEATURES.values():
        problem = make_problem(q, k, v, **options)
        product = reference.weights(problem) @ np.repeat(v, 2, axis=-3)
        np.testing.assert_allclose(reference.forward(problem).out, product, atol=1e-13)
