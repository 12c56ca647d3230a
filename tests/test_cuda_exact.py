"""The exact Hopper kernel keeps the laws, in an emulator of its PTX; no GPU needed."""

from types import SimpleNamespace

import numpy as np
import pytest
from cpu_backend import assert_same_bits
from hopper_emulator import matrix, run_exact
from hopper_emulator.machine import REGISTERS, WARPGROUP
from hypothesis import settings

import fusedattn
from fusedattn.cuda import backend, exact, hopper, hopper_exact, ptx
from fusedattn.problem import make_problem
from fusedattn.testing import EVERYTHING, assert_within, forward_budget
from fusedattn.testing.suite import make_suite

FEATURES = {"mask", "bias", "alibi_slopes", "softcap", "sinks", "dropout_p", "seed"}
OTHERS = {"full_range", "score_mod", "score_mod_aux", "block_mask", "hidden_nan"}
# What TestExact in test_cuda_gpu.py promises of the kernel on a GPU.
PROMISES = EVERYTHING - OTHERS - FEATURES
EXAMPLES = max(1, settings().max_examples // 20)
# All that the choice of a kernel looks at.
HOPPER = SimpleNamespace(capability=(9, 0))
CONFIGS = [
    hopper_exact.Config(dims, dims, *tile, vectors=True, pairs=True, registers=exact._REGISTERS)
    for dims, tile in exact._TILES.items()
]


@pytest.fixture(autouse=True)
def _sums_are_cut_off(monkeypatch):
    """Let the matrix unit add as badly as it may."""
    monkeypatch.setattr(matrix.Warpgroup, "add_up", staticmethod(matrix.cut_off))


def within(most):
    """Calls of so many keys for each tile of rows."""

    def domain(problem):
        reasons = exact.unsupported(problem)
        rows = problem.batch_size * problem.num_heads * -(-problem.seqlen_q // 128)
        if rows > most // 25 or rows * problem.seqlen_k > most:
            reasons.append("takes too long in the emulator")
        return "; ".join(reasons) or None

    return domain


def suite(most, **options):
    return make_suite(
        run_exact.attention,
        supports=PROMISES,
        dtypes=("float32",),
        bitwise=True,
        domain=within(most),
        **options,
    )


TestExact = pytest.mark.deep(suite(300, max_examples=EXAMPLES))
# What a mistake in the kernel breaks first.
TestBriefly = suite(
    100,
    max_examples=2,
    laws=(
        "equals_reference",
        "unseen_keys_do_not_matter",
        "nan_reaches_the_output",
        "memory_layout_does_not_matter",
        "rows_without_keys",
    ),
)


def operands(rows, keys, dim=64, dim_v=64, heads=1, group=1):
    random = np.random.default_rng(7)
    shapes = (heads * group, rows, dim), (heads, keys, dim), (heads, keys, dim_v)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_right(arrays, *, tile=run_exact.small, **options):
    """Within the budget of float32."""
    out, lse = run_exact.attention(*arrays, tile=tile, return_lse=True, **options)
    wide = (array.astype(np.float64) for array in arrays)
    expected = fusedattn.attention(*wide, backend="reference", return_lse=True, **options)
    budget = forward_budget(make_problem(*arrays, **options))
    assert_within(out, expected[0], budget.out)
    assert_within(lse, expected[1], budget.lse, name="lse")


def as_on_a_gpu(config):
    return config


def test_the_tiles_of_a_gpu_are_right_as_well():
    assert_right(operands(70, 90), causal=True, tile=as_on_a_gpu)


@pytest.mark.deep
@pytest.mark.parametrize("dims", [(128, 128), (96, 40), (50, 127)])
def test_all_tiles_of_a_gpu_are_right(dims):
    assert_right(operands(150, 200, *dims, heads=2, group=2), causal=True, tile=as_on_a_gpu)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(1, 16))
def test_who_comes_first_does_not_matter(seed):
    arrays = operands(140, 40)
    first = run_exact.attention(*arrays, causal=True, return_lse=True, seed=0)
    again = run_exact.attention(*arrays, causal=True, return_lse=True, seed=seed)
    assert_same_bits(again, first)


@pytest.mark.parametrize("exponent", [pytest.param(-20, marks=pytest.mark.deep), 0, 20])
def test_every_product_of_parts_counts(exponent):
    # Few keys, and no sum whose terms cancel: what is left out shows.
    q, k, v = (np.abs(array) for array in operands(64, 3, 16, 16))
    q, k, v = np.ldexp(q, exponent), np.ldexp(k, -exponent), np.ldexp(v, exponent)
    assert_right([q, k, v])
    wide = [array.astype(np.float64) for array in (q, k, v)]
    expected = fusedattn.attention(*wide, backend="reference")
    error = (run_exact.attention(q, k, v) - expected) / expected
    assert np.sqrt(np.mean(error**2)) < 2.0**-23


def test_the_largest_numbers_are_not_rounded_to_infinity():
    q, k, v = operands(5, 7, 8, 8)
    top = np.finfo(np.float32).max
    q[:, :, 0], k[:, :, 0] = 2.0**-130, np.copysign(top, k[:, :, 0])
    v[0, 3] = top / 32
    assert_right([q, k, v])


def test_scores_of_infinite_elements_follow_ieee_arithmetic():
    q, k, v = operands(6, 20, 8, 8)
    q[0, :, 3] = [1, -1, 2, -3, 0, 5]
    k[0, 17, 3] = -np.inf  # weighs nothing where q is positive; +inf and NaN for other rows
    out, lse = run_exact.attention(q, k, v, return_lse=True)
    wide = (array.astype(np.float64) for array in (q, k, v))
    expected = fusedattn.attention(*wide, backend="reference", return_lse=True)
    seen = q[0, :, 3] > 0
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), ~seen)
    np.testing.assert_allclose(out[0, seen], expected[0][0, seen], rtol=1e-5)
    np.testing.assert_allclose(lse[0, seen], expected[1][0, seen], rtol=1e-6)
    assert np.isnan(lse[0, ~seen]).all()


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 2, 100, 64), {}, None),
        ((1, 2, 100, 33), {"causal": True, "window_size": (9, None), "q_offset": 5}, None),
        ((1, 2, 16, 64), {}, "keys are split"),
        ((1, 2, 100, 129), {}, "head dims beyond 128"),
        ((1, 2, 100, 64), {"softcap": 3.0}, "softcap is not implemented in it"),
        ((1, 2, 100, 64), {"scale": -1.0}, "scale is not positive"),
        ((1, 2, 0, 64), {}, "there are no keys"),
    ],
)
def test_plain_problems_take_the_kernel(shape, options, reason):
    problem = make_problem(*[np.zeros(shape, np.float32)] * 3, **options)
    said = "; ".join(backend.not_tensor_cores(problem, HOPPER))
    assert reason in said if reason else not said


@pytest.mark.parametrize("config", CONFIGS)
def test_a_block_gets_the_memory_and_the_registers_it_asks_for(config):
    assert config.shared <= hopper.SHARED_LIMIT
    few, many = config.registers
    held = REGISTERS // config.threads // 8 * 8 * config.threads
    assert WARPGROUP * (few + hopper_exact.WARPGROUPS * many) <= held


@pytest.mark.parametrize("config", CONFIGS)
def test_six_products_of_parts_are_computed(config):
    scores = ptx.part_products(config.block_k, config.dims, 1024, 1024, 1024).text
    outputs = ptx.part_accumulate(config.dims_v, config.block_k, 1024).text
    # One of the first takes three parts of the keys at once.
    assert scores.count(f"m64n{3 * config.block_k}k16") == config.dims // 16
    assert scores.count(f"m64n{config.block_k}k16") == 3 * config.dims // 16
    assert outputs.count("wgmma.mma_async") == 6 * config.block_k // 16
