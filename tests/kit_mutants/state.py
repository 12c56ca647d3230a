"""Mistakes in the use of memory, and what a call keeps from another."""

import itertools

import numpy as np
from kit_subject import Attention

from fusedattn.testing import EVERYTHING
from kit_mutants.registry import mutant, replace


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
