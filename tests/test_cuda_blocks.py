"""Block masks in the Hopper kernel: tiles that are hidden are not loaded; no GPU needed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hopper_emulator import machine, memory, run
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_hopper import features, operands
from test_hopper_emulator import forgets, made_wrong

from fusedattn import attention, make_block_mask, make_problem
from fusedattn.cuda import backend, compiler, driver, hopper_blocks, ptx, tensor_cores
from fusedattn.cuda.hopper_blocks import KIND, KIND_BITS, MIXED
from fusedattn.masks import EDGE, FULL, SKIP, row_interval
from fusedattn.testing import assert_within, forward_budget


def documents(batch, head, q_idx, k_idx, row_of, key_of):
    return row_of[q_idx] == key_of[k_idx]


def near(batch, head, q_idx, k_idx):
    return abs(q_idx - k_idx + 70 * head) < 24


def gaps(batch, head, q_idx, k_idx):
    """Rows 3 and 64 to 127 see no key, key 30 and keys from 96 on are seen by no row."""
    return q_idx != 3 and q_idx // 64 != 1 and k_idx != 30 and k_idx < 96


def masks(rows, keys, heads):
    """Block masks by name, blocks of all sizes."""
    places = np.arange(rows) * keys // rows // 37, np.arange(keys) // 37
    one = make_block_mask(documents, None, None, rows, keys, aux=places, block=(64, 32))
    other = make_block_mask(gaps, None, None, rows, keys, block=(64, 32))
    return {
        "documents": one,
        "of heads": make_block_mask(near, 1, heads, rows, keys, block=(32, 16)),
        "small blocks": make_block_mask(near, None, None, rows, keys, block=(5, 7)),
        "large blocks": make_block_mask(gaps, None, None, rows, keys, block=(150, 70)),
        "gaps": other,
        "joined": (one | ~other) & make_block_mask(near, 1, heads, rows, keys, block=(64, 32)),
        "not what the function says": disagreeing(rows, keys),
    }


def disagreeing(rows, keys):
    """Return a mask whose kinds are not those of its function, which counts in partial blocks."""
    mask = make_block_mask(near, None, None, rows, keys, block=(9, 8))
    kinds = np.random.default_rng(4).choice([SKIP, FULL, EDGE], mask.kinds.shape).astype(np.uint8)
    # Empty blocks come first: some tiles hold nothing else.
    return replace(mask, kinds=np.sort(kinds, axis=2))


def assert_right(arrays, emulator, **options):
    """Within the budget, and the same rows without a key."""
    options |= {"return_lse": True}
    out, lse = run.attention(*arrays, **emulator, **options)
    wide = {"out_dtype": np.float32}
    expected = attention(*arrays, backend="reference", **options | wide)
    # The budget is that of the same call with a dense mask.
    dense = options.pop("block_mask").to_mask()[0]
    options["mask"] = dense & options.get("mask", True)
    half = arrays[0].dtype
    budget = forward_budget(make_problem(*arrays, **options), rounds_weights_to=half)
    assert_within(out, expected[0], budget.out)
    assert_within(lse, expected[1], budget.lse, name="lse")
    np.testing.assert_array_equal(out[lse == -np.inf], 0)


def deep_but(names, *few):
    """Leave all but a few to the deep tests."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.deep) for name in names]


@pytest.mark.parametrize("name", deep_but(masks(9, 9, 1), "not what the function says"))
@pytest.mark.parametrize("rows", [9, pytest.param(150, marks=pytest.mark.deep)])
def test_a_block_mask_hides_what_the_reference_hides(name, rows):
    arrays = operands(rows, 110, group=2)
    assert_right(arrays, {}, causal=rows == 9, block_mask=masks(rows, 110, 2)[name])


@pytest.mark.parametrize(
    ("rows", "name"),
    [(9, "several"), *(pytest.param(70, n, marks=pytest.mark.deep) for n in ("mask", "several"))],
)
def test_a_block_mask_goes_with_every_feature(rows, name):
    options = features(rows, 100, 2)[name]
    mask = masks(rows, 100, 2)["of heads" if name == "several" else "small blocks"]
    if name == "several":
        options |= features(rows, 100, 2)["score_mod"]
        options |= {"window_size": (60, 5), "seqused_k": 93, "seqused_q": rows - 1}
    assert_right(operands(rows, 100, group=2), {}, block_mask=mask, **options)


@pytest.mark.deep
@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_the_tiles_of_a_gpu_are_right_with_a_block_mask(dims):
    mask = masks(150, 300, 1)["joined"]
    tiles = {"tile": lambda config: config}
    assert_right(operands(150, 300, *dims), tiles, causal=True, block_mask=mask)


