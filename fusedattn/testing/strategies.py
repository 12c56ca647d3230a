"""Hypothesis strategies for calls of an attention function.

A draw decides the few things that shrink well: shapes, which features are on, styles of values, and
a seed; NumPy fills the arrays from that seed. So large arrays cost nothing to draw, a smaller
example is a smaller call, and each draw is reproducible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers the name bfloat16)
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from fusedattn.problem import MAX_SEQLEN, AttentionProblem
from fusedattn.testing import fill
from fusedattn.testing.buffers import PLACEMENTS, Array, same_everywhere
from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import EVERYTHING, as_supports
from fusedattn.testing.roundoff import largest
from fusedattn.testing.rows import unseen_keys

Domain = Callable[[AttentionProblem], str | None]
Generator = np.random.Generator

# Small lengths three times as often, then the edges of the usual blocks.
_SMALL = (1, 2, 3, 4, 5, 6, 7, 8)
_EDGES = (9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 100, 127, 128, 129)
LENGTHS = (*_SMALL, *_SMALL, *_SMALL, *_EDGES, 130, 160, 191, 193, 255, 256, 257, 300)
HEAD_DIMS = (4, 1, 2, 3, 5, 7, 8, 8, 16, 16, 4, 3, 13, 24, 32, 33, 40, 64, 64, 65, 80, 96, 128, 192)
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
    num_heads_kv: tuple[int, ...] = (1, 2, 1, 3, 4)
    group_size: tuple[int, ...] = (2, 1, 3, 4)
    batch: tuple[int, ...] = (1, 2, 3)
    square: bool | None = None  # whether seqlen_q and seqlen_k must be, or never are, equal


@st.composite
def shapes(
    draw: st.DrawFn,
    supports: Collection[str] = EVERYTHING,
    focus: Collection[str] = (),
    sizes: Sizes | None = None,
) -> Shapes:
    """Draw the sizes of a call that the declared capabilities allow."""
    sizes = sizes or Sizes()
    seqlen_k = draw(st.sampled_from(sizes.seqlen_k))
    seqlen_q = draw(st.sampled_from(sizes.seqlen_q))
    square = sizes.square
    if square is None:
        square = seqlen_k in sizes.seqlen_q and draw(st.integers(0, 2)) == 2
    if square:
        seqlen_q = seqlen_k
    head_dim = draw(st.sampled_from(sizes.head_dim))
    head_dim_v = head_dim
    if "head_dim_v" in supports and ("head_dim_v" in focus or draw(st.booleans())):
        head_dim_v = draw(st.sampled_from(sizes.head_dim_v))
    heads_kv = draw(st.sampled_from(sizes.num_heads_kv))
    group = 1
    if "gqa" in supports and ("gqa" in focus or draw(st.booleans())):
        group = draw(st.sampled_from(sizes.group_size))
    batch_shape: tuple[int, ...] = (draw(st.sampled_from(sizes.batch)),)
    if "leading_axes" in supports and ("leading_axes" in focus or draw(st.integers(0, 3)) == 3):
        batch_shape = draw(st.sampled_from([(), (2, 3), (1, 2), (3, 1), (1, 1, 2)]))
    elif draw(st.integers(0, 3)) == 3:
        # Equal sizes let an array broadcast along the wrong axis without an error.
        batch_shape = (heads_kv * group,)
    if sizes.batch == Sizes.batch and "gqa" not in focus and draw(st.integers(0, 9)) == 9:
        # All sizes alike: no mistake about axes shows in a shape.
        seqlen_q = seqlen_k = heads_kv = draw(st.sampled_from((2, 3, 4)))
        group, batch_shape, head_dim_v = 1, (seqlen_q,), head_dim
    # Long sequences come alone.
    seqlen_q = max(1, min(seqlen_q, MAX_LOGITS // seqlen_k)) if not square else seqlen_q
    while (n := int(np.prod(batch_shape))) * heads_kv * group * seqlen_q * seqlen_k > MAX_LOGITS:
        if n > 1:
            batch_shape = tuple(1 for _ in batch_shape)
        elif heads_kv > 1:
            heads_kv = 1
        elif group > 2:
            group = 2
        else:
            break
    drawn = Shapes(
        batch_shape, heads_kv * group, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
    )
    if "zero_size" in supports and ("zero_size" in focus or draw(st.integers(0, 11)) == 11):
        empty = draw(st.sampled_from(["seqlen_k", "seqlen_q", "batch", "heads"]))
        if empty == "batch" and batch_shape:
            drawn = drawn._replace(batch_shape=(*batch_shape[:-1], 0))
        elif empty == "heads":
            drawn = drawn._replace(num_heads=0, num_heads_kv=0)
        elif empty == "seqlen_q":
            drawn = drawn._replace(seqlen_q=0)
        else:
            drawn = drawn._replace(seqlen_k=0)
    return drawn


def magnitudes() -> st.SearchStrategy[tuple[str, str, str, float | None]]:
    """Draw styles of q, k and v, and the size of the logits."""
    plain = st.just("normal")
    return st.tuples(
        plain | st.sampled_from(fill.STYLES),
        plain | st.sampled_from(fill.STYLES),
        plain | st.sampled_from(fill.V_STYLES),
        st.just(1.0) | st.sampled_from(fill.SPREADS),
    )


def layouts() -> st.SearchStrategy[str]:
    """Draw how an array lies in memory."""
    return st.sampled_from(PLACEMENTS)


def broadcastable(rng: Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that broadcasts to `shape`: axes of 1, and leading axes left out."""
    *batch, heads, rows, keys = shape
    ones = (1,) * len(batch)
    usual = (
        shape,
        (rows, keys),
        (heads, rows, keys),
        (*batch, 1, 1, keys),
        (*batch, 1, rows, keys),
        (*ones, heads, rows, keys),
        (keys,),
        (rows, 1),
        (heads, 1, keys),
    )
    if rng.random() < 0.8:
        return usual[int(rng.integers(len(usual)))]
    return tuple(1 if rng.random() < 0.35 else n for n in shape)


