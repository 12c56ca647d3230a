"""JAX's transformations around our gradients."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from fusedattn import attention as on_arrays  # noqa: E402
from fusedattn.interop.jax import attention  # noqa: E402

MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(1, 1)),
    "offset": dict(causal=True, q_offset=1),
    "lengths": dict(seqused_k=np.array([[3, 2]]), seqused_q=2),
    "mask": dict(mask=MASK),
    "scale": dict(scale=-0.7),
    "softcap": dict(softcap=0.8),
    "alibi": dict(alibi_slopes=np.array([0.5, -0.25])),
    "dropout": dict(dropout_p=0.4, seed=7),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def operands(dtype=np.float64, leading=(1, 2), seed=0):
    rng = np.random.default_rng(seed)
    shapes = (*leading, 2, 3, 4), (*leading, 1, 4, 4), (*leading, 1, 4, 2)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def normal(shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape))


def check(function, arguments):
    check_grads(function, arguments, order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature):
    check(functools.partial(attention, **FEATURES[feature]), operands())


def test_layout_concerns_q_k_v_out_and_their_gradients():
    check(
        lambda *qkv: attention(*qkv, layout="bshd", mask=MASK),
        [x.swapaxes(-3, -2) for x in operands()],
    )


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 1), (1, 2, 2, 3, 4)])
def test_bias_and_sinks_and_lse_are_differentiable(shape):
    def both(q, k, v, bias, sinks):
        return attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True)

    check(both, (*operands(), normal(shape), normal(2)))


def test_lse_alone_is_differentiable():
    q, k, v = operands()
    check(lambda q, k: attention(q, k, v, return_lse=True)[1], (q, k))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_results_are_those_of_arrays_in_every_type(dtype):
    q, k, v = operands(dtype)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    expected = on_arrays(*map(np.asarray, (q, k, v)), causal=True, return_lse=True)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    for x in jax.grad(lambda *qkv: attention(*qkv).sum(), (0, 1, 2))(q, k, v):
        assert x.dtype == dtype


def test_jit_changes_nothing():
    arrays = operands()
    loss = lambda *qkv: (attention(*qkv, mask=MASK) ** 2).sum()  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays)
    expected, plain = jax.value_and_grad(loss, (0, 1, 2))(*arrays)
    np.testing.assert_allclose(value, expected)
    for one, other in zip(gradients, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_numpy_arrays_are_read_in_the_types_that_jax_is_set_to():
    arrays = [np.asarray(x) for x in operands(np.float64)]
    with jax.enable_x64(False):
        out = attention(*arrays, window_size=[1, None])
    assert out.dtype == np.float32


def test_lengths_may_be_traced():
    q, k, v = operands()
    run = jax.jit(lambda used: attention(q, k, v, seqused_k=used))
    for used in (0, 2, 4):
        expected = on_arrays(*map(np.asarray, (q, k, v)), seqused_k=used)
        np.testing.assert_array_equal(run(jnp.asarray(used)), expected)


VMAPPED = {
    "plain": ({}, {}),
    "mask of all": ({}, dict(mask=jnp.asarray(MASK))),
    "mask of each": (dict(mask=jnp.stack([jnp.asarray(MASK), ~jnp.asarray(MASK)] * 2)[:3]), {}),
    "bias of all": ({}, dict(bias=normal((3, 4)))),
    "bias of each": (dict(bias=normal((3, 2, 3, 1))), {}),
    "slopes of each": (dict(alibi_slopes=normal((3, 2))), {}),
    "lengths of each": (dict(seqused_k=jnp.array([4, 0, 2])), dict(causal=True)),
    "offset of each": (dict(q_offset=jnp.array([[0, 1], [2, 0], [1, 1]])), dict(causal=True)),
    "sinks of all": ({}, dict(sinks=normal(2))),
    "sinks of each": (dict(sinks=normal((3, 2))), {}),
    "dropout": ({}, dict(dropout_p=0.5, seed=3)),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_is_a_loop(name):
    mapped, shared = VMAPPED[name]
    arrays = operands(leading=(3, 2))

    def loss(differentiable, fixed):
        q, k, v, *extra = differentiable
        names = [n for n in ("bias", "sinks") if n in mapped]
        keywords = dict(zip(names, extra, strict=True)) | fixed | shared
        out, lse = attention(q, k, v, **keywords, return_lse=True)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    own = [mapped[n] for n in ("bias", "sinks") if n in mapped]
    fixed = {n: x for n, x in mapped.items() if n not in ("bias", "sinks")}
    pull = jax.value_and_grad(loss)
    values, gradients = jax.jit(jax.vmap(pull))([*arrays, *own], fixed)
    for i in range(3):
        one = [x[i] for x in (*arrays, *own)], {n: x[i] for n, x in fixed.items()}
        value, expected = pull(*one)
        np.testing.assert_allclose(values[i], value, rtol=1e-12)
        for got, want in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-10, atol=1e-13)


def test_the_gradient_of_a_bias_that_vmap_shares_is_summed():
    q, k, v = operands(leading=(3, 2))
    bias = normal((3, 4))

    def total(bias):
        return (jax.vmap(lambda q, k, v: attention(q, k, v, bias=bias))(q, k, v) ** 2).sum()

    def whole(bias):
        return (attention(q, k, v, bias=bias) ** 2).sum()

    np.testing.assert_allclose(jax.grad(total)(bias), jax.grad(whole)(bias), rtol=1e-10)


def test_operands_are_read_where_they_lie(monkeypatch):
    from fusedattn.interop import jax as module

    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return on_arrays(**arguments)

    monkeypatch.setattr(module, "forward", spy)
    array = jnp.zeros((1, 2, 300, 64), jnp.float32)
    attention(array, array, array).block_until_ready()
    # The callback may be handed the array itself or JAX's copy of it; ours is never a further one.
    assert not seen["q"].flags.owndata


def test_a_large_call_inside_jit_ends():
    x = jnp.ones((1, 4, 512, 64), jnp.float32)
    run = jax.jit(jax.grad(lambda x: attention(x + 1, x * 2, x, causal=True).sum()))
    assert run(x).shape == x.shape


def test_a_second_derivative_and_forward_mode_are_refused():
    q, k, v = operands()

    def slope(q):
        return jax.grad(lambda q: (attention(q, k, v) ** 2).sum())(q).sum()

    with pytest.raises((TypeError, ValueError), match="Pure callbacks do not support JVP"):
        jax.grad(slope)(q)
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(lambda q: attention(q, k, v), (q,), (q,))


def test_what_cannot_be_is_said():
    q, k, v = operands()
    with pytest.raises(ValueError, match="k must have the head_dim of q"):
        jax.jit(attention)(q, k[..., :2], v)
    with pytest.raises(TypeError, match=r"q must be a jax\.Array, but is of type list"):
        attention([1.0], k, v)
    with pytest.raises(TypeError, match="no argument out"):
        attention(q, k, v, out=q)
    with pytest.raises(TypeError, match="bais"):
        attention(q, k, v, bais=None)
    with pytest.raises(ValueError, match="alibi_slopes has no gradient, but is differentiated"):
        jax.grad(lambda slopes: attention(q, k, v, alibi_slopes=slopes).sum())(normal(2))
