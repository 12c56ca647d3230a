"""One attention call, checked and resolved: the only thing that a backend is given."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn import checks, operands
from fusedattn.block_mask import BlockMask
from fusedattn.checks import Array
from fusedattn.functions import UserFunction, aux_arrays, user_function
from fusedattn.masks import MAX_SEQLEN, UNBOUNDED, KeyRange, relative_bounds, visible_pairs


class Result(NamedTuple):
    """What a backend returns, in canonical axis order."""

    out: Array
    lse: Array | None


class Gradients(NamedTuple):
    """Gradients of the operands that were given; None for one that was not."""

    d_q: Array
    d_k: Array
    d_v: Array
    d_bias: Array | None
    d_sinks: Array | None
    d_score_mod_aux: tuple[Array | None, ...] | None = None


class Lengths(NamedTuple):
    """One int64 per batch item of each, flat in C order."""

    q_offset: NDArray[np.int64]
    seqused_q: NDArray[np.int64]
    seqused_k: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionProblem:
    """A validated attention call. Arrays are views of the caller's, never copies.

    The axis order is ``(*batch_shape, heads, seqlen, dim)`` whatever the caller's layout. Per-item
    integers are flat int64 arrays of length ``batch_size``, in C order over ``batch_shape``.
    """

    q: Array
    k: Array
    v: Array
    out: Array | None  # the caller's `out`, or None
    scale: float  # resolved: 1 / sqrt(head_dim) when None was given
    causal: bool
    window_size: tuple[int | None, int | None]  # sides clamped to 2**31
    q_offset: NDArray[np.int64]
    seqused_q: NDArray[np.int64]
    seqused_k: NDArray[np.int64]
    mask: Array | None  # bool, (*batch_shape, heads, seqlen_q, seqlen_k), stride 0 where broadcast
    bias: Array | None  # any float dtype, shaped as mask
    bias_shape: tuple[int, ...] | None  # as the caller gave it: the shape of its gradient
    alibi_slopes: Array | None  # any float dtype, (*batch_shape, heads)
    softcap: float | None
    sinks: Array | None  # any float dtype, (heads,)
    score_mod: UserFunction | None  # with its aux arrays
    score_mod_grad: UserFunction | None  # its derivative by the score; for gradients
    block_mask: BlockMask | None  # of 1 or batch_size items, of 1 or num_heads heads
    dropout_p: float
    seed: int
    layout: str
    return_lse: bool
    out_dtype: np.dtype[Any]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of q, k and v."""
        return self.q.shape[:-3]

    @property
    def batch_size(self) -> int:
        """Product of the leading axes; 1 without any."""
        size: int = self.q_offset.shape[0]
        return size

    @property
    def num_heads(self) -> int:
        """Heads of q and of the output."""
        size: int = self.q.shape[-3]
        return size

    @property
    def num_heads_kv(self) -> int:
        """Heads of k and v; each serves `group_size` query heads."""
        size: int = self.k.shape[-3]
        return size

    @property
    def group_size(self) -> int:
        """Query head ``h`` reads KV head ``h // group_size``; 1 where there are no heads."""
        return self.q.shape[-3] // self.k.shape[-3] if self.k.shape[-3] else 1

    @property
    def seqlen_q(self) -> int:
        """Rows of q, before `seqused_q`."""
        size: int = self.q.shape[-2]
        return size

    @property
    def seqlen_k(self) -> int:
        """Rows of k and v, before `seqused_k`."""
        size: int = self.k.shape[-2]
        return size

    @property
    def head_dim(self) -> int:
        """Last axis of q and k."""
        size: int = self.q.shape[-1]
        return size

    @property
    def head_dim_v(self) -> int:
        """Last axis of v and of the output."""
        size: int = self.v.shape[-1]
        return size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Storage type of q, k and v."""
        return self.q.dtype

    @property
    def accumulator(self) -> np.dtype[Any]:
        """Type of scores, sums and lse: float64 for float64 inputs, float32 for all others."""
        return checks.ACCUMULATOR[self.q.dtype]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output in canonical axis order."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape ``(*batch_shape, heads, seqlen_q)``."""
        return self.q.shape[:-1]

    @property
    def key_bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(k_from, k_to)`` per batch item, see `fusedattn.masks.relative_bounds`."""
        # The scalar formula, on all batch items at once.
        k_from, k_to = relative_bounds(self.causal, self.window_size, 0)
        return self.q_offset + k_from, self.q_offset + k_to

    def key_range(self, batch: int) -> KeyRange:
        """Intervals of the keys that the rows of one (flat) batch item see."""
        k_from, k_to = relative_bounds(self.causal, self.window_size, int(self.q_offset[batch]))
        return KeyRange(k_from, k_to, int(self.seqused_q[batch]), int(self.seqused_k[batch]))

    @property
    def flops(self) -> int:
        """Floating-point operations of both products over the visible key intervals."""
        pairs = int(visible_pairs(*self.key_bounds, self.seqused_q, self.seqused_k).sum())
        return 2 * (self.head_dim + self.head_dim_v) * self.num_heads * pairs

    @property
    def bytes_moved(self) -> int:
        """Bytes that must be read or written once: inputs without their broadcast axes, outputs."""
        inputs = (self.q, self.k, self.v, self.mask, self.bias, self.alibi_slopes, self.sinks)
        total = math.prod(self.out_shape) * self.out_dtype.itemsize
        if self.return_lse:
            total += math.prod(self.lse_shape) * self.accumulator.itemsize
        for array in inputs:
            if array is not None:
                stored = (n for n, step in zip(array.shape, array.strides, strict=True) if step)
                total += math.prod(stored) * array.itemsize if array.size else 0
        return total

    def empty_out(self) -> Array:
        """Memory for the output: canonical axis order, contiguous in the caller's layout."""
        if self.layout == "bhsd":
            return np.empty(self.out_shape, self.out_dtype)
        *leading, heads, rows, dim = self.out_shape
        return np.empty((*leading, rows, heads, dim), self.out_dtype).swapaxes(-3, -2)

    def restore(self, array: Array) -> Array:
        """View a canonical array with heads and sequence axes in the caller's layout."""
        return array.swapaxes(-3, -2) if self.layout == "bshd" else array


