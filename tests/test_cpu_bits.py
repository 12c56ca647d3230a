"""The same inputs give the same bits, wherever and beside whatever they are computed."""

from functools import partial

import numpy as np
import pytest
from cpu_backend import DTYPES, ISAS, assert_same_bits, attention_on, each_isa, normal, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedattn import attention
from fusedattn.cpu.tile import FEW_ROWS
from fusedattn.testing import PLACEMENTS, Placed

EXAMPLES = settings().max_examples

# One of each kind of work: none, an edge on every tile, a dense mask, passes over the scores, and
# rows that need the rescue.
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (37, 5)},
    "mask": {"mask": np.random.default_rng(1).random((1, 1, 300, 400)) < 0.5},
    "scores": {"softcap": 5.0, "alibi_slopes": np.array([0.3, -0.1]), "bias": normal(4, 300, 400)},
    "sinks": {"sinks": np.array([1.0, -2.0]), "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "exact": {"scale": 2.0**101, "causal": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@each_option
def test_the_number_of_threads_moves_no_bit(set_threads, threads, dtype, options):
    # Too little work for a second thread, some, and so much that the caller only waits.
    for batch, rows, keys in ((1, 5, 30), (2, 300, 400), (30, 300, 400)):
        if "scale" in options and batch > 2:
            continue  # the exact path is slow
        arrays = operands(dtype, batch=batch, rows=rows, keys=keys)
        cut = {
            name: options[name][..., :rows, :keys] for name in ("mask", "bias") if name in options
        }
        call = partial(attention, *arrays, **{**options, **cut}, return_lse=True)
        set_threads(1)
        expected = call()
        set_threads(threads)
        for _ in range(3):
            assert_same_bits(call(), expected)


@each_isa
@each_option
def test_neighbours_and_slot_in_the_batch_move_no_bit(isa, options):
    if "dropout_p" in options:
        pytest.skip("what is dropped depends on the slot")
    fn, options = attention_on(isa), {**options, "return_lse": True}
    q, k, v = operands(batch=3)
    nan = np.float32(np.nan)
    q, k, v = (np.concatenate([x, x[:1] * 100, x[:1] * nan, x[:1]]) for x in (q, k, v))
    alone = [fn(q[i : i + 1], k[i : i + 1], v[i : i + 1], **options) for i in range(6)]
    together = fn(q, k, v, **options)
    for i, item in enumerate(alone):
        assert_same_bits(tuple(x[i : i + 1] for x in together), item)
    assert_same_bits(alone[5], alone[0])
    # Without a batch axis, and with two.
    assert_same_bits(fn(q[0], k[0], v[0], **unbatched(options)), tuple(x[0] for x in together))
    folded = fn(*(x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)), **options)
    assert_same_bits(tuple(x.reshape(6, *x.shape[2:]) for x in folded), together)


def unbatched(options):
    return {name: x[0] if name == "mask" else x for name, x in options.items()}


@each_isa
@pytest.mark.parametrize("dtype", DTYPES[:2])
@each_option
def test_strides_layout_and_out_move_no_bit(isa, dtype, options):
    fn, options = attention_on(isa), {**options, "return_lse": True}
    arrays = operands(dtype)
    expected = fn(*arrays, **options)
    for placement in PLACEMENTS:
        if placement.startswith("stride0"):
            continue
        views = [Placed(x, placement).view for x in arrays]
        arguments = {**options}
        for name in ("mask", "bias"):
            if name in options:
                arguments[name] = Placed(options[name], placement).view
        out = Placed(np.zeros_like(expected[0]), placement).view
        assert_same_bits(fn(*views, **arguments, out=out), expected)
        assert_same_bits(out, expected[0])
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    out, lse = fn(*swapped, **options, layout="bshd")
    assert_same_bits((out.swapaxes(1, 2), lse), expected)


@each_isa
def test_a_stride_of_zero_is_like_a_copy(isa):
    fn = attention_on(isa)
    for axis in range(4):
        arrays = [np.broadcast_to(x.take([0], axis), x.shape) for x in operands()]
        expected = fn(*(x.copy() for x in arrays), causal=True, return_lse=True)
        assert_same_bits(fn(*arrays, causal=True, return_lse=True), expected)


CHUNKING = {
    "causal": {"causal": True},
    "window": {"window_size": (130, 0)},
    "narrow window": {"window_size": (20, 7)},
    "full": {},
    "alibi": {"causal": True, "alibi_slopes": np.array([0.25, 0.5])},
    "softcap": {"causal": True, "softcap": 3.0, "sinks": np.array([0.5, 1.0])},
}


@each_isa
@pytest.mark.parametrize("options", CHUNKING.values(), ids=CHUNKING)
@pytest.mark.parametrize("cached", [0, 150])
def test_prefill_in_chunks_has_the_bits_of_prefill_in_one_call(isa, options, cached):
    """Each chunk sees the keys so far; blocks of keys begin where they do in the whole."""
    fn, rows = attention_on(isa), 333
    q, k, v = operands(batch=1, rows=rows, keys=rows + cached)
    whole = fn(q, k, v, q_offset=cached, return_lse=True, **options)
    for size in (FEW_ROWS + 1, 47, 48, 49, 95, 96, 97, 128, 192, 200):
        for begin in range(0, rows, size):
            # Few rows would take another kernel: a short rest goes with the last chunk.
            part = slice(begin, begin + size if begin + size + FEW_ROWS < rows else rows)
            # Without `causal` the window, or all of it, may look ahead: the keys must be there.
            seen = part.stop + cached if "causal" in options else rows + cached
            chunk = fn(
                q[:, :, part],
                k[:, :, :seen],
                v[:, :, :seen],
                q_offset=begin + cached,
                return_lse=True,
                **options,
            )
            assert_same_bits(chunk, tuple(x[:, :, part] for x in whole))
            if part.stop == rows:
                break


