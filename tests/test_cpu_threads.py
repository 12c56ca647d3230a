"""The pool: any number of callers, errors that reach them, a count that respects the machine."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal, python

import fusedattn
from fusedattn import attention
from fusedattn.cpu import backend, threads
from fusedattn.testing import Case
from fusedattn.testing.laws.common import assert_equals_reference

LARGE = [normal(i, 1, 4, 700, 64) for i in range(3)]  # the caller waits for the pool
MEDIUM = [normal(i, 1, 2, 300, 64) for i in range(3)]  # the caller joins in


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """A pool of its own for each test, whatever the machine has."""
    monkeypatch.setattr(threads, "_state", threads._State())
    monkeypatch.setattr(threads, "_num_threads", 2)


def test_the_examples_below_take_the_paths_they_are_meant_to():
    flops = [4 * x[0].size * x[0].shape[-2] for x in (MEDIUM, LARGE)]
    assert backend.ALONE_FLOPS < flops[0] < backend.LONG_FLOPS < flops[1]


def test_a_decode_is_shared_out_for_what_it_reads(monkeypatch):
    """16 MiB of keys and values for 8 MFLOP: more than a prefill has to do to be worth it."""
    ran, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *a, **k: ran.append(a) or run(*a, **k))
    q, k = normal(0, 1, 8, 1, 128), normal(1, 1, 8, 2048, 128)
    attention(q, k, k)
    assert ran


def test_six_threads_calling_at_once_get_their_own_answers():
    rng = np.random.default_rng(0)
    calls = []
    for i in range(24):
        dtype = ["float32", "float64", "float16", "bfloat16"][i % 4]
        rows, keys, dim = (int(rng.integers(1, top)) for top in (400, 500, 80))
        arrays = [
            normal(3 * i + j, 2, 3, n, dim, dtype=dtype) for j, n in enumerate((rows, keys, keys))
        ]
        options = [{}, {"causal": True}, {"mask": rng.random((rows, keys)) < 0.5}, {"softcap": 3.0}]
        calls.append((arrays, {**options[i // 4 % 4], "return_lse": True}))
    calls.append((LARGE, {"causal": True}))
    alone = [attention(*arrays, **options) for arrays, options in calls]
    for (arrays, options), (out, lse) in list(zip(calls, alone, strict=False))[:-1:5]:
        case = Case(*arrays, options)
        assert_equals_reference(case.expected._replace(out=out, lse=lse), case)
    barrier, failures = threading.Barrier(6), []

    def call(thread):
        barrier.wait()
        for turn in range(len(calls)):
            index = (turn * 7 + thread * 5) % len(calls)
            arrays, options = calls[index]
            try:
                assert_same_bits(attention(*arrays, **options), alone[index])
            except BaseException as error:
                failures.append(error)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not failures


def test_a_first_call_from_six_threads_at_once():
    """All of them find nothing compiled and nothing remembered."""
    code = """
import threading, numpy as np, fusedattn
q = np.random.default_rng(0).standard_normal((1, 2, 300, 64), np.float32)
barrier, results = threading.Barrier(6), []
def call():
    barrier.wait()
    results.append(fusedattn.attention(q, q, q).tobytes())
