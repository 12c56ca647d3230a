"""The portable CUDA kernel keeps the laws, in Numba's simulator; no GPU needed."""

import importlib
import time
import types

import numpy as np
import pytest
from hypothesis import settings

import fusedattn
from fusedattn.cuda import compiler
from fusedattn.testing import EVERYTHING
from fusedattn.testing.suite import make_suite

DTYPES = ("float32", "float16", "bfloat16", "float64")
# V up to the largest number would need the rescue of rows that the CPU has; the rest is promised.
PROMISES = EVERYTHING - {"full_range"}
# The simulator takes a thousand times as long as a CPU.
EXAMPLES = max(1, settings().max_examples // 60)


def simulated(q, k, v, **keywords):
    """`attention` in the simulator."""
    return fusedattn.attention(q, k, v, backend="cuda", **keywords)


def small(problem):
    """Shapes of a few tiles."""
    rows = problem.batch_size * problem.num_heads * problem.seqlen_q
    keys = problem.batch_size * problem.num_heads * problem.seqlen_k
    if max(rows, keys) > 72 or max(problem.head_dim, problem.head_dim_v) > 33:
        return "takes too long in the simulator"
    return None


@pytest.fixture(autouse=True)
def _simulator(monkeypatch):
    monkeypatch.setenv("FUSEDATTN_CUDA_COMPILER", "simulator")


TestSimulator = make_suite(
    simulated,
    supports=PROMISES,
    dtypes=DTYPES,
    bitwise=True,
    domain=small,
    max_examples=EXAMPLES,
)


def test_threads_of_a_block_share_their_arrays(monkeypatch):
    tools = compiler.toolchain()
    cuda, found = tools.cuda, []

    def slow(*arguments):
        time.sleep(1e-3)  # others run meanwhile
        return np.empty(*arguments)

    slowly = types.ModuleType("numpy")
    slowly.__dict__.update(np.__dict__, empty=slow)
    monkeypatch.setattr(importlib.import_module("numba.cuda.simulator.kernelapi"), "np", slowly)

    def kernel(out):
        found.append(cuda.shared.array(4, np.int64))
        cuda.syncthreads()

    tools.cuda.jit(tools.quiet(kernel))[1, 8](np.zeros(1))
    assert len(found) == 8
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize("seqlen_k", [0, 3])
def test_a_sink_that_is_not_finite_makes_rows_nan_whether_they_see_keys_or_not(seqlen_k):
    q, k = np.ones((4, 3, 2), np.float32), np.ones((4, 3, 2), np.float32)
    options = {"sinks": np.array([np.nan, np.inf, -np.inf, 1], np.float32), "return_lse": True}
    options |= {"seqused_k": seqlen_k, "causal": True, "seqused_q": 2}
    got = simulated(q, k, k, **options)
    expected = fusedattn.attention(q, k, k, backend="reference", **options)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.isnan(got[1]).sum() == 4
