"""Worker threads: a pool of Python threads that run one native function without the GIL.

Not OpenMP, whose threads do not survive a fork, and not Numba's own pool, which aborts on
concurrent callers. Any number of callers may share the pool; a child process starts its own.

A signal handler may raise between any two instructions of the main thread. So all bookkeeping of a
job is done by the workers, which signals never interrupt; a caller only looks at it, and may look
again.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "FUSEDATTN_NUM_THREADS"

# More than any machine has: a larger number is a mistake.
MOST_THREADS = 2**16

# For so many large calls at once the pool has workers of their own.
CALLERS = 4

Task = Callable[[], None]


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut by the cgroup's quota."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _cgroup_quota(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the process's cgroup (v1 or v2), or a parent, allows, if limited."""
    try:
        text = (proc / "self/cgroup").read_text(errors="surrogateescape")
    except OSError:
        return None
    limits = []
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path:
            continue
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
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


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
    if not text.strip().isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise ValueError(
            f"{_VARIABLE} must be an integer from 1 to {MOST_THREADS}, but is {text!r}"
        )
    return int(text)


class _State:
    """What a fork must renew: the threads and everything they wait on."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may call again in the midst of a call
        self.tasks: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.workers = 0
        self.jobs: set[_Job] = set()  # whose callers wait


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
    """Set the number of threads that a large call uses; `fusedattn.set_num_threads` checks it."""
    global _num_threads
    _num_threads = n


def _serve(state: _State) -> None:
    while True:
        job = state.tasks.get()
        if job.take_part():
            job.leave()
        del job  # or the last call's arrays would live until the next one


def _ask(state: _State, job: _Job, helpers: int) -> int:
    """Start the workers that a job lacks; return how many of them it may ask for help.

    Fewer than ``helpers`` when the system refuses. Callers at the same time get workers of their
    own, so that a short call does not wait for a long one to end, but no more than ``CALLERS``
    times as many.
    """
    with state.lock:
        asked = sum(other.helpers for other in [*state.jobs] if not other.over)
        while state.workers < min(asked + helpers, CALLERS * helpers):
            name = f"fusedattn-{state.workers}"
            thread = threading.Thread(target=_serve, args=(state,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                break
            state.workers += 1
        job.helpers = min(helpers, state.workers)
        if job.helpers:
            state.jobs.add(job)
        return job.helpers


class _Job:
    """One call's work on several threads; the first error of any of them reaches the caller.

    A worker that returns has found nothing left to take. The job is over when one has returned and
    none is at work: workers that come to it later pass by.
    """

    def __init__(self, work: Task, stop: Task) -> None:
        self.error: BaseException | None = None
        self.over = False
        self.helpers = 0
        self._calls: tuple[Task, Task] | None = (work, stop)
        self._lock = threading.Lock()
        self._at_work = 0
        self._wake = threading.Lock()
        self._wake.acquire()

    def take_part(self) -> bool:
        """Work until nothing is left, on a thread of the pool; False if the job is over."""
        with self._lock:
            if self._calls is None:
                return False
            self._at_work += 1
            work, stop = self._calls
        try:
            work()
        except BaseException as error:
            if self.error is None:
                self.error = error
            stop()  # the others need not finish what is lost
        return True

    def leave(self) -> None:
        """End what a successful `take_part` began."""
        with self._lock:
            self._at_work -= 1
            if self._at_work == 0:
                self._end()

    def _end(self) -> None:
        self.over, self._calls = True, None
        self._wake.release()

    def nothing_is_left(self) -> None:
        """Say that the caller itself has worked until nothing was left, or has stopped the work."""
        with self._lock:
            if self._at_work == 0 and not self.over:
                self._end()

    def wait(self) -> None:
        """Return when the job is over."""
        while not self.over:
            # On Windows, signals are heard only between two waits.
            self._wake.acquire(timeout=0.1)


def run(work: Task, stop: Task, threads: int, *, join_in: bool) -> None:
    """Run ``work`` on several threads at once and wait for all of them.

    Parameters
    ----------
    work : callable
        Takes items until there are none left, without the GIL; safe to run on any thread.
    stop : callable
        Makes every running ``work``, and each that begins later, return soon.
    threads : int
        How many threads.
    join_in : bool
        Whether the caller works too. It answers to Ctrl-C only when its own share is done, so
        long calls leave all work to the pool and wait, which a signal interrupts at once.
    """
    helpers = threads - 1 if join_in else threads
    if sys.is_finalizing():  # the pool's threads have stopped for good
        helpers = 0
    state, job = _state, _Job(work, stop)
    interrupt: BaseException | None = None
    try:
        helpers = _ask(state, job, helpers) if helpers else 0
        if helpers == 0:
            work()
            return
        while not job.over:
            # Nothing may touch the caller's arrays once an error has left this function, so an
            # interrupt, or a second one, only changes what is waited for.
            try:
                if interrupt is not None:
                    stop()
                    job.nothing_is_left()
                else:
                    for _ in range(helpers):
                        state.tasks.put(job)
                    if join_in:
                        work()
                        job.nothing_is_left()
                job.wait()
            except BaseException as error:
                interrupt = error if interrupt is None else interrupt
        if interrupt is not None:
            raise interrupt
        if job.error is not None:
            raise job.error
    finally:
        state.jobs.discard(job)
        if not job.over:  # a third interrupt, between two instructions of the loop
            stop()
        interrupt = job.error = None  # a traceback and its frames would keep each other alive