@each_isa
@pytest.mark.parametrize("options", CHUNKING.values(), ids=CHUNKING)
def test_decoding_few_rows_at_a_time_has_the_bits_of_decoding_one(isa, options):
    fn, rows = attention_on(isa), FEW_ROWS
    q, k, v = operands(batch=1, rows=rows, keys=rows + 250)
    arguments = {**options, "return_lse": True}
    whole = fn(q, k, v, q_offset=250, **arguments)
    for size in (1, 2, 3):
        for begin in range(0, rows, size):
            part = slice(begin, min(begin + size, rows))
            seen = part.stop + 250 if "causal" in options else rows + 250
            some = fn(
                q[:, :, part], k[:, :, :seen], v[:, :, :seen], q_offset=begin + 250, **arguments
            )
            assert_same_bits(some, tuple(x[:, :, part] for x in whole))


@each_isa
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 31, 48, 49, 95, 96, 97, 100, 128, 200])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_grouped_heads_have_the_bits_of_repeated_ones(isa, rows, group):
    fn = attention_on(isa)
    q, k, v = operands(batch=1, heads=2 * group, heads_kv=2, rows=rows, keys=211)
    mask = np.random.default_rng(0).random((2 * group, rows, 211)) < 0.7
    for options in ({"causal": True}, {"mask": mask}, {"window_size": (60, 3)}):
        grouped = fn(q, k, v, return_lse=True, **options)
        repeated = fn(q, *(x.repeat(group, 1) for x in (k, v)), return_lse=True, **options)
        assert_same_bits(grouped, repeated)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_has_the_same_bits_in_every_lane_of_every_panel(isa, dtype):
    fn = attention_on(isa)
    q, k, v = operands(dtype, batch=1, heads=1, rows=400, keys=301)
    mask = np.random.default_rng(0).random((400, 301)) < 0.3
    bias = normal(9, 400, 301)
    out, lse = fn(q, k, v, mask=mask, bias=bias, return_lse=True)
    rng = np.random.default_rng(1)
    for rows in (FEW_ROWS + 1, 33, 48, 50, 97, 145, 193, 385):
        chosen = rng.permutation(400)[:rows]
        options = {"mask": mask[chosen], "bias": bias[chosen], "return_lse": True}
        assert_same_bits(
            fn(q[:, :, chosen], k, v, **options), (out[:, :, chosen], lse[:, :, chosen])
        )
        few = chosen[:FEW_ROWS]
        options = {"mask": mask[few], "bias": bias[few], "return_lse": True}
        one, one_lse = fn(q[:, :, few], k, v, **options)
        for i in range(FEW_ROWS):
            options = {"mask": mask[few[i]], "bias": bias[few[i]], "return_lse": True}
            alone = fn(q[:, :, few[i : i + 1]], k, v, **options)
            assert_same_bits(alone, (one[:, :, i : i + 1], one_lse[:, :, i : i + 1]))


@given(
    seed=st.integers(0, 2**32 - 1),
    extreme=st.floats(0, 0.3),
    isa=st.sampled_from(ISAS),
    exponent=st.integers(-20, 60),
)
def test_neighbouring_rows_of_any_size_move_no_bit(seed, extreme, isa, exponent):
    """Large scores in one lane must not change how another lane is rounded."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(seed, 1, 60, 8), normal(seed + 1, 1, 130, 8), normal(seed + 2, 1, 130, 8)
    q[:, rng.random(60) < extreme] *= np.float32(2.0**exponent)
    out, lse = attention_on(isa)(q, k, v, causal=True, q_offset=60, return_lse=True)
    for begin in (0, 7, 31, 60 - FEW_ROWS - 1):
        part = slice(begin, begin + FEW_ROWS + 1)
        some = attention_on(isa)(
            q[:, part], k, v, causal=True, q_offset=60 + begin, return_lse=True
        )
        assert_same_bits(some, (out[:, part], lse[:, part]))


def test_the_same_call_has_the_same_bits_each_time():
    q, k, v = operands(batch=4, heads=4, heads_kv=2)
    expected = attention(q, k, v, causal=True, return_lse=True)
    for _ in range(50):
        assert_same_bits(attention(q, k, v, causal=True, return_lse=True), expected)


def test_zero_has_one_sign():
    """Whether a hidden tile was skipped must not show in a sign of zero."""
    q, k = normal(0, 1, 60, 8), normal(1, 1, 300, 8)
    v = np.full((1, 300, 4), -0.0, np.float32)
    some = np.arange(300) < 5
    for options in ({}, {"causal": True}, {"mask": some}, {"dropout_p": 0.5, "seed": 1}):
        for isa in ISAS:
            out = attention_on(isa)(q, k, v, **options)
            assert not np.signbit(out).any()
