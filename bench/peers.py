"""The libraries that are compared, each at its best and as its user would call it.

A peer takes a case and offers one or more ways to compute it. What its user does once, outside the
hot loop (another axis order, a mask in the form it wants, a compiled function), is done before a
way is handed out. The fastest of those whose answers are right is timed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import fusedattn
from bench.cases import Array, Bool, Case
from fusedattn.cli.machine import available_memory, binary_size

OURS = "fused"

# Part of the available memory that the scores of a peer may take; the rest is not ours to risk.
SAFE_SHARE = 0.7


class Way(NamedTuple):
    """The call that is timed, and how its result becomes (batch, heads, seqlen_q, head_dim).

    Gradients of q, k and v stand behind one another along the third axis.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Array]


Ways = Mapping[str, Way]


class Unsupported(Exception):
    """Why a peer cannot compute a case."""


class Peer(NamedTuple):
    """A library: how it is called in tables, the package it needs, and what it computes."""

    title: str
    package: str
    forward: Callable[[Case], Ways]
    backward: Callable[[Case], Ways] | None = None

    @property
    def missing(self) -> str | None:
        """Return why it cannot be asked at all, or None."""
        found = importlib.util.find_spec(self.package)
        return None if found else f"the package {self.package} is not installed"

    def ways(self, case: Case) -> Ways:
        """Return the ways to compute a case.

        Raises
        ------
        Unsupported
            If there is none.
        """
        if not case.is_gradient:
            return self.forward(case)
        if self.backward is None:
            raise Unsupported("no gradients without its forward, or none at all")
        return self.backward(case)


def scores_fit(case: Case) -> bool:
    """Whether all scores in float32, three times, fit into memory."""
    available = available_memory()
    return available is None or _scores_bytes(case) <= SAFE_SHARE * available


def _scores_bytes(case: Case) -> int:
    return 3 * 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k


def _scores_must_fit(case: Case) -> None:
    if not scores_fit(case):
        raise Unsupported(f"its scores take {binary_size(_scores_bytes(case))} of memory")


def _every_row(case: Case, mask: Bool | None) -> Bool | None:
    return case.visible(np.arange(case.seqlen_q), mask)


def fused(case: Case) -> Ways:
    """`fusedattn.attention`."""
    inputs = case.inputs()
    q, k, v, *_ = inputs
    options = {name: value for name, value in case.options(inputs).items() if value is not None}
    return {"attention": Way(lambda: fusedattn.attention(q, k, v, **options), np.asarray)}


def fused_gradients(case: Case) -> Ways:
    """`fusedattn.attention_backward`."""
    q, k, v, *_ = case.inputs()
    d_out = case.d_out()
    out, lse = fusedattn.attention(q, k, v, causal=case.causal, return_lse=True)

    def call() -> Any:
        return fusedattn.attention_backward(d_out, q, k, v, out, lse, causal=case.causal)

    return {"attention_backward": Way(call, lambda found: np.concatenate(found[:3], axis=2))}


def torch_gradients(case: Case) -> Ways:
    """PyTorch's autograd through its fused kernel, the forward done beforehand."""
    import torch

    q, k, v = (torch.from_numpy(array).requires_grad_() for array in case.inputs()[:3])
    d_out = torch.from_numpy(case.d_out())
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, is_causal=case.causal)

    def call() -> Any:
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return {"autograd": Way(call, lambda found: np.concatenate([x.numpy() for x in found], axis=2))}