@pytest.mark.parametrize("rows", [140, pytest.param(9, marks=pytest.mark.deep)])
def test_what_a_block_mask_hides_from_all_rows_may_hold_anything(rows):
    q, k, v = operands(rows, 110)
    clean = k.copy(), v.copy()
    k[:, 30], v[:, 30], k[:, 96:], v[:, 96:] = np.nan, np.nan, np.nan, np.nan
    options = {"block_mask": masks(rows, 110, 1)["gaps"], "return_lse": True}
    out, lse = run.attention(q, k, v, **options)
    expected = attention(q, *clean, backend="reference", **options)
    np.testing.assert_allclose(out, expected[0], atol=4e-3)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)
    assert (lse[0, 3], np.abs(out[0, 3]).max()) == (-np.inf, 0)


class Loads:
    """Notes which tiles of keys and values are loaded."""

    def __init__(self, monkeypatch):
        self.found = []
        load = memory.Shared.load_box

        def noted(shared, address, map_address, coordinates, barrier):
            if map_address > 128 and coordinates[0] == 0:  # of k and v, their first panel
                self.found.append((map_address // 128 - 1, *coordinates[1:]))
            load(shared, address, map_address, coordinates, barrier)

        monkeypatch.setattr(memory.Shared, "load_box", noted)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (150, "of heads"),
        *(pytest.param(rows, "small blocks", marks=pytest.mark.deep) for rows in (9, 150)),
        pytest.param(9, "gaps", marks=pytest.mark.deep),
    ],
)
def test_tiles_that_no_row_sees_are_not_loaded(monkeypatch, name, rows):
    q, k, v = operands(rows, 110, group=2)
    mask = masks(rows, 110, 2)[name]
    options = {"block_mask": mask, "causal": True}
    problem = make_problem(q, k, v, **options)
    config = run.small(tensor_cores.config_of(problem))
    loads = Loads(monkeypatch)
    run.attention(q, k, v, **options)
    # Which blocks of the mask a tile meets, by brute force.
    shown = np.broadcast_to(mask.kinds != SKIP, (1, 2, *mask.kinds.shape[2:]))[0]
    shown = shown.repeat(mask.block[0], 1).repeat(mask.block[1], 2)[:, :rows, :110]
    expected = []
    for heads, first, last in tiles_of_rows(config, rows):
        high = row_interval(last - 1, -(2**30), 110 - rows + 1, rows, 110)[1]
        for key in range(0, high, config.block_k):
            if shown[heads, first:last, key : key + config.block_k].any():
                expected += [(operand, key, 0, 0) for operand in (1, 2)]
    assert sorted(loads.found) == sorted(expected)
    whole = sum(len(range(0, 110, config.block_k)) for _ in tiles_of_rows(config, rows))
    assert len(expected) < 2 * whole


def tiles_of_rows(config, rows):
    """Heads and rows of each tile, of two heads that share keys."""
    if config.packed and 2 * rows <= config.block_q:
        return [(slice(0, 2), 0, rows)]
    starts = range(0, rows, config.block_q)
    return [
        (slice(head, head + 1), first, min(first + config.block_q, rows))
        for head in range(2)
        for first in starts
    ]


