"""Mistakes in the arithmetic: products, softmax, sinks, lse, dropout, types, values."""

import numpy as np
from kit_subject import Attention

from kit_mutants.registry import mutant, replace

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
