"""Calls that the tests of the specification share: one for each feature, and all at once."""

import numpy as np

SHAPE = (2, 3, 4, 5, 7)  # two leading axes, heads, seqlen_q, seqlen_k

# Each feature with what it has to work with, and all that may meet.
FEATURES = {
    "plain": {},
    "scale": dict(scale=-0.7),
    "scale 0": dict(scale=0.0),
    "causal": dict(causal=True),
    "top left": dict(causal=True, q_offset=0),
    "window": dict(window_size=(2, 1)),
    "left window": dict(window_size=(1, None), causal=True),
    "offsets": dict(causal=True, q_offset=np.array([[4], [-2]])),
    "lengths": dict(seqused_k=np.array([7, 3, 0]), seqused_q=np.array([[5], [2]]), causal=True),
    "mask": dict(mask=np.random.default_rng(1).random((4, 5, 7)) < 0.5),
    "bias": dict(bias=np.random.default_rng(2).standard_normal((3, 1, 5, 7))),
    "bias of -inf": dict(bias=np.where(np.arange(7) % 3 == 1, -np.inf, 0.5)),
    "alibi": dict(alibi_slopes=np.array([0.5, 0.25, -0.1, 0.0]), q_offset=1),
    "alibi per item": dict(alibi_slopes=np.arange(12.0).reshape(3, 4) / 20),
    "softcap": dict(softcap=0.8),
    "sinks": dict(sinks=np.array([0.3, -1.0, 2.0, -np.inf]), causal=True, q_offset=-2),
    "all": dict(
        causal=True,
        window_size=(3, None),
        mask=np.random.default_rng(3).random((5, 7)) < 0.8,
        bias=np.random.default_rng(4).standard_normal((4, 5, 1)),
        alibi_slopes=np.array([0.5, 0.25, -0.1, 0.0]),
        softcap=1.3,
        sinks=np.array([0.3, -1.0, 2.0, 0.0]),
        seqused_q=4,
        seqused_k=6,
    ),
    "dropout": dict(dropout_p=0.4, seed=7, sinks=np.zeros(4), causal=True),
}


def operands(rng, heads_kv=2):
    *batch, heads, seqlen_q, seqlen_k = SHAPE
    q = rng.standard_normal((*batch, heads, seqlen_q, 8))
    k = rng.standard_normal((*batch, heads_kv, seqlen_k, 8))
    v = rng.standard_normal((*batch, heads_kv, seqlen_k, 3))
    return q, k, v
