"""The public gradient: shapes, layouts, what it refuses, and which backend computes it."""

import ml_dtypes
import numpy as np
import pytest

import fusedattn
from fusedattn import attention, attention_backward, dispatch
from fusedattn.problem import Gradients, make_problem

RNG = np.random.default_rng(0)
Q = RNG.standard_normal((2, 4, 5, 8), dtype=np.float32)
K = RNG.standard_normal((2, 2, 7, 8), dtype=np.float32)
V = RNG.standard_normal((2, 2, 7, 3), dtype=np.float32)
OUT, LSE = attention(Q, K, V, return_lse=True, backend="reference")
D_OUT = RNG.standard_normal(OUT.shape, dtype=np.float32)
GIVEN = {"d_out": D_OUT, "q": Q, "k": K, "v": V, "out": OUT, "lse": LSE}


def swapped(array):
    return array.swapaxes(-3, -2)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_every_gradient_has_the_shape_and_dtype_of_its_operand(backend):
    bias, sinks = np.zeros((4, 1, 7), np.float64), np.zeros(4, ml_dtypes.bfloat16)
    out, lse = attention(Q, K, V, bias=bias, sinks=sinks, return_lse=True)
    found = attention_backward(D_OUT, Q, K, V, out, lse, bias=bias, sinks=sinks, backend=backend)
    assert type(found) is Gradients is fusedattn.Gradients
    for gradient, operand in zip(found[:5], (Q, K, V, bias, sinks), strict=True):
        assert (gradient.shape, gradient.dtype) == (operand.shape, operand.dtype)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_what_was_not_given_has_no_gradient(backend):
    found = attention_backward(*GIVEN.values(), backend=backend)
    assert found.d_bias is found.d_sinks is None
    bias = np.zeros((5, 7), np.float32)
    found = attention_backward(*GIVEN.values(), bias=bias, bias_grad=False, backend=backend)
    assert found.d_bias is None


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_a_d_lse_of_none_is_zero(backend):
    without = attention_backward(*GIVEN.values(), backend=backend)
    zero = attention_backward(*GIVEN.values(), d_lse=np.zeros_like(LSE), backend=backend)
    for one, other in zip(without[:3], zero[:3], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_layout_concerns_q_k_v_out_and_their_gradients_only(backend):
    mask = RNG.random((4, 5, 7)) < 0.7
    bias = RNG.standard_normal((4, 5, 7))
    d_lse = RNG.standard_normal(LSE.shape, dtype=np.float32)
    options = {"mask": mask, "bias": bias, "backend": backend}
    out, lse = attention(Q, K, V, return_lse=True, **options)
    found = attention_backward(D_OUT, Q, K, V, out, lse, d_lse=d_lse, **options)
    rows = (swapped(x) for x in (D_OUT, Q, K, V, out))
    other = attention_backward(*rows, lse, d_lse=d_lse, layout="bshd", **options)
    for name in ("d_q", "d_k", "d_v"):
        np.testing.assert_array_equal(swapped(getattr(other, name)), getattr(found, name))
    np.testing.assert_array_equal(other.d_bias, found.d_bias)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_out_may_be_float32_whatever_the_inputs_are(dtype):
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    out, lse = attention(q, k, v, return_lse=True, out_dtype=np.float32)
    for out_dtype in (None, np.float32):
        found = attention_backward(D_OUT, q, k, v, out, lse, out_dtype=out_dtype)
        assert found.d_q.dtype == dtype
    if dtype != np.float32:
        with pytest.raises(TypeError, match=f"out must have dtype {np.dtype(dtype)}|d_out must"):
            attention_backward(D_OUT, q, k, v, out, lse, out_dtype=dtype)


def test_arrays_of_any_strides_give_the_same_bits():
    flipped = [x[..., ::-1, :].copy()[..., ::-1, :] for x in (D_OUT, Q, K, V, OUT)]
    assert flipped[0].strides[-2] < 0
    lse = np.repeat(LSE, 2, axis=-1)[..., ::2]
    found, expected = attention_backward(*flipped, lse), attention_backward(*GIVEN.values())
    for one, other in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_inputs_may_be_read_only_and_are_not_written():
    arrays = {name: x.copy() for name, x in GIVEN.items()}
    for x in arrays.values():
        x.setflags(write=False)
    attention_backward(*arrays.values(), d_lse=arrays["lse"])
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, GIVEN[name])


