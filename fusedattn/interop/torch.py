"""`attention` for PyTorch tensors on the CPU, differentiable.

Import it by name: ``import fusedattn.interop.torch``. `fusedattn` itself never loads torch. Tensors
are read and returned where they lie, without a copy.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedattn.api import attention as forward
from fusedattn.gradients import attention_backward

__all__ = ["attention"]

Array = NDArray[Any]

# Operands that have a gradient; all others are read only.
_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_OUT_DTYPES = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention on CPU tensors, with gradients of q, k, v, bias and sinks.

    Parameters
    ----------
    q, k, v : Tensor
        As in `fusedattn.attention`, on the CPU, in float16, bfloat16, float32 or float64.
    bias, sinks : Tensor, optional
        As there, of any float dtype.
    return_lse : bool
        Also return the log-sum-exp of each row, which is differentiable too.
    **options
        The other keywords of `fusedattn.attention`, with tensors in the place of arrays and a
        ``torch.dtype`` as `out_dtype`. There is no `out`. The arrays of `score_mod_aux` stay NumPy
        arrays and get no gradient here (`fusedattn.attention_backward` has it).

    Returns
    -------
    out : Tensor, (..., heads, seqlen_q, head_dim_v)
    lse : Tensor, (..., heads, seqlen_q)
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As `fusedattn.attention`; if a tensor is not a dense one on the CPU, or if alibi_slopes, of
        which there is no gradient, requires one.
    RuntimeError
        When a gradient is differentiated a second time.

    Examples
    --------
    >>> import torch
    >>> from fusedattn.interop.torch import attention
    >>> q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    >>> attention(q, k, v, causal=True).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 2, 5, 8])
    """
    if "out" in options:
        raise TypeError("attention of torch tensors has no argument out: autograd owns its results")
    slopes = options.get("alibi_slopes")
    if isinstance(slopes, Tensor) and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes has no gradient, but requires one; use its .detach()")
    if isinstance(options.get("out_dtype"), torch.dtype):
        options["out_dtype"] = _OUT_DTYPES.get(options["out_dtype"], options["out_dtype"])
    names = [name for name, value in options.items() if isinstance(value, Tensor)]
    settings = {name: value for name, value in options.items() if name not in names}
    tensors = [options[name] for name in names]
    given = (q, k, v, bias, sinks)
    wanted = any(isinstance(x, Tensor) and x.requires_grad for x in given)
    settings["return_lse"] = return_lse or (wanted and torch.is_grad_enabled())
    out, lse = _Attention.apply(names, settings, *given, *tensors)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """The pair of functions that autograd knows."""

    @staticmethod
    def forward(
        names: list[str], settings: dict[str, Any], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        result = forward(**_arrays((*_DIFFERENTIABLE, *names), tensors), **settings)
        out, lse = result if isinstance(result, tuple) else (result, None)
        return _tensor(out), _tensor(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        ctx.names, settings, *tensors = inputs
        ctx.settings = {name: x for name, x in settings.items() if name != "return_lse"}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2 : 2 + len(_DIFFERENTIABLE)]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        gradients = _Gradient.apply(
            ctx.names, ctx.settings, needed, d_out, d_lse, out, lse, *tensors
        )
        return None, None, *gradients, *[None for _ in ctx.names]


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own, which has no derivative and says so.

    Otherwise a second derivative would silently be taken as zero.
    """

    @staticmethod
    def forward(
        names: list[str],
        settings: dict[str, Any],
        needed: tuple[bool, ...],
        d_out: Tensor,
        d_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        incoming = _arrays(("d_out", "d_lse", "out", "lse"), (d_out, d_lse, out, lse))
        arrays = _arrays((*_DIFFERENTIABLE, *names), tensors)
        bias_grad = needed[_DIFFERENTIABLE.index("bias")]
        found = attention_backward(**incoming, **arrays, bias_grad=bias_grad, **settings)
        return tuple(
            _tensor(x) if need else None for x, need in zip(found[:5], needed, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("attention has no second derivative: its gradient is not differentiable")


def _arrays(names: tuple[str, ...], tensors: Any) -> dict[str, Any]:
    given = zip(names, tensors, strict=True)
    return {name: None if x is None else _array(name, x) for name, x in given}


def _array(name: str, tensor: object) -> Array:
    """View a tensor as an array, without a copy."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is of type {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the CPU, but is on {tensor.device}; move it there with .cpu()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but has the layout {tensor.layout}")
    plain = tensor.detach().resolve_neg()
    if plain.dtype == torch.bfloat16:  # NumPy knows it from ml_dtypes, which torch does not
        bits: Array = plain.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = plain.numpy()
    return array


def _tensor(array: Array | None) -> Any:
    """View an array as a tensor, without a copy."""
    if array is None:
        return None
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
