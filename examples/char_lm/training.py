"""Adam, its learning rate, and the loop around them."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from examples.char_lm.model import (
    Shape,
    Weights,
    cross_entropy,
    forward,
    init,
    loss_and_gradients,
)
from examples.char_lm.text import Corpus, Tokens, windows


class Plan(NamedTuple):
    """How to train."""

    steps: int = 500
    batch: int = 32
    length: int = 128
    rate: float = 4e-3
    warmup: int = 40
    seed: int = 0
    backend: str | None = None


class Progress(NamedTuple):
    """Where the training stands after a step."""

    step: int
    loss: float  # on the batch of this step, before it was learnt from
    seconds: float  # since the start
    weights: Weights


class Adam:
    """Kingma & Ba 2015, algorithm 1, with gradients clipped to a norm of 1."""

    def __init__(self, weights: Weights) -> None:
        self.mean = {name: np.zeros_like(x) for name, x in weights.items()}
        self.square = {name: np.zeros_like(x) for name, x in weights.items()}
        self.count = 0

    def update(self, weights: Weights, gradients: Weights, rate: float) -> None:
        """Move the weights, in place."""
        self.count += 1
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
        clip = min(1.0, 1.0 / max(norm, 1e-12))
        forget, forget_square = 0.9, 0.98
        # Both averages start at 0 and are too small at first, by these factors.
        rate *= math.sqrt(1 - forget_square**self.count) / (1 - forget**self.count)
        for name, gradient in gradients.items():
            mean, square = self.mean[name], self.square[name]
            gradient = gradient * gradient.dtype.type(clip)
            mean += (1 - forget) * (gradient - mean)
            square += (1 - forget_square) * (gradient * gradient - square)
            weights[name] -= rate * mean / (np.sqrt(square) + 1e-8)


def learning_rate(plan: Plan, step: int) -> float:
    """Rise linearly, then fall along a cosine to a tenth."""
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def train(plan: Plan, shape: Shape, corpus: Corpus) -> Iterator[Progress]:
    """Train, and report after each step. One seed, one run: every step is deterministic."""
    weights = init(shape, len(corpus.alphabet), plan.seed)
    adam, rng = Adam(weights), np.random.default_rng(plan.seed)
    start = time.perf_counter()
    for step in range(plan.steps):
        places = rng.integers(0, len(corpus.training) - plan.length, plan.batch)
        before, after = windows(corpus.training, places, plan.length)
        loss, gradients = loss_and_gradients(weights, shape, before, after, plan.backend)
        adam.update(weights, gradients, learning_rate(plan, step))
        yield Progress(step + 1, loss, time.perf_counter() - start, weights)


def evaluate(
    weights: Weights, shape: Shape, before: Tokens, after: Tokens, backend: str | None = None
) -> float:
    """Mean loss over pieces of text, in nats per character."""
    total, batch = 0.0, 32
    for first in range(0, len(before), batch):
        part = slice(first, first + batch)
        logits, *_ = forward(weights, shape, before[part], backend)
        total += cross_entropy(logits, after[part])[0] * len(before[part])
    return total / len(before)
