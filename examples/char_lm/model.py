"""A decoder-only transformer and its gradient, written out.

Each function of the forward pass has its derivative next to it, and `forward` keeps just what
`backward` needs. Only attention needs no explanation here: `fusedattn.attention` keeps ``out`` and
``lse``, and `fusedattn.attention_backward` makes the gradients of them.

Everything computes in the dtype of the weights. Shapes: ``B`` pieces of ``S`` characters, ``C``
channels, ``H`` heads of ``D = C / H``, ``V`` characters in the alphabet.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn import attention, attention_backward

Array = NDArray[Any]
Weights = dict[str, Array]

EPSILON = 1e-5


class Shape(NamedTuple):
    """What the weights do not tell."""

    layers: int = 3
    heads: int = 4
    channels: int = 128


class Step(NamedTuple):
    """What the forward pass of one layer leaves for the backward pass."""

    x: Array  # (B, S, C), what came in
    qkv: Array  # (B, S, 3, H, D)
    out: Array  # (B, S, H, D)
    lse: Array  # (B, H, S)
    middle: Array  # (B, S, C), between attention and feed-forward
    hidden: Array  # (B, S, 4 C), after the ReLU


def init(shape: Shape, alphabet: int, seed: int, dtype: Any = np.float32) -> Weights:
    """Draw weights; what is added to the stream of each layer starts small."""
    rng = np.random.default_rng(seed)
    channels = shape.channels

    def draw(*size: int, scale: float) -> Array:
        return (rng.standard_normal(size) * scale).astype(dtype)

    weights = {"embedding": draw(alphabet, channels, scale=0.1)}
    for layer in range(shape.layers):
        small = (2 * shape.layers * channels) ** -0.5
        weights |= {
            f"{layer}.attention.norm": np.ones(channels, dtype),
            f"{layer}.attention.qkv": draw(channels, 3 * channels, scale=channels**-0.5),
            f"{layer}.attention.join": draw(channels, channels, scale=small),
            f"{layer}.forward.norm": np.ones(channels, dtype),
            f"{layer}.forward.up": draw(channels, 4 * channels, scale=channels**-0.5),
            f"{layer}.forward.down": draw(4 * channels, channels, scale=small / 2),
        }
    return weights | {
        "norm": np.ones(channels, dtype),
        "unembedding": draw(channels, alphabet, scale=channels**-0.5),
    }


def slopes(shape: Shape, dtype: Any = np.float32) -> Array:
    """Return ALiBi slopes (Press et al. 2022, section 3): position is told by distance alone.

    A head of slope ``2**-k`` sees some ``2**k`` characters back. With no table of positions, text
    may grow longer than any piece of the training.
    """
    return 2.0 ** -(8.0 * np.arange(1, shape.heads + 1) / shape.heads).astype(dtype)


def normalise(x: Array, gain: Array) -> Array:
    """RMS normalisation (Zhang & Sennrich 2019): mean square 1 along the channels, times a gain."""
    return x * _inverse_rms(x) * gain


def normalise_backward(d_y: Array, x: Array, gain: Array) -> tuple[Array, Array]:
    """Gradients of x and gain. With ``n = x / rms``, ``d_x = (d_n - n mean(d_n n)) / rms``."""
    inverse = _inverse_rms(x)
    normal = x * inverse
    d_normal = d_y * gain
    along = (d_normal * normal).mean(axis=-1, keepdims=True)
    d_gain = (d_y * normal).reshape(-1, x.shape[-1]).sum(axis=0)
    return inverse * (d_normal - normal * along), d_gain


def _inverse_rms(x: Array) -> Array:
    squares = np.einsum("...c,...c->...", x, x)[..., None] / x.shape[-1]
    inverse: Array = 1 / np.sqrt(squares + x.dtype.type(EPSILON))
    return inverse


def matmul(x: Array, weight: Array) -> Array:
    """Multiply the channels of ``x`` by a matrix: one large product, not one for each piece."""
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)


def matmul_backward(d_y: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients of x and weight."""
    rows = d_y.reshape(-1, d_y.shape[-1])
    return (rows @ weight.T).reshape(x.shape), x.reshape(-1, x.shape[-1]).T @ rows


