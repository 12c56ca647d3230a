"""A compact blocked attention that keeps every promise of the kit: the base of planted mutants.

Each step is a method, so that a mutant is a subclass with one step broken. It works in float64 and
rounds once, which makes the full range easy; that it is right is proved by the kit itself.
"""

import numpy as np

from fusedattn.functions import user_function
from fusedattn.pointwise import evaluate
from fusedattn.reference import keep_mask


class Attention:
    """Blocked online-softmax attention in plain NumPy."""

    block_k = 16
    late = False

    def __call__(
        self,
        q,
        k,
        v,
        *,
        scale=None,
        causal=False,
        window_size=None,
        q_offset=None,
        seqused_q=None,
        seqused_k=None,
        mask=None,
        bias=None,
        alibi_slopes=None,
        softcap=None,
        sinks=None,
        score_mod=None,
        score_mod_aux=(),
        block_mask=None,
        dropout_p=0.0,
        seed=None,
        layout="bhsd",
        return_lse=False,
        out=None,
        out_dtype=None,
    ):
        dtype = q.dtype
        given = out
        if layout == "bshd":
            q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
            out = out if out is None else out.swapaxes(-3, -2)
        q, k, v = self.load(q), self.load(k), self.load(v)
        batch, heads, rows, keys = q.shape[:-3], q.shape[-3], q.shape[-2], k.shape[-2]
        k, v = self.repeat(k, heads), self.repeat(v, heads)
        used_q = self.per_item(seqused_q, rows, batch)
        used_k = self.per_item(seqused_k, keys, batch)
        offset = self.offset(q_offset, used_q, used_k, rows, keys, batch)
        position = np.arange(rows)[:, None] + offset
        key = np.arange(keys)
        seen = self.in_lengths(key, used_k) & (np.arange(rows)[:, None] < used_q)
        seen = seen & self.in_window(position, key, causal, window_size)
        seen = np.broadcast_to(seen, (*batch, heads, rows, keys))

        scores = self.scores(q, k, self.scale(scale, q, v))
        if block_mask is not None:
            dense = np.broadcast_to(self.in_blocks(block_mask), self.flat(seen.shape))
            seen = seen & dense.reshape(seen.shape)
        if score_mod is not None and not self.late:
            scores, seen = self.modify(scores, seen, score_mod, score_mod_aux)
        scores, seen = self.terms(scores, seen, position, key, softcap, alibi_slopes, bias, mask)
        if score_mod is not None and self.late:
            scores, seen = self.modify(scores, seen, score_mod, score_mod_aux)
        sink = np.full((*batch, heads, rows), -np.inf)
        if sinks is not None:
            live = np.arange(rows) < used_q[..., 0]
            sink = np.where(live, sinks.astype(np.float64)[:, None], -np.inf)
        keep = self.keep(seen.shape, dropout_p, seed)
        result, lse = self.softmax_v(scores, seen, v, sink, keep, dropout_p)

        result = self.store(result, dtype if out_dtype is None else np.dtype(out_dtype))
        if layout == "bshd":
            result = result.swapaxes(-3, -2)
        if given is not None:
            given[...] = result
            result = given
        lse = lse.astype(np.float64 if dtype == np.float64 else np.float32)
        return (result, lse) if return_lse else result

    def load(self, x):
        return x.astype(np.float64)

    def store(self, x, dtype):
        if dtype.itemsize == 2 and dtype.kind != "f":
            x = x.astype(np.float32)
        return x.astype(dtype)

    def repeat(self, x, heads):
        return np.repeat(x, heads // x.shape[-3], -3) if x.shape[-3] else x

    def per_item(self, value, default, batch):
        value = default if value is None else value
        return np.broadcast_to(value, batch).reshape(*batch, 1, 1, 1).astype(np.int64)

    def offset(self, q_offset, used_q, used_k, rows, keys, batch):
        return used_k - used_q if q_offset is None else self.per_item(q_offset, 0, batch)

    def in_lengths(self, key, used_k):
        return key < used_k

    def in_window(self, position, key, causal, window_size):
        left, right = window_size or (None, None)
        seen = np.ones(np.broadcast_shapes(position.shape, key.shape), bool)
        if causal:
            seen &= self.causal(position, key)
        if left is not None:
            seen &= self.not_left(position, key, left)
        if right is not None:
            seen &= self.not_right(position, key, right)
        return seen

    def causal(self, position, key):
        return key <= position

    def not_left(self, position, key, left):
        return key >= position - left

    def not_right(self, position, key, right):
        return key <= position + right

    def scale(self, scale, q, v):
        return 1 / np.sqrt(q.shape[-1]) if scale is None else scale

    def scores(self, q, k, scale):
        return (q @ k.swapaxes(-1, -2)) * scale

    def terms(self, scores, seen, position, key, softcap, alibi_slopes, bias, mask):
        if softcap is not None:
            scores = self.cap(scores, softcap)
        if alibi_slopes is not None:
            scores = scores + self.alibi(alibi_slopes.astype(np.float64), position, key)
        if bias is not None:
            scores, seen = self.add_bias(scores, seen, bias.astype(np.float64))
        if mask is not None:
            seen = self.apply_mask(seen, mask)
        return scores, seen

    def flat(self, shape):
        return (int(np.prod(shape[:-3], dtype=int)), *shape[-3:])

    def in_blocks(self, block_mask):
        return block_mask.to_mask()

    def pairs(self, seen):
        return np.nonzero(seen.reshape(self.flat(seen.shape)))

    def modify(self, scores, seen, score_mod, aux):
        function = user_function("score_mod", score_mod, aux)
        pairs = self.pairs(seen)
        changed = scores.reshape(self.flat(seen.shape)).copy()
        changed[pairs] = evaluate(function, changed[pairs], *self.told(*pairs))
        changed = changed.reshape(scores.shape)
        return changed, self.left_by_mod(seen, changed)

    def told(self, batch, head, row, key):
        """What a score_mod is told of a pair."""
        return batch, head, row, key

    def left_by_mod(self, seen, scores):
        return seen & (scores != -np.inf)

    def cap(self, scores, softcap):
        return softcap * np.tanh(scores / softcap)

    def alibi(self, slopes, position, key):
        return -slopes[..., None, None] * np.abs(position - key)

    def add_bias(self, scores, seen, bias):
        return scores + bias, seen & (bias != -np.inf)

    def apply_mask(self, seen, mask):
        return seen & mask

    def keep(self, shape, dropout_p, seed):
        return keep_mask(shape, dropout_p, seed) if dropout_p else np.ones(shape, bool)

    def start(self, sink):
        """Maximum and row sum before the first key."""
        return sink.copy(), np.where(sink > -np.inf, 1.0, 0.0)

    def hide(self, scores, seen):
        return np.where(seen, scores, -np.inf)

    def blocks(self, keys):
        return [slice(i, min(i + self.block_k, keys)) for i in range(0, keys, self.block_k)]

    def exp(self, x):
        return np.exp(x)

    def row_max(self, old, scores):
        return np.maximum(old, scores.max(-1, initial=-np.inf))

    def shift(self, row_max):
        return np.where(np.isneginf(row_max), 0.0, row_max)

    def rescale(self, old, new):
        return np.where(np.isneginf(old), 0.0, self.exp(old - self.shift(new)))

    def rescale_acc(self, acc, factor):
        return acc * factor[..., None]

    def rescale_sum(self, row_sum, factor):
        return row_sum * factor

    def add_to_sum(self, row_sum, p):
        return row_sum + p.sum(-1)

    def weighted(self, p, used, v):
        """Sum of p * v over used entries: hidden ones are left out, not multiplied by 0."""
        finite = np.isfinite(v)
        total = p @ np.where(finite, v, 0.0)
        if not finite.all():
            for special in (np.nan, np.inf, -np.inf):
                same = np.isnan(v) if np.isnan(special) else v == special
                total += np.where(used.astype(float) @ same > 0, special, 0.0)
        return total

    def softmax_v(self, scores, seen, v, sink, keep, dropout_p):
        scores = self.hide(scores, seen)
        row_max, row_sum = self.start(sink)
        acc = np.zeros((*scores.shape[:-1], v.shape[-1]))
        # Sums of numbers at the end of float64's range are taken of small fractions of them.
        unit = 2.0**-40 if np.abs(np.nan_to_num(v)).max(initial=0.0) > 2.0**900 else 1.0
        for block in self.blocks(scores.shape[-1]):
            part = scores[..., block]
            new = self.row_max(row_max, part)
            p = self.exp(part - self.shift(new)[..., None])
            factor = self.rescale(row_max, new)
            row_sum = self.add_to_sum(self.rescale_sum(row_sum, factor), p)
            used = seen[..., block] & keep[..., block]
            p = self.drop(p, keep[..., block], dropout_p)
            acc = self.rescale_acc(acc, factor)
            acc = acc + self.weighted(p, used, v[..., block, :] * unit)
            row_max = new
        out = self.divide(acc, row_sum)
        out = np.where(np.isfinite(out), np.clip(out, -_TOP * unit, _TOP * unit), out) / unit
        return out, self.lse(row_sum, row_max)

    def drop(self, p, keep, dropout_p):
        return np.where(keep, p, 0.0) / (1 - dropout_p)

    def divide(self, acc, row_sum):
        return acc / np.where(row_sum == 0, 1.0, row_sum)[..., None]

    def lse(self, row_sum, row_max):
        return self.shift(row_max) + np.log(row_sum)


_TOP = np.finfo(np.float64).max


def plain_attention(q, k, v):
    """The few lines everybody writes, in float32: it promises nothing extra."""
    scores = q @ k.swapaxes(-1, -2) * np.float32(1 / np.sqrt(q.shape[-1]))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def plain_masked_attention(q, k, v, *, causal=False, mask=None, scale=None, return_lse=False):
    """The same with masks, an lse, and rows without keys."""
    scale = np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (q @ k.swapaxes(-1, -2)) * scale
    rows, keys = scores.shape[-2:]
    if causal:
        scores = np.where(np.tri(rows, keys, keys - rows, dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    row_max = scores.max(-1, keepdims=True)
    shift = np.where(np.isneginf(row_max), np.float32(0), row_max)
    weights = np.exp(scores - shift)
    row_sum = weights.sum(-1, keepdims=True)
    out = (weights @ v) / np.where(row_sum == 0, np.float32(1), row_sum)
    lse = (np.log(row_sum) + shift)[..., 0]
    return (out, lse) if return_lse else out
