"""Functions of scores and of positions, from which calls are drawn.

Each reads its positions through arrays: ``row_of[q_idx]``, ``key_of[k_idx]`` and
``item_of[batch]``. So a law that reorders the keys, or takes some rows, reorders these arrays, and
holds for functions of positions as it does for a mask.

What a budget has to know of a score function f is the same for all of them: ``|f(x) - f(y)| <=
|x - y|``, at most four roundings of numbers no larger than ``|x| + |f(x)|`` (tanh counts for two),
and whether a key is hidden depends on its position alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.block_mask import BlockMask, make_block_mask

Array = NDArray[Any]
Generator = np.random.Generator

# The arrays that every function takes, before those of its own.
POSITIONS = ("row_of", "key_of", "item_of")
TABLE = 61


def halved(score, batch, head, q_idx, k_idx, row_of, key_of, item_of, table):  # type: ignore[no-untyped-def]
    """Half of the score."""
    return score * 0.5


def relative(score, batch, head, q_idx, k_idx, row_of, key_of, item_of, table):  # type: ignore[no-untyped-def]
    """Add what a table holds for the head and the distance."""
    return score + table[head % 3, (row_of[q_idx] - key_of[k_idx]) % 61]


def sloped(score, batch, head, q_idx, k_idx, row_of, key_of, item_of, table):  # type: ignore[no-untyped-def]
    """Subtract a slope times the distance, another slope for each item."""
    slope = table[item_of[batch] % 3, 0]
    return score - slope * abs(row_of[q_idx] - key_of[k_idx])


def capped(score, batch, head, q_idx, k_idx, row_of, key_of, item_of, table):  # type: ignore[no-untyped-def]
    """Hold the score between -20 and 20, smoothly."""
    return 20.0 * math.tanh(score / 20.0)


def dilated(score, batch, head, q_idx, k_idx, row_of, key_of, item_of, table):  # type: ignore[no-untyped-def]
    """Hide two keys of three, and bend what is left."""
    if (row_of[q_idx] + key_of[k_idx] + item_of[batch]) % 3:
        return -math.inf
    return score / 2.0 if score > 0 else score


def packed(batch, head, q_idx, k_idx, row_of, key_of, item_of):  # type: ignore[no-untyped-def]
    """Documents of 37 positions that do not see each other."""
    return row_of[q_idx] // 37 == key_of[k_idx] // 37


def near(batch, head, q_idx, k_idx, row_of, key_of, item_of):  # type: ignore[no-untyped-def]
    """Keys near by, nearer for later items and heads."""
    return abs(row_of[q_idx] - key_of[k_idx]) < 50 - 7 * ((item_of[batch] + head) % 5)


def leading(batch, head, q_idx, k_idx, row_of, key_of, item_of):  # type: ignore[no-untyped-def]
    """The first keys, for all rows and heads."""
    return key_of[k_idx] < 40


def later(batch, head, q_idx, k_idx, row_of, key_of, item_of):  # type: ignore[no-untyped-def]
    """Keys at later positions."""
    return key_of[k_idx] > row_of[q_idx]


SCORE_FUNCTIONS = {f.__name__: f for f in (halved, relative, sloped, capped, dilated)}
MASK_FUNCTIONS = {f.__name__: f for f in (packed, near, leading, later)}


def draw_score_mod(rng: Generator, batch: int, rows: int, keys: int) -> dict[str, Any]:
    """Draw a score_mod with its arrays."""
    function = list(SCORE_FUNCTIONS.values())[int(rng.integers(len(SCORE_FUNCTIONS)))]
    table = rng.standard_normal((3, TABLE)).astype(np.float32)
    aux = (*map(np.arange, (rows, keys, batch)), table)
    return {"score_mod": function, "score_mod_aux": aux}


def draw_block_mask(rng: Generator, batch: int, heads: int, rows: int, keys: int) -> BlockMask:
    """Draw a block mask, sometimes one for all items and heads."""
    function = list(MASK_FUNCTIONS.values())[int(rng.integers(len(MASK_FUNCTIONS)))]
    aux = tuple(map(np.arange, (rows, keys, batch)))
    block = (int(rng.choice([16, 5, 32, 1])), int(rng.choice([32, 16, 7, 96])))
    every = function is near or rng.random() < 0.5
    items, each = (batch, heads) if every else (None, None)
    return make_block_mask(function, items, each, rows, keys, aux=aux, block=block)


def moved(
    keywords: dict[str, Any] | Any,
    *,
    rows: Any = None,
    keys: Any = None,
    item: Any = None,
) -> dict[str, Any]:
    """Give the functions of a call the positions of what is left of it, or of another order."""
    index = (rows, keys, item)
    changes: dict[str, Any] = {}
    if "score_mod" in keywords:
        changes["score_mod_aux"] = _taken(keywords["score_mod_aux"], index)
    mask = keywords.get("block_mask")
    if mask is not None:
        leaf = mask.predicate.leaf
        aux = _taken(leaf.aux, index)
        batch, heads = mask.shape[:2]
        changes["block_mask"] = make_block_mask(
            MASK_FUNCTIONS[leaf.function.__name__],
            1 if item is not None else batch,
            heads,
            len(aux[0]),
            len(aux[1]),
            aux=aux,
            block=mask.block,
        )
    return changes


def _taken(aux: tuple[Array, ...], index: tuple[Any, ...]) -> tuple[Array, ...]:
    parts = zip(aux[:3], index, strict=True)
    taken = (a.copy() if i is None else np.ascontiguousarray(a[i]) for a, i in parts)
    return (*taken, *aux[3:])


def block_mask_source(mask: BlockMask, source: Any) -> str:
    """Return an expression that makes an equal block mask."""
    leaf = mask.predicate.leaf
    assert leaf is not None
    arrays = "".join(f"{source(array)}, " for array in leaf.aux)
    return (
        f"make_block_mask(functions.{leaf.function.__name__}, *{mask.shape}, aux=({arrays}), "
        f"block={mask.block})"
    )