def split(qkv: Array) -> tuple[Array, Array, Array]:
    """View q, k and v, (B, S, H, D) each, in what one product has made of them."""
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def forward(
    weights: Weights, shape: Shape, tokens: Array, backend: str | None = None
) -> tuple[Array, list[Step], Array]:
    """Return logits (B, S, V), what each layer leaves behind, and the last stream (B, S, C)."""
    x = weights["embedding"][tokens]
    steps = []
    for layer in range(shape.layers):
        own = {name: weights[f"{layer}.{name}"] for name in LAYER}
        qkv = matmul(normalise(x, own["attention.norm"]), own["attention.qkv"])
        qkv = qkv.reshape(*tokens.shape, 3, shape.heads, -1)
        out, lse = attention(
            *split(qkv), layout="bshd", causal=True, alibi_slopes=slopes(shape, x.dtype),
            return_lse=True, backend=backend,
        )  # fmt: skip
        middle = x + matmul(out.reshape(x.shape), own["attention.join"])
        up = matmul(normalise(middle, own["forward.norm"]), own["forward.up"])
        hidden = np.maximum(up, 0)
        steps.append(Step(x, qkv, out, lse, middle, hidden))
        x = middle + matmul(hidden, own["forward.down"])
    return matmul(normalise(x, weights["norm"]), weights["unembedding"]), steps, x


LAYER = (
    "attention.norm",
    "attention.qkv",
    "attention.join",
    "forward.norm",
    "forward.up",
    "forward.down",
)


def backward(
    weights: Weights,
    shape: Shape,
    tokens: Array,
    kept: tuple[list[Step], Array],
    d_logits: Array,
    backend: str | None = None,
) -> Weights:
    """Return the gradient of every weight: `forward`, read from its last line to its first."""
    steps, x = kept
    d_weights: Weights = {}
    normal = normalise(x, weights["norm"])
    d_normal, d_weights["unembedding"] = matmul_backward(d_logits, normal, weights["unembedding"])
    d_x, d_weights["norm"] = normalise_backward(d_normal, x, weights["norm"])
    for layer in reversed(range(shape.layers)):
        own = {name: weights[f"{layer}.{name}"] for name in LAYER}
        d_x, d_own = _layer_backward(own, shape, steps[layer], d_x, backend)
        d_weights |= {f"{layer}.{name}": gradient for name, gradient in d_own.items()}
    d_weights["embedding"] = np.zeros_like(weights["embedding"])
    np.add.at(d_weights["embedding"], tokens, d_x)
    return d_weights


def _layer_backward(
    own: Weights, shape: Shape, step: Step, d_x: Array, backend: str | None
) -> tuple[Array, Weights]:
    """Gradients of one layer's input and weights."""
    d_own: Weights = {}
    # x = middle + hidden @ down: the gradient goes both ways.
    d_hidden, d_own["forward.down"] = matmul_backward(d_x, step.hidden, own["forward.down"])
    d_up = np.where(step.hidden > 0, d_hidden, 0)
    normal = normalise(step.middle, own["forward.norm"])
    d_normal, d_own["forward.up"] = matmul_backward(d_up, normal, own["forward.up"])
    d_branch, d_own["forward.norm"] = normalise_backward(d_normal, step.middle, own["forward.norm"])
    d_middle = d_x + d_branch

    rows = step.out.reshape(step.x.shape)
    d_rows, d_own["attention.join"] = matmul_backward(d_middle, rows, own["attention.join"])
    d_q, d_k, d_v, *_ = attention_backward(
        d_rows.reshape(step.out.shape), *split(step.qkv), step.out, step.lse, layout="bshd",
        causal=True, alibi_slopes=slopes(shape, d_x.dtype), backend=backend,
    )  # fmt: skip
    d_qkv = np.stack([d_q, d_k, d_v], axis=2).reshape(*step.x.shape[:-1], -1)
    normal = normalise(step.x, own["attention.norm"])
    d_normal, d_own["attention.qkv"] = matmul_backward(d_qkv, normal, own["attention.qkv"])
    d_branch, d_own["attention.norm"] = normalise_backward(d_normal, step.x, own["attention.norm"])
    return d_middle + d_branch, d_own


def cross_entropy(logits: Array, after: Array) -> tuple[float, Array]:
    """Mean of ``-log softmax(logits)[after]`` in nats per character, and its gradient."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exps = np.exp(shifted)
    row_sum = exps.sum(axis=-1, keepdims=True)
    target = after[..., None].astype(np.int64)
    chosen = np.take_along_axis(shifted, target, axis=-1) - np.log(row_sum)
    d_logits = exps / row_sum
    np.put_along_axis(d_logits, target, np.take_along_axis(d_logits, target, axis=-1) - 1, axis=-1)
    return -float(chosen.mean(dtype=np.float64)), d_logits / after.size


def loss_and_gradients(
    weights: Weights, shape: Shape, before: Array, after: Array, backend: str | None = None
) -> tuple[float, Weights]:
    """Return the loss on a batch and the gradient of every weight."""
    logits, *kept = forward(weights, shape, before, backend)
    loss, d_logits = cross_entropy(logits, after)
    return loss, backward(weights, shape, before, tuple(kept), d_logits, backend)
