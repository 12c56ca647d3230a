"""BlockMask: what it holds, what it is joined to, and attention that skips its empty blocks."""

import numpy as np
import pytest
from cpu_backend import ISAS, assert_same_bits, attention_on, each_isa, normal
from hypothesis import given
from hypothesis import strategies as st

from fusedattn import BlockMask, attention, attention_backward, explain, make_block_mask
from fusedattn.masks import EDGE, FULL, SKIP
from fusedattn.testing import functions


def causal(batch, head, q_idx, k_idx):
    return q_idx >= k_idx


def of_heads(batch, head, q_idx, k_idx):
    return (q_idx + k_idx + batch) % (head + 2) == 0


DENSE = {
    causal: lambda b, h, q, k: (q >= k) & (b + h >= 0),
    of_heads: lambda b, h, q, k: (q + k + b) % (h + 2) == 0,
}


def dense(function, batch, heads, rows, keys):
    return DENSE[function](*np.ogrid[:batch, :heads, :rows, :keys])


@given(
    function=st.sampled_from(list(DENSE)),
    shape=st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(0, 70)] * 2),
    block=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
def test_a_block_mask_is_the_dense_mask_by_blocks(function, shape, block):
    mask = make_block_mask(function, *shape, block=block)
    expected = dense(function, *shape)
    np.testing.assert_array_equal(mask.to_mask(), expected)
    for place in np.ndindex(mask.kinds.shape):
        rows, keys = (slice(i * n, (i + 1) * n) for i, n in zip(place[2:], block, strict=True))
        cell = expected[place[:2]][rows, keys]
        kind = FULL if cell.all() else EDGE if cell.any() else SKIP
        assert mask.kinds[place] == kind
    empty = sum(
        expected[place[:2]][
            place[2] * block[0] : (place[2] + 1) * block[0],
            place[3] * block[1] : (place[3] + 1) * block[1],
        ].size
        for place in np.argwhere(mask.kinds == SKIP)
        for place in [tuple(place)]
    )
    assert mask.sparsity == pytest.approx(empty / expected.size if expected.size else 0)


def test_joined_masks_are_joined_entry_by_entry():
    one = make_block_mask(causal, None, None, 100, 120, block=(16, 32))
    other = make_block_mask(of_heads, 2, 3, 100, 120, block=(16, 32))
    shape = (2, 3, 100, 120)
    first, second = (np.broadcast_to(m.to_mask(), shape) for m in (one, other))
    for joined, expected in (
        (one & other, first & second),
        (one | other, first | second),
        (~one, ~first),
        (~(one & ~other) | one, ~(first & ~second) | first),
    ):
        np.testing.assert_array_equal(np.broadcast_to(joined.to_mask(), shape), expected)
        # No block is called partial that is not.
        blocks = [
            np.add.reduceat(
                np.add.reduceat(expected, np.arange(0, 100, 16), 2), np.arange(0, 120, 32), 3
            )
        ]
        empty = np.broadcast_to(joined.kinds, (2, 3, 7, 4)) == SKIP
        np.testing.assert_array_equal(empty, blocks[0] == 0)


