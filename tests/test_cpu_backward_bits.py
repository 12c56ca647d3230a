"""The same inputs give the same gradients, bit for bit, wherever and beside whatever they are."""

from functools import partial

import numpy as np
import pytest
from cpu_backend import DTYPES, assert_same_bits, came_back, each_isa, gradient_on, normal, operands

import fusedattn
from fusedattn import attention_backward
from fusedattn.testing import PLACEMENTS, Placed

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (37, 5)},
    "mask": {"mask": np.random.default_rng(1).random((1, 1, 300, 400)) < 0.5},
    "scores": {"softcap": 5.0, "alibi_slopes": np.array([0.3, -0.1]), "bias": normal(4, 300, 400)},
    "bias of keys": {"bias": normal(4, 2, 1, 400)},
    "bias of rows": {"bias": normal(4, 300, 1)},
    "sinks": {"sinks": np.array([1.0, -2.0]), "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "large": {"scale": 1e5},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


several_threads = pytest.mark.parametrize("threads", [2, 7])


@several_threads
@pytest.mark.parametrize("dtype", DTYPES[:2])
@each_option
def test_the_number_of_threads_moves_no_bit(set_threads, threads, dtype, options):
    # Too little work for a second thread, some, and so much that the caller only waits.
    for batch, rows, keys in ((1, 5, 30), (2, 300, 400), (8, 300, 400)):
        arrays = operands(dtype, batch=batch, rows=rows, keys=keys)
        cut = {"mask": np.s_[..., :rows, :keys], "bias": np.s_[..., :rows, :keys]}
        chosen = {name: x[cut[name]] if name in cut else x for name, x in options.items()}
        given, keywords = came_back(*arrays, **chosen)
        call = partial(attention_backward, *given, **keywords)
        set_threads(1)
        expected = call()
        set_threads(threads)
        for _ in range(3):
            assert_same_bits(call(), expected)


@several_threads
def test_items_that_wait_for_each_other_add_in_one_order(set_threads, threads):
    """One head alone: every item waits for the one of the keys before."""
    arrays = operands(batch=1, heads=1, rows=1500, keys=2000, dim=16, dim_v=16)
    for options in ({}, {"causal": True}, {"bias": normal(3, 1500, 2000)}):
        given, keywords = came_back(*arrays, **options)
        call = partial(attention_backward, *given, **keywords)
        set_threads(1)
        expected = call()
        set_threads(threads)
        for _ in range(5):
            assert_same_bits(call(), expected)


@each_isa
@each_option
def test_neighbours_and_slot_in_the_batch_move_no_bit(isa, options):
    if "dropout_p" in options:
        pytest.skip("what is dropped depends on the slot")
    q, k, v = operands(batch=2)
    nan = np.float32(np.nan)
    q, k, v = (np.concatenate([x, x[:1] * 100, x[:1] * nan, x[:1]]) for x in (q, k, v))
    arrays, keywords = came_back(q, k, v, **options)
    d_lse = keywords["d_lse"]
    arrays[0][4], d_lse[4] = arrays[0][0], d_lse[0]
    fn = partial(gradient_on(isa), **options)
    together = fn(*arrays, d_lse=d_lse)
    for i in range(5):
        part = slice(i, i + 1)
        alone = fn(*(x[part] for x in arrays), d_lse=d_lse[part])
        assert_same_bits(alone[:3], tuple(x[part] for x in together[:3]))
    assert_same_bits(tuple(x[4] for x in together[:3]), tuple(x[0] for x in together[:3]))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES[:2])
@each_option
def test_strides_and_layout_move_no_bit(isa, dtype, options):
    fn = gradient_on(isa)
    arrays, keywords = came_back(*operands(dtype), **options)
    d_lse = keywords["d_lse"]
    expected = fn(*arrays, **keywords)
    for placement in PLACEMENTS:
        if placement.startswith("stride0"):
            continue
        views = [Placed(x, placement).view for x in arrays]
        arguments = {**options, "d_lse": Placed(d_lse, placement).view}
        for name in ("mask", "bias"):
            if name in options:
                arguments[name] = Placed(options[name], placement).view
        assert_same_bits(fn(*views, **arguments), expected)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays[:-1]]
    found = fn(*swapped, arrays[-1], d_lse=d_lse, layout="bshd", **options)
    assert_same_bits(tuple(x.swapaxes(1, 2) for x in found[:3]) + found[3:], expected)


def test_the_same_call_has_the_same_bits_each_time():
    arrays = operands(batch=4, heads=4, heads_kv=2)
    given, keywords = came_back(*arrays, causal=True, bias=normal(7, 300, 400))
    expected = attention_backward(*given, **keywords)
    for _ in range(30):
        assert_same_bits(attention_backward(*given, **keywords), expected)


def test_zero_has_one_sign():
    """Whether a hidden tile was skipped must not show in a sign of zero."""
    q, k, v = np.zeros((1, 60, 24), np.float32), normal(1, 1, 300, 24), normal(2, 1, 300, 24)
    out, lse = fusedattn.attention(q, k, v, return_lse=True)
    for sign in (1.0, -1.0):
        d_out = np.full_like(out, sign * 0.0)
        for options in ({}, {"causal": True}, {"dropout_p": 0.5, "seed": 1}, {"scale": -1.0}):
            found = attention_backward(d_out, q, k, v, out, lse, **options)
            for gradient in found[:3]:
                assert not np.signbit(gradient).any()
