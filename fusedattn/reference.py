"""The specification: attention and its gradients in plain NumPy.

Every other backend is judged against this file. It materialises all scores, computes in float64
and rounds once at the end, so it is slow, large and easy to check. It derives masks by itself from
plain index arithmetic and draws its own random words, because two derivations that agree say more
than one that is shared.

The order of operations is ::

    scale * q k^T -> score_mod -> softcap -> + alibi -> + bias -> hide
        -> softmax with sinks -> dropout -> * v

Whatever a row does not see is left out by selection and never multiplied by zero: ``0 * NaN`` and
``0 * inf`` are NaN, and a finite "very negative" score would still count in a row without keys.

Shapes below: ``B`` stands for the leading axes, ``H`` and ``G`` for query and KV heads, ``S`` and
``T`` for the lengths of q and k, ``D`` and ``E`` for the head dims of q and v.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn.pointwise import evaluate
from fusedattn.problem import AttentionProblem, Gradients, Result
from fusedattn.slopes import add_to_aux, d_score

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


class Reference:
    """The specification as a backend."""

    name = "reference"

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Nothing is unsupported: this is what the others are compared with."""
        return []

    def forward(self, problem: AttentionProblem) -> Result:
        """See `forward`."""
        return forward(problem)

    def unsupported_backward(self, problem: AttentionProblem) -> list[str]:
        """Nothing is unsupported."""
        return []

    def backward(
        self,
        problem: AttentionProblem,
        d_out: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any],
        d_lse: NDArray[Any] | None,
        *,
        bias_grad: bool,
    ) -> Gradients:
        """See `backward`."""
        return backward(problem, d_out, out, lse, d_lse, bias_grad=bias_grad)


REFERENCE = Reference()


def forward(problem: AttentionProblem) -> Result:
    """Compute ``out`` (B, H, S, E) and, if asked for, ``lse`` (B, H, S)."""
    with np.errstate(all="ignore"):  # NaN, inf and overflow are answers here, not accidents
        visible, scores, _ = _scores(problem)
        weights, lse, _ = _softmax(problem, visible, scores)
        used, weights = _drop(problem, visible, weights)
        v = _float64(problem, problem.v)
        # Weights that were dropped and scaled up no longer sum to 1, and may overflow in earnest.
        average = _average if problem.dropout_p == 0.0 else _attend
        out = average(weights, used, v)
        result = _round(out, problem.out_dtype)
        if problem.out is not None:
            problem.out[...] = result
            result = problem.out
        return Result(result, lse.astype(problem.accumulator) if problem.return_lse else None)


def weights(problem: AttentionProblem) -> Float64:
    """Weights (B, H, S, T) as they multiply v: hidden and dropped entries are 0."""
    with np.errstate(all="ignore"):
        visible, scores, _ = _scores(problem)
        return _drop(problem, visible, _softmax(problem, visible, scores)[0])[1]


def backward(
    problem: AttentionProblem,
    d_out: NDArray[Any],
    out: NDArray[Any] | None = None,
    lse: NDArray[Any] | None = None,
    d_lse: NDArray[Any] | None = None,
    *,
    bias_grad: bool = True,
) -> Gradients:
    """Pull ``d_out`` (B, H, S, E) and ``d_lse`` (B, H, S) back to the operands.

    `out` and `lse` are what the forward returned. They may come from more keys than the problem
    holds, as in context parallelism: the gradients are then those of this part of the keys, as long
    as the lse is precise enough, see `_from_lse`. Without them both are computed here in full
    precision.

    With ``w`` the softmax weights, ``z`` the dropout factors (0 or ``1 / (1 - dropout_p)``)::

        d_w = z * (d_out v^T)        delta = rowsum(d_out * out)
        d_score = w * (d_w - delta + d_lse)
        d_sink = w_sink * (d_lse - delta)
    """
    with np.errstate(all="ignore"):
        q, k, v = (_float64(problem, array) for array in (problem.q, problem.k, problem.v))
        visible, scores, d_softcap = _scores(problem)
        d_out = d_out.astype(np.float64)
        w, _, w_sink = _softmax(problem, visible, scores)
        if lse is not None:
            w, w_sink = _from_lse(problem, visible, scores, lse, (w, w_sink))
        used, dropped = _drop(problem, visible, w)
        if out is None:
            out = _attend(dropped, used, v)
        sees: Bool = np.any(visible, axis=-1)
        # A row without keys has a constant output: what comes back through it does not matter.
        delta = np.where(sees, (d_out * out).sum(axis=-1), 0.0)
        slope = (0.0 if d_lse is None else d_lse.astype(np.float64)) - delta

        keep_scale = 1.0 / (1.0 - problem.dropout_p)
        d_w = np.where(used, keep_scale * (d_out @ v.swapaxes(-1, -2)), 0.0)
        d_scores = np.where(visible, w * (d_w + slope[..., None]), 0.0)
        d_raw = np.where(visible, d_scores * d_softcap, 0.0)
        d_aux = None
        if problem.score_mod is not None:
            d_raw, d_aux = _through_score_mod(problem, q, k, d_raw, visible)
        d_qk = problem.scale * d_raw
        d_q = _attend(d_qk, visible, k)
        d_k = _attend(d_qk.swapaxes(-1, -2), visible.swapaxes(-1, -2), q)
        d_v = _attend(dropped.swapaxes(-1, -2), used.swapaxes(-1, -2), d_out)
        return Gradients(
            _round(d_q, problem.dtype),
            _round(_sum_groups(problem, d_k), problem.dtype),
            _round(_sum_groups(problem, d_v), problem.dtype),
            _d_bias(problem, d_scores) if bias_grad else None,
            _d_sinks(problem, w_sink, slope),
            d_aux,
        )