def test_a_mask_is_made_with_the_memory_of_some_tiles():
    import tracemalloc

    tracemalloc.start()
    make_block_mask(lambda b, h, q, k: q // 4096 == k // 4096, None, None, 1, 2**20)
    make_block_mask(causal, None, None, 2000, 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_what_happens_later_to_arrays_and_outer_values_does_not_change_a_mask():
    document, width = np.repeat([0, 1, 2], 20), 7
    mask = make_block_mask(
        lambda b, h, q, k, d: (d[q] == d[k]) & (q - k < width),
        None,
        None,
        60,
        60,
        aux=(document,),
        block=(8, 8),
    )
    before = mask.to_mask()
    document[:] = 5
    width = 1
    np.testing.assert_array_equal(mask.to_mask(), before)
    q = normal(0, 1, 60, 8)
    out = attention(q, q, q, block_mask=mask, backend="cpu")
    np.testing.assert_allclose(out, attention(q, q, q, mask=before[0]), atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        mask.kinds[...] = 0


BLOCKS = [(128, 128), (64, 96), (16, 32), (5, 7), (1, 1), (300, 500)]


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("block", BLOCKS[:4:3])
@pytest.mark.parametrize("name", functions.MASK_FUNCTIONS)
def test_a_block_mask_has_the_bits_of_its_dense_mask(isa, block, name):
    q, k, v = normal(0, 2, 4, 200, 16), normal(1, 2, 2, 330, 16), normal(2, 2, 2, 330, 9)
    aux = (np.arange(200) + 60, np.arange(330), np.arange(2))
    mask = make_block_mask(functions.MASK_FUNCTIONS[name], 2, 4, 200, 330, aux=aux, block=block)
    v[:, :, 77], k[:, :, 200] = np.nan, np.inf
    fn = attention_on(isa)
    for options in ({}, {"causal": True, "softcap": 3.0}, {"mask": np.arange(330) % 5 > 0}):
        extra = options.get("mask", True)
        options = {**options, "return_lse": True}
        got = fn(q, k, v, block_mask=mask, **options)
        assert_same_bits(got, fn(q, k, v, **{**options, "mask": mask.to_mask() & extra}))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", [1, 4, 200])
def test_blocks_of_any_size_and_rows_of_any_number(block, rows):
    q, k, v = normal(0, 1, 3, rows, 16), normal(1, 1, 3, 330, 16), normal(2, 1, 3, 330, 9)
    near = make_block_mask(lambda b, h, q, k: abs(q - k) < 40, None, None, rows, 330, block=block)
    own = make_block_mask(of_heads, 1, 3, rows, 330, block=block)
    for mask in (near, own, near | own, ~near & own):
        got = attention(q, k, v, block_mask=mask, return_lse=True, backend="cpu")
        dense_mask = np.broadcast_to(mask.to_mask(), (1, 3, rows, 330))
        assert_same_bits(got, attention(q, k, v, mask=dense_mask, return_lse=True, backend="cpu"))


def test_neighbouring_rows_and_items_move_no_bit():
    """Blocks that another row of the panel lists must not change this row's bits."""
    rng = np.random.default_rng(0)
    kept = rng.random((2, 25, 11)) < 0.4
    q, k, v = normal(0, 2, 1, 200, 16), normal(1, 2, 1, 330, 16), normal(2, 2, 1, 330, 8)

    def listed(batch, head, q_idx, k_idx, kept):
        return kept[batch, q_idx // 8, k_idx // 30]

    mask = make_block_mask(listed, 2, None, 200, 330, aux=(kept,), block=(8, 30))
    whole = attention(q, k, v, block_mask=mask, return_lse=True)
    for row in range(0, 200, 8):
        own = kept.copy()
        own[:, np.arange(25) != row // 8] = rng.random((11,)) < 0.5
        other = make_block_mask(listed, 2, None, 200, 330, aux=(own,), block=(8, 30))
        got = attention(q, k, v, block_mask=other, return_lse=True)
        rows = slice(row, row + 8)
        assert_same_bits(tuple(x[:, :, rows] for x in got), tuple(x[:, :, rows] for x in whole))


@pytest.mark.parametrize("block", BLOCKS[:4])
@pytest.mark.parametrize("rows", [3, 200])
def test_gradients_past_a_block_mask_have_the_bits_of_its_dense_mask(block, rows):
    q, k, v = normal(0, 2, 4, rows, 16), normal(1, 2, 2, 330, 16), normal(2, 2, 2, 330, 12)
    v[:, :, 7], k[:, :, 9], v[:, :, 20] = np.nan, np.inf, np.nan  # the last one is seen by some

    def banded(batch, head, q_idx, k_idx):
        return (2 * q_idx + batch - k_idx) % 50 < 20 and k_idx != 7 and k_idx != 9

    mask = make_block_mask(banded, 2, 4, rows, 330, block=block)
    for options in ({}, {"causal": True, "softcap": 3.0, "mask": np.arange(330) % 4 > 0}):
        dense_mask = mask.to_mask() & options.get("mask", True)
        out, lse = attention(q, k, v, block_mask=mask, return_lse=True, **options)
        arguments = (normal(5, *out.shape), q, k, v, out, lse)
        got = attention_backward(*arguments, block_mask=mask, backend="cpu", **options)
        dense = {**options, "mask": dense_mask}
        expected = attention_backward(*arguments, backend="cpu", **dense)
        again = attention_backward(*arguments, block_mask=mask, backend="blocked", **options)
        for name in ("d_q", "d_k", "d_v"):
            assert_same_bits(getattr(got, name), getattr(expected, name))
            np.testing.assert_allclose(getattr(again, name), getattr(got, name), atol=3e-5)


def test_a_picture_shows_full_partial_and_empty_blocks():
    mask = make_block_mask(causal, None, 2, 256, 512, block=(64, 128))
    assert str(mask) == "+...\n+...\n#+..\n#+.."
    assert repr(mask).startswith("BlockMask(batch=1, heads=2, seqlen_q=256, seqlen_k=512")
    # A large mask is drawn small.
    lines = str(make_block_mask(causal, None, None, 2000, 2000, block=(8, 8))).splitlines()
    assert len(lines) <= 64
    assert max(map(len, lines)) <= 64
    assert lines[0][0] == "+"
    assert lines[-1][0] == "#"
    assert lines[0][-1] == "."


@pytest.mark.parametrize("where", [{"batch": 1}, {"head": 2}, {"head": -1}, {"batch": "x"}])
def test_a_picture_of_what_is_not_there_is_refused(where):
    mask = make_block_mask(causal, None, 2, 8, 8)
    name = next(iter(where))
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        mask.draw(**where)


def test_a_mask_is_plotted_on_request():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    mask = make_block_mask(causal, None, None, 200, 300, block=(64, 128))
    axes = mask.plot()
    image = axes.images[0]
    assert image.get_array().shape == (200, 300)
    assert image.get_array()[199, 0] == FULL
    assert image.get_array()[0, 299] == SKIP
    matplotlib.pyplot.close("all")


def test_explain_says_how_much_is_empty():
    q = normal(0, 1, 256, 8)
    mask = make_block_mask(causal, None, None, 256, 256)
    assert "block_mask 25% empty" in str(explain(q, q, q, block_mask=mask))


MAKE = {"batch": None, "heads": None, "seqlen_q": 8, "seqlen_k": 8}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"batch": 1.5}, TypeError, "batch must be an int"),
        ({"seqlen_k": -1}, ValueError, "seqlen_k must be in the range 0"),
        ({"block": 128}, TypeError, r"block must be a pair \(rows, keys\)"),
        ({"block": (0, 8)}, ValueError, r"block\[0\] must be in the range 1"),
        ({"aux": 3}, TypeError, "aux must be a tuple of arrays"),
        ({"aux": (np.zeros(3),)}, TypeError, "one for each aux array"),
    ],
)
def test_mistakes_in_making_a_mask(changes, kind, message):
    with pytest.raises(kind, match=message):
        make_block_mask(causal, **{**MAKE, **changes})


def test_mistakes_in_using_a_mask():
    q = normal(0, 2, 3, 8, 4)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask"):
        attention(q, q, q, block_mask=np.ones((8, 8), bool))
    for shape in ((None, None, 8, 9), (3, None, 8, 8), (None, 2, 8, 8)):
        mask = make_block_mask(causal, *shape)
        with pytest.raises(ValueError, match=r"made for \(batch, heads, seqlen_q, seqlen_k\)"):
            attention(q, q, q, block_mask=mask)
    one, other = (make_block_mask(causal, **MAKE, block=(n, 4)) for n in (2, 4))
    with pytest.raises(ValueError, match="same lengths and blocks"):
        one & other
    with pytest.raises(TypeError, match="unsupported operand"):
        one & np.ones((8, 8), bool)
    assert isinstance(one | one, BlockMask)


@each_isa
@pytest.mark.parametrize("block", [(1, 7), (2, 7), (16, 16)])
def test_few_rows_of_many_heads_share_a_panel_whatever_the_blocks(isa, block):
    def every(batch, head, q_idx, k_idx):
        return q_idx >= 0

    q, k, v = normal(0, 1, 8, 2, 64), normal(1, 1, 1, 300, 64), normal(2, 1, 1, 300, 64)
    mask = make_block_mask(every, None, None, 2, 300, block=block)
    fn = attention_on(isa)
    assert_same_bits(fn(q, k, v, block_mask=mask), fn(q, k, v))