def make_problem(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    q_offset: int | Array | None = None,
    seqused_q: int | Array | None = None,
    seqused_k: int | Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_aux: tuple[Array, ...] = (),
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    out: Array | None = None,
    out_dtype: Any = None,
) -> AttentionProblem:
    """Check the arguments of `fusedattn.attention` and resolve their defaults.

    Every check of the library happens here, before any work. See `fusedattn.attention` for the
    meaning of the arguments.

    Returns
    -------
    AttentionProblem
        Canonical views and resolved scalars.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it is and what was expected.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.zeros((2, 8, 10, 64), np.float32), np.zeros((2, 4, 16, 64), np.float32)
    >>> problem = make_problem(q, k, k, causal=True)
    >>> problem.scale, problem.group_size, problem.q_offset.tolist()
    (0.125, 2, [6, 6])
    >>> make_problem(q, k, k, window_size=128)
    Traceback (most recent call last):
    TypeError: window_size must be a pair (left, right), each None (open) or an int >= 0, ...
    """
    q, k, v = operands.canonical(q, k, v, layout)
    dtype = q.dtype
    accumulator = checks.ACCUMULATOR[dtype]
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    batch = (q.shape[:-3], math.prod(q.shape[:-3]))

    lengths = make_lengths(q_offset, seqused_q, seqused_k, seqlen_q, seqlen_k, batch)

    bias_shape = None
    scores_shape = (*q.shape[:-1], seqlen_k)
    if mask is not None:
        mask = operands.mask(mask, scores_shape)
    if bias is not None:
        bias, bias_shape = operands.bias(bias, scores_shape)
    if alibi_slopes is not None:
        alibi_slopes = operands.alibi_slopes(alibi_slopes, q.shape[:-2])
    if sinks is not None:
        sinks = operands.sinks(sinks, q.shape[-3])
    function = None
    if score_mod is not None:
        function = user_function("score_mod", score_mod, score_mod_aux)
    elif aux_arrays("score_mod", score_mod_aux):
        raise ValueError("score_mod_aux must be () without a score_mod, but is given")
    if block_mask is not None:
        operands.check_block_mask(block_mask, batch[1], q.shape[-3], seqlen_q, seqlen_k)
    if window_size is not None:
        window_size = checks.window(window_size, UNBOUNDED)
    dropout_p, seed = checks.dropout(dropout_p, seed)
    out_dtype = checks.output_dtype(out_dtype, dtype)
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias}
        inputs |= {"alibi_slopes": alibi_slopes, "sinks": sinks}
        inputs |= {} if function is None else function.named_aux()
        out = operands.output(out, (*q.shape[:-1], v.shape[-1]), out_dtype, layout, inputs)

    return AttentionProblem(
        q=q,
        k=k,
        v=v,
        out=out,
        scale=_scale(scale, q.shape[-1], accumulator),
        causal=checks.flag("causal", causal),
        window_size=(None, None) if window_size is None else window_size,
        q_offset=lengths.q_offset,
        seqused_q=lengths.seqused_q,
        seqused_k=lengths.seqused_k,
        mask=mask,
        bias=bias,
        bias_shape=bias_shape,
        alibi_slopes=alibi_slopes,
        softcap=None if softcap is None else checks.softcap(softcap, accumulator),
        sinks=sinks,
        score_mod=function,
        score_mod_grad=None,
        block_mask=block_mask,
        dropout_p=dropout_p,
        seed=seed,
        layout=layout,
        return_lse=checks.flag("return_lse", return_lse),
        out_dtype=out_dtype,
    )


def batch_offsets(batch_shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
    """Bytes from the first batch item of an array to each, flat in C order.

    >>> batch_offsets((2, 3), (100, 10, 4))
    array([  0,  10,  20, 100, 110, 120])
    """
    offsets = np.zeros(1, np.int64)
    for length, stride in zip(batch_shape, strides[: len(batch_shape)], strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return offsets


def make_lengths(
    q_offset: Any,
    seqused_q: Any,
    seqused_k: Any,
    seqlen_q: int,
    seqlen_k: int,
    batch: tuple[tuple[int, ...], int],
) -> Lengths:
    """Check and resolve what there is one integer of per item; batch is (batch_shape, size)."""
    used_q = _per_item("seqused_q", seqused_q, seqlen_q, batch, 0, seqlen_q)
    used_k = _per_item("seqused_k", seqused_k, seqlen_k, batch, 0, seqlen_k)
    if q_offset is None:
        offset = used_k - used_q
    else:
        offset = checks.batch_integers("q_offset", q_offset, *batch, 1 - MAX_SEQLEN, MAX_SEQLEN - 1)
    return Lengths(offset, used_q, used_k)


def _per_item(
    name: str, value: Any, default: int, problem: tuple[tuple[int, ...], int], low: int, high: int
) -> NDArray[np.int64]:
    """Return one integer per batch item; `problem` is (batch_shape, batch_size)."""
    if value is not None:
        return checks.batch_integers(name, value, *problem, low, high)
    filled = np.empty(problem[1], np.int64)
    filled.fill(default)
    return filled


def _scale(value: Any, head_dim: int, accumulator: np.dtype[Any]) -> float:
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    return checks.real_in("scale", value, accumulator)
