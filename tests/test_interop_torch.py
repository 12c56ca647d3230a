"""PyTorch's autograd around our gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from fusedattn import attention as on_arrays  # noqa: E402
from fusedattn.interop.torch import attention  # noqa: E402

FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(1, 1)),
    "offset": dict(causal=True, q_offset=1),
    "lengths": dict(seqused_k=torch.tensor([[3, 2]]), seqused_q=2),
    "mask": dict(mask=torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)),
    "scale": dict(scale=-0.7),
    "softcap": dict(softcap=0.8),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, -0.25])),
    "dropout": dict(dropout_p=0.4, seed=7),
    "bshd": dict(layout="bshd"),
}


def tensors(dtype=torch.float64, requires_grad=True, heads_kv=1):
    torch.manual_seed(0)
    shapes = (1, 2, 2, 3, 4), (1, 2, heads_kv, 4, 4), (1, 2, heads_kv, 4, 2)
    return [
        torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes
    ]


def double(shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature):
    options = FEATURES[feature]
    q, k, v = tensors()
    if options.get("layout") == "bshd":
        q, k, v = (x.detach().transpose(-3, -2).requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, **options), (q, k, v))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 1), (1, 2, 2, 3, 4)])
def test_bias_and_sinks_and_lse_are_differentiable(shape):
    def both(q, k, v, bias, sinks):
        return attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(both, (*tensors(), double(shape), double(2)))


def test_lse_alone_is_differentiable():
    q, k, _ = tensors()
    v = torch.zeros(1, 2, 1, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: attention(q, k, v, return_lse=True)[1], (q, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_and_gradients_have_the_type_of_their_operand(dtype):
    q, k, v = tensors(dtype)
    bias = torch.zeros(3, 4, requires_grad=True)
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype) == (dtype, expected)
    wide = [x.detach().to(torch.float64).requires_grad_() for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, enable_gqa=True)
    torch.testing.assert_close(out.to(torch.float64), exact, rtol=2e-2, atol=2e-2)
    exact.sum().backward()
    out.sum().backward()
    for one, other in zip((q, k, v), wide, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.to(torch.float64), other.grad, rtol=3e-2, atol=3e-2)
    assert bias.grad.dtype == torch.float32


def test_out_dtype_is_a_torch_dtype():
    q, k, v = tensors(torch.bfloat16)
    out = attention(q, k, v, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert q.grad.dtype == torch.bfloat16


def test_tensors_are_read_where_they_lie(monkeypatch):
    from fusedattn.interop import torch as module

    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return on_arrays(**arguments)

    monkeypatch.setattr(module, "forward", spy)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.transpose(-3, -2) for x in tensors(dtype, requires_grad=False))
        out = attention(q, k, v, layout="bshd")
        for name, tensor in zip("qkv", (q, k, v), strict=True):
            assert seen[name].__array_interface__["data"][0] == tensor.data_ptr()
            assert seen[name].strides == tuple(n * tensor.itemsize for n in tensor.stride())
        assert out.shape == (1, 2, 3, 2, 2)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v = tensors(requires_grad=False)
    v.requires_grad_()
    bias = torch.zeros(3, 4, dtype=torch.float64)
    attention(q, k, v, bias=bias).sum().backward()
    assert q.grad is k.grad is bias.grad is None
    assert v.grad is not None
    assert not attention(q, k, v.detach()).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_an_operand_changed_before_the_backward_is_noticed():
    q, k, v = tensors()
    values = v * 1
    out = attention(q, k, values)
    values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("loss", [lambda out: out.sum(), lambda out: (out * out).sum()])
def test_a_second_derivative_is_refused(loss):
    q, k, v = tensors()
    (d_q,) = torch.autograd.grad(loss(attention(q, k, v)), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        d_q.sum().backward()


def test_functional_gradients_are_the_same():
    q, k, v = tensors()
    (expected,) = torch.autograd.grad(attention(q, k, v, causal=True).sum(), q)
    found = torch.func.grad(lambda q: attention(q, k.detach(), v.detach(), causal=True).sum())(q)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_cannot_be_is_said():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="k must be on the CPU, but is on meta"):
        attention(q, k.detach().to("meta"), v)
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, but is of type ndarray"):
        attention(np.zeros((1, 2, 3)), k, v)
    with pytest.raises(TypeError, match="v must be a dense tensor"):
        attention(q, k, v.detach().to_sparse())
    with pytest.raises(ValueError, match="alibi_slopes has no gradient, but requires one"):
        attention(q, k, v, alibi_slopes=torch.zeros(2, requires_grad=True))
    with pytest.raises(TypeError, match="no argument out"):
        attention(q, k, v, out=torch.zeros(1))
    with pytest.raises(TypeError, match="bais"):
        attention(q, k, v, bais=None)
    with pytest.raises(ValueError, match="k must have the head_dim of q"):
        attention(q, k[..., :2], v)
