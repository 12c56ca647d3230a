"""What is measured: named shapes, each with the model or paper it comes from."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import fusedattn
from fusedattn.problem import AttentionProblem

Array = NDArray[Any]
Bool = NDArray[np.bool_]

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

WINDOW = 1024


class Inputs(NamedTuple):
    """The arrays of a case, in the axis order (batch, heads, seqlen, head_dim)."""

    q: Array
    k: Array
    v: Array
    mask: Bool | None  # (seqlen_q, seqlen_k)
    bias: Array | None  # (1, heads, seqlen_q, seqlen_k), of q's dtype


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; queries stand at the end of the keys that count."""

    group: str
    shape: str  # as a name: BATCH,HEADS[-HEADS_KV],SEQLEN,HEAD_DIM
    variant: str
    source: str
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    window_size: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None  # keys that count, for each item of the batch
    operand: str = ""  # "mask", "bias" or none
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For `select` and the tables."""
        return f"{self.group}/{self.shape}/{self.variant}/{self.dtype}"

    @property
    def is_gradient(self) -> bool:
        """Whether the gradients of q, k and v are computed, from the output as it was."""
        return self.group == "backward"

    @property
    def bound_by_memory(self) -> bool:
        """Whether reading keys and values, not arithmetic, is what takes the time."""
        return self.group == "decode"

    def inputs(self) -> Inputs:
        """Draw N(0, 1): the same numbers in every process."""
        rng = np.random.default_rng(0)
        dtype = DTYPES[self.dtype]

        def draw(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32).astype(dtype, copy=False)

        q = draw(self.batch, self.heads, self.seqlen_q, self.head_dim)
        k, v = (draw(self.batch, self.heads_kv, self.seqlen_k, self.head_dim) for _ in range(2))
        scores = (self.seqlen_q, self.seqlen_k)
        mask = rng.random(scores, np.float32) < 0.5 if self.operand == "mask" else None
        bias = draw(1, self.heads, *scores) if self.operand == "bias" else None
        return Inputs(q, k, v, mask, bias)

    def d_out(self) -> Array:
        """Draw the gradient that comes back through the output."""
        shape = (self.batch, self.heads, self.seqlen_q, self.head_dim)
        return (
            np.random.default_rng(1)
            .standard_normal(shape, np.float32)
            .astype(DTYPES[self.dtype], copy=False)
        )

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """Return the keywords of `fusedattn.attention`."""
        lengths = None if self.lengths is None else np.array(self.lengths)
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "seqused_k": lengths,
            "mask": inputs.mask,
            "bias": inputs.bias,
        }

    def visible(self, rows: NDArray[np.int64], mask: Bool | None) -> Bool | None:
        """Return which keys some rows see, (batch or 1, 1, rows, seqlen_k); None for all of them.

        This is what the reference and the libraries without such an option are given.
        """
        if not self.causal and self.window_size is None and self.lengths is None and mask is None:
            return None
        keys = np.arange(self.seqlen_k)
        lengths = np.array(self.lengths or [self.seqlen_k])[:, None, None, None]
        position = rows[:, None] + lengths - self.seqlen_q
        seen = np.broadcast_to(keys < lengths, (len(lengths), 1, len(rows), self.seqlen_k))
        if self.causal:
            seen = seen & (keys <= position)
        if self.window_size is not None:
            left, right = self.window_size
            seen = seen & (keys >= position - left) & (keys <= position + right)
        return seen if mask is None else seen & mask[rows]

    @functools.cached_property
    def problem(self) -> AttentionProblem:
        """The problem with arrays of the right shapes that take no memory."""
        dtype = DTYPES[self.dtype]
        q, k, v = (
            np.broadcast_to(np.zeros((), dtype), (self.batch, heads, seqlen, self.head_dim))
            for heads, seqlen in [(self.heads, self.seqlen_q)]
            + 2 * [(self.heads_kv, self.seqlen_k)]
        )
        options = self.options(Inputs(q, k, v, None, None))
        return fusedattn.make_problem(q, k, v, **options)

    @property
    def flops(self) -> int:
        """Operations of both products over the keys that causal, window and lengths leave.

        Of the five products of the gradients, two and a half times as many.
        """
        return self.problem.flops * 5 // 2 if self.is_gradient else self.problem.flops

    @property
    def bytes_moved(self) -> int:
        """Bytes that must be read or written once: keys and values that count, queries, output."""
        keys = sum(self.lengths) if self.lengths else self.batch * self.seqlen_k
        queries = self.batch * self.seqlen_q * self.heads
        elements = 2 * self.head_dim * (keys * self.heads_kv + queries)
        size: int = np.dtype(DTYPES[self.dtype]).itemsize
        return elements * size


def _mixed_lengths(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths spread evenly over the octaves from low to high, in an order without pattern."""
    spread = np.geomspace(low, high, count).astype(int)
    return tuple(int(n) for n in np.random.default_rng(0).permutation(spread))


Sizes = tuple[int, int, int, int, int]

TRANSFORMER = "Transformer base, 8 heads of 64 (arXiv:1706.03762, table 3)"
BERT = "BERT base, 12 heads of 64 (arXiv:1810.04805, section 3)"
LLAMA = "Llama 3 8B, 32 heads of 128 over 8 KV heads (arXiv:2407.21783, table 3)"
FLASH = "FlashAttention-2's benchmark, hidden dim 2048 (arXiv:2307.08691, section 4.1)"
GEMMA = "Gemma 3's local layers, 1024 keys back (arXiv:2503.19786, section 2)"
LONGFORMER = "Longformer, a window to both sides (arXiv:2004.05150, section 3.1)"
T5 = "T5 small, 8 heads of 64, relative position bias (arXiv:1910.10683, section 2.1)"

