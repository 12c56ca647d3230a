"""Values of the operands: ordinary ones and those that break kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.testing.roundoff import largest, smallest_subnormal
from fusedattn.testing.rows import Float64

Array = NDArray[Any]
Generator = np.random.Generator

# Plain first: shrinking goes there.
STYLES = (
    "normal",
    "integers",  # few values: ties, and sums without rounding
    "constant",  # one value: every key alike
    "constant_rows",  # one value a row
    "zero_rows",  # some rows are zero
    "twins",  # rows come in equal pairs
    "row_sizes",  # rows between 1e-4 and 1e4 of the others
    "one_hot",
    "ascending",  # a drift along the sequence, up
    "descending",  # or down
    "tiny",  # far below 1, and normal
    "subnormal",
    "positive",
)

# Typical size of a logit; None stands for the end of the accumulator's range.
SPREADS = (1.0, 0.01, 4.0, 20.0, 300.0, 1e4, None)


def fill(rng: Generator, style: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Float64:
    """Return float64 values of a style, of size about 1 except for subnormals."""
    rows = (*shape[:-1], 1)
    if style == "integers":
        return rng.integers(-2, 3, shape).astype(np.float64)
    if style == "constant":
        return np.full(shape, float(rng.choice([0.3, -1.0, 0.0, 1.7])))
    if style == "constant_rows":
        return np.broadcast_to(rng.standard_normal(rows), shape).copy()
    if style == "one_hot":
        only = np.zeros(shape)
        hot = rng.integers(0, shape[-1], rows)
        np.put_along_axis(only, hot, rng.choice([1.0, 2.0, -1.0], rows), axis=-1)
        return only
    if style == "subnormal":
        return rng.integers(-9, 10, shape).astype(np.float64) * smallest_subnormal(dtype)
    values: Float64 = rng.standard_normal(shape)
    if style == "positive":
        values = np.abs(values)
    elif style == "tiny":
        values = values * 10.0 ** -rng.uniform(4, 20)
    elif style == "zero_rows":
        values = values * rng.integers(0, 2, rows)
    elif style == "twins" and shape[-2] > 1:
        values = values[..., np.arange(shape[-2]) // 2, :]
    elif style == "row_sizes":
        values = values * 10.0 ** rng.uniform(-4, 4, rows)
    elif style in ("ascending", "descending"):
        drift = np.linspace(0.0, rng.choice([2.0, 10.0]), shape[-2])[:, None]
        values = values + (drift if style == "ascending" else drift[::-1])
    return values


def fit(values: Float64, dtype: np.dtype[Any], limit: float | None = None) -> Array:
    """Round to a type, held to its largest finite number or to a limit below."""
    top = largest(dtype) if limit is None else min(limit, largest(dtype))
    return np.clip(values, -top, top).astype(dtype)


def queries_and_keys(
    rng: Generator,
    styles: tuple[str, str],
    spread: float | None,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    scale: float,
    room: float,
) -> tuple[Array, Array]:
    """Return q and k whose logits have about the size `spread`, and stay inside the domain.

    The domain is ``max(1, |scale|) sum_d |q_d k_d| <= room``.
    """
    q, k = fill(rng, styles[0], q_shape, dtype), fill(rng, styles[1], k_shape, dtype)
    dim = q_shape[-1]
    if spread is None:
        # Split the exponent of the range at random between the two.
        top = np.log2(room / max(1.0, abs(scale)) / dim) - 8
        exponent = rng.uniform(0, top)
        cap = np.log2(largest(dtype)) - 4
        q = q * 2.0 ** min(np.floor(exponent), cap)
        k = k * 2.0 ** min(np.floor(top - exponent), cap)
    elif spread != 1.0:
        # Aimed at what the scale leaves of a product of two normal rows.
        size = abs(scale) * np.sqrt(dim)
        factor = spread / size if size > 1e-3 else spread
        if styles[1] == "ascending" or rng.random() < 0.5:
            q = q * factor
        else:
            k = k * factor
    q, k = fit(q, dtype), fit(k, dtype)
    with np.errstate(over="ignore"):
        top_q = float(np.abs(q.astype(np.float64)).max(initial=0.0))
        top_k = float(np.abs(k.astype(np.float64)).max(initial=0.0))
    reach = top_k * dim * max(1.0, abs(scale))
    if reach > 0 and top_q > room / reach:
        down = 2.0 ** np.floor(np.log2(room / reach / top_q))
        q = (q.astype(np.float64) * down).astype(dtype)
    return q, k


def values_of(
    rng: Generator, style: str, shape: tuple[int, ...], dtype: np.dtype[Any], limit: float
) -> Array:
    """Return v of a style; ``"huge"`` reaches the limit, ``"spiky"`` has single huge entries."""
    if style == "huge":
        values = rng.uniform(0.5, 1.0, shape) * rng.choice([-1.0, 1.0, 1.0], shape) * limit
        return fit(np.where(rng.random(shape) < 0.3, np.sign(values) * limit, values), dtype, limit)
    if style == "spiky":
        values = fill(rng, "normal", shape, dtype)
        return fit(np.where(rng.random(shape) < 0.1, values * 1e6, values), dtype, limit)
    return fit(fill(rng, style, shape, dtype), dtype, limit)


V_STYLES = (*STYLES, "spiky", "huge")


def mask_values(rng: Generator, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a mask: random density, empty and full rows, leading blocks and columns hidden."""
    density = float(rng.choice([0.5, 0.9, 0.1, 0.98]))
    flat: NDArray[np.bool_] = rng.random(shape) < density
    if flat.size == 0:
        return flat
    mask = np.atleast_2d(flat)  # a view
    rows, keys = mask.shape[-2:]
    if rng.random() < 0.5:
        mask[..., rng.integers(0, rows), :] = False
    if rng.random() < 0.3:
        mask[..., rng.integers(0, rows), :] = True
    if rng.random() < 0.3:
        mask[..., : rng.integers(0, keys + 1)] = False
    if rng.random() < 0.2:
        mask[..., rng.integers(0, keys + 1) :] = False
    if rng.random() < 0.2:
        mask[..., rng.integers(0, keys)] = False
    return flat


def bias_values(
    rng: Generator, shape: tuple[int, ...], dtype: np.dtype[Any], room: float
) -> tuple[Array, float]:
    """Return a bias and its largest finite magnitude, below `room`."""
    kind = str(rng.choice(["normal", "integers", "steep", "far"], p=[0.45, 0.2, 0.15, 0.2]))
    bias = rng.standard_normal(shape)
    if kind == "integers":
        bias = rng.integers(-3, 4, shape).astype(np.float64)
    elif kind == "steep":
        bias = bias * 10.0 ** rng.uniform(0, 3, (*shape[:-1], 1))
    elif kind == "far":
        # Below any finite stand-in for -inf: what is hidden must not come out on top.
        bias = bias + rng.choice([-3e4, 1e4, -4e9, -1e31])
    bias = fit(bias, dtype, room)
    hide = rng.random()
    if hide < 0.4 and bias.size:
        chosen = rng.random(shape) < 0.3
        if hide < 0.2 and len(shape) > 1:
            chosen = chosen | (np.arange(shape[-2]) == rng.integers(0, shape[-2]))[:, None]
        bias[chosen] = -np.inf
    finite = np.where(np.isfinite(bias), bias, 0).astype(np.float64)
    return bias, float(np.abs(finite).max(initial=0.0))
