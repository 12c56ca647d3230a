"""Gradients on several threads: concurrent callers, Ctrl-C, and memory that nobody writes to."""

import signal
import threading
import time

import numpy as np
import pytest
from cpu_backend import assert_same_bits, came_back, normal

from fusedattn import attention_backward
from fusedattn.cpu import threads

# Many seconds of work; a longer wait than this after Ctrl-C would be noticed.
SECONDS = 0.5


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(threads, "_num_threads", 2)


@pytest.mark.usefixtures("two_threads")
def test_concurrent_callers_do_not_disturb_each_other():
    sizes = (40, 300, 700)
    calls = [came_back(*(normal(i, 3, n, 32) for i in range(3)), causal=True) for n in sizes]
    expected = [attention_backward(*given, **keywords) for given, keywords in calls]
    wrong = []

    def repeat(index):
        given, keywords = calls[index % len(calls)]
        for _ in range(10):
            try:
                found = attention_backward(*given, **keywords)
                assert_same_bits(found, expected[index % len(calls)])
            except BaseException as error:
                wrong.append(error)

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


LONG = {
    "full": {},
    "shared bias": {"bias": np.zeros((12_000, 1), np.float32)},
    "large": {"scale": 1e5},
    "rescue": {"poison": np.nan},
    "dropout": {"dropout_p": 0.5, "seed": 1},
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_a_long_call_ends_at_once(monkeypatch, options, count):
    monkeypatch.setattr(threads, "_num_threads", count)
    options = dict(options)
    # What is long about the rescue is not the pass before it.
    length = 4000 if "poison" in options else 12_000
    q, k, v = (np.broadcast_to(normal(i, 1, length, 64), (8, length, 64)) for i in range(3))
    if "poison" in options:
        k = k.copy()
        k[:, 3] = options.pop("poison")
    out, lse = np.broadcast_to(normal(3, length, 64), q.shape), np.full(q.shape[:-1], 5e4, "f4")
    few = [x[..., :150, :] for x in (out, q, k, v, out)] + [lse[:, :150].copy()]
    cut = {**options}
    if "bias" in cut:
        cut["bias"] = cut["bias"][:150]
    expected = attention_backward(*few, **cut)  # compiles, too
    began = []

    def fire(*_):
        began.append(time.perf_counter())
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, fire)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0 if length == 4000 else 0.3)
        with pytest.raises(KeyboardInterrupt):
            attention_backward(out, q, k, v, out, lse, **options)
        assert time.perf_counter() - began[0] < SECONDS
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_same_bits(attention_backward(*few, **cut), expected)


@pytest.mark.usefixtures("two_threads")
def test_nothing_but_the_gradients_is_written():
    arrays, keywords = came_back(*(normal(i, 2, 300, 32) for i in range(3)), causal=True)
    given = {**keywords, "bias": normal(5, 300, 300), "sinks": normal(6, 2)}
    before = [x.tobytes() for x in (*arrays, given["d_lse"], given["bias"], given["sinks"])]
    attention_backward(*arrays, **given)
    after = [x.tobytes() for x in (*arrays, given["d_lse"], given["bias"], given["sinks"])]
    assert before == after


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "batch"), [(0, 5, 2, 1), (5, 0, 2, 1), (5, 5, 0, 1), (5, 5, 2, 0)]
)
def test_zero_sizes(rows, keys, heads, batch):
    q, k, v = normal(0, batch, heads, rows, 8), *(normal(i, batch, heads, keys, 8) for i in (1, 2))
    bias, sinks = normal(3, rows, keys), normal(4, heads)
    given, keywords = came_back(q, k, v, bias=bias, sinks=sinks)
    found = attention_backward(*given, **keywords)
    for gradient, operand in zip(found[:5], (q, k, v, bias, sinks), strict=True):
        assert gradient.shape == operand.shape
    assert found.d_score_mod_aux is None
    assert not any(x.any() for x in found[:4])
    expected = keywords["d_lse"].sum((0, 2)) if keys == 0 else np.zeros(heads)
    if batch == 0 or rows == 0 or keys == 0:
        np.testing.assert_allclose(found.d_sinks, expected, rtol=1e-6)
