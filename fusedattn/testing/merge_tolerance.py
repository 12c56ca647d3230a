"""A-priori error budget of a merge; the derivation is that of `fusedattn.testing.tolerance`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.testing.compare import Budget
from fusedattn.testing.roundoff import (
    EXP_LIMIT,
    change_of_weight,
    smallest_normal,
    smallest_subnormal,
    unit_roundoff,
)


def merge_budget(
    parts: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    budgets: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
) -> Budget:
    """Largest error of merged partial results, for each element of out and lse.

    Parameters
    ----------
    parts : sequence of (out, lse)
        Exact partial results over disjoint keys, ``out`` of shape ``(..., seq, dim)`` and ``lse``
        of shape ``(..., seq)``, in the types in which they are stored.
    budgets : sequence of (out, lse), optional
        Budgets of those parts when they come from a kernel; 0 by default.

    Returns
    -------
    Budget
        As `forward_budget`, for the merged result in the types of the parts.
    """
    out_dtype, lse_dtype = parts[0][0].dtype, parts[0][1].dtype
    u = unit_roundoff(lse_dtype) + 2.0**-53
    out = np.stack([np.asarray(part[0], np.float64) for part in parts])
    lse = np.stack([np.asarray(part[1], np.float64) for part in parts])
    out_error, lse_error = np.zeros(out.shape), np.zeros(lse.shape)
    if budgets is not None:
        out_error = np.stack([np.asarray(budget[0], np.float64) for budget in budgets])
        lse_error = np.stack([np.asarray(budget[1], np.float64) for budget in budgets])
    with np.errstate(all="ignore"):
        row_max = lse.max(0)
        present = np.isfinite(lse)
        shift = np.where(np.isfinite(row_max), row_max, 0.0)
        total = np.log(np.exp(lse - shift).sum(0)) + shift
        safe_total = np.where(np.isfinite(total), total, 0.0)
        log_w = lse - safe_total
        sizes = np.where(present, np.abs(lse), 0.0) + np.abs(shift) + 1
        exponent = np.where(present, lse_error + u * (2 * sizes + 7 * len(parts) + 4), 0.0)
        change, w = change_of_weight(log_w, exponent), np.exp(log_w)
        ref = np.abs((w[..., None] * out).sum(0))
        moved = (change[..., None] * np.abs(out)).sum(0) + ref * change.sum(0)[..., None]
        moved = moved + ((w + change)[..., None] * out_error).sum(0)
        bound = moved / np.exp(log_w - exponent).sum(0)[..., None]
        widest = (np.abs(out) + out_error).max(0) + ref
        bound = np.where(bound < widest, bound, widest)
        bound = (
            bound
            + 4 * u * (ref + bound)
            + 4 * len(parts) * smallest_normal(lse_dtype) * (1 + np.abs(out).max(0))
        )
        bound = bound + unit_roundoff(out_dtype) * (ref + bound) + smallest_subnormal(out_dtype)
        lse_bound = np.log1p(change.sum(0))
        lse_bound = np.where(exponent.max(0) < EXP_LIMIT, lse_bound, exponent.max(0))
        lse_bound = lse_bound + u * (
            4 * (np.abs(total - row_max) + 1) + 2 * (np.abs(shift) + 1) + 2 * np.abs(safe_total)
        )
    empty = ~np.isfinite(total)
    return Budget(
        np.where(empty[..., None] | np.isnan(bound), 0.0, bound),
        np.where(empty | np.isnan(lse_bound), 0.0, lse_bound),
    )
