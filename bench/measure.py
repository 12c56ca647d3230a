"""One case: every answer is checked, then the peers and the machine take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench.cases import Case
from bench.peers import OURS, Unsupported
from bench.verify import Truth, Verdict, judge, truth
from bench.workers import MACHINE, PAUSE_SECONDS

# Whose threads sleep as soon as a call is over.
QUIET = (OURS, MACHINE)
# A peer that is so many times slower than ours, and has used so many seconds, is not asked again:
# the minutes go to the comparisons that are close.
OUTCLASSED, PATIENCE_SECONDS = 3.0, 4.0

Record = dict[str, Any]


class Asked(Protocol):
    """A `bench.workers.Worker`, or what behaves like one."""

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Return what the method of `bench.workers.Station` returns."""


def compare(case: Case, workers: Mapping[str, Asked], rounds: int) -> Record:
    """Return everything about a case: what it is, who was refused and why, all raw times."""
    expected = truth(case)
    peers = {
        name: _prepare(name, worker, case, expected)
        for name, worker in workers.items()
        if name != MACHINE
    }
    kind, work = workers[MACHINE].ask("prepare_probe", case)
    machine: Record = {"probe": kind, "work": work, "rounds": []}
    entries = {MACHINE: machine} | {name: p for name, p in peers.items() if p["note"] is None}
    for _ in range(rounds):
        _round(entries, workers)
    for worker in workers.values():
        with contextlib.suppress(Unsupported):  # it has ended, and forgotten everything
            worker.ask("forget")
    return {"name": case.name, **_facts(case), "machine": machine, "peers": peers}


def _facts(case: Case) -> Record:
    names = ["group", "shape", "variant", "dtype", "source", "batch", "heads", "heads_kv"]
    names += ["seqlen_q", "seqlen_k", "head_dim", "causal"]
    facts = {name: getattr(case, name) for name in names}
    return facts | {"flops": case.flops, "bytes": case.bytes_moved}


def _prepare(name: str, worker: Asked, case: Case, expected: Truth) -> Record:
    """Check every way of a peer and let it choose among those that are right."""
    entry: Record = {"way": None, "note": None, "rms": None, "of_bound": None, "rounds": []}
    try:
        answers = worker.ask("prepare", case, expected.sample)
        verdicts = {way: judge(a, expected, ours=name == OURS) for way, a in answers.items()}
        right = [way for way, verdict in verdicts.items() if verdict.fault is None]
        entry["refused"] = {way: v.fault for way, v in verdicts.items() if v.fault is not None}
        if not right:
            return entry | {"note": "; ".join(f"{w}: {v.fault}" for w, v in verdicts.items())}
        chosen = worker.ask("choose", right)
        verdict: Verdict = verdicts[chosen]
        return entry | {"way": chosen, "rms": verdict.rms, "of_bound": verdict.of_bound}
    except Unsupported as reason:
        return entry | {"note": str(reason)}


def _round(entries: Mapping[str, Record], workers: Mapping[str, Asked]) -> None:
    """Let everyone who is still in the race take a turn."""
    for name, entry in entries.items():
        if entry.get("note") or (name not in QUIET and _outclassed(entry, entries.get(OURS))):
            continue
        try:
            entry["rounds"].append([_rounded(s) for s in workers[name].ask("turn")])
        except Unsupported as reason:
            entry["note"] = str(reason)
        if name not in QUIET:
            time.sleep(PAUSE_SECONDS)


def _outclassed(entry: Record, ours: Record | None) -> bool:
    if ours is None or not ours["rounds"] or not entry["rounds"]:
        return False
    if sum(map(sum, entry["rounds"])) <= PATIENCE_SECONDS:
        return False
    return fastest(entry["rounds"]) > OUTCLASSED * fastest(ours["rounds"])


def fastest(rounds: Sequence[Sequence[float]]) -> float:
    """Return the shortest of all times."""
    return min(min(times) for times in rounds)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.5g}")
