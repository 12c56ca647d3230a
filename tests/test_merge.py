"""Merging partial results over disjoint keys."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedattn import attention, merge

EMPTY = (np.zeros((2, 5, 3)), np.full((2, 5), -np.inf))


def partials(bounds=(0, 4, 4, 9, 12), dtype=np.float64, **options):
    """Partial results over consecutive slices of the keys (one empty), and that over all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, d)).astype(dtype) for n, d in ((5, 8), (12, 8), (12, 3)))
    options |= {"return_lse": True, "backend": "reference"}
    parts = [
        attention(q, k[:, lo:hi], v[:, lo:hi], **options) for lo, hi in itertools.pairwise(bounds)
    ]
    return parts, attention(q, k, v, **options)


def assert_same(actual, expected, rtol=1e-14):
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


def test_parts_give_back_the_whole():
    parts, whole = partials()
    assert_same(merge(*parts), whole)


def test_any_order_and_any_grouping_give_the_same():
    parts, whole = partials()
    a, b, c, d = parts
    for first, second, third, fourth in itertools.permutations(parts):
        assert_same(merge(first, second, third, fourth), whole)
    assert_same(merge(merge(a, b), merge(c, d)), whole)
    assert_same(merge(a, merge(b, merge(c, d))), whole)


def test_two_parts_commute_to_the_bit():
    (a, _, b, _), _ = partials()
    np.testing.assert_array_equal(merge(a, b)[0], merge(b, a)[0])
    np.testing.assert_array_equal(merge(a, b)[1], merge(b, a)[1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_empty_state_is_the_identity(dtype):
    (part, empty, *_), _ = partials(dtype=dtype)
    assert np.isneginf(empty[1]).all()
    for merged in (merge(part), merge(part, empty), merge(empty, part, empty)):
        np.testing.assert_array_equal(merged[0], part[0])
        np.testing.assert_array_equal(merged[1], part[1])
        assert (merged[0].dtype, merged[1].dtype) == (part[0].dtype, part[1].dtype)


def test_no_keys_and_no_keys_are_no_keys():
    out, lse = merge(EMPTY, EMPTY)
    np.testing.assert_array_equal(out, EMPTY[0])
    np.testing.assert_array_equal(lse, EMPTY[1])


def test_what_a_part_without_keys_holds_does_not_matter():
    (part, *_), _ = partials()
    garbage = (np.full_like(part[0], np.nan), EMPTY[1])
    np.testing.assert_array_equal(merge(garbage, part)[0], part[0])


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_no_difference_of_lse_overflows(first, second):
    out, lse = merge(
        (np.full((1, 1, 1), 2.0), np.full((1, 1), first)),
        (np.full((1, 1, 1), 4.0), np.full((1, 1), second)),
    )
    weight = 1.0 / (1.0 + np.exp(np.clip(second - first, -700.0, 700.0)))
    np.testing.assert_allclose(out, 2.0 * weight + 4.0 * (1.0 - weight), rtol=1e-13)
    np.testing.assert_allclose(lse, np.logaddexp(first, second), rtol=1e-13)


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=6), st.data())
def test_the_mean_of_finite_parts_stays_among_them(fractions, data):
    largest = np.finfo(np.float64).max
    lses = data.draw(st.lists(st.floats(-50.0, 50.0), min_size=6, max_size=6))
    parts = [
        (np.full((1, 1, 1), x * largest), np.full((1, 1), lse))
        for x, lse in zip(fractions, lses, strict=False)
    ]
    out, _ = merge(*parts)
    assert np.isfinite(out).all()
    slack = 1e-14 * max(abs(x) for x in fractions)
    assert min(fractions) - slack <= out[0, 0, 0] / largest <= max(fractions) + slack


def test_parts_at_the_largest_number_keep_their_mean():
    # In half of the rows the shares add up to just above 1, and their plain sum would be inf.
    lses = np.random.default_rng(2).standard_normal((7, 1, 100))
    largest = np.finfo(np.float64).max
    out, _ = merge(*((np.full((1, 100, 1), largest), lse) for lse in lses))
    np.testing.assert_allclose(out / largest, 1.0, rtol=1e-14)


def test_a_nan_stays_in_its_row_however_little_it_weighs():
    out = np.ones((1, 2, 1))
    broken = out.copy()
    broken[0, 1] = np.nan
    merged, lse = merge((out, np.full((1, 2), 1e4)), (broken, np.full((1, 2), -1e4)))
    np.testing.assert_array_equal(np.isnan(merged[0, :, 0]), [False, True])
    np.testing.assert_array_equal(lse, 1e4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_lse_of_nan_or_inf_gives_nan(bad):
    part = (np.ones((1, 1, 1)), np.zeros((1, 1)))
    out, lse = merge((np.ones((1, 1, 1)), np.full((1, 1), bad)), part)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_layout_concerns_out_alone():
    parts, (out, lse) = partials()
    swapped = [(part.swapaxes(0, 1), lse_part) for part, lse_part in parts]
    assert_same(merge(*swapped, layout="bshd"), (out.swapaxes(0, 1), lse))


def test_a_sink_given_to_one_part_enters_once():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, n, 4)) for n in (5, 6, 6))
    options = {"return_lse": True, "backend": "reference"}
    sinks = np.array([0.5, -1.0])
    left = attention(q, k[:, :2], v[:, :2], sinks=sinks, **options)
    right = attention(q, k[:, 2:], v[:, 2:], **options)
    assert_same(merge(left, right), attention(q, k, v, sinks=sinks, **options))


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ((), TypeError, "at least one"),
        (
            (EMPTY[0],),
            TypeError,
            r"states\[0\] must be a pair \(out, lse\), .* ndarray",
        ),
        ((EMPTY, [1, 2, 3]), TypeError, r"states\[1\] must be a pair .* list"),
        (((None, EMPTY[1]),), TypeError, r"out of states\[0\] must be an array .* NoneType"),
        (((EMPTY[0], np.zeros((2, 5), int)),), TypeError, r"lse of states\[0\] .* int64"),
        (
            (EMPTY, (EMPTY[0].astype(np.float32), EMPTY[1])),
            TypeError,
            r"out of states\[1\] must have the dtype float64 of states\[0\], but has float32",
        ),
        (
            (EMPTY, (EMPTY[0], EMPTY[1][:, :1])),
            ValueError,
            r"lse of states\[1\] must have the shape \(2, 5\) of states\[0\], but has \(2, 1\)",
        ),
        (((EMPTY[0], EMPTY[1].T),), ValueError, r"lse must have shape .* and lse \(5, 2\)"),
        (((EMPTY[1], EMPTY[1][0]),), ValueError, r"out has shape \(2, 5\)"),
        ([(EMPTY[0].astype(">f4"), EMPTY[1])], TypeError, "out of states.0. .* byte order"),
    ],
)
def test_what_does_not_fit_is_refused(states, error, message):
    with pytest.raises(error, match=message):
        merge(*states)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be 'bhsd' or 'bshd', but is 'sbhd'"):
        merge(EMPTY, layout="sbhd")
