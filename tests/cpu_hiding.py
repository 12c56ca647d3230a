"""Ways to hide keys from rows, each with what is seen then."""

import numpy as np

ROWS, KEYS = 130, 210  # some panels of rows, some blocks of keys, none of them full
SEEN = np.random.default_rng(3).random((ROWS, KEYS)) < 0.6
SEEN[:, 40] = False  # a key that nobody sees, next to some that somebody sees
SEEN[50] = False
HIDING = {
    "causal": ({"causal": True}, np.tri(ROWS, KEYS, KEYS - ROWS, dtype=bool)),
    "window": (
        {"window_size": (20, 3), "q_offset": 40},
        np.abs(np.arange(ROWS)[:, None] + 40 - 8.5 - np.arange(KEYS)) <= 11.5,
    ),
    "mask": ({"mask": SEEN}, SEEN),
    "bias": ({"bias": np.where(SEEN, 0.25, -np.inf).astype(np.float32)}, SEEN),
    "float64 bias": ({"bias": np.where(SEEN, 0.25, -1e300)}, SEEN),  # -inf in the accumulator
    "keys used": ({"seqused_k": 97}, np.broadcast_to(np.arange(KEYS) < 97, (ROWS, KEYS))),
    "rows used": (
        {"seqused_q": 70, "q_offset": 0},
        np.broadcast_to(np.arange(ROWS)[:, None] < 70, (ROWS, KEYS)),
    ),
}
