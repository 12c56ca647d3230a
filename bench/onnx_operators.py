"""ONNX Runtime's attention on the CPU: three operators, each a model of one node.

Inputs and outputs are bound to memory once, so a run copies nothing. What an operator cannot say
(MultiHeadAttention no grouped heads, GroupQueryAttention only causal ones) it is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from bench.cases import Array, Case, Inputs
from bench.peers import scores_fit

MICROSOFT = "com.microsoft"

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}

Run = tuple[Callable[[], Array], Callable[[Array], Array]]


class Node:
    """A session for one node; None in the place of an input leaves it out."""

    def __init__(
        self,
        operator: str,
        domain: str,
        inputs: dict[str, Array | None],
        threads: int,
        **given: Any,
    ) -> None:
        names = [name if array is not None else "" for name, array in inputs.items()]
        self.arrays = {name: array for name, array in inputs.items() if array is not None}
        cached = domain == MICROSOFT and operator == "GroupQueryAttention"
        outputs = ["Y", "present_key", "present_value"] if cached else ["Y"]
        node = helper.make_node(operator, names, outputs, domain=domain, **given)
        kind = _TYPES[self.arrays["Q"].dtype.name]
        graph = helper.make_graph(
            [node],
            operator,
            [
                helper.make_tensor_value_info(name, _TYPES[array.dtype.name], array.shape)
                for name, array in self.arrays.items()
            ],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        )
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what it refuses it also raises
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def bound(self, out: Array, cache: tuple[Array, Array] | None = None) -> Callable[[], Array]:
        """Return a call that writes ``out``, and new keys into the cache that it reads."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy  # lies where the array lies
        inputs = {name: value(array) for name, array in self.arrays.items()}
        outputs = {"Y": value(out)}
        if cache is not None:
            shared = [inputs.get(name) for name in ("past_key", "past_value")]
            outputs["present_key"], outputs["present_value"] = (
                value(array) if past is None else past
                for past, array in zip(shared, cache, strict=True)
            )
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, array)
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, array)

        def call() -> Array:
            self.session.run_with_iobinding(binding)
            return out

        return call


def _joined(array: Array) -> Array:
    """(batch, heads, seqlen, dim) to (batch, seqlen, heads * dim), which two operators want."""
    batch, heads, seqlen, dim = array.shape
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, seqlen, heads * dim)


def _split(case: Case) -> Callable[[Array], Array]:
    shape = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    return lambda result: result.reshape(shape).swapaxes(1, 2)


def ways(case: Case, inputs: Inputs, threads: int) -> dict[str, Run]:
    """Return the operators that can say the case; when it is first run, each may still refuse."""
    return dict(_ways(case, inputs, threads))


def _ways(case: Case, inputs: Inputs, threads: int) -> Iterator[tuple[str, Run]]:
    stored = scores_fit(case)  # what is not fused writes all scores
    if stored:
        yield "Attention", (_attention(case, inputs, threads), np.asarray)
    plain = not (case.causal or case.lengths or case.operand)
    sayable = case.window_size is None and case.operand != "mask"
    aligned = not case.causal or case.seqlen_q == case.seqlen_k
    if case.heads == case.heads_kv and sayable and aligned and (stored or plain):
        yield "MultiHeadAttention", (_multi_head(case, inputs, threads), _split(case))
    is_causal = case.causal or (case.seqlen_q == 1 and case.window_size is None)
    if is_causal and not case.operand:
        yield "GroupQueryAttention", (_group_query(case, inputs, threads), _split(case))


def _attention(case: Case, inputs: Inputs, threads: int) -> Callable[[], Array]:
    """ONNX's own operator; with `nonpad_kv_seqlen` the last query stands on the last key."""
    q, k, v, mask, bias = inputs
    given: dict[str, Array | None] = {"Q": q, "K": k, "V": v}
    if case.window_size is not None:
        seen = case.visible(np.arange(case.seqlen_q), None)
        given["attn_mask"] = None if seen is None else np.ascontiguousarray(seen[0, 0])
    elif mask is not None or bias is not None:
        given["attn_mask"] = mask if bias is None else bias
    elif case.lengths is not None or (case.causal and case.seqlen_q != case.seqlen_k):
        given |= dict.fromkeys(("attn_mask", "past_key", "past_value"))
        lengths = case.lengths or (case.seqlen_k,) * case.batch
        given["nonpad_kv_seqlen"] = np.array(lengths, np.int64)
    causal = case.causal and case.window_size is None
    return Node("Attention", "", given, threads, is_causal=int(causal)).bound(np.empty_like(q))


def _multi_head(case: Case, inputs: Inputs, threads: int) -> Callable[[], Array]:
    q, k, v, _, bias = inputs
    given: dict[str, Array | None] = {"Q": _joined(q), "K": _joined(k), "V": _joined(v)}
    if case.seqlen_q != case.seqlen_k:  # a cache keeps its axis order
        given |= {"K": k, "V": v}
    lengths = None if case.lengths is None else np.array(case.lengths, np.int32)
    given |= {"unused_bias": None, "key_padding_mask": lengths, "attention_bias": bias}
    causal = int(case.causal)
    node = Node(
        *("MultiHeadAttention", MICROSOFT, given, threads),
        num_heads=case.heads,
        unidirectional=causal,
    )
    return node.bound(np.empty_like(_joined(q)))


def _group_query(case: Case, inputs: Inputs, threads: int) -> Callable[[], Array]:
    """Fewer queries than keys are the next ones of a cache, which is written in place."""
    q, k, v, *_ = inputs
    lengths = np.array(case.lengths or (case.seqlen_k,) * case.batch)
    given: dict[str, Array | None] = {"Q": _joined(q)}
    if case.seqlen_q == case.seqlen_k:
        given |= {"K": _joined(k), "V": _joined(v), "past_key": None, "past_value": None}
    else:
        new = lengths[:, None] - case.seqlen_q + np.arange(case.seqlen_q)
        last = [np.take_along_axis(x, new[:, None, :, None], axis=2) for x in (k, v)]
        given |= {"K": _joined(last[0]), "V": _joined(last[1]), "past_key": k, "past_value": v}
    given["seqlens_k"] = (lengths - 1).astype(np.int32)
    given["total_sequence_length"] = np.array(lengths.max(), np.int32)
    window: dict[str, Any] = (
        {} if case.window_size is None else {"local_window_size": case.window_size[0] + 1}
    )
    node = Node(
        *("GroupQueryAttention", MICROSOFT, given, threads),
        num_heads=case.heads,
        kv_num_heads=case.heads_kv,
        **window,
    )
    return node.bound(np.empty_like(_joined(q)), cache=(k, v))