def _float64(problem: AttentionProblem, array: NDArray[Any]) -> Float64:
    """Read in float64, with each KV head repeated for the query heads that share it."""
    wide = array.astype(np.float64)
    if wide.shape[-3] != problem.num_heads:
        wide = np.repeat(wide, problem.group_size, axis=-3)
    return wide


def _operand(problem: AttentionProblem, array: NDArray[Any]) -> Float64:
    """Read a bias, slopes or sinks in the accumulator's type, whatever they are stored in."""
    return array.astype(problem.accumulator).astype(np.float64)


def _per_item(problem: AttentionProblem, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shape one number per batch item so that it broadcasts against (B, H, S, T)."""
    return values.reshape(*problem.batch_shape, 1, 1, 1)


def _scores(problem: AttentionProblem) -> tuple[Bool, Float64, Float64 | float]:
    """Which keys each row sees, all scores before hiding, and the derivative of the softcap."""
    q, k = _float64(problem, problem.q), _float64(problem, problem.k)
    scores = problem.scale * (q @ k.swapaxes(-1, -2))
    visible = _visible(problem, scores.shape)
    if problem.score_mod is not None:
        scores = _modified(problem, scores, visible)
        visible = visible & (scores != -np.inf)
    d_softcap: Float64 | float = 1.0
    if problem.softcap is not None:
        capped = np.tanh(scores / problem.softcap)
        scores = problem.softcap * capped
        d_softcap = 1.0 - capped * capped
    if problem.alibi_slopes is not None:
        slopes = _operand(problem, problem.alibi_slopes)[..., None, None]
        scores = scores - slopes * np.abs(_position(problem) - np.arange(problem.seqlen_k))
    if problem.bias is not None:
        bias = _operand(problem, problem.bias)
        scores = scores + bias
        visible = visible & (bias != -np.inf)
    return visible, scores, d_softcap


def _position(problem: AttentionProblem) -> NDArray[np.int64]:
    """Key position at which each query stands, shape (B, 1, S, 1)."""
    return np.arange(problem.seqlen_q)[:, None] + _per_item(problem, problem.q_offset)


def _visible(problem: AttentionProblem, shape: tuple[int, ...]) -> Bool:
    """Which keys each row may see by its position, the lengths and the masks, (B, H, S, T)."""
    row = np.arange(problem.seqlen_q)[:, None]
    key = np.arange(problem.seqlen_k)
    position = _position(problem)
    visible = row < _per_item(problem, problem.seqused_q)
    visible = visible & (key < _per_item(problem, problem.seqused_k))
    if problem.causal:
        visible &= key <= position
    left, right = problem.window_size
    if left is not None:
        visible &= key >= position - left
    if right is not None:
        visible &= key <= position + right
    if problem.mask is not None:
        visible = visible & problem.mask
    if problem.block_mask is not None:
        dense = np.broadcast_to(problem.block_mask.to_mask(), _flat(problem, shape))
        visible = visible & dense.reshape(shape)
    return np.broadcast_to(visible, shape)


def _flat(problem: AttentionProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scores with one flat batch axis, by which functions are told the item."""
    return (problem.batch_size, *shape[-3:])


def _modified(problem: AttentionProblem, scores: Float64, visible: Bool) -> Float64:
    """Replace the score of each visible pair by what the score_mod says; others stay."""
    assert problem.score_mod is not None
    flat = scores.reshape(_flat(problem, scores.shape)).copy()
    pairs = np.nonzero(visible.reshape(flat.shape))
    flat[pairs] = evaluate(problem.score_mod, flat[pairs], *pairs)
    return flat.reshape(scores.shape)


def _through_score_mod(
    problem: AttentionProblem, q: Float64, k: Float64, d_modified: Float64, visible: Bool
) -> tuple[Float64, tuple[NDArray[Any] | None, ...]]:
    """Pull gradients of modified scores back to the raw ones and to the aux arrays."""
    function = problem.score_mod
    assert function is not None
    flat = _flat(problem, d_modified.shape)
    raw = (problem.scale * (q @ k.swapaxes(-1, -2))).reshape(flat)
    pairs = np.nonzero(visible.reshape(flat))
    d_result = d_modified.reshape(flat)[pairs]
    d_raw = np.zeros(flat)
    # A weight of 0 takes nothing back, however steep the function is there.
    slope = d_score(function, problem.score_mod_grad, raw[pairs], *pairs)
    d_raw[pairs] = np.where(d_result == 0.0, 0.0, d_result * slope)
    sums = [None if array.dtype.kind in "iub" else np.zeros(array.shape) for array in function.aux]
    add_to_aux(function, sums, d_result, raw[pairs], *pairs)
    rounded = tuple(
        None if total is None else _round(total, array.dtype)
        for total, array in zip(sums, function.aux, strict=True)
    )
    return d_raw.reshape(d_modified.shape), rounded


def _sinks(problem: AttentionProblem) -> Float64 | None:
    """Sink logits (B, H, S); rows past `seqused_q` have none."""
    if problem.sinks is None:
        return None
    active = np.arange(problem.seqlen_q) < _per_item(problem, problem.seqused_q)[..., 0]
    return np.where(active, _operand(problem, problem.sinks)[:, None], -np.inf)


def _softmax(
    problem: AttentionProblem, visible: Bool, scores: Float64
) -> tuple[Float64, Float64, Float64]:
    """Normalised weights (B, H, S, T) over the visible keys, the lse and the sink's weight."""
    row_max = np.where(visible, scores, -np.inf).max(axis=-1, initial=-np.inf)
    sinks = _sinks(problem)
    if sinks is not None:
        row_max = np.maximum(row_max, sinks)
    # A row that sees nothing has nothing to shift by, and -inf - -inf would make it NaN.
    shift = np.where(np.isneginf(row_max), 0.0, row_max)
    exps = np.where(visible, np.exp(scores - shift[..., None]), 0.0)
    row_sum = exps.sum(axis=-1)
    w_sink = np.zeros_like(shift) if sinks is None else np.exp(sinks - shift)
    row_sum = row_sum + w_sink
    lse = shift + np.log(row_sum)
    divisor = np.where(row_sum == 0.0, 1.0, row_sum)
    return exps / divisor[..., None], lse, w_sink / divisor


def _from_lse(
    problem: AttentionProblem,
    visible: Bool,
    scores: Float64,
    lse: NDArray[Any],
    own: tuple[Float64, Float64],
) -> tuple[Float64, Float64]:
    """Weights of keys and sink that a stored lse gives; `own` are those of the softmax itself.

    The roundoff of the lse is a relative error of every weight. Where it exceeds ``2**-12`` the
    stored number is too coarse to be of use, and the softmax itself counts.
    """
    unit = float(np.finfo(problem.accumulator).eps) / 2
    shift = np.where(np.isneginf(lse), 0.0, lse.astype(np.float64))
    w = np.where(visible, np.exp(scores - shift[..., None]), 0.0)
    sinks = _sinks(problem)
    w_sink = np.zeros_like(shift) if sinks is None else np.exp(sinks - shift)
    coarse = unit * np.abs(shift) > 2.0**-12
    return np.where(coarse[..., None], own[0], w), np.where(coarse, own[1], w_sink)


def _attend(weights: Float64, used: Bool, values: Float64) -> Float64:
    """Multiply ``weights @ values`` where an entry counts only if it is used.

    The product runs over finite values alone. Then each NaN or inf is added to just those rows that
    use it, column by column, which is what selecting entry by entry would give.
    """
    finite = np.isfinite(values)
    product = weights @ np.where(finite, values, 0.0)
    if not finite.all():
        for special in (np.nan, np.inf, -np.inf):
            same = np.isnan(values) if np.isnan(special) else values == special
            product += np.where(used.astype(np.float64) @ same > 0.0, special, 0.0)
    return product


def _average(weights: Float64, used: Bool, values: Float64) -> Float64:
    """Return `_attend` of weights whose sum is 1, also for values near the largest float64.

    There a sum of weights that rounds to just above 1 would give inf for the mean of finite values,
    and a partial sum may overflow although the whole does not. Only such entries are computed
    again, at a quarter of their size, which is exact for numbers so large, and held to the largest.
    """
    mean = _attend(weights, used, values)
    if np.isfinite(mean).all():
        return mean
    expected = np.isfinite(_attend(weights, used, np.where(np.isfinite(values), 0.0, values)))
    lost = expected & ~np.isfinite(mean)
    quarter = np.finfo(np.float64).max / 4
    scaled = _attend(weights, used, values / 4)
    mean[lost] = 4.0 * np.clip(scaled[lost], -quarter, quarter)
    return mean


def _drop(problem: AttentionProblem, visible: Bool, weights: Float64) -> tuple[Bool, Float64]:
    """Which entries multiply a value, and the weights with which they do."""
    if problem.dropout_p == 0.0:
        return visible, weights
    used = visible & keep_mask(weights.shape, problem.dropout_p, problem.seed)
    return used, np.where(used, weights / (1.0 - problem.dropout_p), 0.0)


def _sum_groups(problem: AttentionProblem, gradient: Float64) -> Float64:
    """Add up the gradients of the query heads that read the same KV head."""
    *batch, _, length, dim = gradient.shape
    groups = (*batch, problem.num_heads_kv, problem.group_size, length, dim)
    total: Float64 = gradient.reshape(groups).sum(axis=-3)
    return total


def _d_bias(problem: AttentionProblem, d_scores: Float64) -> NDArray[Any] | None:
    """Sum over the axes along which the bias was broadcast."""
    if problem.bias is None or problem.bias_shape is None:
        return None
    added = d_scores.ndim - len(problem.bias_shape)
    total = d_scores.sum(axis=tuple(range(added)))
    for axis, length in enumerate(problem.bias_shape):
        if length == 1:
            total = total.sum(axis=axis, keepdims=True)
    return _round(total, problem.bias.dtype)


def _d_sinks(problem: AttentionProblem, w_sink: Float64, slope: Float64) -> NDArray[Any] | None:
    """Sum ``w_sink * slope`` over rows and batch items; rows without a sink have no share."""
    sinks = _sinks(problem)
    if problem.sinks is None or sinks is None:
        return None
    d_sinks = np.where(np.isneginf(sinks), 0.0, w_sink * slope)
    total = d_sinks.sum(axis=(*range(d_sinks.ndim - 2), -1))
    return _round(total, problem.sinks.dtype)


def _round(values: Float64, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round once. A cast to bfloat16 goes through float32 and would round twice.

    So the way there rounds to odd: toward zero, with the last bit set where anything was cut off.
    Boldo & Melquiond, "Emulation of FMA and correctly rounded sums" (2008), section 3.
    """
    if dtype != ml_dtypes.bfloat16:
        return values.astype(dtype)
    single = np.asarray(values, np.float64).astype(np.float32)
    cut = np.isfinite(values) & (single != values)
    bits = single.view(np.uint32) - (np.abs(single) > np.abs(values)).astype(np.uint32)
    odd = np.where(cut, bits | np.uint32(1), single.view(np.uint32))
    return odd.view(np.float32).astype(dtype)


def keep_mask(shape: tuple[int, ...], dropout_p: float, seed: int) -> Bool:
    """Which entries of the weights (B, H, S, T) dropout keeps.

    Entry ``(batch, head, row, key)`` reads word ``key % 4`` of Philox4x32-10 with the seed as key
    and the counter ``(key // 4, row, head, flat batch index)``; it stays iff the word is at least
    ``floor(dropout_p * 2**32)``.
    """
    *batch_shape, heads, rows, keys = shape
    batch = np.arange(int(np.prod(batch_shape, dtype=np.int64)), dtype=np.uint64)
    counter = np.ix_(batch, *(np.arange(n, dtype=np.uint64) for n in (heads, rows, -(-keys // 4))))
    words = philox4x32(counter[::-1], (seed & 0xFFFFFFFF, seed >> 32))
    blocks = np.stack(np.broadcast_arrays(*words), axis=-1)
    kept = blocks.reshape(len(batch), heads, rows, 4 * blocks.shape[3])[..., :keys] >= int(
        dropout_p * 2.0**32
    )
    return kept.reshape(shape)


def philox4x32(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four 32-bit random words (in uint64) for a counter of four words and a key.

    Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.
    """
    low_bits = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            product1 & low_bits,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            product0 & low_bits,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
