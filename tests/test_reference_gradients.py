"""The gradients of the specification against finite differences, and what they leave out."""

import numpy as np
import pytest
from reference_calls import FEATURES, SHAPE, operands

from fusedattn import reference
from fusedattn.problem import make_problem


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
