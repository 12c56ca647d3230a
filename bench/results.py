"""Reading what `bench.run` wrote: statistics and ratios, always from the raw times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure import fastest
from bench.peers import OURS

FORMAT = 1


class Entry:
    """One case of the results."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.name: str = record["name"]
        self.group, self.shape = record["group"], record["shape"]
        self.variant, self.dtype = record["variant"], record["dtype"]

    def measured(self, peer: str) -> bool:
        """Whether there is a time."""
        entry = self.record["peers"].get(peer)
        return entry is not None and entry["note"] is None and bool(entry["rounds"])

    def note(self, peer: str) -> str | None:
        """Why there is none."""
        entry = self.record["peers"].get(peer)
        return None if entry is None else entry["note"]

    def way(self, peer: str) -> str | None:
        """Which of its ways was the fastest."""
        return self.record["peers"][peer]["way"] if self.measured(peer) else None

    def best(self, peer: str = OURS) -> float:
        """Seconds of the fastest call."""
        return fastest(self.record["peers"][peer]["rounds"])

    def median(self, peer: str = OURS) -> float:
        """Median of all calls, in seconds."""
        rounds: list[list[float]] = self.record["peers"][peer]["rounds"]
        return statistics.median(seconds for turn in rounds for seconds in turn)

    def ratio(self, peer: str) -> float | None:
        """The peer's fastest time over ours."""
        if not (self.measured(peer) and self.measured(OURS)):
            return None
        return self.best(peer) / self.best()

    def ratio_of_medians(self, peer: str) -> float | None:
        """The peer's median over ours."""
        if not (self.measured(peer) and self.measured(OURS)):
            return None
        return self.median(peer) / self.median()

    def rms(self, peer: str = OURS) -> float | None:
        """Root of the mean square of its error against float64."""
        entry = self.record["peers"].get(peer)
        return None if entry is None else entry["rms"]

    @property
    def limit(self) -> str:
        """What bounds it: "fma" or "read"."""
        return str(self.record["machine"]["probe"])

    @property
    def machine_rate(self) -> float:
        """The most that the machine did in the same rounds: operations, or bytes, a second."""
        machine = self.record["machine"]
        return float(machine["work"]) / fastest(machine["rounds"])

    def rate(self, peer: str = OURS) -> float:
        """The same of a peer."""
        work = self.record["flops" if self.limit == "fma" else "bytes"]
        return float(work) / self.best(peer)

    def fraction(self, peer: str = OURS) -> float | None:
        """Part of the machine that was used; None where nothing was measured."""
        return self.rate(peer) / self.machine_rate if self.measured(peer) else None


class Results:
    """A whole run."""

    def __init__(self, whole: dict[str, Any]) -> None:
        if whole.get("format") != FORMAT:
            raise ValueError(f"format {whole.get('format')!r}: these results need another version")
        self.whole = whole
        self.about: dict[str, Any] = whole["about"]
        self.apart: dict[str, Any] = whole["apart"]
        self.entries = [Entry(record) for record in whole["cases"]]

    def of(self, group: str, **equal: str) -> list[Entry]:
        """Return the entries of a group with some fields equal."""
        return [
            entry
            for entry in self.entries
            if entry.group == group and all(getattr(entry, k) == v for k, v in equal.items())
        ]


def write(path: Path, about: dict[str, Any], cases: list[Any], apart: dict[str, Any]) -> None:
    """Write results, one case a line, so that a diff can be read."""
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"format": FORMAT, "about": about, "apart": apart}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n')
    part.replace(path)  # never half of it


def read(path: Path) -> Results:
    """Read what `write` wrote.

    Raises
    ------
    ValueError
        If it is something else.
    """
    return Results(json.loads(path.read_text()))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the mean for ratios.

    Examples
    --------
    >>> round(geometric_mean([2.0, 8.0]), 12)
    4.0
    """
    return statistics.geometric_mean(values)
