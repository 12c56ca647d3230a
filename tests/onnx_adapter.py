"""The ONNX operator `Attention` (opsets 23 to 25) said in the words of `fusedattn.attention`.

Inputs, attributes and outputs keep their ONNX names. What `attention` cannot say is refused, never
ignored.
"""

import numpy as np

from fusedattn import attention

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
ATTRIBUTES = frozenset(
    {
        "is_causal",
        "kv_num_heads",
        "left_window_size",
        "q_num_heads",
        "qk_matmul_output_mode",
        "right_window_size",
        "scale",
        "softcap",
        "softmax_precision",
    }
)
PRECISION = {1: 24, 10: 11, 11: 53, 16: 8}  # bits of significand by the number of an ONNX type


def run_node(node, arrays, *, backend=None):
    """Run an `onnx.NodeProto`: arrays and results in the order of the names it gives them."""
    from onnx.helper import get_attribute_value

    if (node.op_type, node.domain) != ("Attention", ""):
        raise NotImplementedError(f"operator {node.domain}::{node.op_type}")
    attributes = {item.name: get_attribute_value(item) for item in node.attribute}
    # An optional input in the middle is left out by an empty name, and has no array.
    given = [role for role, name in zip(INPUTS, node.input, strict=False) if name]
    results = onnx_attention(dict(zip(given, arrays, strict=True)), attributes, backend=backend)
    wanted = [role for role, name in zip(OUTPUTS, node.output, strict=False) if name]
    if "qk_matmul_output" in wanted:
        raise NotImplementedError("qk_matmul_output: the scores are never stored")
    return [results[role] for role in wanted]


def onnx_attention(inputs, attributes, *, backend=None):
    """Compute Y, present_key and present_value of the operator."""
    unknown = (set(attributes) - ATTRIBUTES) | (set(inputs) - set(INPUTS))
    if unknown:
        raise NotImplementedError(f"{sorted(unknown)} of the operator")
    q = split_heads(inputs["Q"], attributes.get("q_num_heads"))
    k = split_heads(inputs["K"], attributes.get("kv_num_heads"))
    v = split_heads(inputs["V"], attributes.get("kv_num_heads"))
    check_precision(q.dtype, attributes.get("softmax_precision"))
    if {"past_key", "nonpad_kv_seqlen"} <= set(inputs):
        raise NotImplementedError("past_key with nonpad_kv_seqlen: two kinds of cache at once")
    if "past_key" in inputs:
        k = np.concatenate([inputs["past_key"], k], axis=2)
        v = np.concatenate([inputs["past_value"], v], axis=2)
    y = attention(
        q,
        k,
        v,
        scale=attributes.get("scale"),
        causal=bool(attributes.get("is_causal", 0)),
        window_size=window(attributes),
        q_offset=position_of_first_query(inputs, q.shape[2]),
        seqused_k=inputs.get("nonpad_kv_seqlen"),
        # Before mask and bias, our one order. Opset 23 as first published had it after them, where
        # -inf becomes a finite score; the erratum (onnx/onnx#7867) corrected it in place.
        softcap=attributes.get("softcap", 0.0) or None,
        backend=backend,
        **mask_or_bias(inputs.get("attn_mask"), k.shape[2]),
    )
    if inputs["Q"].ndim == 3:
        y = y.swapaxes(1, 2).reshape(*inputs["Q"].shape[:2], -1)
    return {"Y": y, "present_key": k, "present_value": v}


def split_heads(array, num_heads):
    """Return (batch, heads, seq, dim): a view of (batch, seq, heads * dim), or the array itself."""
    if array.ndim == 4:
        return array
    batch, seqlen, hidden = array.shape
    return array.reshape(batch, seqlen, num_heads, hidden // num_heads).swapaxes(1, 2)


def position_of_first_query(inputs, seqlen_q):
    """Keys before this call: those of the cache; without one, queries and keys start together."""
    if "nonpad_kv_seqlen" in inputs:
        return inputs["nonpad_kv_seqlen"] - seqlen_q
    return inputs["past_key"].shape[2] if "past_key" in inputs else 0


def window(attributes):
    """Return (left, right) with None for -1, which leaves a side open."""
    sides = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    return tuple(None if side == -1 else side for side in sides)


def mask_or_bias(attn_mask, seqlen_k):
    """Bool selects, a float type is added; keys beyond a shorter mask are hidden."""
    if attn_mask is None:
        return {}
    is_bool = attn_mask.dtype == np.bool_
    missing = seqlen_k - attn_mask.shape[-1]
    if missing:
        hidden = np.full((*attn_mask.shape[:-1], missing), False if is_bool else -np.inf)
        attn_mask = np.concatenate([attn_mask, hidden.astype(attn_mask.dtype)], axis=-1)
    return {"mask" if is_bool else "bias": attn_mask}


def check_precision(dtype, softmax_precision):
    """Half types and float32 are accumulated in float32, float64 in itself: more may be refused."""
    accumulator = 53 if dtype == np.float64 else 24
    if softmax_precision is not None and PRECISION[softmax_precision] > accumulator:
        raise NotImplementedError(f"softmax_precision {softmax_precision} for {dtype}")