@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 4]), *[st.integers(1, 90)] * 2),
    block=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 32])),
    packed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_walk_is_the_tiles_that_meet_a_block_that_is_not_empty(shape, block, tile, packed, seed):
    random = np.random.default_rng(seed)
    rows, keys = shape[2:]
    sizes = (*shape[:2], -(-rows // block[0]), -(-keys // block[1]))
    kinds = random.choice([SKIP, FULL, EDGE], sizes, p=random.dirichlet([1, 1, 1]))
    mask = replace(make_block_mask(near, *shape, block=block), kinds=kinds.astype(np.uint8))
    heads = 2 if packed and shape[1] > 1 else 1
    walks = hopper_blocks.walks_of(mask, tile, heads, packed=packed)
    pairs = mask.kinds.repeat(block[0], 2).repeat(block[1], 3)[:, :, :rows, :keys]
    height = rows if packed else tile[0]
    for batch, unit, index in np.ndindex(walks.shape[:3]):
        own = pairs[batch, unit * heads : (unit + 1) * heads, index * height : (index + 1) * height]
        expected = {}
        for number, key in enumerate(range(0, keys, tile[1]), 1):
            found = set(own[..., key : key + tile[1]].ravel().tolist())
            if found != {SKIP}:
                expected[number] = found.pop() if len(found) == 1 else MIXED
        walk = walks[batch, unit, index].tolist()
        for last in range(len(walk)):
            number = last if walk[last] & KIND != SKIP else walk[last] >> KIND_BITS
            walked = {}
            while number:
                walked[number] = walk[number] & KIND
                number = walk[number] >> KIND_BITS
            assert walked == {n: kind for n, kind in expected.items() if n <= last}
            assert list(walked) == sorted(walked, reverse=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (3, 4)])
@pytest.mark.parametrize("heads", [1, 2])
def test_each_tile_of_rows_finds_its_own_walk(shape, heads):
    """The order holds three batch items of four heads, two tiles of rows each."""
    units = shape[1] // heads if shape[1] > 1 else 1
    walks = np.arange(shape[0] * units * 2 * 5, dtype=np.int32).reshape(shape[0], units, 2, 5)
    tiles = np.array([(b, h, 32 * r, 0) for b, h, r in np.ndindex(3, 4 // heads, 2)], np.int32)
    tiles[:, 1] *= heads
    order = hopper_blocks.order_with(tiles[None], walks, heads, 32)
    turns = order[: -walks.size].reshape(len(tiles), -1)
    np.testing.assert_array_equal(turns[:, :4], tiles)
    for batch, head, row, _, start, *_ in turns.tolist():
        place = min(batch, shape[0] - 1), min(head // heads, units - 1), row // 32
        np.testing.assert_array_equal(order[start // 4 :][:5], walks[place])


@pytest.mark.deep
@pytest.mark.parametrize("rows", [9, 70])
def test_each_item_of_a_batch_has_its_own_mask(rows):
    random = np.random.default_rng(3)
    q = random.standard_normal((2, 2, rows, 64)).astype(np.float16)
    k = random.standard_normal((2, 1, 110, 64)).astype(np.float16)
    mask = make_block_mask(
        lambda b, h, q, k: abs(q - k + 30 * b + 20 * h) < 20, 2, 2, rows, 110, block=(16, 24)
    )
    out = run.attention(q, k, k, block_mask=mask)
    expected = attention(q, k, k, block_mask=mask, backend="reference")
    np.testing.assert_allclose(out, expected, atol=4e-3)


def all_like_the_last(walks, axis):
    """Let all walks along an axis be the last."""
    return np.broadcast_to(walks.take([-1], axis), walks.shape).copy()


WRONG_WALKS = {
    "partial tiles pass for full ones": lambda w: w - ((w & KIND) == EDGE),
    "tiles of several kinds pass for partial ones": lambda w: w - ((w & KIND) == MIXED),
    "what is kept is the last tile": lambda w: np.where((w & KIND) != SKIP, w & KIND, w),
    "all heads walk as the last": lambda w: all_like_the_last(w, 1),
    "all rows walk as the last": lambda w: all_like_the_last(w, 2),
}


def with_another(name, function):
    """Return what makes kernels in which a function of the mask's is another one."""
    return made_wrong(
        lambda tools, op: None, lambda tools, own: function if own.__name__ == name else own
    )


WRONG_KERNELS = {
    "the function is not asked": with_another("asks", lambda *_: True),
    "all blocks are partial": with_another("kind_in", lambda *_: EDGE),
    "all blocks are those of the first row": with_another("place_of", lambda *_: 0),
    "unseen values stay": made_wrong(forgets(ptx.STORE_SHARED_ZEROS)),
}
# With which mask and how many rows they are seen; "of heads" where nothing is said.
SEEN_WITH = {
    "partial tiles pass for full ones": ("gaps", 9),
    "tiles of several kinds pass for partial ones": ("not what the function says", 9),
    "all heads walk as the last": ("of heads", 70),
    "all rows walk as the last": ("gaps", 140),
    "all blocks are partial": ("not what the function says", 9),
    "all blocks are those of the first row": ("not what the function says", 70),
    "unseen values stay": ("gaps", 9),
}


def try_with(mask, rows, **emulator):
    """Compute something with a mask."""
    q, k, v = operands(rows, 110, group=2)
    if mask == "gaps":
        v[:, 30] = np.nan  # no row sees it
    assert_right((q, k, v), emulator, block_mask=masks(rows, 110, 2)[mask])


@pytest.mark.parametrize("name", deep_but([*WRONG_WALKS, *WRONG_KERNELS], "all blocks are partial"))
def test_mistakes_with_blocks_are_seen(monkeypatch, name):
    walks_of, change = hopper_blocks.walks_of, WRONG_WALKS.get(name)
    if change is not None:
        monkeypatch.setattr(hopper_blocks, "walks_of", lambda *a, **b: change(walks_of(*a, **b)))
    emulator = {"made": WRONG_KERNELS[name]} if name in WRONG_KERNELS else {}
    with pytest.raises(AssertionError):
        try_with(*SEEN_WITH.get(name, ("of heads", 9)), **emulator)


@pytest.mark.deep
@pytest.mark.parametrize("case", sorted({("of heads", 9), *SEEN_WITH.values()}))
def test_what_has_no_mistake_with_blocks_passes(case):
    try_with(*case)


class InOrder:
    """No chance: nobody's priority changes, and the warps of the last warpgroup come last."""

    def __init__(self, seed):
        pass

    def shuffle(self, agents):
        agents += [agents.pop(8) for _ in range(4)]

    def random(self):
        return 0.5


def test_a_warpgroup_may_be_ahead_of_the_other_as_far_as_it_can(monkeypatch):
    """Tiles that both tell each other of come after one at which they do not meet."""
    q, k, v = operands(128, 160, 128, 128)
    v[:, 70] = np.nan
    monkeypatch.setattr(machine, "_CHANGE", 0)
    monkeypatch.setattr(machine, "random", SimpleNamespace(Random=InOrder))
    mask = make_block_mask(
        lambda b, h, q, k: k != 70 and (k != 150 if q >= 64 else k != 86),
        *(None, None, 128, 160),
        block=(128, 32),
    )
    assert mask.draw() == "##+#+"
    assert_right((q, k, v), {}, block_mask=mask)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(6))
def test_who_comes_first_does_not_matter_with_a_block_mask(seed):
    """What is told of a tile of keys stays until all have read it."""
    arrays, mask = operands(150, 300), masks(150, 300, 1)["small blocks"]
    assert_right(arrays, {"schedule": seed}, block_mask=mask)


def test_the_choice_of_a_kernel_says_who_takes_block_masks(monkeypatch):
    where = SimpleNamespace(capability=(9, 0), has_pools=True, chip="sm_90a")
    monkeypatch.setattr(driver, "device", lambda ordinal: where)
    monkeypatch.setattr(compiler, "chosen_name", lambda: "numba-cuda-mlir")
    mask = make_block_mask(near, None, None, 40, 40)
    half, single = (np.zeros((1, 40, 128), dtype) for dtype in (np.float16, np.float32))
    (told,) = backend.CUDA.describe(make_problem(half, half, half, block_mask=mask))
    assert told == "Hopper kernel, sm_90a, compiled by numba-cuda-mlir, tiles of 128 x 128"
    *_, told = backend.CUDA.describe(make_problem(single, single, single, block_mask=mask))
    assert told == "not the Hopper kernel: block_mask is not implemented in it"


def test_a_launch_is_given_the_kinds_of_the_mask_and_what_its_function_reads(monkeypatch):
    launched, uploads = [], {}

    def upload(where, array, stream=0):
        uploads[16 * len(uploads) + 16] = array
        return SimpleNamespace(address=16 * len(uploads))

    function = SimpleNamespace(launch=lambda *arguments: launched.append(arguments))
    where = SimpleNamespace(multiprocessors=4, function=lambda *arguments: function)
    tools = SimpleNamespace(array_words=lambda address, length, size: (address,))
    monkeypatch.setattr(driver, "upload", upload)
    monkeypatch.setattr(tensor_cores, "encode", lambda *_: bytes(128))
    monkeypatch.setattr(compiler, "toolchain", lambda: tools)
    mask = masks(150, 110, 2)["documents"]
    q, k, v = operands(150, 110, group=2)
    problem = make_problem(q, k, v, block_mask=mask, out=np.empty_like(q))
    prepared = tensor_cores.Prepared(problem, where)
    prepared.run(dict.fromkeys(("q", "k", "v", "out"), 16), 0)
    words = np.frombuffer(launched[0][3]._buffer, np.int64)
    given = [uploads[address] for address in words[-4:]]
    np.testing.assert_array_equal(given[0], mask.kinds.ravel())
    assert given[1][:5].tolist() == [0, 0, mask.kinds.shape[3], *mask.block]
    for array, aux in zip(given[2:], mask.predicate.leaf.aux, strict=True):
        np.testing.assert_array_equal(array, aux)
    order = uploads[words[6]]
    tile = tensor_cores.config_of(problem)
    walks = hopper_blocks.walks_of(mask, (tile.block_q, tile.block_k), 1, packed=False)
    turns = order[: order.size - walks.size].reshape(-1, 8)
    turns = turns[turns[:, 0] >= 0]
    assert len(turns) == 2 * walks.shape[2] > 2
    for _, _, row, _, start, *_ in turns.tolist():
        found = order[start // 4 :][: walks.shape[3]]
        np.testing.assert_array_equal(found, walks[0, 0, row // tile.block_q])
