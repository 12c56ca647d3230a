"""Worker threads: a pool of Python threads that run one native function without the GIL.

Not OpenMP, whose threads do not survive a fork, and not Numba's own pool, which aborts on
concurrent callers. Any number of callers may share the pool; a child process starts its own.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "FUSEDATTN_NUM_THREADS"

Task = Callable[[], None]


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut by the cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota is not None else max(1, cpus)


def _cgroup_quota(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the process's cgroup (v2 or v1) or a parent of it allows, if limited."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, read = root, _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "cpu", _quota_v1
        else:
            continue
        folder = base / path.lstrip("/")
        for candidate in (folder, *folder.parents):
            limit = read(candidate)
            if limit is not None:
                limits.append(limit)
            if candidate == base:
                break
    return min(limits, default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _default_threads() -> int:
    text = os.environ.get(_VARIABLE)
    if text is None or not text.strip():
        return available_cpus()
    try:
        return _checked(int(text), _VARIABLE)
    except ValueError:
        raise ValueError(f"{_VARIABLE} must be an integer >= 1, but is {text!r}") from None


def _checked(n: int, name: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{name} must be an int, but is {n!r} ({type(n).__name__})")
    if n < 1:
        raise ValueError(f"{name} must be at least 1, but is {n}")
    return n


class _State:
    """What a fork must renew: the threads and everything they wait on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self.workers = 0


_state = _State()
_num_threads: int | None = None


def _renew() -> None:
    global _state
    _state = _State()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def get_num_threads() -> int:
    """Return the number of threads that a large call uses."""
    global _num_threads
    if _num_threads is None:
        _num_threads = _default_threads()
    return _num_threads


def set_num_threads(n: int) -> None:
    """Set the number of threads that a large call uses; results do not depend on it."""
    global _num_threads
    _num_threads = _checked(n, "n")


def _serve(tasks: queue.SimpleQueue[Task]) -> None:
    while True:
        tasks.get()()


def _grow(state: _State, workers: int) -> int:
    """Start workers up to a number; return how many there are. Fewer when the system refuses."""
    with state.lock:
        while state.workers < workers:
            name = f"fusedattn-{state.workers}"
            thread = threading.Thread(
                target=_serve, args=(state.tasks,), name=name, daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                break
            state.workers += 1
        return state.workers


class _Job:
    """One call's work on several threads; errors of any of them reach the caller."""

    def __init__(self, work: Task) -> None:
        self.work = work
        self.finished = threading.Semaphore(0)
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.finished.release()


def run(work: Task, stop: Callable[[], None], threads: int, *, join_in: bool) -> None:
    """Run ``work`` on several threads at once and wait for all of them.

    Parameters
    ----------
    work : callable
        Takes items until there are none left, without the GIL; safe to run on any thread.
    stop : callable
        Makes every running ``work`` return soon.
    threads : int
        How many threads.
    join_in : bool
        Whether the caller works too. It answers to Ctrl-C only when its own share is done, so
        long calls leave all work to the pool and wait, which a signal interrupts at once.
    """
    helpers = threads - 1 if join_in else threads
    helpers = min(helpers, _grow(_state, helpers)) if helpers else 0
    if helpers == 0:
        work()
        return
    job = _Job(work)
    tasks = _state.tasks
    for _ in range(helpers):
        tasks.put(job)
    waiting = helpers
    try:
        if join_in:
            work()
        while waiting:
            job.finished.acquire()
            waiting -= 1
    except BaseException:
        # Nothing may touch the caller's arrays once the error has left this function.
        stop()
        while waiting:
            job.finished.acquire()
            waiting -= 1
        raise
    if job.error is not None:
        raise job.error
