"""A call filled from a NumPy generator: what a draw does not decide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import ml_dtypes  # noqa: F401  (registers the name bfloat16)
import numpy as np

from fusedattn.masks import MAX_SEQLEN
from fusedattn.testing import fill, functions
from fusedattn.testing.buffers import PLACEMENTS, Array, same_everywhere
from fusedattn.testing.cases import Case
from fusedattn.testing.roundoff import largest
from fusedattn.testing.rows import unseen_keys
from fusedattn.testing.sizes import Shapes

Generator = np.random.Generator


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
    batch = int(np.prod(size.batch_shape, dtype=np.int64))
    if "score_mod" in on:
        keywords |= functions.draw_score_mod(rng, batch, size.seqlen_q, size.seqlen_k)
    if "block_mask" in on:
        lengths = (size.seqlen_q, size.seqlen_k)
        keywords["block_mask"] = functions.draw_block_mask(rng, batch, size.num_heads, *lengths)
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
    others = [name for name in ("float32", "float64", "float16", "bfloat16") if name != plain.name]
    dtype: np.dtype[Any] = np.dtype(str(rng.choice([plain.name, *others], p=[0.7, 0.1, 0.1, 0.1])))
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
