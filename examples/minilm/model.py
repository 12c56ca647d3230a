"""The forward pass: a BERT encoder of six layers, mean pooling, unit length.

Two arrangements of the same sentences give the same embeddings:

- `embed_padded`: one rectangle (batch, longest sentence), as most code does it. Every layer also
  computes the rows that are padding; attention is told which keys are real.
- `embed_packed`: the sentences end to end, (total tokens), each at its own length. No row is
  padding, in attention neither.

Everything computes in the dtype of the weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from fusedattn import attention

Array = NDArray[Any]
Tokens = Sequence[Sequence[int]]  # ids of each sentence


class Model(NamedTuple):
    """Weights by their names in the file, and what their shapes do not tell."""

    weights: dict[str, Array]
    num_layers: int
    num_heads: int
    epsilon: float


@numba.vectorize(["float32(float32)", "float64(float64)"])
def gelu(x: float) -> float:
    """GELU by its definition: `math.erf` as a NumPy ufunc, accurate to the last bits of x's dtype.

    This model was trained with it; the common tanh formula is up to 5e-4 off.
    """
    return 0.5 * x * (1 + math.erf(x * math.sqrt(0.5)))


def linear(model: Model, name: str, x: Array) -> Array:
    """Return ``x @ weight.T + bias``."""
    weight, bias = model.weights[f"{name}.weight"], model.weights[f"{name}.bias"]
    # In two dimensions it is one large matrix product, in three one small product a sentence.
    rows = x.reshape(-1, x.shape[-1]) @ weight.T + bias
    return rows.reshape(*x.shape[:-1], len(bias))


def layer_norm(model: Model, name: str, x: Array) -> Array:
    """Mean 0 and variance 1 along the last axis, then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(variance + model.epsilon)
    return normal * model.weights[f"{name}.weight"] + model.weights[f"{name}.bias"]


def embeddings(model: Model, ids: Array, positions: Array) -> Array:
    """Sum the vectors of word, position and segment, of which there is only one here."""
    table = {
        kind: model.weights[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "position", "token_type")
    }
    x = table["word"][ids] + table["position"][positions] + table["token_type"][0]
    return layer_norm(model, "embeddings.LayerNorm", x)


def encoder_layer(model: Model, index: int, x: Array, attend: Callable[..., Array]) -> Array:
    """One layer on x (..., hidden); `attend` maps q, k, v (..., heads, dim) to the same shape."""
    name = f"encoder.layer.{index}"
    heads = (*x.shape[:-1], model.num_heads, x.shape[-1] // model.num_heads)
    q, k, v = (
        linear(model, f"{name}.attention.self.{role}", x).reshape(heads)
        for role in ("query", "key", "value")
    )
    seen = linear(model, f"{name}.attention.output.dense", attend(q, k, v).reshape(x.shape))
    x = layer_norm(model, f"{name}.attention.output.LayerNorm", x + seen)
    inner = gelu(linear(model, f"{name}.intermediate.dense", x))
    outer = linear(model, f"{name}.output.dense", inner)
    return layer_norm(model, f"{name}.output.LayerNorm", x + outer)


def encode(model: Model, ids: Array, positions: Array, attend: Callable[..., Array]) -> Array:
    """Return the last layer's vector of each token, (..., hidden)."""
    x = embeddings(model, ids, positions)
    for index in range(model.num_layers):
        x = encoder_layer(model, index, x, attend)
    return x


def unit_length(x: Array) -> Array:
    """Divide each row by its Euclidean norm."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pad(sentences: Tokens) -> tuple[Array, Array]:
    """Return ids (batch, longest), 0 where there is no token, and lengths (batch,)."""
    lengths = np.array([len(sentence) for sentence in sentences], np.int64)
    ids = np.zeros((len(sentences), lengths.max(initial=0)), np.int64)
    for row, sentence in zip(ids, sentences, strict=True):
        row[: len(sentence)] = sentence
    return ids, lengths


def embed_padded(
    model: Model,
    sentences: Tokens,
    *,
    hide: Literal["lengths", "mask"] = "lengths",
    backend: str | None = None,
) -> Array:
    """Return embeddings (batch, hidden) of unit length, computed as one padded rectangle.

    `hide` is how attention learns which keys are padding: from ``seqused_k``, so that blocks of
    padding are never touched, or from a bool mask (batch, 1, 1, longest), the form in which most
    frameworks hand it around.
    """
    ids, lengths = pad(sentences)
    positions = np.arange(ids.shape[1])
    real = positions < lengths[:, None]
    hidden = {"seqused_k": lengths} if hide == "lengths" else {"mask": real[:, None, None]}
    attend = partial(attention, layout="bshd", backend=backend, **hidden)
    x = encode(model, ids, positions, attend)
    total = np.where(real[..., None], x, 0).sum(axis=1)
    return unit_length(total / lengths[:, None].astype(total.dtype))


def embed_packed(model: Model, sentences: Tokens, *, backend: str | None = None) -> Array:
    """Return embeddings (batch, hidden) of unit length, computed without any padding."""
    lengths = np.array([len(sentence) for sentence in sentences], np.int64)
    # Sentences of one length next to each other are one rectangle: see packed_attention.
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    ids = np.concatenate([sentences[i] for i in order])
    positions = np.concatenate([np.arange(length) for length in lengths])
    x = encode(model, ids, positions, partial(packed_attention, lengths=lengths, backend=backend))
    starts = np.cumsum(lengths) - lengths
    total = np.add.reduceat(x, starts, axis=0)
    result = np.empty_like(total)
    result[order] = unit_length(total / lengths[:, None].astype(total.dtype))
    return result


def packed_attention(
    q: Array, k: Array, v: Array, *, lengths: Array, backend: str | None = None
) -> Array:
    """Attention of (total, heads, dim) within each sentence; `lengths` are in ascending order.

    One call for each distinct length, on views of q, k, v and out: nothing is copied, masked or
    padded.
    """
    out = np.empty(v.shape, v.dtype)
    for rows, shape in rectangles(lengths):
        ours = [array[rows].reshape(*shape, *array.shape[1:]) for array in (q, k, v, out)]
        attention(*ours[:3], out=ours[3], layout="bshd", backend=backend)
    return out


def rectangles(lengths: Array) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield the rows of each run of equal lengths, and its shape (sentences, length)."""
    start = 0
    for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
        stop = start + int(count) * int(length)
        yield slice(start, stop), (int(count), int(length))
        start = stop
