"""Ctrl-C: heard at once, whatever is computed or compiled, and everything works afterwards."""

import random
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal, python

from fusedattn import attention
from fusedattn.cpu import threads

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")

# Many seconds of work; a longer wait than this after Ctrl-C would be noticed.
SECONDS = 0.5


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(threads, "_num_threads", 2)


def is_inside(frame):
    """Whether a frame belongs to a call of the library."""
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("fusedattn"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def interrupts(*moments):
    """KeyboardInterrupt after each of so many seconds; the block must end with one.

    All of them come inside of the library: the way out of this block must not meet the second.
    """
    left, fired = list(moments), []

    def fire(_, frame):
        if fired is not None and not is_inside(frame):
            signal.setitimer(signal.ITIMER_REAL, 1e-5)
        elif fired is not None:
            begun = left.pop(0) if left else 0.0
            # Python swallows what is raised in the midst of a weak reference's callback: again.
            signal.setitimer(signal.ITIMER_REAL, left[0] - begun if left else 2.0)
            fired.append(time.perf_counter())
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, fire)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            try:
                signal.setitimer(signal.ITIMER_REAL, moments[0])
                yield
            finally:
                last, fired = fired, None
        assert time.perf_counter() - last[-1] < SECONDS
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


LONG = {
    "full": {},
    "causal mask": {"causal": True, "mask": np.ones((1, 20_000), bool)},
    "exact path": {"scale": 2.0**101},
    "half types": {"dtype": np.float16},
    "rescue": {"poison": np.nan},
    "dropout": {"dropout_p": 0.5, "seed": 1},
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_a_long_call_ends_at_once_and_leaves_out_alone(monkeypatch, options, count):
    monkeypatch.setattr(threads, "_num_threads", count)
    options = dict(options)
    q, k, v = (np.broadcast_to(normal(i, 1, 20_000, 64), (8, 20_000, 64)) for i in range(3))
    if "dtype" in options:
        q, k, v = (x.astype(options["dtype"]) for x in (q, k, v))
        del options["dtype"]
    if "poison" in options:  # each row sees it in one column alone
        v = v.copy()
        v[:, 0, 3] = options.pop("poison")
    few = [x[:, :150] for x in (q, k, v)]
    expected = attention(*few, **{**options, "mask": None})  # compiles, too
    out = np.zeros(q.shape, q.dtype)
    with interrupts(0.15):
        attention(q, k, v, out=out, **options)
    left = out.copy()
    time.sleep(0.02)
    assert_same_bits(out, left)
    assert_same_bits(attention(*few, **{**options, "mask": None}), expected)


def test_an_interrupt_at_any_moment_leaves_the_pool_usable():
    """Also a second one, while the first is being dealt with."""
    rng = random.Random(0)
    sizes = {300: 0.002, 700: 0.01, 2000: 0.05}
    inputs = {n: [normal(i, 1, 4, n, 64) for i in range(3)] for n in sizes}
    expected = {n: attention(*inputs[n]) for n in sizes}
    for _ in range(100):
        n = rng.choice(list(sizes))
        first = rng.random() * sizes[n]
        moments = [1e-5 + first] if rng.random() < 0.6 else [1e-5 + first, 2e-3 + first]
        out = np.zeros_like(inputs[n][0])
        with interrupts(*moments):
            while True:
                attention(*inputs[n], out=out)
        left = out.copy()
        time.sleep(0.001)
        assert_same_bits(out, left)
    for n in sizes:
        assert_same_bits(attention(*inputs[n]), expected[n])


WHILE_COMPILING = """
import signal, sys, time
import numpy as np
import fusedattn

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGPROF, interrupt)
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 60, 32), np.float32)
v[:, :, 3] = np.inf  # needs the rescue too
options = {"causal": True, "return_lse": True}
hit, before = 0, time.process_time()
for seconds in [*map(float, sys.argv[1:]), 0]:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time, whatever else is running
    try:
        out, lse = fusedattn.attention(q, k, v, **options)
        signal.setitimer(signal.ITIMER_PROF, 0)
        break
    except KeyboardInterrupt:
        hit += 1
spent = time.process_time() - before
expected, expected_lse = fusedattn.attention(q, k, v, **options, backend="reference")
finite = np.isfinite(expected)
near = np.abs(out[finite] - expected[finite]).max(), np.abs(lse - expected_lse).max()
print(hit, spent, near[0] < 1e-5, near[1] < 1e-5, not np.isfinite(out[~finite]).any())
"""


def interrupted(cache, *moments):
    """Return how many of the moments came before the call was done, and what it took in seconds."""
    out = python(WHILE_COMPILING, *moments, FUSEDATTN_CACHE_DIR=cache)
    hit, spent, *fine = out.split()
    assert fine == ["True"] * 3
    return int(hit), float(spent)


def test_a_compilation_that_was_interrupted_can_be_repeated(tmp_path):
    assert interrupted(tmp_path, 0.9, 1.6)[0] >= 1
    assert interrupted(tmp_path)[0] == 0


@pytest.mark.deep
def test_a_compilation_can_be_interrupted_at_any_moment(tmp_path):
    rng = random.Random(1)
    _, whole = interrupted(tmp_path / "whole")
    hits, moments_a_turn = 0, 6  # a turn ends with all compiled, which takes longest
    for turn in range(12):
        moments = sorted(rng.uniform(0.01, whole) for _ in range(moments_a_turn))
        hits += interrupted(tmp_path / str(turn), *moments)[0]
    assert hits > 30
