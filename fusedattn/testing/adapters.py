"""Other people's signatures, called like `fusedattn.attention`.

An adapter wraps a function so that it takes NumPy arrays and the keywords that it has an equivalent
for, and says which calls that covers. Each is a few lines: write your own in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn.problem import AttentionProblem

Array = NDArray[Any]


class Adapted(NamedTuple):
    """A wrapped function with what it supports; ``check_attention(**adapted.options())``."""

    fn: Callable[..., Any]
    supports: frozenset[str] = frozenset()
    domain: Callable[[AttentionProblem], str | None] | None = None
    gradient: Callable[..., Any] | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of `check_attention`."""
        return self._asdict()


def _named(adapter: str, fn: Any, adapted: Adapted) -> Adapted:
    """Let a wrapped function go by its own name, also in the code of failing examples."""
    name, module = getattr(fn, "__name__", "fn"), getattr(fn, "__module__", None)
    call: Any = adapted.fn
    call.__name__ = name
    call.source = (
        f"from {module} import {name}\n"
        f"from fusedattn.testing import adapters\n"
        f"adapted = adapters.{adapter}({name})"
    )
    if adapted.gradient is not None:
        pull_back: Any = adapted.gradient
        pull_back.source = call.source
    return adapted


def numpy(fn: Callable[..., Any]) -> Adapted:
    """Leave a function as it is: it takes NumPy arrays, and what ``--supports`` says."""
    return Adapted(fn)


def torch(fn: Callable[..., Any]) -> Adapted:
    """Wrap a function with the signature of ``torch.nn.functional.scaled_dot_product_attention``.

    ``is_causal`` aligns to the top left and excludes ``attn_mask``; a mask and a bias become one.
    """
    import torch as library

    def call(qkv: Any, scale: float | None, causal: bool, mask: Any, bias: Any) -> Any:
        q, k, v = qkv
        mask, bias = (None if x is None else _to_torch(four_axes(x)) for x in (mask, bias))
        attn_mask = mask if bias is None else bias.to(q.dtype)
        if mask is not None and bias is not None:
            attn_mask = attn_mask.masked_fill(~mask, -float("inf"))
        grouped = {"enable_gqa": True} if q.shape[-3] != k.shape[-3] else {}
        return fn(q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, **grouped)

    def attention(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        causal: bool = False,
        mask: Array | None = None,
        bias: Array | None = None,
    ) -> Array:
        return _from_torch(call([_to_torch(x) for x in (q, k, v)], scale, causal, mask, bias))

    def gradient(
        d_out: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        *,
        scale: float | None = None,
        causal: bool = False,
        mask: Array | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, ...]:
        tensors = [_to_torch(x).requires_grad_() for x in (q, k, v)]
        result = call(tensors, scale, causal, mask, bias)
        found = library.autograd.grad(result, tensors, _to_torch(d_out))
        return tuple(_from_torch(x) for x in found)

    def domain(problem: AttentionProblem) -> str | None:
        if problem.causal and problem.q_offset.any():
            return "is_causal aligns to the top left"
        if problem.causal and (problem.mask is not None or problem.bias is not None):
            return "is_causal excludes attn_mask"
        if problem.bias is not None and problem.dtype.itemsize == 2:
            return "attn_mask has the type of the queries, which would round the bias"
        return None

    supports = frozenset({"scale", "causal", "mask", "bias", "gqa", "head_dim_v", "strides"})
    return _named("torch", fn, Adapted(attention, supports, domain, gradient))


