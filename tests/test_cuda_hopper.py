"""The Hopper kernel keeps the laws, in an emulator of its PTX; no GPU needed."""

from dataclasses import replace

import numpy as np
import pytest
from cpu_backend import assert_same_bits
from cuda_promises import HOPPER
from hopper_emulator import run
from hypothesis import settings

import fusedattn
from fusedattn.cuda import tensor_cores
from fusedattn.testing.suite import make_suite

EXAMPLES = max(1, settings().max_examples // 60)


def small(problem):
    held = {name: np.array(getattr(problem, name), order="C") for name in ("q", "k", "v")}
    reasons = tensor_cores.unsupported(replace(problem, **held, out=None))
    rows = problem.batch_size * problem.num_heads * -(-problem.seqlen_q // 128)
    if rows > 8 or rows * problem.seqlen_k > 600 or problem.head_dim > 128:
        reasons.append("takes too long in the emulator")
    return "; ".join(reasons) or None


TestHopper = make_suite(
    run.attention,
    supports=HOPPER,
    dtypes=("bfloat16", "float16"),
    bitwise=True,
    domain=small,
    max_examples=EXAMPLES,
)


def operands(rows, keys, dim=64, dim_v=64, dtype=np.float16, heads=1, group=1):
    random = np.random.default_rng(7)
    shapes = (heads * group, rows, dim), (heads, keys, dim), (heads, keys, dim_v)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def assert_right(arrays, *, emulator, **options):
    options |= {"return_lse": True}
    out, lse = run.attention(*arrays, **emulator, **options)
    expected = fusedattn.attention(*arrays, backend="reference", **options)
    np.testing.assert_allclose(out, expected[0], atol=4e-3)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.deep), True])
def test_the_tiles_of_a_gpu_are_right_as_well(causal):
    assert_right(operands(70, 300), causal=causal, emulator={"tile": lambda config: config})


# The heads of a group in one tile; their keys in splits; tiles of one head, some without a key.
@pytest.mark.parametrize(("rows", "keys", "group"), [(30, 100, 3), (5, 150, 4), (150, 20, 2)])
def test_rows_and_keys_are_shared_out_right(rows, keys, group):
    assert_right(operands(rows, keys, heads=2, group=group), emulator={}, causal=True)


def placed(shape, dtype, bytes_apart):
    """An array whose rows begin so many bytes past multiples of 16, one after the other."""
    *others, dim = shape
    row = dim + (16 + bytes_apart) // dtype.itemsize
    flat = np.zeros(np.prod(others) * row + 16, dtype)
    first = -flat.ctypes.data % 16 // dtype.itemsize
    return flat[first:][: np.prod(others) * row].reshape(*others, row)[..., :dim]


# Whole tiles, rows of several heads, rows without a key, keys in splits, head dims that end within
# the columns that four threads write at once.
@pytest.mark.parametrize(
    ("rows", "keys", "dim_v", "group"), [(70, 60, 72, 1), (20, 90, 64, 3), (5, 40, 40, 4)]
)
def test_where_rows_of_out_begin_changes_no_bit(rows, keys, dim_v, group):
    q, k, v = operands(rows, keys, dim_v=dim_v, heads=2, group=group)
    shape = (*q.shape[:-1], dim_v)
    results = []
    for apart in (0, 4, 8):
        out = placed(shape, q.dtype, apart)
        run.attention(q, k, v, causal=True, q_offset=9 - rows // 2, out=out)
        problem = fusedattn.make_problem(q, k, v, out=out)
        assert tensor_cores.config_of(problem).vectors == (apart == 0)
        results.append(out)
    expected = fusedattn.attention(
        q, k, v, causal=True, q_offset=9 - rows // 2, backend="reference"
    )
    np.testing.assert_allclose(results[0], expected, atol=4e-3)
    for other in results[1:]:
        assert_same_bits((other,), (results[0],))


def features(rows, keys, heads):
    """Options by name, none of them a multiple of anything."""
    random = np.random.default_rng(3)
    mask = random.random((rows, keys)) < 0.6
    mask[:, 30], mask[5] = False, False
    bias = random.standard_normal((heads, rows, keys)).astype(np.float16)
    bias[..., 40] = -np.inf
    slopes, sinks = random.random((2, heads)).astype(np.float32)
    alone = {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sinks": sinks},
        "bias": {"bias": bias},
        "bias of doubles": {"bias": bias.astype(np.float64)[0]},
        "mask": {"mask": mask},
        "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
        "score_mod": {"score_mod": lambda s, b, h, q, k: s * 0.5 + 0.01 * (q - k) * (h + 1)},
    }
    several = {
        key: value
        for name, one in alone.items()
        if name not in ("bias of doubles", "score_mod")
        for key, value in one.items()
    }
    return alone | {"several": several}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mask", "several") else pytest.param(name, marks=pytest.mark.deep)
        for name in features(6, 41, 1)
    ],
)
@pytest.mark.parametrize("rows", [9, pytest.param(70, marks=pytest.mark.deep)])
def test_features_are_right_together_and_alone(name, rows):
    q, k, v = operands(rows, 100, group=2)
    if name == "mask":
        v[:, 30] = np.nan  # no row sees it
    options = features(rows, 100, 2)[name]
    assert_right((q, k, v), emulator={}, causal=name == "several", **options)


# Tiles without a key, keys in splits, and rows without a key in a tile that has some.
@pytest.mark.parametrize(
    ("rows", "keys"),
    [(5, 20), *(pytest.param(*sizes, marks=pytest.mark.deep) for sizes in [(5, 70), (150, 9)])],
)
def test_a_sink_that_is_not_finite_makes_rows_nan_whether_they_see_keys_or_not(rows, keys):
    q, k, v = operands(rows, keys, group=4)
    options = {"sinks": np.array([np.nan, np.inf, -np.inf, 1], np.float32), "return_lse": True}
    for lengths in ({"seqused_k": 0}, {"q_offset": 2 - rows}):
        options |= {"seqused_q": rows - 1, "causal": True, **lengths}
        out, lse = run.attention(q, k, v, **options)
        expected = fusedattn.attention(q, k, v, backend="reference", **options)
        np.testing.assert_allclose(out, expected[0], atol=4e-3)
        np.testing.assert_allclose(lse, expected[1], atol=1e-5)
        assert np.isnan(lse).mean() == 0.5 * (rows - 1) / rows


@pytest.mark.deep
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (256, 256)])
def test_all_tiles_of_a_gpu_are_right(dims):
    assert_right(
        operands(300, 400, *dims, heads=2), causal=True, emulator={"tile": lambda config: config}
    )


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(16))
def test_who_comes_first_does_not_matter(seed):
    arrays = operands(140, 170)
    first = run.attention(*arrays, causal=True, return_lse=True, schedule=0)
    assert_same_bits(run.attention(*arrays, causal=True, return_lse=True, schedule=seed), first)
