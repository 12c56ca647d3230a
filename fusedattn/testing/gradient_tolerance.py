r"""A-priori error budgets of the gradients.

Notation as in `fusedattn.testing.tolerance`. The backward pass recomputes ``w_j = exp(s_j - lse)``
from a stored lse, which is off by its own forward budget and rounded once more: the exponent of
every weight is off by ``f_j = e_j + lse_budget + u (|s_j - lse| + 2 |lse| + 4)``, and the weight by
``w_j expm1(f_j)``, a relative error of about ``u |lse|`` where logits are large. Then, with
``z_j`` the dropout factor:

- ``p_j = z_j sum_d d_out_d v_jd`` costs ``(D_v + 2) u`` of the sum of absolute values;
- ``delta = sum_d d_out_d out_d`` inherits the budget of the stored output, rounded to its own type,
  and costs ``D_v u``; a kernel that takes ``sum_j w_j p_j`` instead inherits that of the weights;
- ``t_j = p_j - delta + d_lse`` costs ``2u`` of its three parts;
- ``d_s_j = w_j t_j``: both errors and ``2u``; its softcap factor ``1 - tanh^2`` is off by
  ``2 error / cap + 6u``;
- ``d_q``, ``d_k``, ``d_v``, ``d_bias`` and ``d_sinks`` are sums of those over ``n`` terms in any
  order, ``(n + 4) u`` of the sum of absolute values, and are rounded to their own type.

A kernel that rounds weights and ``d_s`` to a half type adds ``u_half`` to both, and says so.

Where ``u |lse| > 2**-12`` a stored lse is too coarse, and row_max and row_sum are computed again.
Weights made of those lie between 0 and 1 but for rounding, whatever the errors of their exponents,
so there no weight is off by more than 1. Where a bound overflows it is inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.problem import AttentionProblem, Gradients
from fusedattn.testing.roundoff import (
    change_of_weight,
    largest,
    smallest_normal,
    smallest_subnormal,
    unit_roundoff,
)
from fusedattn.testing.rows import Float64, RowBlock, any_over, kv_heads, row_blocks
from fusedattn.testing.tolerance import (
    Weights,
    capped_error,
    forward_budget,
    kept_places,
    working_roundoff,
)

Array = NDArray[Any]

# Relative error of a weight from a stored lse beyond which row_max and row_sum are found again.
COARSE = 2.0**-12


def backward_budget(
    problem: AttentionProblem,
    d_out: Array,
    d_lse: Array | None = None,
    *,
    rounds_weights_to: Any = None,
) -> Gradients:
    """Largest error of exact gradients, elementwise, for each operand that was given.

    Parameters
    ----------
    problem : AttentionProblem
        What was differentiated.
    d_out, d_lse : ndarray
        What comes back through out and lse, in canonical axis order.
    rounds_weights_to : dtype, optional
        Half type to which the kernel rounds its weights and their gradients, if it does.

    Returns
    -------
    Gradients
        float64 arrays of the shapes of the gradients.
    """
    sums = _Sums(problem)
    half = 0.0 if rounds_weights_to is None else unit_roundoff(rounds_weights_to)
    out_error = forward_budget(problem, rounds_weights_to=rounds_weights_to).out
    keep = kept_places(problem)
    with np.errstate(all="ignore"):
        for block in row_blocks(problem):
            place = block.place
            factor = 1.0 if keep is None else keep[place] / (1.0 - problem.dropout_p)
            d_out_rows = d_out[place].astype(np.float64)
            slope = np.zeros(d_out_rows.shape[:-1]) if d_lse is None else d_lse[place]
            sums.add(block, d_out_rows, slope.astype(np.float64), factor, out_error[place], half)
    return sums.gradients()


class _Sums:
    """Absolute sums and errors of each gradient, collected over blocks of rows."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        scores = (*problem.lse_shape, problem.seqlen_k)
        zeros = np.zeros
        self.q = zeros(problem.q.shape), zeros(problem.q.shape)
        self.k = zeros(problem.k.shape), zeros(problem.k.shape)
        self.v = zeros(problem.v.shape), zeros(problem.v.shape)
        # Of the full shape only where a bias is given; the sum over its broadcast axes comes last.
        self.bias = None if problem.bias is None else (zeros(scores), zeros(scores))
        self.sinks = zeros(problem.num_heads), zeros(problem.num_heads)

    def add(
        self,
        block: RowBlock,
        d_out: Float64,
        slope: Float64,
        factor: Float64 | float,
        out_error: Float64,
        half: float,
    ) -> None:
        """Add the share of some rows. Each pair is (sum of absolute values, error)."""
        problem, u = self.problem, working_roundoff(self.problem)
        heads = kv_heads(problem, block.heads)
        k = np.abs(problem.k[block.index][heads].astype(np.float64))
        v = problem.v[block.index][heads].astype(np.float64)
        seen = any_over(block.attended, -1)
        d_out = np.where(seen[..., None], d_out, 0.0)
        slope = np.where(seen | (block.sink > -np.inf), slope, 0.0)

        weights = Weights(problem, block)
        lse = np.where(np.isfinite(weights.lse), weights.lse, 0.0)
        stored = weights.lse_budget() + u * (2 * np.abs(lse) + 4)
        w = np.exp(weights.log_w)
        w_error = self._weight_error(block, weights, lse, stored) + half * w

        # Hidden values may be anything; they have no part in what follows.
        v = np.where(any_over(block.attended, -2)[..., None], v, 0.0)
        p = factor * (d_out @ v.swapaxes(-1, -2))
        p_error = (
            u * (problem.head_dim_v + 2) * factor * (np.abs(d_out) @ np.abs(v).swapaxes(-1, -2))
        )
        out = (w * factor) @ v
        delta = (d_out * out).sum(-1)
        sizes = np.abs(d_out) * np.abs(out)
        from_out = (np.abs(d_out) * out_error).sum(-1) + u * problem.head_dim_v * sizes.sum(-1)
        n = block.attended.sum(-1)
        from_weights = w_error * np.abs(p) + (w + w_error) * p_error
        from_weights = from_weights.sum(-1) + u * n * (w * np.abs(p)).sum(-1)
        delta_error = np.maximum(from_out, from_weights)

        size = np.abs(p) + (np.abs(delta) + np.abs(slope))[..., None]
        t = np.abs(p + (slope - delta)[..., None])
        t_error = p_error + delta_error[..., None] + 2 * u * size
        d_s = w * t
        d_s_error = w_error * (t + t_error) + w * t_error + (2 * u + half) * d_s
        if self.bias is not None:
            self.bias[0][block.place] += d_s
            self.bias[1][block.place] += d_s_error
        if problem.softcap is not None:
            tanh = block.capped / problem.softcap
            slack = np.minimum(1.0, 2 * capped_error(problem, block) / problem.softcap) + 6 * u
            bend = 1.0 - tanh * tanh
            d_s, d_s_error = d_s * bend, d_s_error * (bend + slack) + d_s * slack
        scale = abs(problem.scale)
        self.q[0][block.place] += scale * (d_s @ k)
        self.q[1][block.place] += scale * (d_s_error @ k)
        q = np.abs(problem.q[block.place].astype(np.float64))
        d_out = np.abs(d_out)
        for pair, values, times in (
            (self.k, (scale * d_s, scale * d_s_error), q),
            (self.v, (w * factor, w_error * factor), d_out),
        ):
            for total, value in zip(pair, values, strict=True):
                np.add.at(total[block.index], heads, value.swapaxes(-1, -2) @ times)
        self._add_sinks(block, weights, stored, slope, delta, delta_error)

    def _weight_error(
        self, block: RowBlock, weights: Weights, lse: Float64, stored: Float64
    ) -> Float64:
        """Error of the weights as they are computed again from an lse that is off by `stored`."""
        u = weights.u
        logs = np.where(block.attended, np.abs(weights.log_w), 0.0)
        error = change_of_weight(weights.log_w, weights.exponent + stored[..., None] + u * logs)
        again = (u * np.abs(lse) > COARSE)[..., None]
        error = np.where(again, np.minimum(error, 1 + weights.chain), error)
        tiny = smallest_normal(self.problem.accumulator)
        return np.where(block.attended, error + 4 * tiny, 0.0)

    def _add_sinks(
        self,
        block: RowBlock,
        weights: Weights,
        stored: Float64,
        slope: Float64,
        delta: Float64,
        delta_error: Float64,
    ) -> None:
        u = weights.u
        has_sink = block.sink > -np.inf
        logs = np.where(has_sink, np.abs(weights.sink_log_w), 0.0)
        w = np.exp(weights.sink_log_w)
        w_error = change_of_weight(weights.sink_log_w, weights.sink_exponent + stored + u * logs)
        t, size = np.abs(slope - delta), np.abs(slope) + np.abs(delta)
        t_error = delta_error + 2 * u * size
        w_error = np.where(u * np.abs(weights.lse) > COARSE, np.minimum(w_error, 1.0), w_error)
        self.sinks[0][block.heads] += np.where(has_sink, w * t, 0.0).sum(-1)
        error = w_error * (t + t_error) + w * t_error + 2 * u * w * t
        self.sinks[1][block.heads] += np.where(has_sink, error, 0.0).sum(-1)

    def gradients(self) -> Gradients:
        """Combine sums and errors into budgets, rounding to the type of each operand."""
        problem = self.problem
        rows, keys = problem.seqlen_q, problem.seqlen_k
        bias = sinks = None
        if self.bias is not None and problem.bias is not None and problem.bias_shape is not None:
            size, error = (_sum_to(total, problem.bias_shape) for total in self.bias)
            count = max(1, self.bias[0].size // max(1, size.size))
            bias = _budget(problem, size, error, count, problem.bias.dtype)
        if problem.sinks is not None:
            count = rows * problem.batch_size
            sinks = _budget(problem, *self.sinks, count, problem.sinks.dtype)
        per_key = rows * problem.group_size
        return Gradients(
            _budget(problem, *self.q, keys, problem.dtype),
            _budget(problem, *self.k, per_key, problem.dtype),
            _budget(problem, *self.v, per_key, problem.dtype),
            bias,
            sinks,
        )


def _sum_to(array: Float64, shape: tuple[int, ...]) -> Float64:
    """Sum over the axes along which an array of that shape was broadcast."""
    total = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
    summed: Float64 = total.sum(axes, keepdims=True) if axes else total
    return summed


def _budget(
    problem: AttentionProblem, size: Float64, error: Float64, terms: int, dtype: Any
) -> Float64:
    u = working_roundoff(problem)
    error = error + u * (terms + 4) * (size + error)
    total = size + error
    error = error + unit_roundoff(dtype) * total + smallest_subnormal(dtype)
    error = error + 4 * terms * smallest_normal(problem.accumulator)
    error = np.where(total > largest(dtype), np.inf, error)
    return np.where(np.isnan(error), np.inf, error)  # 0 * inf, after an overflow
