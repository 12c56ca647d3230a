"""The exact Hopper kernel keeps the laws, in an emulator of its PTX; no GPU needed."""

import numpy as np
import pytest
from hopper_emulator import matrix, run_exact
from hypothesis import settings

from fusedattn.cuda import exact
from fusedattn.testing import EVERYTHING
from fusedattn.testing.suite import make_suite

FEATURES = {"mask", "bias", "alibi_slopes", "softcap", "sinks", "dropout_p", "seed"}
OTHERS = {"full_range", "score_mod", "score_mod_aux", "block_mask", "hidden_nan"}
# What TestExact in test_cuda_gpu.py promises of the kernel on a GPU.
PROMISES = EVERYTHING - OTHERS - FEATURES
EXAMPLES = max(1, settings().max_examples // 60)


@pytest.fixture(autouse=True)
def _sums_are_cut_off(monkeypatch):
    """Let the matrix unit add as badly as it may."""
    monkeypatch.setattr(matrix.Warpgroup, "add_up", staticmethod(matrix.cut_off))


def small(problem):
    reasons = exact.unsupported(problem)
    rows = problem.batch_size * problem.num_heads * -(-problem.seqlen_q // 128)
    if rows > 8 or rows * problem.seqlen_k > 300:
        reasons.append("takes too long in the emulator")
    return "; ".join(reasons) or None


TestExact = make_suite(
    run_exact.attention,
    supports=PROMISES,
    dtypes=("float32",),
    bitwise=True,
    domain=small,
    max_examples=EXAMPLES,
)
