"""Working memory of the gradients grows with the length of the sequences, not with its square."""

import tracemalloc

import numpy as np
import pytest
from cpu_backend import came_back, normal, python

from fusedattn import attention_backward

PEAK = """
import sys
import numpy as np
import fusedattn

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

length, option = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
d_out, q, k, v = (rng.standard_normal((1, 2, length, 64), np.float32) for _ in range(4))
options = {
    "full": {},
    "mask": {"mask": np.arange(length) % 3 != 0},
    "bias": {"bias": np.linspace(0, 1, length, dtype=np.float16), "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "seed": 1},
    "half": {},
    "rescue": {"causal": True},
}[option]
if option == "half":
    d_out, q, k, v = (x.astype(np.float16) for x in (d_out, q, k, v))
fusedattn.set_num_threads(2)
def prepared(rows):
    part = [x[:, :, :rows] for x in (d_out, q, k, v)]
    cut = {name: x[:rows] if name in ("mask", "bias") else x for name, x in options.items()}
    out, lse = fusedattn.attention(*part[1:], **cut, return_lse=True)
    if option == "rescue":  # every row needs another look
        part[2][:, :, -1] = np.nan
    return (*part, out, lse), cut
small, cut = prepared(256)  # of the same tile
fusedattn.attention_backward(*small, **cut)  # compiles
if option == "rescue":
    k[:, :, 255] = 0
large, cut = prepared(length)
before = peak()
fusedattn.attention_backward(*large, **cut)
print(peak() - before)
"""


@pytest.mark.deep
@pytest.mark.parametrize("option", ["full", "mask", "bias", "dropout", "half", "rescue"])
def test_peak_memory_grows_with_the_length(option):
    length = {"full": 8000, "rescue": 2000}.get(option, 4000)
    extra = int(python(PEAK, length, option))
    operand = 4 * 2 * length * 64
    # Three gradients, packed q and d_out, a sum of d_q, tables; 2 MiB for each thread. A byte for
    # each score would be 15 to 60 operands.
    assert extra <= 7 * operand + 4 * 2**20, f"{extra / operand:.1f} operands"


LENGTH = 2000
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 100)},
    "mask of the keys": {"mask": np.arange(LENGTH) % 2 == 0},
    "bias of one number": {"bias": np.float16([0.5])},
    "bias of the keys": {"bias": normal(0, LENGTH, dtype=np.float64)},
    "bias of the rows": {"bias": normal(0, 2, LENGTH, 1)},
    "alibi": {"alibi_slopes": np.float16([0.5, 1.0])},
    "sinks": {"sinks": np.float16([0.5, 1.0])},
    "lengths": {"seqused_q": 700, "seqused_k": 900},
    "dropout": {"dropout_p": 0.5, "seed": 3},
    "softcap": {"softcap": 3.0},
    "large": {"scale": 1e6},
}


def lowest_peak(given, keywords, calls):
    """Most that a call allocates, once every thread that takes part has its working memory.

    A thread allocates that, and keeps it, when it first finds something to do.
    """
    peaks = []
    for _ in range(calls + 1):
        tracemalloc.start()
        attention_backward(*given, **keywords)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_array_of_the_size_of_the_scores_is_made(set_threads, options):
    """Python's allocations of a call, all threads' together."""
    q, k, v = (normal(i, 2, LENGTH, 16) for i in range(3))
    given, keywords = came_back(q, k, v, **options)
    set_threads(2)
    peak = lowest_peak(given, keywords, calls=2)
    # Rows are narrow here, so the tables weigh more. A byte for each score would be 8 MB.
    assert peak < 16 * q.nbytes, peak / q.nbytes


def test_a_thread_more_costs_tiles_and_no_sum_of_its_own(set_threads):
    q, k, v = (normal(i, 2, 3000, 64) for i in range(3))
    given, keywords = came_back(q, k, v)
    peaks = []
    for count in (1, 4):
        set_threads(count)
        peaks.append(lowest_peak(given, keywords, calls=8))
    assert peaks[1] < peaks[0] + 2**16
