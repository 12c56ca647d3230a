"""Laws about what a call may depend on, and what it may touch."""

from __future__ import annotations

import dataclasses
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fusedattn.testing.buffers import PLACEMENTS
from fusedattn.testing.cases import Answer, Case
from fusedattn.testing.kernel import Kernel, quietly
from fusedattn.testing.laws.common import (
    Array,
    assert_equals_reference,
    assert_same,
    assert_same_bits,
    replaced,
    take_item,
)
from fusedattn.testing.roundoff import largest
from fusedattn.testing.rows import attended, unseen_keys

# Python names this flag of Linux from 3.13 on.
_NORESERVE = 0x4000


def unseen_keys_do_not_matter(kernel: Kernel, case: Case) -> None:
    """Keys that no query may see hold anything, NaN and infinities too; so do unused queries.

    Needs ``unseen_nan``. If this does not hold, the unused end of a cache must be cleared on every
    step, and one NaN in a padding token reaches the loss.
    """
    case = _hide_keys(case, kernel)
    problem, rng = case.problem, case.rng
    unseen = unseen_keys(problem)[..., None]
    junk = rng.choice([np.nan, np.inf, -np.inf, largest(case.q.dtype)])
    used = problem.seqused_q.reshape(*problem.batch_shape, 1, 1)
    unused = (np.arange(problem.seqlen_q) >= used)[..., None]
    values = {"k": (unseen, junk), "v": (unseen, junk), "q": (unused, junk)}
    dirty = replaced(case, values)
    assert_same(kernel, kernel(dirty), kernel(case), case)


def _hide_keys(case: Case, kernel: Kernel) -> Case:
    """Hide some keys from every row, if none are hidden yet."""
    problem = case.problem
    if unseen_keys(problem).any() or problem.seqlen_k == 0:
        return case
    if kernel.can("seqused_k") and "seqused_k" not in case.keywords:
        return case.change(seqused_k=int(case.rng.integers(0, problem.seqlen_k)))
    if kernel.can("mask"):
        columns = case.rng.random((1, problem.seqlen_k)) < 0.6
        return case.change(mask=columns)
    return case


def hidden_keys_do_not_leak(kernel: Kernel, case: Case) -> None:
    """A key hidden from one row and seen by another does not leak into the first, whatever it is.

    A NaN bias on a hidden key does not matter either. Needs ``hidden_nan``. If this does not hold,
    a single NaN in a document spoils its neighbours in the packed batch: ``0 * NaN`` is NaN.
    """
    problem, rng = case.problem, case.rng
    seen = attended(problem)
    if seen.size == 0:
        return
    key = int(rng.integers(problem.seqlen_k))
    chosen = np.arange(problem.seqlen_k)[:, None] == key
    junk = rng.choice([np.nan, np.inf, -np.inf, largest(case.q.dtype)])
    values: dict[str, Any] = {"v": (chosen, junk)}
    if rng.random() < 0.6:
        values["k"] = (chosen, junk)
    if "bias" in case.keywords and problem.mask is not None:
        values["bias"] = (~problem.mask & (problem.bias != -np.inf), np.nan)
    dirty = replaced(case, values)
    clean = ~seen[..., key]
    assert_same(kernel, kernel(dirty), kernel(case), case, clean)


def batch_items_are_independent(kernel: Kernel, case: Case) -> None:
    """A batch item depends on neither its neighbours nor its place among them.

    To the bit where declared. Domain: no dropout, whose counters name the item. If this does not
    hold, answers change with the load of a server.
    """
    problem, rng = case.problem, case.rng
    if problem.batch_size == 0:
        return
    whole = kernel(case)
    shape = problem.batch_shape
    index = tuple(int(i) for i in np.unravel_index(int(rng.integers(problem.batch_size)), shape))
    alone = take_item(case, index)
    one = kernel(alone)
    item = Answer(whole.out[index][None], None if whole.lse is None else whole.lse[index][None])
    assert_same(kernel, one, item, alone)


