"""Mistakes in what a row sees and what is added to its scores."""

import numpy as np
from kit_subject import Attention

from kit_mutants.registry import mutant, replace

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
