"""What several laws need: comparisons, and calls made of parts of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.testing.cases import Answer, Case
from fusedattn.testing.compare import assert_within
from fusedattn.testing.functions import moved
from fusedattn.testing.kernel import Kernel

Array = NDArray[Any]
Bool = NDArray[np.bool_]


def assert_same_bits(actual: Array, expected: Array, name: str, where: Bool | None = None) -> None:
    """Assert that two arrays hold the same bits; any NaN equals any NaN."""
    assert actual.shape == expected.shape, f"{name}: shapes {actual.shape} and {expected.shape}"
    bits = np.dtype(f"u{actual.itemsize}")
    same = np.ascontiguousarray(actual).view(bits) == np.ascontiguousarray(expected).view(bits)
    same |= np.isnan(actual) & np.isnan(expected)
    if where is not None:
        same |= ~where
    if not same.all():
        place = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{name}{list(place)} is {actual[place]!s} in one call and {expected[place]!s} in the "
            f"other; {int((~same).sum())} of {same.size} elements differ"
        )


def assert_close(
    actual: Array, expected: Array, budget: Array, name: str, where: Bool | None = None
) -> None:
    """Assert that two results of a kernel differ by no more than a budget, in chosen places."""
    if where is None:
        return assert_within(actual, expected, budget, name=name)
    chosen = np.broadcast_to(where, actual.shape)
    got = np.where(chosen, actual.astype(np.float64), 0.0)
    want = np.where(chosen, expected.astype(np.float64), 0.0)
    return assert_within(got, want, np.where(chosen, budget, 0.0), name=name)


def assert_same(
    kernel: Kernel,
    actual: Answer,
    expected: Answer,
    case: Case,
    rows: Bool | None = None,
    *,
    bitwise: bool | None = None,
) -> None:
    """Assert that two calls agree: to the bit where the kernel declares it, else within budget.

    `rows` of the shape of lse chooses rows; `case` gives the budget.
    """
    wide = None if rows is None else np.broadcast_to(rows[..., None], actual.out.shape)
    if kernel.bitwise if bitwise is None else bitwise:
        assert_same_bits(actual.out, expected.out, "out", wide)
        if actual.lse is not None and expected.lse is not None:
            assert_same_bits(actual.lse, expected.lse, "lse", rows)
        return
    out, lse = case.budget
    assert_close(actual.out, expected.out, 2 * out, "out", wide)
    if actual.lse is not None and expected.lse is not None:
        assert_close(actual.lse, expected.lse, 2 * lse, "lse", rows)


def assert_equals_reference(answer: Answer, case: Case) -> None:
    """Assert that a result is the reference's, within the budget of the call."""
    assert_within(answer.out, case.expected.out, case.budget.out, name="out")
    if answer.lse is not None:
        assert case.expected.lse is not None
        assert_within(answer.lse, case.expected.lse, case.budget.lse, name="lse")


def full(case: Case, name: str) -> Array:
    """Mask or bias of a case in the full shape of the logits."""
    problem = case.problem
    shape = (*problem.lse_shape, problem.seqlen_k)
    return np.broadcast_to(case.keywords[name], shape)


def take_keys(case: Case, keys: Array | slice, **keywords: Any) -> Case:
    """Take some keys, with their columns of mask and bias."""
    changes: dict[str, Any] = {"k": _take(case.k, keys, -2), "v": _take(case.v, keys, -2)}
    for name in ("mask", "bias"):
        if name in case.keywords:
            array = case.keywords[name]
            if array.shape[-1] != 1 or case.k.shape[-2] == 1:
                changes[name] = _take(full(case, name), keys, -1)
    changes |= moved(case.keywords, keys=keys)
    return case.change(**changes, **keywords)


def _take(array: Array, index: Array | slice, axis: int) -> Array:
    where: list[Any] = [slice(None)] * array.ndim
    where[axis] = index
    return np.ascontiguousarray(array[tuple(where)])


def take_item(case: Case, index: tuple[int, ...]) -> Case:
    """Take one batch item, as a batch of one."""
    changes: dict[str, Any] = {name: getattr(case, name)[index][None] for name in "qkv"}
    batch_shape = case.problem.batch_shape
    for name in ("mask", "bias"):
        if name in case.keywords:
            changes[name] = np.ascontiguousarray(full(case, name)[index])[None]
    for name in ("q_offset", "seqused_q", "seqused_k"):
        if name in case.keywords:
            changes[name] = int(np.broadcast_to(case.keywords[name], batch_shape)[index])
    slopes = case.keywords.get("alibi_slopes")
    if slopes is not None and slopes.ndim > 1:
        shape = (*batch_shape, slopes.shape[-1])
        changes["alibi_slopes"] = np.ascontiguousarray(np.broadcast_to(slopes, shape)[index])[None]
    flat = int(np.ravel_multi_index(index, batch_shape)) if batch_shape else 0
    changes |= moved(case.keywords, item=slice(flat, flat + 1))
    return case.change(**changes)


def replaced(case: Case, values: Mapping[str, tuple[Bool, Any]]) -> Case:
    """Copy with other values in some places of k, v, q or a keyword's array."""
    changes: dict[str, Any] = {}
    for name, (where, value) in values.items():
        array = getattr(case, name) if name in "qkv" else full(case, name)
        changes[name] = np.where(where, np.asarray(value, array.dtype), array)
    return case.change(**changes)
