"""The backward pass of the CPU backend: from a problem to finished gradients."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu import threads
from fusedattn.cpu.backward_params import (
    EACH_ENTRY,
    NO_BIAS,
    SUM_OVER_KEYS,
    SUM_OVER_ROWS,
    BackwardCall,
    backward_groups,
    backward_tile,
)
from fusedattn.cpu.compile import Worker, get_backward_rescue, get_backward_worker, get_micro
from fusedattn.cpu.params import STOP
from fusedattn.cpu.scratch import working_memory
from fusedattn.cpu.user.code import UserCode
from fusedattn.cpu.user.words import describe_tables
from fusedattn.problem import AttentionProblem, Gradients

# As in the forward pass: below this much work a second thread costs more than it saves, and above
# that much the caller only waits, so that Ctrl-C is heard.
ALONE_FLOPS = 5_000_000
LONG_FLOPS = 300_000_000
# Products of the backward pass for each two of the forward pass.
FLOPS_FACTOR = 2.5
# Slots for the gradients of aux arrays, and the numbers that they may take together. More slots let
# more threads add at once, and take more memory.
AUX_SLOTS, AUX_NUMBERS = 16, 1 << 22

Array = NDArray[Any]


def backward(
    problem: AttentionProblem,
    d_out: Array,
    out: Array,
    lse: Array,
    d_lse: Array | None = None,
    *,
    bias_grad: bool = True,
) -> Gradients:
    """Pull ``d_out`` and ``d_lse`` back to the operands; arrays in canonical axis order.

    Finite in the domain that `fusedattn.attention_backward` states, and a little beyond: what
    counts is ``max_j sum_d |d_out_d v_jd| + sum_d |d_out_d out_d|``, below the bound given there.
    """
    arrays: dict[str, Array | None] = {
        name: getattr(problem, name) for name in ("q", "k", "v", "mask", "bias")
    }
    arrays |= {"d_out": d_out, "out": out, "lse": np.ascontiguousarray(lse)}
    arrays["d_lse"] = None if d_lse is None else np.ascontiguousarray(d_lse)
    d_q, d_k, d_v = (_like(problem, array) for array in (problem.q, problem.k, problem.v))
    arrays |= {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    if problem.alibi_slopes is not None:
        slopes = np.broadcast_to(problem.alibi_slopes, problem.lse_shape[:-1])
        arrays["slopes"] = _in_float64(problem, slopes)
    shares = None
    if problem.sinks is not None:
        arrays["sinks"] = _in_float64(problem, problem.sinks)
        shares = arrays["sink_shares"] = np.zeros(problem.lse_shape)
    bias = BiasGradient(problem, bias_grad)
    arrays |= bias.arrays

    natives: dict[str, int] = {}
    tile = backward_tile(problem)
    for group in backward_groups(problem, bias_grad):
        natives |= get_micro(tile, group).addresses
    user = UserCode(problem, tile)
    user.add_gradients(problem, tile)
    call = BackwardCall(problem, natives | user.passes, arrays)
    aux = AuxGradients(problem, call)
    call.record["bias_kind"], call.record["bias_in_turn"] = bias.kind, bias.in_turn
    rows = call.own("bad_rows", np.zeros(math.prod(problem.lse_shape), np.uint8))
    keys = call.own("bad_keys", np.zeros(math.prod(problem.k.shape[:-1]), np.uint8))
    flops = FLOPS_FACTOR * problem.flops
    _run(call, get_backward_worker(), flops)
    bad = np.concatenate([2 * np.flatnonzero(rows), 2 * np.flatnonzero(keys) + 1])
    if bad.size:
        user.compile_scalars()
        call.enter_functions(user.scalars or {})
        call.restart(bad)
        _run(call, get_backward_rescue(), flops)
    d_sinks = _d_sinks(problem, d_lse, shares)
    return Gradients(d_q, d_k, d_v, bias.finish(), d_sinks, aux.finish())


def _run(call: BackwardCall, worker: Worker, flops: float) -> None:
    """Run all items of a call."""
    size = call.scratch_bytes
    if flops < ALONE_FLOPS:
        worker(call.address, working_memory(size))
        return

    def work() -> None:
        worker(call.address, working_memory(size))

    def stop() -> None:
        call.set_counter(STOP)

    count = min(call.items, threads.get_num_threads())
    threads.run(work, stop, count, join_in=flops < LONG_FLOPS)


def not_differentiable(problem: AttentionProblem) -> list[str]:
    """Reasons why gradients cannot go through the score_mod here."""
    tile = backward_tile(problem)
    try:
        UserCode(problem, tile).add_gradients(problem, tile)
    except TypeError as error:
        return [str(error)]
    return []


class AuxGradients:
    """Accumulators for the gradients of the arrays of a score_mod, in float64.

    Items of work go round a fixed number of slots, those of one slot one after the other, and the
    slots are added up in order: the same sums whatever the number of threads.
    """

    def __init__(self, problem: AttentionProblem, call: BackwardCall) -> None:
        self._function = problem.score_mod
        if self._function is None:
            return
        words = describe_tables(self._function.aux)
        call.keep(words)
        call.record["score_words"] = ctypes.addressof(words)
        floats = [array.dtype.kind not in "iub" for array in self._function.aux]
        sizes = [n * array.size for n, array in zip(floats, self._function.aux, strict=True)]
        self._floats, total = floats, sum(sizes)
        self._offsets = np.cumsum([0, *sizes])[:-1].astype(np.int64)
        slots = max(1, min(AUX_SLOTS, AUX_NUMBERS // max(1, total)))
        self._sums = np.zeros((slots, total))
        if any(floats):
            call.own("aux_sums", self._sums)
            call.own("aux_offsets", np.concatenate([self._offsets, [0]]))
            call.record["aux_slots"], call.record["aux_slot_bytes"] = slots, 8 * total

    def finish(self) -> tuple[Array | None, ...] | None:
        """Round to the dtypes of the arrays; None without a score_mod."""
        if self._function is None:
            return None
        total = self._sums.sum(axis=0)
        found: list[Array | None] = []
        parts = zip(self._function.aux, self._floats, self._offsets, strict=True)
        with np.errstate(all="ignore"):
            for array, is_float, start in parts:
                part = total[start : start + array.size]
                found.append(part.reshape(array.shape).astype(array.dtype) if is_float else None)
        return tuple(found)


class BiasGradient:
    """Where the gradient of the bias is collected, and how it becomes that of the caller's array.

    Entries of a bias that is broadcast over neither rows nor keys are summed in place, items taking
    turns. Otherwise what is left of each head is of the length of a sequence, and batch items and
    heads that share a bias are added up at the end.
    """

    def __init__(self, problem: AttentionProblem, wanted: bool) -> None:
        self.problem = problem
        self.kind, self.in_turn = NO_BIAS, False
        self.arrays: dict[str, Array | None] = {}
        self._sums: Array | None = None
        if problem.bias is None or problem.bias_shape is None or not wanted:
            return
        scores = (*problem.lse_shape, problem.seqlen_k)
        shape = (1,) * (len(scores) - len(problem.bias_shape)) + problem.bias_shape
        self._shape = shape
        if shape[-1] != scores[-1] or scores[-1] == 1:
            self.kind, sums_shape = SUM_OVER_KEYS, scores[:-1]
        elif shape[-2] != scores[-2] or scores[-2] == 1:
            self.kind, sums_shape = SUM_OVER_ROWS, (*scores[:-2], scores[-1])
        else:
            self.kind, sums_shape = EACH_ENTRY, shape
        self._sums = np.zeros(sums_shape, problem.accumulator)
        if self.kind == EACH_ENTRY:
            self.in_turn = shape != scores
            self.arrays["d_bias"] = np.broadcast_to(self._sums, scores)
        else:
            self.arrays["bias_sums"] = self._sums

    def finish(self) -> Array | None:
        """Return the gradient, rounded once to the type of the bias."""
        problem = self.problem
        if problem.bias is None or problem.bias_shape is None or self._sums is None:
            return None
        total = self._sums
        if self.kind != EACH_ENTRY:
            total = np.expand_dims(total, -1 if self.kind == SUM_OVER_KEYS else -2)
            axes = tuple(
                axis
                for axis, length in enumerate(self._shape)
                if length == 1 and total.shape[axis] != 1
            )
            with np.errstate(all="ignore"):
                total = total.sum(axis=axes, dtype=np.float64, keepdims=True)
        return _rounded(total.reshape(problem.bias_shape), problem.bias.dtype)


def _d_sinks(problem: AttentionProblem, d_lse: Array | None, shares: Array | None) -> Array | None:
    """Add up what each row gives to the gradient of its head's sink."""
    if problem.sinks is None or shares is None:
        return None
    # A row without keys has a constant output, so even a NaN that comes back through it does not
    # matter; that mask or bias hide all keys from it is only looked at where it would.
    for index in np.argwhere(~np.isfinite(shares)):
        *batch, head, row = map(int, index)
        if not _sees_any(problem, tuple(batch), head, row):
            shares[tuple(index)] = 0.0 if d_lse is None else d_lse[tuple(index)]
    axes = (*range(shares.ndim - 2), shares.ndim - 1)
    with np.errstate(all="ignore"):
        total = shares.sum(axis=axes)
    return _rounded(total, problem.sinks.dtype)