def per_item(
    rng: Generator, batch_shape: tuple[int, ...], draw_one: Callable[[], int]
) -> int | Array:
    """Return one integer, or an array of them that broadcasts to the leading axes."""
    if not batch_shape or rng.random() < 0.4:
        return draw_one()
    shape = batch_shape if rng.random() < 0.7 else batch_shape[-1:]
    dtype = (np.int64, np.int32)[int(rng.integers(2))]
    values = [draw_one() for _ in range(int(np.prod(shape)))]
    return np.array(values, dtype).reshape(shape)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Array:
    """Draw a boolean mask that broadcasts to the shape of the logits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return fill.mask_values(rng, broadcastable(rng, shape))


@st.composite
def attention_problems(
    draw: st.DrawFn,
    supports: Collection[str] = EVERYTHING,
    dtypes: Collection[str] = ("float32",),
    *,
    focus: Collection[str] = (),
    without: Collection[str] = (),
    sizes: Sizes | None = None,
    domain: Domain | None = None,
    tame: bool = False,
    extreme: bool = False,
) -> Case:
    """Draw a call inside the domain of the numerics contract.

    Parameters
    ----------
    supports : collection of str
        Keywords and capabilities to draw from; all by default.
    dtypes : collection of str
        Types of q, k and v to choose from.
    focus : collection of str
        Features that every draw has. Any other comes in one draw of four.
    without : collection of str
        Features that no draw has.
    sizes : Sizes, optional
        Sizes to choose from.
    domain : callable, optional
        ``domain(problem)`` returns None for a call that it admits.
    tame : bool
        Values of moderate size only.
    extreme : bool
        Logits and values at the end of the range in every draw.

    Returns
    -------
    strategy of Case
    """
    chosen = as_supports(supports) - frozenset(without)
    if domain is not None:
        sizes = sizes_within(domain, chosen, tuple(dtypes), sizes or Sizes())
    size = draw(shapes(chosen, focus, sizes))
    dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
    styles = ("normal", "normal", "normal", 1.0) if tame else draw(magnitudes())
    if extreme:
        styles = (*styles[:2], "huge", None)
    on = {
        name
        for name in _OPTIONAL
        if name in chosen and (name in focus or draw(st.integers(0, 3)) == 3)
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = build(rng, size, dtype, styles, on, "full_range" in chosen, len(dtypes) > 1)
    if "return_lse" in chosen and ("return_lse" in focus or rng.random() < 0.8):
        case = case.change(return_lse=True)
    if "strides" in on:
        case = place(rng, case)
    if "half_weights" in chosen:
        case = case.change(half_weights=True)
    if domain is not None:
        assume(domain(case.problem) is None)
    return case


_OPTIONAL = (
    "scale",
    "causal",
    "window_size",
    "q_offset",
    "seqused_q",
    "seqused_k",
    "mask",
    "bias",
    "alibi_slopes",
    "softcap",
    "sinks",
    "dropout_p",
    "layout",
    "out",
    "out_dtype",
    "strides",
)


def build(
    rng: Generator,
    size: Shapes,
    dtype: np.dtype[Any],
    styles: tuple[str, str, str, float | None],
    on: Collection[str],
    full_range: bool,
    mixed: bool,
) -> Case:
    """Fill a call with values from a generator; `on` names its features.

    `mixed` says that bias, slopes and sinks may have other types than the accumulator's.
    """
    keywords = positions(rng, size, on)
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    # Three sources share a quarter of the range: the product, the bias and ALiBi.
    room = largest(accumulator) / 16
    if "scale" in on:
        keywords["scale"] = float(rng.choice([0.5, 1.0, 0.0, -0.5, -2.0, 0.03, 7.3]))
    if "softcap" in on:
        keywords["softcap"] = float(rng.choice([1.0, 5.0, 30.0, 0.3, 50.0, 1e4]))
    float_dtype = functools.partial(_any_float, rng, accumulator, mixed)
    keywords |= logit_terms(rng, size, on, room, float_dtype)
    if "sinks" in on:
        sinks = rng.standard_normal(size.num_heads) * rng.choice([1.0, 10.0, 100.0])
        keywords["sinks"] = sinks.astype(float_dtype())
    keep = 1.0
    if "dropout_p" in on:
        keywords["dropout_p"] = float(rng.choice([0.5, 0.1, 0.9, 0.25, 0.999]))
        seeds = (0, 1, 2**32 + 5, 2**64 - 1, int(rng.integers(2**63)))
        keywords["seed"] = seeds[int(rng.integers(len(seeds)))]
        keep = 1.0 - keywords["dropout_p"]
    if "layout" in on:
        keywords["layout"] = "bshd"
    if "out_dtype" in on:
        keywords["out_dtype"] = np.float32

    scale = keywords.get("scale", size.head_dim**-0.5)
    q, k = fill.queries_and_keys(
        rng, (styles[0], styles[1]), styles[3], size.q, size.k, dtype, scale, room
    )
    limit = min(largest(dtype), largest(keywords.get("out_dtype", dtype)))
    if not full_range:
        limit = min(limit, largest(accumulator) / (4 * max(1, size.seqlen_k)))
    v = fill.values_of(rng, styles[2], size.v, dtype, limit * keep * (1 - 2.0**-6))
    placement = {"out": "plain"} if "out" in on else {}
    case = Case(q, k, v, keywords, placement, seed=int(rng.integers(2**16)))
    if rng.random() < 0.5:
        case = with_garbage(rng, case)
    return case


def positions(rng: Generator, size: Shapes, on: Collection[str]) -> dict[str, Any]:
    """Draw the keywords that say where queries stand and what they see."""
    keywords: dict[str, Any] = {}
    rows, keys = size.seqlen_q, size.seqlen_k
    if "causal" in on:
        keywords["causal"] = True
    if "window_size" in on:
        near = (0, 1, 2, 3, int(rng.integers(0, keys + 1)), keys)
        far = (None, 2**31 - 1, 2**31 + 5)
        pair = [
            near[int(rng.integers(6))] if rng.random() < 0.8 else far[int(rng.integers(3))]
            for _ in range(2)
        ]
        if rng.random() < 0.25:
            pair[int(rng.integers(2))] = None
        keywords["window_size"] = (pair[0], pair[1])

    def offset() -> int:
        if rng.random() < 0.06:
            # Near the end of the range; the rest is room for laws that shift it.
            return int(rng.choice([MAX_SEQLEN - 1024, 1024 - MAX_SEQLEN]))
        return int(rng.integers(-rows - 1, keys + 2)) if rng.random() < 0.7 else keys - rows

    if "q_offset" in on:
        keywords["q_offset"] = per_item(rng, size.batch_shape, offset)
    for name, length in (("seqused_q", rows), ("seqused_k", keys)):
        if name in on:
            keywords[name] = per_item(
                rng, size.batch_shape, functools.partial(_length, rng, length)
            )
    return keywords


def _length(rng: Generator, length: int) -> int:
    if rng.random() < 0.3:
        return int(rng.choice([0, length, max(0, length - 1)]))
    return int(rng.integers(0, length + 1))


def _any_float(rng: Generator, plain: np.dtype[Any], mixed: bool) -> np.dtype[Any]:
    if not mixed:
        return plain
    names = ["float32", "float64", "float16", "bfloat16"]
    dtype: np.dtype[Any] = np.dtype(str(rng.choice(names, p=[0.7, 0.1, 0.1, 0.1])))
    return dtype


def logit_terms(
    rng: Generator,
    size: Shapes,
    on: Collection[str],
    room: float,
    float_dtype: Callable[[], np.dtype[Any]],
) -> dict[str, Any]:
    """Draw mask, bias and ALiBi slopes."""
    terms: dict[str, Any] = {}
    if "mask" in on:
        terms["mask"] = fill.mask_values(rng, broadcastable(rng, size.scores))
    if "bias" in on:
        shape = broadcastable(rng, size.scores)
        terms["bias"], _ = fill.bias_values(rng, shape, float_dtype(), room)
    if "alibi_slopes" in on:
        shape = size.scores[:-2] if rng.random() < 0.4 else (size.num_heads,)
        slopes = 2.0 ** rng.integers(-6, 2, shape) * rng.choice([1.0, 1.0, 1.0, -1.0], shape)
        if rng.random() < 0.5:
            slopes = slopes * rng.uniform(1.0, 2.0, shape)
        terms["alibi_slopes"] = slopes.astype(float_dtype())
    return terms


def with_garbage(rng: Generator, case: Case) -> Case:
    """Put large finite values where no row looks."""
    unseen = unseen_keys(case.problem)[..., None]
    if not unseen.any():
        return case
    k, v = case.k.astype(np.float64), case.v.astype(np.float64)
    top_k, top_v = np.abs(k).max(initial=0.0), np.abs(v).max(initial=0.0)
    junk = rng.choice([-1.0, 1.0], k.shape) * top_k
    k = np.where(unseen, junk, k)
    # A thousand times the rest, as far as the type goes and the domain of V allows.
    limit = min(largest(case.v.dtype), largest(case.problem.accumulator) / (4 * k.shape[-2])) / 2
    v = np.where(unseen, top_v if top_v > limit / 1e4 else min(limit, 1e3 * (1.0 + top_v)), v)
    return case.change(k=k.astype(case.k.dtype), v=v.astype(case.v.dtype))


def place(rng: Generator, case: Case) -> Case:
    """Lay the arrays of a case out in memory at random."""
    placement, changes = dict(case.placement), {}
    names = ["q", "k", "v", *(n for n in ("mask", "bias") if n in case.keywords)]
    for name in names:
        if rng.random() < 0.7:
            how = str(rng.choice(PLACEMENTS))
            placement[name] = how
            array = getattr(case, name) if name in "qkv" else case.keywords[name]
            changes[name] = same_everywhere(array, how)
    if "out" in placement:
        placement["out"] = str(rng.choice(PLACEMENTS[:7]))
    return case.change(placement=placement, **changes)


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
    square = None
    if not admits(seqlen_q=kept["seqlen_q"][-1], seqlen_k=kept["seqlen_k"][0]):
        square = True
    return Sizes(**kept, square=square)