def same_call_same_bits(kernel: Kernel, case: Case) -> None:
    """The same call gives the same bits, also after other calls, and never writes to old results.

    If this does not hold, something races, is left over from an earlier call, or is returned from a
    buffer that the next call uses again.
    """
    first = kernel(case)
    other = case.change(q=case.q[..., ::-1].copy(), v=-case.v)
    kernel(other)
    for _ in range(3):
        again = kernel(case)
        assert_same_bits(again.out, first.out, "out of the same call")
        if first.lse is not None and again.lse is not None:
            assert_same_bits(again.lse, first.lse, "lse of the same call")
    _results_are_kept(kernel, case, other)


def _results_are_kept(kernel: Kernel, case: Case, other: Case) -> None:
    seen: list[Array] = []

    def remember(*arguments: Any, **keywords: Any) -> Any:
        result = kernel.fn(*arguments, **keywords)
        for array in result if isinstance(result, tuple) else (result,):
            if isinstance(array, np.ndarray):
                seen.append(array)
        return result

    spy = dataclasses.replace(kernel, fn=remember)
    spy(case)
    kept = [(array, array.tobytes()) for array in seen]
    if "out" in case.placement:
        return
    spy(other)
    for array, before in kept:
        assert array.tobytes() == before, "a later call has overwritten this call's result"


def earlier_calls_do_not_matter(kernel: Kernel, case: Case) -> None:
    """A call does not depend on earlier ones: same shapes, other contents, other options.

    The arrays of the second call are the first call's, overwritten in place, as a cache is during
    decoding. If this does not hold, something is remembered by shape or by address.
    """
    kernel(case)
    kernel(case)
    other = _like(case)
    assert_equals_reference(kernel(other), other)
    assert_equals_reference(kernel(case), case)
    if "out" in case.placement or case.keywords.get("layout") == "bshd":
        return
    arrays = [x.copy() for x in (case.q, case.k, case.v)]
    keywords = dict(case.keywords)
    quietly(kernel.fn, *arrays, **keywords)
    changed = case.change(q=-case.q, k=case.k[..., ::-1].copy(), v=case.v[..., ::-1].copy())
    for array, new in zip(arrays, (changed.q, changed.k, changed.v), strict=True):
        array[...] = new
    result = quietly(kernel.fn, *arrays, **keywords)
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert_equals_reference(Answer(out, lse), changed)


def _like(case: Case) -> Case:
    """Return a call of the same kind with other contents and options."""
    changes: dict[str, Any] = {"q": -case.q, "v": -case.v}
    for name, value in case.keywords.items():
        if name == "mask":
            changes[name] = ~value
        elif name in ("bias", "alibi_slopes", "sinks"):
            changes[name] = np.where(np.isfinite(value), -value, value)
        elif name in ("seqused_q", "seqused_k"):
            changes[name] = value // 2
        elif name == "q_offset":
            changes[name] = np.maximum(value, -3) + 1 if isinstance(value, np.ndarray) else 1
        elif name in ("scale", "softcap"):
            changes[name] = value / 2 if value else 0.5
        elif name == "seed":
            changes[name] = value // 2 + 1
        elif name == "window_size":
            changes[name] = (1, 1)
    return case.change(**changes)


def memory_layout_does_not_matter(kernel: Kernel, case: Case) -> None:
    """Strides and layout change nothing: to the bit where declared.

    Every argument is laid out anew: rows apart, axes swapped, reversed, every other element. If
    this does not hold, a transposed view gives another answer than its copy.
    """
    rng = case.rng
    plain = case.change(placement={}).without("layout", "out")
    names = ["q", "k", "v", *(n for n in ("mask", "bias") if n in case.keywords)]
    placement: dict[str, str] = {}
    if kernel.can("strides"):
        placement = {name: str(rng.choice(PLACEMENTS[:7])) for name in names}
    if kernel.can("out"):
        placement["out"] = str(rng.choice(PLACEMENTS[:7])) if kernel.can("strides") else "plain"
    moved = plain.change(placement=placement)
    if kernel.can("layout") and rng.random() < 0.5:
        moved = moved.change(layout="bshd")
    assert_same(kernel, kernel(moved), kernel(plain), plain)


