"""The specification against independent oracles: scipy, finite differences, known answers."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from fusedattn import reference
from fusedattn.problem import make_problem

BFLOAT16 = ml_dtypes.bfloat16
SHAPE = (2, 3, 4, 5, 7)  # two leading axes, heads, seqlen_q, seqlen_k

# Options in every combination with each other where they may meet.
FEATURES = {
    "plain": {},
    "scale": dict(scale=-0.7),
    "scale 0": dict(scale=0.0),
    "causal": dict(causal=True),
    "top left": dict(causal=True, q_offset=0),
    "window": dict(window_size=(2, 1)),
    "left window": dict(window_size=(1, None), causal=True),
    "offsets": dict(causal=True, q_offset=np.array([[4], [-2]])),
    "lengths": dict(seqused_k=np.array([7, 3, 0]), seqused_q=np.array([[5], [2]]), causal=True),
    "mask": dict(mask=np.random.default_rng(1).random((4, 5, 7)) < 0.5),
    "bias": dict(bias=np.random.default_rng(2).standard_normal((3, 1, 5, 7))),
    "bias of -inf": dict(bias=np.where(np.arange(7) % 3 == 1, -np.inf, 0.5)),
    "alibi": dict(alibi_slopes=np.array([0.5, 0.25, -0.1, 0.0]), q_offset=1),
    "alibi per item": dict(alibi_slopes=np.arange(12.0).reshape(3, 4) / 20),
    "softcap": dict(softcap=0.8),
    "sinks": dict(sinks=np.array([0.3, -1.0, 2.0, -np.inf]), causal=True, q_offset=-2),
    "all": dict(
        causal=True,
        window_size=(3, None),
        mask=np.random.default_rng(3).random((5, 7)) < 0.8,
        bias=np.random.default_rng(4).standard_normal((4, 5, 1)),
        alibi_slopes=np.array([0.5, 0.25, -0.1, 0.0]),
        softcap=1.3,
        sinks=np.array([0.3, -1.0, 2.0, 0.0]),
        seqused_q=4,
        seqused_k=6,
    ),
    "dropout": dict(dropout_p=0.4, seed=7, sinks=np.zeros(4), causal=True),
}


def operands(rng, heads_kv=2):
    *batch, heads, seqlen_q, seqlen_k = SHAPE
    q = rng.standard_normal((*batch, heads, seqlen_q, 8))
    k = rng.standard_normal((*batch, heads_kv, seqlen_k, 8))
    v = rng.standard_normal((*batch, heads_kv, seqlen_k, 3))
    return q, k, v


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


def losses(problem, d_out, d_lse):
    """Return ``<d_out, out> + <d_lse, lse>`` over the rows that have an lse."""
    out, lse = reference.forward(problem)
    return float((d_out * out).sum() + (d_lse * lse)[np.isfinite(lse)].sum())


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_adjoint_to_finite_differences(feature):
    rng = np.random.default_rng(5)
    options = dict(FEATURES[feature])
    values = dict(zip("qkv", operands(rng), strict=True))
    values |= {name: options.pop(name) for name in ("bias", "sinks") if name in options}
    problem = make_problem(**values, return_lse=True, **options)
    out, lse = reference.forward(problem)
    d_out, d_lse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    gradients = reference.backward(problem, d_out, out, lse, d_lse)
    for name, value in values.items():
        direction = np.where(np.isfinite(value), rng.standard_normal(value.shape), 0.0)
        step = 1e-5
        ahead, behind = (
            losses(make_problem(**values | {name: moved}, return_lse=True, **options), d_out, d_lse)
            for moved in (value + step * direction, value - step * direction)
        )
        gradient = getattr(gradients, f"d_{name}")
        assert gradient.shape == value.shape
        expected = (ahead - behind) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_operands_not_given_are_none():
    q, k, v = operands(np.random.default_rng(0))
    gradients = reference.backward(make_problem(q, k, v), np.ones((2, 3, 4, 5, 3)))
    assert gradients.d_bias is None
    assert gradients.d_sinks is None


def test_a_bias_gradient_that_is_not_wanted_is_none_and_changes_nothing():
    q, k, v = operands(np.random.default_rng(0))
    problem = make_problem(q, k, v, **FEATURES["all"])
    d_out = np.ones(problem.out_shape)
    wanted, found = (reference.backward(problem, d_out, bias_grad=flag) for flag in (True, False))
    assert wanted.d_bias is not None
    assert found.d_bias is None
    for name in ("d_q", "d_k", "d_v", "d_sinks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sinks", [None, np.full(4, 2.0**45)])
def test_an_lse_too_coarse_for_its_weights_is_not_used(dtype, sinks):
    q, k, v = (x.astype(dtype) for x in operands(np.random.default_rng(11)))
    # 2**45 is exact in both types, and no score survives beside it.
    options = {} if sinks is None else {"sinks": sinks}
    problem = make_problem(q, k, v, bias=np.array(2.0**45), return_lse=True, **options)
    d_out = np.random.default_rng(12).standard_normal(problem.out_shape)
    out, lse = reference.forward(problem)
    expected = reference.backward(problem, d_out, out, d_lse=np.ones(lse.shape))
    wrong = (lse * (1 + 4 * np.finfo(dtype).eps)).astype(dtype)
    found = reference.backward(problem, d_out, out, wrong, np.ones(lse.shape))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (4, 1, 1), (1, 1, 5, 7), (2, 3, 4, 5, 7)])
def test_the_gradient_of_a_bias_has_its_shape_and_dtype(shape):
    rng = np.random.default_rng(6)
    q, k, v = operands(rng)
    d_out = rng.standard_normal((2, 3, 4, 5, 3))
    full = reference.backward(make_problem(q, k, v, bias=np.zeros(SHAPE)), d_out).d_bias
    bias = np.zeros(shape, np.float32)
    d_bias = reference.backward(make_problem(q, k, v, bias=bias), d_out).d_bias
    assert (d_bias.shape, d_bias.dtype) == (shape, np.float32)
    padded = (1,) * (5 - len(shape)) + shape
    axes = tuple(axis for axis, length in enumerate(padded) if length == 1)
    expected = full.sum(axis=axes, keepdims=True).reshape(shape)
    np.testing.assert_allclose(d_bias, expected, rtol=1e-6, atol=1e-6)


def test_backward_recomputes_what_it_is_not_given():
    rng = np.random.default_rng(7)
    problem = make_problem(*operands(rng), return_lse=True, **FEATURES["all"] | {"sinks": None})
    d_out = rng.standard_normal(problem.out_shape)
    given = reference.backward(problem, d_out, *reference.forward(problem))
    for ours, theirs in zip(reference.backward(problem, d_out), given, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradients_of_a_part_of_the_keys_follow_from_the_out_and_lse_of_all():
    rng = np.random.default_rng(8)
    q, k, v = operands(rng)
    d_out = rng.standard_normal((2, 3, 4, 5, 3))
    whole = make_problem(q, k, v, return_lse=True)
    out, lse = reference.forward(whole)
    expected = reference.backward(whole, d_out, out, lse)
    parts = [
        reference.backward(make_problem(q, k[..., keys, :], v[..., keys, :]), d_out, out, lse)
        for keys in (slice(0, 3), slice(3, 7))
    ]
    np.testing.assert_allclose(sum(part.d_q for part in parts), expected.d_q, atol=1e-13)
    for name in ("d_k", "d_v"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=-2)
        np.testing.assert_allclose(joined, getattr(expected, name), atol=1e-13)


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


def test_what_comes_back_through_a_row_without_keys_is_ignored():
    rng = np.random.default_rng(9)
    q, k, v = operands(rng)
    mask = np.ones((5, 7), bool)
    mask[2] = False
    problem = make_problem(q, k, v, mask=mask, bias=np.zeros((5, 7)), seqused_q=4, return_lse=True)
    out, lse = reference.forward(problem)
    d_out, d_lse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    clean = reference.backward(problem, d_out, out, lse, d_lse)
    d_out[..., [2, 4], :] = np.nan
    d_lse[..., [2, 4]] = np.nan
    for ours, theirs in zip(
        reference.backward(problem, d_out, out, lse, d_lse), clean, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (clean.d_q[..., [2, 4], :] == 0).all()


def test_a_row_without_keys_gives_its_sink_d_lse():
    q, k, v = operands(np.random.default_rng(0))
    problem = make_problem(q, k, v, sinks=np.ones(4), seqused_k=0, seqused_q=3, return_lse=True)
    d_lse = np.random.default_rng(10).standard_normal((2, 3, 4, 5))
    gradients = reference.backward(problem, np.full(problem.out_shape, np.nan), d_lse=d_lse)
    np.testing.assert_allclose(gradients.d_sinks, d_lse[..., :3].sum(axis=(0, 1, 3)))
    assert not gradients.d_q.any()
    assert not gradients.d_v.any()


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
