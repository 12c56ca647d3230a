"""The first call: seconds where it has to compile, less than one where the cache serves it."""

import os

import pytest
from cpu_backend import python

# Processor time of a whole process, in seconds, so that a busy machine makes no difference: nearly
# twice what it takes on the machines it was written on. Compiling once for each dtype or layout
# takes more, and so does loading Numba to find that there is nothing to compile.
COLD, CACHED = 6.0, 0.8

CALL = """
import os
import numpy as np
import fusedattn
q = np.ones((1, 8, 512, 64), np.float32)
fusedattn.attention(q, q, q)
times = os.times()
print(times.user + times.system)
"""


@pytest.mark.skipif(not hasattr(os, "times"), reason="needs processor times")
def test_the_first_call_takes_seconds_and_the_next_process_less(tmp_path):
    cold = float(python(CALL, FUSEDATTN_CACHE_DIR=tmp_path))
    cached = min(float(python(CALL, FUSEDATTN_CACHE_DIR=tmp_path)) for _ in range(2))
    assert cold < COLD
    assert cached < CACHED


def test_other_shapes_strides_and_options_need_no_compiler():
    """One worker serves all; what an option needs besides is a small module of its own."""
    code = """
import time
import numpy as np
import fusedattn
from fusedattn.cpu import compile

fusedattn.warmup(dtypes=["float32"])

def refuse(*_):
    raise AssertionError("compiled again")

compile.compile_module = refuse
rng = np.random.default_rng(0)
for shape in ((3, 4), (2, 3, 4), (1, 2, 3, 4), (2, 1, 2, 3, 4), (1, 700, 64), (1, 1, 576)):
    x = rng.standard_normal((*shape[:-2], 1, *shape[-2:]), np.float32)
    for y in (x, x[..., ::-1], np.asfortranarray(x), np.broadcast_to(x[..., :1], x.shape)):
        fusedattn.attention(y, y, y, causal=True)
        fusedattn.attention(y, y, y, window_size=(2, 0), softcap=2.0, return_lse=True)
        fusedattn.attention(y, y, y, mask=np.ones(x.shape[-2], bool), dropout_p=0.5, seed=1)
        fusedattn.attention(y, y, y, bias=np.zeros(1), alibi_slopes=np.ones(1), sinks=np.ones(1))
"""
    assert python(code) == ""