def _sees_any(problem: AttentionProblem, batch: tuple[int, ...], head: int, row: int) -> bool:
    """Whether a row sees any key."""
    flat = int(np.ravel_multi_index(batch, problem.batch_shape)) if batch else 0
    keys = slice(*problem.key_range(flat).row(row))
    visible = np.ones(keys.stop - keys.start, bool)
    place: Any = (*batch, head, row, keys)
    if problem.mask is not None:
        visible &= problem.mask[place]
    if problem.bias is not None:
        with np.errstate(all="ignore"):
            visible &= ~np.isneginf(problem.bias[place].astype(problem.accumulator))
    return bool(visible.any())


def _like(problem: AttentionProblem, array: Array) -> Array:
    """Memory for a gradient: canonical axis order, contiguous in the caller's layout."""
    make = np.empty if problem.seqlen_q and problem.num_heads else np.zeros  # no rows: no items
    if problem.layout == "bhsd":
        return make(array.shape, array.dtype)
    *leading, heads, rows, dim = array.shape
    return make((*leading, rows, heads, dim), array.dtype).swapaxes(-3, -2)


def _in_float64(problem: AttentionProblem, values: Array) -> NDArray[np.float64]:
    """Slopes or sinks, which count in the accumulator type whatever they are stored in."""
    with np.errstate(all="ignore"):
        return values.astype(problem.accumulator).astype(np.float64, order="C")


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return values.astype(dtype, copy=False)
