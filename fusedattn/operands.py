"""Checks of the arrays of a call against each other: each returns a canonical view or raises."""

from typing import Any

import numpy as np

from fusedattn import checks
from fusedattn.block_mask import BlockMask
from fusedattn.checks import Array
from fusedattn.masks import MAX_SEQLEN

_SCORES = "(..., heads, seqlen_q, seqlen_k)"
_AXES = {"bhsd": "(..., heads, seqlen, dim)", "bshd": "(..., seqlen, heads, dim)"}


def canonical(q: object, k: object, v: object, layout: str) -> tuple[Array, Array, Array]:
    """Check q, k and v and view them in canonical axis order."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', but is {checks.describe(layout)}")
    arrays = (
        checks.float_array("q", q),
        checks.float_array("k", k),
        checks.float_array("v", v),
    )
    for name, array in zip("qkv", arrays, strict=True):
        if array.dtype != arrays[0].dtype:
            raise TypeError(
                f"{name} must have q's dtype {arrays[0].dtype}, but has dtype {array.dtype}"
            )
        if array.ndim < 3 or array.ndim != arrays[0].ndim:
            ranks = "at least 3 axes" if name == "q" else f"{arrays[0].ndim} axes as q"
            raise ValueError(
                f"{name} must have {ranks}, {_AXES[layout]}, but has shape {array.shape}"
            )
    if layout == "bshd":
        arrays = tuple(array.swapaxes(-3, -2) for array in arrays)  # type: ignore[assignment]
    _check_shapes(*arrays, layout)
    return arrays


def _check_shapes(q: Array, k: Array, v: Array, layout: str) -> None:
    """Check that three canonical views fit together; `layout` is for the messages."""
    *batch, heads, seqlen_q, dim = q.shape
    *batch_k, heads_kv, seqlen_k, dim_k = k.shape
    *batch_v, heads_v, seqlen_v, dim_v = v.shape
    fault = None
    if batch_k != batch or batch_v != batch:
        fault = "the leading axes of q, k and v must be equal"
    elif heads_v != heads_kv:
        fault = f"v must have as many heads as k ({heads_kv}), but has {heads_v}"
    elif seqlen_v != seqlen_k:
        fault = f"v must have the length of k ({seqlen_k}), but has length {seqlen_v}"
    elif dim_k != dim:
        fault = f"k must have the head_dim of q ({dim}), but has {dim_k}"
    elif dim == 0 or dim_v == 0:
        fault = f"head_dim and head_dim_v must be at least 1, but are {dim} and {dim_v}"
    elif heads_kv == 0 and heads != 0:
        fault = f"k must have at least one head where q has any, but has 0 and q has {heads}"
    elif heads_kv and heads % heads_kv:
        fault = f"the heads of q must be a multiple of k's ({heads_kv}), but are {heads}"
    elif seqlen_q > MAX_SEQLEN or seqlen_k > MAX_SEQLEN:
        fault = f"seqlen must be at most 2**30, but is {seqlen_q} for q and {seqlen_k} for k"
    if fault is not None:
        swap = (lambda array: array.swapaxes(-3, -2).shape) if layout == "bshd" else np.shape
        raise ValueError(
            f"{fault}; shapes in the order {_AXES[layout]}: q {swap(q)}, k {swap(k)}, v {swap(v)}"
        )


def mask(value: object, scores_shape: tuple[int, ...]) -> Array:
    """Check a mask and view it with an entry for each score."""
    return checks.broadcast("mask", checks.bool_array("mask", value), scores_shape, _SCORES)


def bias(value: object, scores_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Check a bias and view it with an entry for each score; also return its own shape."""
    array = checks.float_array("bias", value)
    return checks.broadcast("bias", array, scores_shape, _SCORES), array.shape


def alibi_slopes(value: object, heads_shape: tuple[int, ...]) -> Array:
    """Check slopes and view them with a value for each head of each batch item."""
    slopes = checks.float_array("alibi_slopes", value)
    if slopes.ndim == 0 or slopes.shape[-1] != heads_shape[-1]:
        raise ValueError(
            f"alibi_slopes must have shape (heads,) or (..., heads) with {heads_shape[-1]} heads, "
            f"but has shape {slopes.shape}"
        )
    return checks.broadcast("alibi_slopes", slopes, heads_shape, "(..., heads)")


def sinks(value: object, heads: int) -> Array:
    """Check sinks: one for each head."""
    array = checks.float_array("sinks", value)
    if array.shape != (heads,):
        raise ValueError(f"sinks must have shape (heads,) = ({heads},), but has {array.shape}")
    return array


def output(
    value: object,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    layout: str,
    inputs: dict[str, Array | None],
) -> Array:
    """Check the caller's `out` in the caller's layout and view it canonically."""
    if layout == "bshd":
        shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    out = checks.output(value, shape, dtype, inputs)
    return out.swapaxes(-3, -2) if layout == "bshd" else out


def check_block_mask(
    value: object, batch_size: int, heads: int, seqlen_q: int, seqlen_k: int
) -> None:
    """Check that a block mask was made for calls of this shape."""
    if not isinstance(value, BlockMask):
        raise TypeError(
            "block_mask must be a BlockMask, as make_block_mask returns, but is "
            f"{checks.describe(value)}"
        )
    wanted = (batch_size, heads, seqlen_q, seqlen_k)
    axes = zip(value.shape, wanted, (True, True, False, False), strict=True)
    if not all(has == needs or (may_be_one and has == 1) for has, needs, may_be_one in axes):
        raise ValueError(
            "block_mask must be made for (batch, heads, seqlen_q, seqlen_k) = "
            f"{wanted}, or 1 in the place of batch or heads, but was made for {value.shape}"
        )
