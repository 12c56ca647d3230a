"""Planted mutants: attention functions with one mistake each, of the kinds the field has made."""

import itertools

import numpy as np
from kit_subject import Attention

from fusedattn.testing import EVERYTHING

MUTANTS = {}


def mutant(name=None, **options):
    """Register a mutant; options go to `Kernel`."""

    def register(cls):
        label = name or cls.__name__
        MUTANTS[label] = (cls, {"supports": EVERYTHING, **options})
        return cls

    return register


def replace(name, **methods):
    """Register a mutant that replaces methods of the subject."""
    mutant()(type(name, (Attention,), methods))


# Masks and positions.
replace("causal_hides_the_diagonal", causal=lambda self, p, j: j < p)
replace("causal_sees_one_ahead", causal=lambda self, p, j: j <= p + 1)
replace("causal_ignored", causal=lambda self, p, j: j == j)
replace("window_left_off_by_one", not_left=lambda self, p, j, n: j > p - n)
replace("window_left_one_more", not_left=lambda self, p, j, n: j >= p - n - 1)
replace("window_right_off_by_one", not_right=lambda self, p, j, n: j < p + n)
replace("window_right_ignored", not_right=lambda self, p, j, n: j == j)
replace(
    "window_ignores_the_offset",
    not_left=lambda self, p, j, n: j >= np.arange(p.shape[-2])[:, None] - n,
)
replace(
    "int32_positions_wrap",
    not_right=lambda self, p, j, n: j <= (p + n).astype(np.int32),
)
replace(
    "top_left_by_default",
    offset=lambda self, o, uq, uk, r, k, b: 0 * uq if o is None else self.per_item(o, 0, b),
)
replace(
    "default_offset_ignores_lengths",
    offset=lambda self, o, uq, uk, r, k, b: k - r + 0 * uq if o is None else self.per_item(o, 0, b),
)
replace(
    "offset_of_the_first_item",
    offset=lambda self, o, uq, uk, r, k, b: (
        uk - uq
        if o is None
        else np.ravel(self.per_item(o, 0, b))[:1].reshape((1,) * (len(b) + 3))
        if np.prod(b)
        else uk - uq
    ),
)
replace(
    "offset_sign",
    offset=lambda self, o, uq, uk, r, k, b: uk - uq if o is None else -self.per_item(o, 0, b),
)
replace("length_minus_one", in_lengths=lambda self, j, n: j < np.maximum(n - 1, np.minimum(n, 1)))
replace("length_plus_one", in_lengths=lambda self, j, n: j <= n)
replace("lengths_ignored", in_lengths=lambda self, j, n: (j >= 0) | (n < 0))
replace(
    "length_of_the_first_item",
    in_lengths=lambda self, j, n: j < (np.ravel(n)[0] if n.size else 0),
)


@mutant()
class WindowSidesSwapped(Attention):
    def in_window(self, position, key, causal, window_size):
        window = None if window_size is None else window_size[::-1]
        return super().in_window(position, key, causal, window)


@mutant()
class WindowOpensCausal(Attention):
    def in_window(self, position, key, causal, window_size):
        closed = window_size is None or window_size[1] is None
        return super().in_window(position, key, causal and closed, window_size)


@mutant()
class FiniteMask(Attention):
    value = -1e9

    def hide(self, scores, seen):
        return np.where(seen, scores, self.value)

    def shift(self, row_max):
        return row_max


@mutant()
class FiniteMaskOfFloat32(FiniteMask):
    value = float(np.finfo(np.float32).min)


@mutant()
class FiniteMaskButEmptyRowsZeroed(Attention):
    value = -1e4

    def hide(self, scores, seen):
        some = seen.any(-1, keepdims=True)
        return np.where(seen, scores, np.where(some, self.value, -np.inf))


@mutant()
class FiniteMaskOf1e30(FiniteMaskButEmptyRowsZeroed):
    value = -1e30


@mutant()
class FiniteBiasMeansHidden(Attention):
    def add_bias(self, scores, seen, bias):
        return scores + bias, seen & (bias > -1e4)


replace("mask_inverted", apply_mask=lambda self, seen, mask: seen & ~mask)
replace(
    "mask_of_the_first_head",
    apply_mask=lambda self, seen, mask: seen & (mask[..., :1, :, :] if mask.ndim > 2 else mask),
)
replace(
    "mask_of_the_first_row",
    apply_mask=lambda self, seen, mask: seen & (mask[..., :1, :] if mask.ndim > 1 else mask),
)