def torch_sdpa(case: Case) -> Ways:
    """PyTorch's `scaled_dot_product_attention`, which takes its fused kernel where it has one.

    Windows and lengths, which it has no words for, become a mask: a bool one, which it converts in
    each call, or one to be added, made beforehand.
    """
    import torch

    def tensor(array: Any) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def read(result: Any) -> Array:
        return np.asarray(result.float().numpy())

    inputs = case.inputs()
    q, k, v = (tensor(array) for array in inputs[:3])
    options: dict[str, Any] = {"enable_gqa": True} if case.heads != case.heads_kv else {}
    attend = torch.nn.functional.scaled_dot_product_attention

    def way(**more: Any) -> Way:
        def call() -> Any:
            with torch.inference_mode():
                return attend(q, k, v, **options, **more)

        return Way(call, read)

    if inputs.bias is not None:
        return {"bias": way(attn_mask=tensor(inputs.bias))}
    if case.operand == "mask":
        return {"bool mask": way(attn_mask=tensor(inputs.mask))}
    if case.causal and case.window_size is None and case.seqlen_q == case.seqlen_k:
        return {"causal": way(is_causal=True)}
    seen = _every_row(case, None)
    if seen is None:
        return {"full": way()}
    added = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~tensor(seen.copy()), -torch.inf)
    return {"bool mask": way(attn_mask=tensor(seen.copy())), "added mask": way(attn_mask=added)}


def jax_nn(case: Case) -> Ways:
    """JAX's `dot_product_attention`, compiled, on arrays in its own axis order: all scores."""
    _scores_must_fit(case)
    import jax
    import jax.numpy as jnp

    inputs = case.inputs()
    q, k, v = (jnp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in inputs[:3])
    options: dict[str, Any] = {}
    operands: dict[str, Any] = {} if inputs.bias is None else {"bias": jnp.asarray(inputs.bias)}
    if case.causal and case.seqlen_q != case.seqlen_k:  # it aligns the first query with key 0
        operands["mask"] = jnp.asarray(_every_row(case, None))
    else:
        options |= {"is_causal": case.causal, "local_window_size": case.window_size}
    if inputs.mask is not None:
        operands["mask"] = jnp.asarray(inputs.mask[None, None])
    if case.lengths is not None:
        operands["key_value_seq_lengths"] = jnp.asarray(case.lengths, jnp.int32)

    def attend(q: Any, k: Any, v: Any, operands: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **operands, **options)

    compiled = jax.jit(attend)

    def call() -> Any:
        return compiled(q, k, v, operands).block_until_ready()

    return {"jit": Way(call, lambda result: np.asarray(result).swapaxes(1, 2))}


def naive_numpy(case: Case) -> Ways:
    """Attention as the textbook has it; grouped heads without a copy of the keys."""
    if case.dtype != "float32":
        raise Unsupported("NumPy has no matrix product in half types but a scalar loop")
    _scores_must_fit(case)
    q, k, v, mask, bias = case.inputs()
    seen = _every_row(case, mask)
    hidden = None if seen is None else ~seen
    scale = np.float32(1 / np.sqrt(case.head_dim))
    grouped = (case.batch, case.heads_kv, -1, case.head_dim)
    scores_shape = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)

    def call() -> Array:
        scores = q.reshape(grouped) @ k.swapaxes(-1, -2)
        scores *= scale
        all_heads = scores.reshape(scores_shape)
        if bias is not None:
            all_heads += bias
        if hidden is not None:
            np.copyto(all_heads, -np.inf, where=hidden)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out: Array = weights @ v
        return out.reshape(q.shape)

    return {"matmul": Way(call, np.asarray)}


def onnx_runtime(case: Case) -> Ways:
    """The best of ONNX Runtime's three operators."""
    if case.dtype == "bfloat16":
        raise Unsupported("its CPU kernels know float32 and float16")
    from bench.onnx_operators import ways

    threads = int(os.environ["FUSEDATTN_NUM_THREADS"])
    found = ways(case, case.inputs(), threads)
    if not found:
        _scores_must_fit(case)
    return {name: Way(call, read) for name, (call, read) in found.items()}


# Ours first: the others are compared with it.
PEERS = {
    OURS: Peer("fusedattn", "fusedattn", fused, fused_gradients),
    "torch": Peer("PyTorch", "torch", torch_sdpa, torch_gradients),
    "onnxruntime": Peer("ONNX Runtime", "onnxruntime", onnx_runtime),
    "jax": Peer("JAX", "jax", jax_nn),
    "numpy": Peer("naive NumPy", "numpy", naive_numpy),
}
