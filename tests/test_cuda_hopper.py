"""The Hopper kernel keeps the laws, in an emulator of its PTX; no GPU needed."""

from dataclasses import replace

import numpy as np
import pytest
from hopper_emulator import run
from hypothesis import settings

from fusedattn.cuda import tensor_cores
from fusedattn.testing import EVERYTHING
from fusedattn.testing.suite import make_suite

FEATURES = {"mask", "bias", "alibi_slopes", "softcap", "sinks", "dropout_p", "seed"}
OTHERS = {"full_range", "score_mod", "score_mod_aux", "block_mask", "hidden_nan"}
# What TestHopper in test_cuda_gpu.py promises of the kernel on a GPU.
PROMISES = (EVERYTHING - OTHERS - FEATURES) | {"half_weights"}
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
    supports=PROMISES,
    dtypes=("bfloat16", "float16"),
    bitwise=True,
    domain=small,
    max_examples=EXAMPLES,
)
