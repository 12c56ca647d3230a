"""Writing text, one character at a time, with keys and values of the past kept in a cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from examples.char_lm.model import LAYER, Array, Shape, Weights, matmul, normalise, slopes, split
from fusedattn import attention


class Cache:
    """Keys and values of each layer, (1, capacity, H, D), of which `length` rows are in use."""

    def __init__(self, shape: Shape, capacity: int, dtype: Any = np.float32) -> None:
        size = (1, capacity, shape.heads, shape.channels // shape.heads)
        self.keys = [np.zeros(size, dtype) for _ in range(shape.layers)]
        self.values = [np.zeros(size, dtype) for _ in range(shape.layers)]
        self.length = 0


def extend(
    weights: Weights, shape: Shape, cache: Cache, tokens: Array, backend: str | None = None
) -> Array:
    """Read further characters, (S,), and return the logits (V,) of what comes next.

    The queries are those of the new characters alone. `seqused_k` says how far the cache is filled,
    and by default the last query stands on the last key in use: that is all that attention has to
    know.
    """
    x = weights["embedding"][tokens][None]
    new = slice(cache.length, cache.length + len(tokens))
    if new.stop > cache.keys[0].shape[1]:
        raise ValueError(f"the cache holds {cache.keys[0].shape[1]} characters, not {new.stop}")
    for layer in range(shape.layers):
        own = {name: weights[f"{layer}.{name}"] for name in LAYER}
        qkv = matmul(normalise(x, own["attention.norm"]), own["attention.qkv"])
        q, k, v = split(qkv.reshape(1, len(tokens), 3, shape.heads, -1))
        cache.keys[layer][:, new], cache.values[layer][:, new] = k, v
        out = attention(
            q, cache.keys[layer], cache.values[layer], layout="bshd", causal=True,
            alibi_slopes=slopes(shape, x.dtype), seqused_k=new.stop, backend=backend,
        )  # fmt: skip
        x = x + matmul(out.reshape(x.shape), own["attention.join"])
        up = matmul(normalise(x, own["forward.norm"]), own["forward.up"])
        x = x + matmul(np.maximum(up, 0), own["forward.down"])
    cache.length = new.stop
    return matmul(normalise(x[:, -1], weights["norm"]), weights["unembedding"])[0]


def generate(
    weights: Weights,
    shape: Shape,
    prompt: Array,
    count: int,
    *,
    temperature: float = 0.7,
    seed: int = 0,
    backend: str | None = None,
) -> Iterator[int]:
    """Draw `count` characters after a prompt of at least one."""
    rng = np.random.default_rng(seed)
    cache = Cache(shape, len(prompt) + count, weights["embedding"].dtype)
    logits = extend(weights, shape, cache, prompt, backend)
    for written in range(count):
        token = draw(rng, logits, temperature)
        yield token
        if written + 1 < count:
            logits = extend(weights, shape, cache, np.array([token]), backend)


def draw(rng: np.random.Generator, logits: Array, temperature: float) -> int:
    """Draw from ``softmax(logits / temperature)``; temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(rng.choice(len(weights), p=weights / weights.sum()))
