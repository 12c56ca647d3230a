"""Sizes of a call: which to draw from, and which of them a kernel's domain admits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusedattn.problem import AttentionProblem
from fusedattn.testing.cases import Case

Domain = Callable[[AttentionProblem], str | None]

# Small lengths three times as often, then the edges of the usual blocks.
_SMALL = (1, 2, 3, 4, 5, 6, 7, 8)
_EDGES = (9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 100, 127, 128, 129)
LENGTHS = (*_SMALL, *_SMALL, *_SMALL, *_EDGES, 130, 160, 191, 193, 255, 256, 257, 300, 513, 1025)
HEAD_DIMS = (
    4,
    1,
    2,
    3,
    5,
    7,
    8,
    8,
    16,
    16,
    4,
    3,
    13,
    24,
    32,
    33,
    40,
    64,
    64,
    65,
    80,
    96,
    128,
    192,
    257,
    576,
)
# A case holds no more logits than one head of 257 by 257.
MAX_LOGITS = 257 * 257


class Shapes(NamedTuple):
    """Sizes of a call."""

    batch_shape: tuple[int, ...]
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int

    @property
    def q(self) -> tuple[int, ...]:
        """Shape of q."""
        return (*self.batch_shape, self.num_heads, self.seqlen_q, self.head_dim)

    @property
    def k(self) -> tuple[int, ...]:
        """Shape of k."""
        return (*self.batch_shape, self.num_heads_kv, self.seqlen_k, self.head_dim)

    @property
    def v(self) -> tuple[int, ...]:
        """Shape of v."""
        return (*self.batch_shape, self.num_heads_kv, self.seqlen_k, self.head_dim_v)

    @property
    def scores(self) -> tuple[int, ...]:
        """Shape of the logits, to which mask and bias broadcast."""
        return (*self.batch_shape, self.num_heads, self.seqlen_q, self.seqlen_k)


@dataclass(frozen=True)
class Sizes:
    """Sizes to choose from, the plainest first."""

    seqlen_q: tuple[int, ...] = LENGTHS
    seqlen_k: tuple[int, ...] = LENGTHS
    head_dim: tuple[int, ...] = HEAD_DIMS
    head_dim_v: tuple[int, ...] = HEAD_DIMS
    num_heads_kv: tuple[int, ...] = (1, 2, 1, 3, 4, 9)
    group_size: tuple[int, ...] = (2, 1, 3, 4, 8)
    batch: tuple[int, ...] = (1, 2, 3, 1, 2, 5)
    square: bool | None = None  # whether seqlen_q and seqlen_k must be, or never are, equal


def sizes_within(
    domain: Domain, supports: frozenset[str], dtypes: tuple[str, ...], sizes: Sizes
) -> Sizes:
    """Narrow the sizes to those that a kernel's domain admits, one axis at a time."""
    return _sizes_within(domain, supports, dtypes, sizes)


@functools.lru_cache(maxsize=64)
def _sizes_within(
    domain: Domain, supports: frozenset[str], dtypes: tuple[str, ...], sizes: Sizes
) -> Sizes:
    def admits(**changes: int) -> bool:
        full = {**base, **changes}
        heads = full.pop("num_heads_kv")
        size = Shapes((full.pop("batch"),), heads * full.pop("group_size"), heads, **full)
        q, k, v = (np.zeros(shape, np.dtype(dtypes[0])) for shape in (size.q, size.k, size.v))
        return domain(Case(q, k, v).problem) is None

    starts = [(length, dim) for dim in (4, 8, 16, 32, 64, 128) for length in (4, 1, 8, 16, 64, 128)]
    for length, dim in starts:
        base = {"seqlen_q": length, "seqlen_k": length, "head_dim": dim, "head_dim_v": dim}
        base |= {"num_heads_kv": 1, "group_size": 1, "batch": 1}
        if admits():
            break
    else:
        return sizes
    kept = {
        name: tuple(n for n in getattr(sizes, name) if admits(**{name: n})) or (base[name],)
        for name in base
        if name != "head_dim"
    }
    joint = "head_dim_v" not in supports
    kept["head_dim"] = tuple(
        n for n in sizes.head_dim if admits(head_dim=n, **({"head_dim_v": n} if joint else {}))
    ) or (base["head_dim"],)
    square = sizes.square
    if not admits(seqlen_q=kept["seqlen_q"][-1], seqlen_k=kept["seqlen_k"][0]):
        square = True
    return Sizes(**kept, square=square)