workers = [threading.Thread(target=call) for _ in range(6)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(len(results), len(set(results)))
"""
    assert python(code) == "6 1\n"


def test_a_short_call_does_not_wait_for_a_long_one():
    """What another caller has begun may take minutes."""
    release, begun = threading.Event(), threading.Semaphore(0)

    def work():
        begun.release()
        release.wait(60)

    def long():
        threads.run(work, release.set, 2, join_in=False)

    callers = [threading.Thread(target=long) for _ in range(2)]
    for caller in callers:
        caller.start()
        begun.acquire()
    try:
        for arrays in (MEDIUM, LARGE):
            start = time.perf_counter()
            attention(*arrays)
            assert time.perf_counter() - start < 20
    finally:
        release.set()
    for caller in callers:
        caller.join()


def test_a_worker_that_is_asked_but_has_not_begun_is_not_free(monkeypatch):
    monkeypatch.setattr(threads, "_serve", lambda state: None)
    state, jobs = threads._State(), [threads._Job(int, int) for _ in range(3)]
    for job, workers in zip(jobs, (2, 4, 6), strict=True):
        assert threads._ask(state, job, 2) == 2
        assert state.workers == workers
    jobs[0].nothing_is_left()
    state.jobs.discard(jobs[1])  # its caller was interrupted before it could put a task
    assert threads._ask(state, threads._Job(int, int), 2) == 2
    assert state.workers == 6


def test_the_pool_does_not_grow_with_the_number_of_calls():
    for _ in range(50):
        attention(*MEDIUM)
        attention(*LARGE)
    assert threads._state.workers <= 2
    with ThreadPoolExecutor(16) as callers:
        list(callers.map(lambda _: attention(*LARGE), range(64)))
    assert threads._state.workers <= 2 * threads.CALLERS


@pytest.mark.parametrize("arrays", [MEDIUM, LARGE], ids=["joined", "waiting"])
@pytest.mark.parametrize("error", [MemoryError("no tile"), SystemExit(3)])
def test_an_error_in_a_worker_reaches_the_caller(monkeypatch, arrays, error):
    expected, caller = attention(*arrays), threading.current_thread()
    allocate = backend.working_memory

    def fail(size):
        if threading.current_thread() is caller:
            time.sleep(0.05)  # leave the worker something to fail at
            return allocate(size)
        raise error

    monkeypatch.setattr(backend, "working_memory", fail)
    with pytest.raises(type(error)) as caught:
        attention(*arrays)
    assert caught.value is error
    monkeypatch.undo()
    assert_same_bits(attention(*arrays), expected)


def test_an_error_on_the_callers_own_thread_waits_for_the_workers(monkeypatch):
    expected, caller = attention(*MEDIUM), threading.current_thread()
    allocate = backend.working_memory

    def fail(size):
        if threading.current_thread() is caller:
            raise MemoryError
        return allocate(size)

    monkeypatch.setattr(backend, "working_memory", fail)
    out = np.zeros_like(expected)
    with pytest.raises(MemoryError):
        attention(*MEDIUM, out=out)
    left = out.copy()
    time.sleep(0.05)
    assert_same_bits(out, left)
    monkeypatch.undo()
    assert_same_bits(attention(*MEDIUM), expected)


@pytest.mark.parametrize("arrays", [MEDIUM, LARGE], ids=["joined", "waiting"])
def test_without_threads_the_caller_computes_alone(monkeypatch, arrays):
    expected = attention(*arrays)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_state", threads._State())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert_same_bits(attention(*arrays), expected)
    assert threads._state.workers == 0


def test_threads_are_daemons_with_a_name():
    attention(*LARGE)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("fusedattn")]
    assert ours
    assert all(thread.daemon for thread in ours)


@pytest.mark.parametrize("arrays", [MEDIUM, LARGE], ids=["joined", "waiting"])
def test_nothing_holds_on_to_arrays_after_the_call(arrays):
    copies = [x.copy() for x in arrays]
    mask = np.ones((arrays[0].shape[-2],) * 2, bool)
    out = attention(*copies, mask=mask, sinks=np.zeros(copies[0].shape[1]))
    alive = [weakref.ref(x) for x in (*copies, mask, out)]
    del copies, mask, out
    time.sleep(0.05)  # a worker may be on its way back
    gc.collect()
    assert [reference() is None for reference in alive] == [True] * 5


@pytest.mark.parametrize("arrays", [MEDIUM, LARGE], ids=["joined", "waiting"])
def test_arrays_live_as_long_as_the_call(arrays):
    """Temporaries that only the call holds are not freed, or used again, under it."""
    expected = attention(*arrays, causal=True)
    for _ in range(20):
        out = attention(*(x.copy() for x in arrays), causal=True)
        assert_same_bits(out, expected)


def test_the_number_of_threads_is_checked():
    for n, error in ((0, ValueError), (-3, ValueError), (2**17, ValueError)):
        with pytest.raises(error, match="n must be"):
            fusedattn.set_num_threads(n)
    for n in (1.0, "2", None, True, np.float64(2)):
        with pytest.raises(TypeError, match="n must be"):
            fusedattn.set_num_threads(n)
    assert fusedattn.get_num_threads() == 2
    fusedattn.set_num_threads(5)
    assert fusedattn.get_num_threads() == 5


@pytest.mark.parametrize(("text", "count"), [("3", 3), (" 12 ", 12), ("1", 1)])
def test_the_environment_sets_the_number_of_threads(monkeypatch, text, count):
    monkeypatch.setattr(threads, "_num_threads", None)
    monkeypatch.setenv("FUSEDATTN_NUM_THREADS", text)
    assert threads.get_num_threads() == count


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_no_choice(monkeypatch, text):
    monkeypatch.setattr(threads, "_num_threads", None)
    monkeypatch.setenv("FUSEDATTN_NUM_THREADS", text)
    assert threads.get_num_threads() == threads.available_cpus()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1e3", "99999999999", "²"])
def test_a_bad_variable_is_named(monkeypatch, text):
    monkeypatch.setattr(threads, "_num_threads", None)
    monkeypatch.setenv("FUSEDATTN_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"FUSEDATTN_NUM_THREADS must be .* but is '{text}'"):
        attention(*LARGE)


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return threads._cgroup_quota(root / "proc", root / "cgroup")


V2, V1 = "0::/a/b\n", "3:cpu,cpuacct:/a/b\n2:memory:/a\n1:name=systemd:/a\n0::/a\n"
QUOTAS = {
    "no cgroups": ({}, None),
    "v2": ({"proc/self/cgroup": V2, "cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2 unlimited": ({"proc/self/cgroup": V2, "cgroup/a/b/cpu.max": "max 100000\n"}, None),
    "v2 parent": (
        {
            "proc/self/cgroup": V2,
            "cgroup/a/b/cpu.max": "400000 100000\n",
            "cgroup/a/cpu.max": "200000 100000\n",
            "cgroup/cpu.max": "max 100000\n",
        },
        2.0,
    ),
    "v2 without file": ({"proc/self/cgroup": V2}, None),
    "v2 own namespace": ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "50000 100000\n"}, 0.5),
    "v2 garbage": ({"proc/self/cgroup": V2, "cgroup/a/b/cpu.max": "what\n"}, None),
    "v2 zero": ({"proc/self/cgroup": V2, "cgroup/a/b/cpu.max": "1 0\n"}, None),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "cgroup/cpu/a/b/cpu.cfs_quota_us": "300000\n",
            "cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "v1 unlimited": (
        {
            "proc/self/cgroup": V1,
            "cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1 in a container": (  # the path is the host's, the tree the container's
        {
            "proc/self/cgroup": V1.replace("/a/b", "/docker/0123"),
            "cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "strange lines": ({"proc/self/cgroup": b"nonsense\n\n7:\n0::/\xff\xfe\n"}, None),
    "path with colons": ({"proc/self/cgroup": "0::/a:b\n", "cgroup/a:b/cpu.max": "1 2\n"}, 0.5),
}


@pytest.mark.parametrize(("files", "quota"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_a_container_is_found(tmp_path, files, quota):
    assert tree(tmp_path, files) == quota


@pytest.mark.parametrize(("quota", "count"), [(None, 8), (0.1, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_the_default_respects_affinity_and_quota(monkeypatch, quota, count):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)
    assert threads.available_cpus() == count
