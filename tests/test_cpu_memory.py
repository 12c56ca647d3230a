"""Working memory is a few tiles per thread, however long the sequences and whatever the options."""

import tracemalloc

import numpy as np
import pytest
from cpu_backend import normal, python

from fusedattn import attention, warmup

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
q, k, v = (rng.standard_normal((1, 2, length, 64), np.float32) for _ in range(3))
out = np.zeros_like(q)
options = {
    "full": {},
    "mask": {"mask": np.arange(length) % 3 != 0},
    "bias": {"bias": np.linspace(0, 1, length, dtype=np.float16)},
    "dropout": {"dropout_p": 0.3, "seed": 1},
    "half": {},
    "rescue": {},
}[option]
if option == "half":
    q, k, v, out = (x.astype(np.float16) for x in (q, k, v, out))
if option == "rescue":
    v[:, :, -1] = np.inf
    options["causal"] = True
small = {name: x[..., :100] if isinstance(x, np.ndarray) else x for name, x in options.items()}
for rows in (8, 100):  # compile, start threads, touch every buffer
    fusedattn.attention(q[:, :, :rows], k[:, :, :100], v[:, :, -100:], **small)
fusedattn.set_num_threads(2)
fusedattn.attention(q[:, :, :1500], k[:, :, :1500], v[:, :, :1500], out=out[:, :, :1500])
# The peak so far may lie above what is in use now: reach it exactly, then see what is added.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
fusedattn.attention(q, k, v, out=out, **options)
print(peak() - before)
"""


@pytest.mark.parametrize("option", ["full", "mask", "bias", "dropout", "half", "rescue"])
def test_peak_memory_does_not_grow_with_the_length(option):
    length = 16384 if option == "full" else 6000
    extra = int(python(PEAK, length, option))
    # 2 MiB for each thread; one row of scores for each query would be 1 GiB, or 144 MiB.
    assert extra <= 4 * 2**20, f"{extra / 2**20:.1f} MiB"


LENGTH = 3000
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 100)},
    "mask of the keys": {"mask": np.arange(LENGTH) % 2 == 0},
    "mask of the rows": {"mask": np.arange(LENGTH)[:, None] % 2 == 0},
    "bias of one number": {"bias": np.float16([0.5])},
    "bias of the keys": {"bias": normal(0, LENGTH, dtype=np.float64)},
    "bias of the rows": {"bias": normal(0, LENGTH, 1)},
    "alibi": {"alibi_slopes": np.float16([0.5, 1.0])},
    "sinks": {"sinks": np.float16([0.5, 1.0])},
    "lengths": {"seqused_q": 700, "seqused_k": 900},
    "dropout": {"dropout_p": 0.5, "seed": 3},
    "softcap": {"softcap": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_array_of_the_size_of_a_sequence_is_made(set_threads, options):
    """Python's allocations of a call, all threads' together: tiles and tables, no copies."""
    q, k, v = normal(0, 2, LENGTH, 16), normal(1, 2, LENGTH, 16), normal(2, 2, LENGTH, 16)
    out = np.zeros_like(q)
    swapped = [np.asfortranarray(x) for x in (q, k, v)]
    half = [x.astype(np.float16) for x in (q, k, v)]
    set_threads(2)
    warmup(dtypes=["float16"])  # compiling takes more
    attention(q, k, v, **options)
    for arrays, place in (((q, k, v), out), (swapped, out), (half, out.astype(np.float16))):
        tracemalloc.start()
        attention(*arrays, **options, out=place)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Larger tiles of another type may be new; half a copy of q would be 190 KiB more.
        assert peak < 2 * 2**20, peak
    peaks = []
    for _ in range(3):  # a thread that takes part for the first time allocates its working memory
        tracemalloc.start()
        attention(q, k, v, **options, out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 32 * 2**10, peaks


def test_many_small_batch_items_take_a_few_words_each():
    batch = 20_000
    q = np.zeros((batch, 1, 1, 4), np.float32)
    out = np.zeros_like(q)
    attention(q[:10], q[:10], q[:10])
    tracemalloc.start()
    attention(q, q, q, out=out, seqused_k=np.ones(batch, np.int64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * batch, peak