def four_axes(array: Array) -> Array:
    """Give a mask or bias its leading axes of 1."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _to_torch(array: Array) -> Any:
    import torch as library

    if any(step < 0 for step in array.strides):
        array = array.copy()  # torch has no negative strides
    if array.dtype == ml_dtypes.bfloat16:
        return library.from_numpy(array.view(np.uint16)).view(library.bfloat16)
    return library.from_numpy(array)


def _from_torch(tensor: Any) -> Array:
    import torch as library

    tensor = tensor.detach()
    if tensor.dtype == library.bfloat16:
        bits: Array = tensor.contiguous().view(library.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    plain: Array = tensor.numpy()
    return plain


def jax(fn: Callable[..., Any]) -> Adapted:
    """Wrap a function with the signature of ``jax.nn.dot_product_attention``.

    Axis order ``(batch, seq, heads, dim)``, masks of four axes; causal and windows align to the top
    left; lengths are arrays over the batch.
    """
    import jax.numpy as library

    def attention(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        mask: Array | None = None,
        bias: Array | None = None,
    ) -> Array:
        arrays = [library.asarray(x.swapaxes(-3, -2)) for x in (q, k, v)]
        keywords: dict[str, Any] = {"scale": scale, "is_causal": causal}
        if window_size is not None:
            keywords["local_window_size"] = tuple(
                2**30 if side is None else min(side, 2**30) for side in window_size
            )
        for name, used in (("query_seq_lengths", seqused_q), ("key_value_seq_lengths", seqused_k)):
            if used is not None:
                keywords[name] = library.asarray(
                    np.broadcast_to(used, q.shape[:1]).astype(np.int32)
                )
        narrow = None if bias is None else bias.astype(q.dtype)
        for name, array in (("bias", narrow), ("mask", mask)):
            if array is not None:
                keywords[name] = library.asarray(four_axes(array))
        result = fn(*arrays, **keywords)
        return np.asarray(result).swapaxes(-3, -2)

    def domain(problem: AttentionProblem) -> str | None:
        limited = problem.causal or problem.window_size != (None, None)
        if limited and problem.q_offset.any():
            return "causal and windows align to the top left"
        if problem.bias is not None and problem.dtype.itemsize == 2:
            return "the bias has the type of the queries, which would round it"
        return None

    supports = {"scale", "causal", "window_size", "seqused_q", "seqused_k", "mask", "bias", "gqa"}
    return _named("jax", fn, Adapted(attention, frozenset(supports), domain))


def flash_attn(fn: Callable[..., Any]) -> Adapted:
    """Wrap a function with the signature of ``flash_attn.flash_attn_func``, on NumPy arrays.

    Axis order ``(batch, seq, heads, dim)``, bottom-right alignment, ``-1`` for an open window side,
    ``softcap=0`` for none; ``return_attn_probs`` gives ``(out, lse, ...)``.
    """

    def attention(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        alibi_slopes: Array | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        left, right = window_size or (None, None)
        result = fn(
            *(x.swapaxes(-3, -2) for x in (q, k, v)),
            softmax_scale=scale,
            causal=causal,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=softcap or 0.0,
            alibi_slopes=alibi_slopes,
            return_attn_probs=return_lse,
        )
        if return_lse:
            return result[0].swapaxes(-3, -2), result[1]
        return result.swapaxes(-3, -2)

    supports = {"scale", "causal", "window_size", "alibi_slopes", "softcap", "return_lse", "gqa"}
    return _named("flash_attn", fn, Adapted(attention, frozenset(supports)))


def onnxruntime(session: Callable[..., Any]) -> Adapted:
    """Wrap ``onnxruntime.InferenceSession`` running one ONNX ``Attention`` node of opset 24."""

    @functools.lru_cache(maxsize=256)
    def prepared(dtype: str, mask: str, scale: float | None, causal: bool, softcap: float) -> Any:
        from onnx import TensorProto, helper

        kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
        inputs = [helper.make_tensor_value_info(n, kind, [None] * 4) for n in ("Q", "K", "V")]
        names = ["Q", "K", "V"]
        if mask:
            of_mask = TensorProto.BOOL if mask == "bool" else kind
            inputs.append(helper.make_tensor_value_info("M", of_mask, [None] * 4))
            names.append("M")
        settings: dict[str, Any] = {"is_causal": int(causal), "softcap": softcap}
        settings |= {} if scale is None else {"scale": scale}
        node = helper.make_node("Attention", names, ["Y"], **settings)
        output = helper.make_tensor_value_info("Y", kind, [None] * 4)
        graph = helper.make_graph([node], "attention", inputs, [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        return session(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def attention(
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
    ) -> Array:
        given = mask
        if bias is not None:
            hidden = np.asarray(-np.inf, q.dtype)
            given = bias.astype(q.dtype) if mask is None else np.where(mask, bias, hidden)
            given = given.astype(q.dtype)
        feed = {"Q": q, "K": k, "V": v}
        kind = ""
        if given is not None:
            kind = "bool" if given.dtype == np.bool_ else "float"
            shape = (*q.shape[:-1], k.shape[-2])
            feed["M"] = np.ascontiguousarray(np.broadcast_to(given, shape))
        run = prepared(q.dtype.name, kind, scale, causal, softcap or 0.0).run
        result: Array = run(None, feed)[0]
        return result

    def domain(problem: AttentionProblem) -> str | None:
        if problem.causal and problem.q_offset.any():
            return "is_causal aligns to the top left"
        if problem.scale <= 0:
            return "the scale must be greater than 0"
        if problem.bias is not None and problem.dtype.itemsize == 2:
            return "the mask has the type of the queries, which would round the bias"
        return None

    supports = {"scale", "causal", "softcap", "mask", "bias", "gqa", "head_dim_v"}
    return _named("onnxruntime", session, Adapted(attention, frozenset(supports), domain))


ADAPTERS: dict[str, Callable[[Callable[..., Any]], Adapted]] = {
    "numpy": numpy,
    "torch": torch,
    "jax": jax,
    "onnxruntime": onnxruntime,
    "flash_attn": flash_attn,
}