@mutant()
class BiasTransposedWhereItFits(Attention):
    def add_bias(self, scores, seen, bias):
        if bias.ndim > 1 and bias.shape[-1] == bias.shape[-2]:
            bias = bias.swapaxes(-1, -2)
        return super().add_bias(scores, seen, bias)


@mutant()
class BiasBroadcastOnTheWrongAxis(Attention):
    def add_bias(self, scores, seen, bias):
        if bias.ndim == 3 and scores.ndim == 4 and bias.shape[0] == scores.shape[0]:
            bias = bias[:, None]
        return super().add_bias(scores, seen, bias)


@mutant()
class BiasBeforeSoftcap(Attention):
    def terms(self, scores, seen, position, key, softcap, alibi_slopes, bias, mask):
        if bias is not None and softcap is not None:
            hidden = np.isneginf(bias.astype(np.float64))
            scores = scores + np.where(hidden, 0, bias.astype(np.float64))
            bias = np.where(hidden, -np.inf, 0.0)
        return super().terms(scores, seen, position, key, softcap, alibi_slopes, bias, mask)


@mutant()
class SoftcapAfterMask(Attention):
    def terms(self, scores, seen, position, key, softcap, alibi_slopes, bias, mask):
        scores, seen = super().terms(scores, seen, position, key, None, alibi_slopes, bias, mask)
        if softcap is not None:
            scores = softcap * np.tanh(np.where(seen, scores, -np.inf) / softcap)
            seen = seen | seen.any(-1, keepdims=True)
        return scores, seen


replace("softcap_ignored", cap=lambda self, s, c: s)
replace("softcap_without_division", cap=lambda self, s, c: c * np.tanh(s))
replace("softcap_clips", cap=lambda self, s, c: np.clip(s, -c, c))
replace(
    "bias_ignored_infinities", add_bias=lambda self, s, seen, b: (s + np.maximum(b, -1e5), seen)
)
replace("bias_twice", add_bias=lambda self, s, seen, b: (s + 2 * b, seen & (b != -np.inf)))
replace("alibi_sign", alibi=lambda self, m, p, j: m[..., None, None] * np.abs(p - j))
replace("alibi_not_absolute", alibi=lambda self, m, p, j: -m[..., None, None] * (p - j))
replace(
    "alibi_ignores_the_offset",
    alibi=lambda self, m, p, j: -m[..., None, None] * np.abs(np.arange(p.shape[-2])[:, None] - j),
)
replace(
    "alibi_of_the_first_item",
    alibi=lambda self, m, p, j: (
        -m.reshape(-1, m.shape[-1])[0][:, None, None] * np.abs(p - j)
        if m.size
        else Attention.alibi(self, m, p, j)
    ),
)
replace("alibi_slopes_reversed", alibi=lambda s, m, p, j: Attention.alibi(s, m[..., ::-1], p, j))