FLOAT64 = np.zeros((2, 4, 5, 3))
FAULTS = [
    ({"d_out": None}, TypeError, r"d_out must be a numpy.ndarray, but is None"),
    ({"d_out": FLOAT64}, TypeError, r"d_out must have dtype float32 .*but has dtype float64"),
    (
        {"d_out": D_OUT[..., :2]},
        ValueError,
        r"d_out must have shape \(\.\.\., heads, seqlen_q, head_dim_v\) = \(2, 4, 5, 3\), but has "
        r"shape \(2, 4, 5, 2\)",
    ),
    ({"out": swapped(OUT)}, ValueError, r"out must have shape .* but has shape \(2, 5, 4, 3\)"),
    ({"out": FLOAT64}, TypeError, r"out must have dtype float32 .*but has dtype float64"),
    ({"out": OUT.astype(np.int32)}, TypeError, r"out must have dtype float16, .* int32"),
    ({"lse": LSE[..., None]}, ValueError, r"lse must have shape \(\.\.\., heads, seqlen_q\) = "),
    ({"lse": LSE.astype(np.float64)}, TypeError, r"lse must have dtype float32 \(lse is float64"),
    ({"lse": 3.0}, TypeError, r"lse must be a numpy.ndarray, but is 3.0"),
    ({"d_lse": LSE[:1]}, ValueError, r"d_lse must have shape .* but has shape \(1, 4, 5\)"),
    ({"d_lse": LSE.astype(np.float16)}, TypeError, r"d_lse must have dtype float32"),
    ({"bias_grad": 1}, TypeError, r"bias_grad must be True or False, but is 1 \(int\)"),
    ({"k": K[:1]}, ValueError, r"the leading axes of q, k and v must be equal"),
    ({"backend": "tpu"}, ValueError, r"backend must be None or one of"),
    ({"layout": "bshd"}, ValueError, r"must"),
    ({"dropout_p": 0.5}, ValueError, r"seed must be an int"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), FAULTS)
def test_a_wrong_argument_is_named_before_any_work(wrong, error, message, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_, **__: pytest.fail("work began"))
    if "backend" in wrong:
        monkeypatch.undo()
    with pytest.raises(error, match=message):
        attention_backward(**GIVEN | wrong)


def test_layout_of_the_shapes_in_messages_is_the_callers():
    arrays = {name: swapped(x) for name, x in GIVEN.items() if name != "lse"}
    with pytest.raises(
        ValueError, match=r"d_out must have shape \(\.\.\., seqlen_q, heads, head_d"
    ):
        attention_backward(**arrays | {"d_out": D_OUT}, lse=LSE, layout="bshd")


def test_the_first_backend_that_can_is_chosen_and_the_others_give_reasons(monkeypatch):
    problem = make_problem(Q, K, V)
    for name in dispatch.NAMES:
        backend = type(dispatch.load(name))
        monkeypatch.setattr(backend, "unsupported_backward", lambda self, p: [f"{self.name} rests"])
    with pytest.raises(NotImplementedError, match=r"(?s)gradient.*cpu rests.*reference rests"):
        attention_backward(*GIVEN.values())
    monkeypatch.setattr(type(dispatch.load("blocked")), "unsupported_backward", lambda self, p: [])
    assert dispatch.choose(problem, backward=True).name == "blocked"
    with pytest.raises(NotImplementedError, match=r"(?s)'reference' not able.*blocked: can run it"):
        attention_backward(*GIVEN.values(), backend="reference")


def test_the_share_of_some_keys_adds_up_to_the_whole():
    whole = attention_backward(*GIVEN.values())
    parts = [
        attention_backward(D_OUT, Q, K[..., keys, :], V[..., keys, :], OUT, LSE)
        for keys in (slice(0, 3), slice(3, 7))
    ]
    np.testing.assert_allclose(parts[0].d_q + parts[1].d_q, whole.d_q, rtol=1e-5, atol=1e-6)
    d_k = np.concatenate([part.d_k for part in parts], axis=-2)
    np.testing.assert_allclose(d_k, whole.d_k, rtol=1e-5, atol=1e-6)
