"""Peers in processes of their own, so that the spinning threads of one do not slow the next.

A process lives as long as the benchmark and does what it is asked, one thing at a time: the peers
take turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import fusedattn
from bench.cases import Array, Case
from bench.peers import OURS, PEERS, Unsupported, Ways
from bench.roofline import Probe, fma_probe, probe_for
from bench.verify import Sample

# One turn: samples until one of the limits is reached, one at least. Short calls are timed in
# batches as long as BATCH_SECONDS, and what is reported is the time of one call.
TURN_SECONDS, TURN_SAMPLES, BATCH_SECONDS = 0.1, 20, 1e-3
# A call of this length needs no other before it to wake threads and caches.
LONG_SECONDS = 0.25
# Threads of some libraries spin on for a while after a call.
PAUSE_SECONDS = 0.1

MACHINE = "machine"


def take_turn(call: Callable[[], object], limit: float = TURN_SECONDS) -> list[float]:
    """Return seconds a call, several times."""
    first = _timed(call, 1)
    if first >= LONG_SECONDS:
        return [first]
    # One call alone may have been interrupted, and the batch would be one call long.
    first = min(first, *(_timed(call, 1) for _ in range(2)))
    batch = max(1, int(BATCH_SECONDS / first))
    seconds: list[float] = []
    while not seconds or (sum(seconds) * batch < limit and len(seconds) < TURN_SAMPLES):
        seconds.append(_timed(call, batch))
    return seconds


def _timed(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


class Station:
    """What a process does for the benchmark; every method is a question from it."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.threads = threads
        self._ways: Ways = {}
        self._call: Callable[[], object] | None = None

    def prepare(self, case: Case, sample: Sample) -> dict[str, Array | str]:
        """Compute the case in every way: some rows of each answer, or why there are none.

        Raises
        ------
        Unsupported
            If there is no way.
        """
        self._ways, self._call = {}, None  # gives their memory back first
        self._ways = dict(PEERS[self.name].ways(case))
        answers: dict[str, Array | str] = {}
        for name, way in self._ways.items():
            try:
                answer = way.read(way.call())
                whole = bool(np.isfinite(answer).all())
                answers[name] = sample.of(answer) if whole else "wrong: not everywhere finite"
            except Exception as error:  # another way may do
                answers[name] = _said(error)
        return answers

    def choose(self, names: Sequence[str]) -> str:
        """Keep the fastest of some ways."""
        best = names[0]
        if len(names) > 1:
            best = min(names, key=lambda name: min(take_turn(self._ways[name].call)))
        self._call = self._ways[best].call
        self._ways = {}
        return best

    def prepare_probe(self, case: Case) -> tuple[str, int]:
        """Make ready what bounds the case: its kind, and the work of one call."""
        self._call = None
        probe: Probe = probe_for(case, self.threads)
        probe.call()
        self._call = probe.call
        return probe.kind, probe.work

    def turn(self) -> list[float]:
        """Return seconds a call."""
        assert self._call is not None, "nothing was chosen"
        return take_turn(self._call)

    def own(self, settings: Sequence[tuple[Case, int]], rounds: int) -> list[dict[str, Any]]:
        """Time our own calls with some numbers of threads, in turns with the machine."""
        found: list[dict[str, Any]] = []
        calls = []
        for case, threads in settings:
            found.append({"name": case.name, "flops": case.flops, "threads": threads})
            found[-1] |= {"work": fma_probe(threads).work, "rounds": [], "machine": []}
            calls.append((PEERS[OURS].forward(case)["attention"].call, fma_probe(threads).call))
        for _ in range(rounds):
            for entry, (call, probe) in zip(found, calls, strict=True):
                fusedattn.set_num_threads(entry["threads"])
                entry["machine"].append(take_turn(probe))
                entry["rounds"].append(take_turn(call))
        fusedattn.set_num_threads(self.threads)
        return found

    def forget(self) -> None:
        """Give the memory of a case back."""
        self._ways, self._call = {}, None


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def serve(name: str, threads: int, pipe: Any) -> None:
    """Answer until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    station = Station(name, threads)
    while True:
        try:
            verb, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(station, verb)(*arguments))
        except Exception as error:  # whatever it is, it concerns this peer alone
            pipe.send(error if isinstance(error, Unsupported) else Unsupported(_said(error)))


class Worker:
    """A process that serves one peer, seen from the benchmark."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.threads = threads
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (self.name, self.threads, theirs)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Return what the method of `Station` returns.

        Raises
        ------
        Unsupported
            What it raised, or that the process has ended; then a new one is started.
        """
        try:
            self._pipe.send((verb, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self.end()
            self._start()  # for the next case
            raise Unsupported("its process ended") from None
        if isinstance(answer, Unsupported):
            raise answer
        return answer

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


@contextlib.contextmanager
def working(names: Sequence[str], threads: int) -> Iterator[dict[str, Worker]]:
    """Start processes that use so many threads, and CPUs where the system can say so."""
    # Read by the libraries when they are loaded, which in the processes is soon.
    count = dict.fromkeys(
        ("FUSEDATTN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        str(threads),
    )
    before = dict(os.environ)
    os.environ.update(count)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    workers: dict[str, Worker] = {}
    try:
        if threads < len(cpus):  # the only word that JAX listens to
            os.sched_setaffinity(0, sorted(cpus)[:threads])
        for name in names:
            workers[name] = Worker(name, threads)
        yield workers
    finally:
        for worker in workers.values():
            worker.end()
        os.environ.clear()
        os.environ.update(before)
        if threads < len(cpus):
            os.sched_setaffinity(0, cpus)