# Scale and scores.
replace("scale_ignored", scale=lambda self, s, q, v: q.shape[-1] ** -0.5)
replace("scale_default_is_one", scale=lambda self, s, q, v: 1.0 if s is None else s)
replace("scale_zero_is_default", scale=lambda self, s, q, v: s or q.shape[-1] ** -0.5)
replace("scale_of_head_dim_v", scale=lambda self, s, q, v: v.shape[-1] ** -0.5 if s is None else s)
replace("scale_twice", scores=lambda self, q, k, s: (q * s @ k.swapaxes(-1, -2)) * s)
replace("scale_absolute", scores=lambda self, q, k, s: Attention.scores(self, q, k, abs(s)))
replace(
    "scale_of_padded_head_dim",
    scale=lambda self, s, q, v: (-(-q.shape[-1] // 8) * 8) ** -0.5 if s is None else s,
)
replace(
    "last_dim_dropped",
    scores=lambda self, q, k, s: Attention.scores(
        self, q[..., : max(1, q.shape[-1] // 4 * 4)], k[..., : max(1, q.shape[-1] // 4 * 4)], s
    ),
)
replace("scores_clipped", scores=lambda s, q, k, c: np.clip(Attention.scores(s, q, k, c), -50, 50))
replace(
    "scores_in_half",
    scores=lambda self, q, k, s: Attention.scores(self, q, k, s).astype(np.float16).astype(float),
)
replace(
    "scores_in_tf32",
    scores=lambda self, q, k, s: Attention.scores(
        self,
        *(
            (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000))
            .view(np.float32)
            .astype(float)
            for x in (q, k)
        ),
        s,
    ),
)
replace(
    "gqa_by_remainder",
    repeat=lambda self, x, heads: (
        np.concatenate([x] * (heads // x.shape[-3]), -3) if x.shape[-3] else x
    ),
)


@mutant()
class QueryHeadReadsItsOwnKeyHead(Attention):
    calls = 0

    def repeat(self, x, heads):
        self.calls += 1
        if x.shape[-3] and self.calls % 2 == 1:  # of K only
            return np.concatenate([x] * (heads // x.shape[-3]), -3)
        return super().repeat(x, heads)


# Softmax.
replace("no_maximum", row_max=lambda self, old, s: np.zeros_like(old))
replace(
    "maximum_of_last_block",
    row_max=lambda self, old, s: np.where(np.isneginf(s.max(-1)), old, s.max(-1)),
)
replace("maximum_not_carried", rescale=lambda self, old, new: np.where(np.isneginf(old), 0.0, 1.0))
replace("acc_not_rescaled", rescale_acc=lambda self, acc, f: acc)
replace("sum_not_rescaled", rescale_sum=lambda self, total, f: total)
replace("leading_empty_block", shift=lambda self, m: m)
replace(
    "row_sum_starts_at_one",
    start=lambda self, sink: (sink.copy(), np.where(sink > -np.inf, 2.0, 1.0)),
)
replace(
    "sum_of_all_but_the_last",
    add_to_sum=lambda self, t, p: t + p[..., :-1].sum(-1) + (p[..., -1] if p.shape[-1] < 2 else 0),
)
replace(
    "last_partial_block_dropped",
    blocks=lambda self, n: [slice(i, i + 16) for i in range(0, n - 15, 16)] or [slice(0, n)],
)
replace(
    "last_key_dropped_past_a_block",
    blocks=lambda self, n: [slice(i, min(i + 128, n)) for i in range(0, n - (n > 128), 128)],
)
replace(
    "blocks_overlap",
    blocks=lambda self, n: [slice(max(0, i - (i > 0)), min(i + 64, n)) for i in range(0, n, 64)],
)
replace("weights_below_1e_4_dropped", exp=lambda self, x: np.where(x < -9.2, 0.0, np.exp(x)))
replace(
    "exponent_clamped",
    exp=lambda self, x: np.where(np.isneginf(x), 0.0, np.exp(np.maximum(x, -20.0))),
)
replace("exp_of_low_degree", exp=lambda self, x: np.exp(x) * (1 + 1e-5 * np.sin(3 * x)))
replace("log2e_rounded", exp=lambda self, x: np.exp2(1.4427 * x))
replace(
    "weights_in_half",
    drop=lambda self, p, keep, rate: (
        Attention.drop(self, p, keep, rate).astype(np.float16).astype(float)
    ),
)
replace("denominator_with_epsilon", divide=lambda self, acc, s: acc / (s + 1e-5)[..., None])
replace("empty_rows_divide_by_zero", divide=lambda self, acc, s: acc / s[..., None])
replace(
    "mean_of_v_in_empty_rows",
    divide=lambda self, acc, s: np.where((s == 0)[..., None], 1.0, Attention.divide(self, acc, s)),
)
replace("nan_to_zero", divide=lambda self, acc, s: np.nan_to_num(Attention.divide(self, acc, s)))
replace(
    "nan_score_skipped",
    row_max=lambda self, old, s: np.fmax(old, np.fmax.reduce(s, -1, initial=-np.inf)),
    exp=lambda self, x: np.nan_to_num(np.exp(x)),
)

# Sinks, lse, dropout.
replace("sink_ignored", start=lambda self, sink: (np.full_like(sink, -np.inf), np.zeros_like(sink)))


@mutant(name="sink_missing_in_lse")
class SinkMissingInLse(Attention):
    def start(self, sink):
        self.sink = sink
        return super().start(sink)

    def lse(self, row_sum, row_max):
        return super().lse(row_sum - np.exp(self.sink - self.shift(row_max)), row_max)


@mutant()
class SinkTakesThePlaceOfAKey(Attention):
    def start(self, sink):
        row_max, row_sum = super().start(sink)
        return row_max, 2 * row_sum


@mutant()
class SinkWhereNothingIsSeen(Attention):
    def lse(self, row_sum, row_max):
        lse = super().lse(row_sum, row_max)
        return np.where(row_sum == 0, 0.0, lse)


@mutant()
class SinkOfTheKvHead(Attention):
    def __call__(self, q, k, v, *, sinks=None, **keywords):
        bshd = keywords.get("layout") == "bshd"
        if sinks is not None and sinks.size:
            group = sinks.size // k.shape[-2 if bshd else -3]
            sinks = sinks[np.arange(sinks.size) // group]
        return super().__call__(q, k, v, sinks=sinks, **keywords)


replace("lse_in_base_2", lse=lambda self, total, m: Attention.lse(self, total, m) * np.log2(np.e))
replace("lse_without_maximum", lse=lambda self, total, m: np.log(total))
replace("lse_with_epsilon", lse=lambda self, total, m: self.shift(m) + np.log(total + 1e-6))
replace(
    "lse_of_empty_rows_zero",
    lse=lambda self, total, m: np.where(total == 0, 0.0, Attention.lse(self, total, m)),
)
replace(
    "lse_in_half",
    lse=lambda self, total, m: Attention.lse(self, total, m).astype(np.float16).astype(float),
)
replace("dropout_not_scaled", drop=lambda self, p, keep, rate: np.where(keep, p, 0.0))
replace("dropout_ignored", keep=lambda self, shape, rate, seed: np.ones(shape, bool))
replace(
    "dropout_inverted",
    keep=lambda self, shape, rate, seed: (
        ~Attention.keep(self, shape, rate, seed) if rate else np.ones(shape, bool)
    ),
)
replace(
    "dropout_of_low_seed",
    keep=lambda self, shape, rate, seed: Attention.keep(
        self, shape, rate, (seed or 0) & 0xFFFFFFFF
    ),
)
replace(
    "dropout_same_for_all_heads",
    keep=lambda self, shape, rate, seed: np.broadcast_to(
        Attention.keep(self, (*shape[:-3], 1, *shape[-2:]), rate, seed), shape
    ),
)


@mutant()
class DropoutBeforeNormalising(Attention):
    def softmax_v(self, scores, seen, v, sink, keep, dropout_p):
        return super().softmax_v(scores, seen & keep, v, sink, keep, 0.0)


# Types.
@mutant(dtypes=("float32", "float16"))
class OutputThroughHalf(Attention):
    def store(self, x, dtype):
        return x.astype(np.float16).astype(dtype)


@mutant(dtypes=("float16",))
class PartialsRoundedFirst(Attention):
    def store(self, x, dtype):
        return x.astype(np.float16).astype(dtype) if dtype == np.float32 else x.astype(dtype)


@mutant(dtypes=("float16",))
class HalfAccumulation(Attention):
    def scores(self, q, k, scale):
        total = np.zeros((*q.shape[:-1], k.shape[-2]), np.float16)
        for d in range(q.shape[-1]):
            step = q[..., :, None, d] * k[..., None, :, d]
            total = (total + step.astype(np.float16)).astype(np.float16)
        return total.astype(float) * scale


@mutant()
class WrongOutputType(Attention):
    def store(self, x, dtype):
        return x


@mutant(dtypes=("float16",))
class LseInInputType(Attention):
    def __call__(self, q, *arguments, return_lse=False, **keywords):
        result = super().__call__(q, *arguments, return_lse=return_lse, **keywords)
        return (result[0], result[1].astype(q.dtype)) if return_lse else result


# Values that are no reason for anything.
replace(
    "zero_keys_are_padding",
    scores=lambda self, q, k, s: np.where(
        (k == 0).all(-1)[..., None, :], -np.inf, Attention.scores(self, q, k, s)
    ),
)
replace("zero_scores_are_hidden", hide=lambda self, s, seen: np.where(seen & (s != 0), s, -np.inf))
replace(
    "ties_keep_the_first",
    exp=lambda self, x: (
        np.where((x == 0) & (np.cumsum(x == 0, -1) > 1), 0.0, np.exp(x))
        if x.ndim > 2
        else np.exp(x)
    ),
)
replace(
    "subnormals_flushed",
    load=lambda self, x: np.where(np.abs(x.astype(float)) < 1e-6, 0, x.astype(float)),
)
replace("values_clipped", load=lambda self, x: np.clip(x.astype(float), -6e4, 6e4))


# Memory and state.
@mutant()
class InputOverwritten(Attention):
    def __call__(self, q, k, v, **keywords):
        result = super().__call__(q, k, v, **keywords)
        q *= np.asarray(0.5, q.dtype)
        return result


@mutant()
class MaskOverwritten(Attention):
    def apply_mask(self, seen, mask):
        result = seen & mask
        if mask.flags.writeable and mask.size:
            mask.flat[0] = not mask.flat[0]
        return result


@mutant()
class WrittenPastTheEnd(Attention):
    def __call__(self, q, k, v, *, out=None, **keywords):
        result = super().__call__(q, k, v, out=out, **keywords)
        if out is not None and out.flags.c_contiguous and out.size:
            past = np.lib.stride_tricks.as_strided(
                out.reshape(-1), (out.size + 1,), (out.itemsize,)
            )
            past[-1] = 0
        return result


@mutant()
class ReadsPastTheEnd(Attention):
    def load(self, x):
        wide = super().load(x)
        if x.flags.c_contiguous and x.size and x.shape[-1] % 4:
            flat = np.lib.stride_tricks.as_strided(x, (x.size + 1,), (x.itemsize,))
            wide = wide + 0.0 * float(flat[-1])
        return wide


@mutant()
class EmptyRowsLeftUnwritten(Attention):
    def __call__(self, q, k, v, *, out=None, **keywords):
        if out is None:
            return super().__call__(q, k, v, **keywords)
        result = super().__call__(q, k, v, **keywords)
        new = result[0] if isinstance(result, tuple) else result
        rows = np.any(new != 0, -1)
        out[rows] = new[rows]
        return (out, result[1]) if isinstance(result, tuple) else out


@mutant()
class OutIgnored(Attention):
    def __call__(self, q, k, v, *, out=None, **keywords):
        return super().__call__(q, k, v, **keywords)


@mutant()
class ReturnsTheSameBuffer(Attention):
    def __init__(self):
        self.buffers = {}

    def __call__(self, q, k, v, *, out=None, **keywords):
        result = super().__call__(q, k, v, out=out, **keywords)
        if out is not None:
            return result
        new = result[0] if isinstance(result, tuple) else result
        held = self.buffers.setdefault((new.shape, new.dtype), np.empty_like(new))
        held[...] = new
        return (held, result[1]) if isinstance(result, tuple) else held


@mutant()
class StaleLse(Attention):
    last = None

    def lse(self, row_sum, row_max):
        new = super().lse(row_sum, row_max)
        old, self.last = self.last, new
        return old if old is not None and old.shape == new.shape else new


@mutant()
class CachedByShape(Attention):
    def __init__(self):
        self.cache = {}

    def scale(self, scale, q, v):
        return self.cache.setdefault((q.shape, v.shape), super().scale(scale, q, v))


@mutant()
class RacesNowAndThen(Attention):
    turns = itertools.count()

    def divide(self, acc, row_sum):
        # One unit in the last place of a float32, every eleventh call.
        out = super().divide(acc, row_sum)
        return out * (1 + 2.0**-23) if next(self.turns) % 11 == 0 else out


@mutant(bitwise=True)
class BatchChangesTheBits(Attention):
    def divide(self, acc, row_sum):
        out = super().divide(acc, row_sum)
        return out * (1 + 2.0**-23) if out.ndim > 3 and out.shape[0] > 2 else out


@mutant()
class BatchStrideZero(Attention):
    def load(self, x):
        wide = super().load(x)
        return wide if x.ndim < 4 or not x.size else np.broadcast_to(wide[:1], wide.shape)


@mutant()
class StridesIgnored(Attention):
    def load(self, x):
        if x.ndim and x.size and x.strides[-1] < 0:
            x = x[..., ::-1]
        return super().load(x)


@mutant()
class Int32Strides(Attention):
    def load(self, x):
        strides = tuple(
            int(np.int64(s // x.itemsize).astype(np.int32)) * x.itemsize for s in x.strides
        )
        if strides != x.strides:
            x = np.lib.stride_tricks.as_strided(x, x.shape, strides)
        return super().load(x)


@mutant()
class LayoutIgnoredWhereSquare(Attention):
    def __call__(self, q, k, v, *, layout="bhsd", **keywords):
        if layout == "bshd" and q.shape == k.shape == v.shape and q.shape[-2] == q.shape[-3]:
            layout = "bhsd"
        return super().__call__(q, k, v, layout=layout, **keywords)


replace("hidden_nan_leaks", weighted=lambda self, p, used, v: p @ v)


@mutant()
class HiddenByAddition(Attention):
    def hide(self, scores, seen):
        return scores + np.where(seen, 0.0, -np.inf)


@mutant()
class DecodeIgnoresTheMask(Attention):
    def apply_mask(self, seen, mask):
        return seen if seen.shape[-2] == 1 and seen.shape[-1] > 4 else seen & mask


@mutant()
class SharedScratch(Attention):
    """Calls at the same time write to the same place."""

    scratch = None

    def scores(self, q, k, scale):
        import time

        self.scratch = super().scores(q, k, scale)
        time.sleep(0.001)
        mine = self.scratch
        return mine if mine.shape == (*q.shape[:-1], k.shape[-2]) else super().scores(q, k, scale)


@mutant(supports=EVERYTHING - {"softcap", "window_size"})
class KeywordIgnored(Attention):
    def __call__(self, q, k, v, *, softcap=None, window_size=None, **keywords):
        return super().__call__(q, k, v, **keywords)


@mutant()
class RaisesOnEmptyKeys(Attention):
    def __call__(self, q, k, v, **keywords):
        if k.size == 0:
            raise ValueError("zero-size array to reduction operation maximum")
        return super().__call__(q, k, v, **keywords)


@mutant(supports=EVERYTHING - {"full_range", "hidden_nan", "unseen_nan"})
class OverflowsInFloat32(Attention):
    def scores(self, q, k, scale):
        with np.errstate(over="ignore"):
            return super().scores(q, k, scale).astype(np.float32).astype(float) * 1.0

    def exp(self, x):
        with np.errstate(over="ignore"):
            return np.exp(x.astype(np.float32) + np.float32(80)).astype(float) * np.exp(-80.0)


# Functions of the caller's.
replace("score_mod_last", late=True)
replace("score_mod_hides_nothing", left_by_mod=lambda self, seen, scores: seen)
replace("score_mod_of_the_first_item", told=lambda self, b, h, i, j: (0 * b, h, i, j))
replace("score_mod_of_the_first_head", told=lambda self, b, h, i, j: (b, 0 * h, i, j))
replace("score_mod_with_axes_swapped", told=lambda self, b, h, i, j: (h, b, i, j))
replace("partial_blocks_are_full", in_blocks=lambda self, mask: by_blocks(mask, (1, 2)))
replace("partial_blocks_are_empty", in_blocks=lambda self, mask: by_blocks(mask, (1,)))
replace("block_mask_ignored", in_blocks=lambda self, mask: np.ones((1, 1, 1, 1), bool))


def by_blocks(mask, kinds):
    """Whole blocks of some kinds, whatever their function says."""
    shown = np.isin(mask.kinds, kinds)
    shown = shown.repeat(mask.block[0], 2).repeat(mask.block[1], 3)
    return shown[:, :, : mask.seqlen_q, : mask.seqlen_k]


def table():
    """Markdown table: the law that kills each mutant, and how many calls that took."""
    from kit_kills import KILLED_BY

    from fusedattn.testing import Kernel
    from fusedattn.testing.check import select_laws, try_law

    print("| mutant | killed by | calls |\n|---|---|---|")
    for name, killer in KILLED_BY.items():
        factory, options = MUTANTS[name]
        options = {**options, "supports": frozenset(options["supports"])}
        law = next(law for law in select_laws(None) if law.name == killer)
        outcome = try_law(law, Kernel(factory(), **options), 100, 0, shrink=False)
        calls = outcome.examples if outcome.status == "failed" else "not within 100"
        print(f"| {name} | {law.name} | {calls} |")


if __name__ == "__main__":
    table()
