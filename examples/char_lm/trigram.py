"""The baseline: how well the two characters before predict the next.

Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7), the usual
best of count-based models: a fixed discount is taken off every count, and what is gained goes to
the model with one character less of context. Below the highest order a character counts once for
each context in which it occurs. The discount of each order is ``n1 / (n1 + 2 n2)``, of the numbers
of those seen once and twice; the last order falls back to all characters alike.
"""

import numpy as np
from numpy.typing import NDArray

from examples.char_lm.text import Tokens

Float64 = NDArray[np.float64]


def trigram(training: Tokens, size: int) -> Float64:
    """Return ``p[a, b, c]``, the probability of c after a and b, as learnt from a text."""
    a, b, c = (training[i : len(training) - 2 + i].astype(np.int64) for i in range(3))
    counts = np.bincount((a * size + b) * size + c, minlength=size**3).reshape((size,) * 3)
    before_bigram = (counts > 0).sum(axis=0)  # contexts in which the pair b, c occurs
    before_unigram = (before_bigram > 0).sum(axis=0)
    unigram = _smooth(before_unigram, np.full(size, 1.0 / size))
    bigram = _smooth(before_bigram, unigram)
    return _smooth(counts, bigram)


def _smooth(counts: NDArray[np.int64], lower: Float64) -> Float64:
    """Discount counts along the last axis and give the rest to the lower order."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    total = counts.sum(axis=-1, keepdims=True)
    kept = np.maximum(counts - discount, 0.0)
    share = total - kept.sum(axis=-1, keepdims=True)
    seen = total > 0
    return np.where(seen, (kept + share * lower) / np.where(seen, total, 1), lower)


def loss(model: Float64, tokens: Tokens, starts: NDArray[np.int64], length: int) -> float:
    """Mean of ``-log p`` over pieces of a text, in nats per character.

    The first character of a piece, too, is predicted from the two before it, although one of them
    lies outside the piece, where the transformer cannot see it.
    """
    places = starts[:, None] + np.arange(length)
    return float(-np.log(model[tokens[places - 1], tokens[places], tokens[places + 1]]).mean())