def memory_outside_is_not_read(kernel: Kernel, case: Case) -> None:
    """Memory before and after each array may hold NaN.

    Lengths and head dims stand around the edges of blocks, where the last tile is only partly
    filled. If this does not hold, a vector load runs past the end of the caller's array.
    """
    plain = case.change(placement={})
    assert_equals_reference(kernel(plain), plain)


def only_out_is_written(kernel: Kernel, case: Case) -> None:
    """A call writes to every element of `out` and to nothing else.

    `out` starts as NaN and lies between guards; inputs are compared byte by byte after each call.
    If this does not hold, a row without keys keeps what was in the buffer, or a tail is stored past
    its end.
    """
    if "out" not in case.placement:
        case = case.change(placement={**case.placement, "out": "plain"})
    assert_equals_reference(kernel(case), case)


def threads_do_not_matter(kernel: Kernel, case: Case) -> None:
    """The number of threads changes nothing, to the bit where declared.

    Needs ``set_threads``. If this does not hold, a result depends on the machine it was made on.
    """
    assert kernel.set_threads is not None
    answers = []
    try:
        for count in (1, 2, 3):
            kernel.set_threads(count)
            answers.append(kernel(case))
    finally:
        kernel.set_threads(1)
    for answer in answers[1:]:
        assert_same(kernel, answer, answers[0], case)


def concurrent_calls_do_not_mix(kernel: Kernel, case: Case) -> None:
    """Calls from several threads at once give what they give one after the other.

    If this does not hold, calls share a buffer.
    """
    cases = [case, case.change(v=-case.v), case.change(q=-case.q), case]
    alone = [kernel(one) for one in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(kernel, cases))
    for one, first, second in zip(cases, alone, together, strict=True):
        assert_same(kernel, second, first, one, bitwise=kernel.deterministic)


def far_memory_is_reached(kernel: Kernel, case: Case) -> None:
    """Batch items, heads and rows may lie further apart than 2**32 elements.

    Only the touched pages of such arrays exist. If this does not hold, an offset was computed in
    32 bits and wraps around.
    """
    axis = int(case.rng.integers(3))
    far = [_far(getattr(case, name), axis) for name in "qkv"]
    if any(array is None for array in far):
        return
    result = quietly(kernel.fn, *far, **case.keywords)
    out = result[0] if isinstance(result, tuple) else result
    near = kernel(case)
    assert_same(kernel, Answer(np.array(out), None), Answer(near.out, None), case)


def _far(values: Array, axis: int) -> Array | None:
    """Lay an array out with one axis of huge stride, or return None where that cannot be done."""
    if sys.platform != "linux":
        return None
    # An offset that wraps around, in elements or in bytes, lands in the first item's memory.
    apart = (2**32 + values.size + 64) * values.itemsize
    strides = list(values.strides)
    strides[axis] = apart
    size = apart * (values.shape[axis] - 1) + values.nbytes
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError:
        return None  # the address space is limited here
    far = np.ndarray(values.shape, values.dtype, buffer=memory, strides=tuple(strides))
    far[...] = values
    return far


def operands_may_be_one_array(kernel: Kernel, case: Case) -> None:
    """q, k and v may be one and the same array.

    If this does not hold, self-attention of raw embeddings is computed from what the call itself
    has written, or from something remembered for another operand.
    """
    case = case.change(k=case.q, v=case.q).without("layout")
    array = case.q.copy()
    result = quietly(kernel.fn, array, array, array, **case.keywords)
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert_equals_reference(Answer(out, lse), case)