# (BATCH, HEADS, HEADS_KV, SEQLEN, HEAD_DIM) and where they come from.
PREFILL = [
    ((1, 8, 8, 512, 64), f"{TRANSFORMER}, 512 tokens"),
    ((1, 8, 8, 2048, 64), f"{TRANSFORMER}, 2048 tokens"),
    ((1, 16, 16, 4096, 128), f"{FLASH}, head dim 128, 4096 tokens"),
    ((1, 8, 8, 8192, 64), f"{TRANSFORMER}, 8192 tokens"),
    ((1, 32, 8, 2048, 128), f"{LLAMA}, 2048 tokens"),
    ((8, 12, 12, 128, 64), f"{BERT}, 8 texts of 128 tokens"),
    ((1, 12, 12, 64, 64), f"{BERT}, a short text"),
]
BACKWARD = [
    ((1, 8, 8, 2048, 64), f"{TRANSFORMER}, 2048 tokens"),
    ((1, 16, 16, 2048, 128), f"{FLASH}, head dim 128, 2048 tokens"),
    ((8, 12, 12, 128, 64), f"{BERT}, 8 texts of 128 tokens"),
]
# With those of PREFILL that have the same heads: time against length.
LENGTHS = (1024, 4096, 16384)
DECODE_LENGTHS = (4096, 32768)


def _heads(heads: int, heads_kv: int) -> str:
    return f"{heads}" if heads == heads_kv else f"{heads}-{heads_kv}"


def _square(
    group: str,
    variant: str,
    sizes: Sizes,
    source: str,
    **options: Any,
) -> Case:
    batch, heads, heads_kv, seqlen, head_dim = sizes
    shape = f"{batch},{_heads(heads, heads_kv)},{seqlen},{head_dim}"
    numbers = (batch, heads, heads_kv, seqlen, seqlen, head_dim)
    return Case(group, shape, variant, source, *numbers, **options)


def _decode(heads: int, seqlen_k: int, seqlen_q: int) -> Case:
    source = LLAMA if heads == 32 else f"{LLAMA}, its cache without grouping"
    shape = f"1,{_heads(heads, 8)},{seqlen_k},128"
    numbers = (1, heads, 8, seqlen_q, seqlen_k, 128)
    return Case("decode", shape, f"q{seqlen_q}", source, *numbers, causal=seqlen_q > 1)


def _float32() -> Iterable[Case]:
    for sizes, source in PREFILL:
        for causal in (False, True):
            variant = "causal" if causal else "full"
            yield _square("prefill", variant, sizes, source, causal=causal)
    at_8192, at_2048 = (1, 8, 8, 8192, 64), (1, 8, 8, 2048, 64)
    back, around = (WINDOW - 1, 0), (WINDOW // 2, WINDOW // 2 - 1)
    yield _square("window", "back", at_8192, GEMMA, causal=True, window_size=back)
    yield _square("window", "around", at_8192, LONGFORMER, window_size=around)
    yield _square("mask", "dense", at_2048, f"{TRANSFORMER}, half of all pairs", operand="mask")
    yield _square("mask", "lengths", at_2048, f"{TRANSFORMER}, a quarter padding", lengths=(1536,))
    yield _square("mask", "bias", at_2048, T5, operand="bias")
    for heads in (32, 8):
        for seqlen_k in DECODE_LENGTHS:
            for seqlen_q in (1, 4):
                yield _decode(heads, seqlen_k, seqlen_q)
    lengths = _mixed_lengths(32, 64, 2048)
    source = f"{LLAMA}, 32 texts of 64 to 2048 tokens"
    numbers = (32, 32, 8, 1, 2048, 128)
    yield Case("decode", "32,32-8,mixed,128", "q1", source, *numbers, lengths=lengths)
    yield _square("tiny", "full", (1, 1, 1, 16, 64), "the smallest call: all of it is overhead")


def all_cases() -> list[Case]:
    """Return every case in every dtype; gradients, and lengths for a picture, in float32 alone."""
    every = [dataclasses.replace(case, dtype=dtype) for dtype in DTYPES for case in _float32()]
    for sizes, source in BACKWARD:
        for causal in (False, True):
            variant = "causal" if causal else "full"
            every.append(_square("backward", variant, sizes, source, causal=causal))
    for seqlen in LENGTHS:
        source = f"{TRANSFORMER}, {seqlen} tokens"
        every.append(_square("length", "full", (1, 8, 8, seqlen, 64), source))
    return every


# One of each kind that takes no more than seconds.
QUICK = (
    "prefill/1,8,512,64/*/float32",
    "prefill/8,12,128,64/full/*",
    "mask/*/lengths/float32",
    "decode/1,32-8,4096,128/q1/*",
    "tiny/*/float32",
)


def select(cases: Iterable[Case], patterns: Iterable[str]) -> list[Case]:
    """Return the cases whose name holds any of the patterns, in which ``*`` is any text."""
    wanted = [f"*{pattern}*" for pattern in patterns] or ["*"]
    return [c for c in cases if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in wanted)]
