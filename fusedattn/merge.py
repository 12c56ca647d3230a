"""Combine partial attention results over disjoint sets of keys.

A partial result is a pair: `out`, the mean of the values under the softmax of *its* keys, and
`lse`, the logarithm of the sum of its exponentials. The pair over the union of the keys follows
from the pairs alone, because ``exp(lse)`` is the weight that each part has in the whole::

    lse = log(sum_i exp(lse_i))          out = sum_i exp(lse_i - lse) * out_i

This is the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867) between whole results: a
blocked kernel does the same between two blocks of keys, split-KV decoding between two threads, and
context parallelism between two machines.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLOATS = ("float16", "bfloat16", "float32", "float64")

State = tuple[NDArray[Any], NDArray[Any]]


def merge(*states: State, layout: str = "bhsd") -> State:
    """Merge partial results ``(out, lse)`` over disjoint keys into that over all of them.

    The operation is associative and commutative up to rounding. Its identity is the result over no
    keys, ``out = 0`` and ``lse = -inf``: merging it in changes no value. A sink must be given to
    exactly one of the parts.

    Parameters
    ----------
    *states : tuple of (ndarray, ndarray)
        Pairs of `out`, ``(..., heads, seqlen_q, head_dim_v)``, and `lse`,
        ``(..., heads, seqlen_q)`` in natural log units. All `out` have one shape and dtype, all
        `lse` too.
    layout : {"bhsd", "bshd"}
        Axis order of `out`, as in `attention`; `lse` is always ``(..., heads, seqlen_q)``.

    Returns
    -------
    out, lse : ndarray
        Shaped and typed as those of the parts.

    Raises
    ------
    TypeError, ValueError
        If a part is not such a pair or the parts do not fit together.

    Notes
    -----
    Computed in float64 and rounded once. What is lost was lost before: a stored `lse` is off by up
    to ``u * |lse|`` (``u`` the unit roundoff of its dtype), which is a *relative* error of the
    weight of its part. Partial results in a half type are rounded already; ask `attention` for
    ``out_dtype="float32"`` when they are to be merged.

    A part whose lse is ``-inf`` is skipped, whatever its `out` holds; NaN in the `out` of any other
    part stays NaN, however little weight the part has. Differences are taken against the largest
    lse, so nothing overflows, for `out` up to the largest finite number and any lse. An lse of
    ``+inf`` or NaN gives NaN, as it does in `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import attention, merge
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, n, 8)).astype(np.float32) for n in (5, 12, 12))
    >>> left = attention(q, k[:, :7], v[:, :7], return_lse=True)
    >>> right = attention(q, k[:, 7:], v[:, 7:], return_lse=True)
    >>> out, lse = merge(left, right)
    >>> bool(np.allclose(out, attention(q, k, v), atol=1e-6))
    True
    """
    _check(states, layout)
    lses = [lse.astype(np.float64) for _, lse in states]
    with np.errstate(all="ignore"):
        top = np.maximum.reduce(lses)
        # With no keys in any part there is nothing to shift by, and -inf - -inf would be NaN.
        shift = np.where(np.isneginf(top), 0.0, top)
        weights = [np.exp(lse - shift) for lse in lses]
        total = np.sum(weights, axis=0)
        lse = shift + np.log(total)
        divisor = np.where(total == 0.0, 1.0, total)
        shares = [weight / divisor for weight in weights]
        holds = [~np.isneginf(part) for part in lses]

        # Heads and sequence axes of `out` in the order of lse.
        outs = [out.swapaxes(-3, -2) if layout == "bshd" else out for out, _ in states]
        out = _weighted_sum(holds, shares, outs)
        if not np.isfinite(out).all():
            # Near the largest float64 the sum overflows where shares round to just above 1. At a
            # quarter of the size it cannot; what was inf or NaN before stays so.
            quarters = [part.astype(np.float64) / 4.0 for part in outs]
            scaled = _weighted_sum(holds, shares, quarters)
            quarter = np.finfo(np.float64).max / 4.0
            held = 4.0 * np.clip(scaled, -quarter, quarter)
            out = np.where(np.isfinite(out) | ~np.isfinite(scaled), out, held)
        result = out.astype(states[0][0].dtype)
    if layout == "bshd":
        result = result.swapaxes(-3, -2)
    return result, np.asarray(lse).astype(states[0][1].dtype)


def _weighted_sum(holds: list[Any], shares: list[Any], outs: list[NDArray[Any]]) -> Any:
    """Sum ``share * out`` over the parts that hold any key; 0 * NaN would not skip the others."""
    total: Any = 0.0
    for held, share, out in zip(holds, shares, outs, strict=True):
        total = total + np.where(held[..., None], share[..., None] * out.astype(np.float64), 0.0)
    return total


def _check(states: tuple[State, ...], layout: str) -> None:
    """Check that the parts are pairs of float arrays that fit together."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', but is {layout!r}")
    if not states:
        raise TypeError("merge needs at least one (out, lse), but got none")
    for position, state in enumerate(states):
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(
                f"states[{position}] must be a pair (out, lse), but is of type "
                f"{type(state).__name__}; attention() returns one with return_lse=True"
            )
        for name, array, first in zip(("out", "lse"), state, states[0], strict=True):
            is_array = type(array) is np.ndarray
            if not is_array or array.dtype.name not in _FLOATS or not array.dtype.isnative:
                kind = getattr(array, "dtype", type(array).__name__)
                raise TypeError(
                    f"{name} of states[{position}] must be an array of a float dtype in the "
                    f"machine's byte order, but is {kind}"
                )
            if array.dtype != first.dtype:
                raise TypeError(
                    f"{name} of states[{position}] must have the dtype {first.dtype} of states[0], "
                    f"but has {array.dtype}"
                )
            if array.shape != first.shape:
                raise ValueError(
                    f"{name} of states[{position}] must have the shape {first.shape} of states[0], "
                    f"but has {array.shape}"
                )
    out, lse = states[0]
    rows = out.shape[:-1]
    if layout == "bshd" and out.ndim >= 3:
        rows = (*rows[:-2], rows[-1], rows[-2])
    if out.ndim < 3 or lse.shape != rows:
        raise ValueError(
            f"lse must have shape (..., heads, seqlen_q) of out, but out has shape {out.shape} in "
            f"layout {layout!r} and lse {lse.shape}"
        )
