"""Tables in Markdown from results, written between markers of the documents that show them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.goals import GOALS
from bench.measure import fastest
from bench.peers import OURS, PEERS
from bench.results import Entry, Results, geometric_mean
from fusedattn.cli.machine import binary_size

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "docs/performance.md", ROOT / "README.md")
NOT_MEASURED = "*Not measured yet.*"
NOTHING = "-"

OTHERS = [name for name in PEERS if name != OURS]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns are aligned to the left."""
    rule = [":---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def seconds(value: float) -> str:
    """Return a time with three digits.

    Examples
    --------
    >>> seconds(1.234), seconds(0.01234), seconds(0.00001234)
    ('1.23 s', '12.3 ms', '12.3 µs')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit or name == "µs":
            amount = value / unit
            digits = 2 if amount < 10 else 1 if amount < 100 else 0
            return f"{amount:.{digits}f} {name}"
    raise AssertionError


def circumstances(results: Results) -> str:
    """Where, when and with what."""
    about = results.about
    machine, versions = about["machine"], about["versions"]
    commit = (about["commit"] or "unknown")[:12]
    state = " with changes that were not committed" if about["dirty"] else ""
    turns = max(len(entry.record["machine"]["rounds"]) for entry in results.entries)
    rates: dict[str, list[float]] = {"fma": [], "read": []}
    for entry in results.entries:
        rates[entry.limit].append(entry.machine_rate / 1e9)
    measured = [
        f"{name} {min(values):.0f} to {max(values):.0f} {unit}"
        for name, values, unit in (
            ("multiply-adds", rates["fma"], "GFLOP/s in float32"),
            ("reading", rates["read"], "GB/s, by size"),
        )
        if values
    ]
    lines = [
        f"- {machine['cpu']}, {machine['vector_unit']}, {about['threads']} thread(s) of "
        f"{machine['cpus']} CPUs, {machine['system']}",
        f"- the machine itself, in the same rounds: {'; '.join(measured)}",
        f"- commit `{commit}`{state}, {about['date']}, {turns} rounds",
        "- " + ", ".join(f"{name} {value}" for name, value in versions.items() if value),
    ]
    return "\n".join(lines)


def goals(results: Results) -> str:
    """Every goal with what was reached."""
    headings = ["goal", "at least", "aim", "reached", "met", "worst case"]
    return table(headings, [goal.cells(results) for goal in GOALS])


def shape(entry: Entry) -> str:
    """Return the shape of a case as people write it.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> shape(SimpleNamespace(shape="1,32-8,2048,128"))
    '(1,32/8,2048,128)'
    """
    return f"({entry.shape.replace('-', '/')})"


def _cell(ratio: float | None, medians: float | None) -> str:
    return NOTHING if ratio is None or medians is None else f"{ratio:.2f} ({medians:.2f})"


def cases(results: Results, *groups: str) -> str:
    """Times of ours, the part of the machine, ratios to the peers, errors; and what is missing."""
    entries = [entry for entry in results.entries if entry.group in groups]
    if not entries:
        return NOT_MEASURED
    peers = [name for name in OTHERS if any(entry.measured(name) for entry in entries)]
    limit = "read rate" if entries[0].limit == "read" else "FMA peak"
    headings = ["case", "dtype", "fastest", "median", limit]
    headings += [PEERS[name].title for name in peers] + ["error", "of torch's"]
    rows = [_case_row(entry, peers) for entry in entries]
    return table(headings, rows, left=2) + _missing(entries)


def _case_row(entry: Entry, peers: Sequence[str]) -> list[str]:
    label = f"{shape(entry)} {entry.variant}"
    if not entry.measured(OURS):
        return [label, entry.dtype, entry.note(OURS) or "", *[""] * (len(peers) + 4)]
    cells = [label, entry.dtype, seconds(entry.best()), seconds(entry.median())]
    cells.append(NOTHING if entry.group == "tiny" else f"{entry.fraction():.2f}")
    cells += [_cell(entry.ratio(name), entry.ratio_of_medians(name)) for name in peers]
    ours, torch = entry.rms(), entry.rms("torch")
    cells.append(f"{ours:.2g}")
    cells.append(NOTHING if not ours or not torch else f"{ours / torch:.2f}")
    return cells


def _missing(entries: Sequence[Entry]) -> str:
    """Why a peer has no number, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for name in OTHERS:
            note = entry.note(name)
            if note is not None:
                reasons.setdefault((name, note), []).append(f"{shape(entry)} {entry.dtype}")
    lines = []
    for (name, note), where in reasons.items():
        places = sorted(set(where))
        shown = ", ".join(places) if len(places) <= 3 else f"{len(places)} cases"
        lines.append(f"- {PEERS[name].title}: {note} ({shown})")
    return "\n\n" + "\n".join(lines) if lines else ""


def ways(results: Results) -> str:
    """Which of its ways each peer was fastest with, and how often."""
    rows = []
    for name in OTHERS:
        taken = [way for entry in results.entries if (way := entry.way(name))]
        counts = ", ".join(f"{way} {taken.count(way)}" for way in dict.fromkeys(taken))
        rows.append([PEERS[name].title, counts or NOTHING])
    return table(["peer", "fastest way, and in how many cases"], rows, left=2)


def startup(results: Results) -> str:
    """Import and first calls."""
    times = results.apart.get("startup")
    if not times:
        return NOT_MEASURED
    names = {
        "import": "import beyond NumPy",
        "cold": "first call, nothing compiled yet",
        "cached": "first call, from the cache on disk",
    }
    rows = []
    for name, text in names.items():
        median, fewest = statistics.median(times[name]), min(times[name])
        rows.append([text, seconds(median), seconds(fewest), str(len(times[name]))])
    return table(["", "median", "fastest", "processes"], rows)


def memory(results: Results) -> str:
    """Peak beyond inputs and output."""
    entries = results.apart.get("memory")
    if not entries:
        return NOT_MEASURED
    found = {(entry["method"], entry["seqlen"]): entry for entry in entries}
    rows = []
    for seqlen in sorted({entry["seqlen"] for entry in entries}):
        row = [str(seqlen)]
        for method in ("naive", "fused"):
            entry = found.get((method, seqlen), {})
            size = entry.get("bytes")
            if size is not None:
                row.append(binary_size(size))
            else:
                needed = entry.get("needed")
                row.append(f"({binary_size(needed)}, not run)" if needed else NOTHING)
        rows.append(row)
    return table(["seqlen", "naive NumPy", "fused, all threads"], rows)


def growth(results: Results) -> str:
    """Cost per operation with length, and speed with threads."""
    found = results.apart.get("growth")
    if not found:
        return NOT_MEASURED
    rows = []
    for entry in [*found["length"], *found["threads"]]:
        best = fastest(entry["rounds"])
        peak = entry["work"] / fastest(entry["machine"])
        rate = entry["flops"] / best
        name, threads = entry["name"].split("/")[1], str(entry["threads"])
        rows.append([name, threads, seconds(best), f"{rate / 1e9:.0f}", f"{rate / peak:.2f}"])
    return table(["(B,H,S,D), full, float32", "threads", "fastest", "GFLOP/s", "FMA peak"], rows)


PICTURES = {
    "speed": "Time of PyTorch, ONNX Runtime, JAX and naive NumPy over that of fusedattn, for every "
    "prefill shape in float32, full and causal",
    "peak": "Part of the machine that fusedattn, PyTorch and ONNX Runtime use in float32: of the "
    "multiply-add peak for prefill, of the streaming-read rate for decode, case by case",
    "time": "Time of one call against the length, fusedattn and its peers, on logarithmic axes",
    "memory": "Memory beyond inputs and output against the length: naive attention grows with the "
    "square, fused attention stays flat",
}


def picture(name: str, folder: str) -> str:
    """Return a picture that follows the reader's colours, light or dark."""
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}{name}-dark.svg">\n'
        f'  <img src="{folder}{name}-light.svg" alt="{PICTURES[name]}">\n'
        "</picture>"
    )


def pictures(folder: str) -> str:
    """Return all pictures."""
    return "\n\n".join(picture(name, folder) for name in PICTURES)


def summary(results: Results) -> str:
    """For the README: a sentence and the pictures."""
    about = results.about
    said = [
        f"Measured on {about['threads']} thread(s): {about['machine']['cpu']}, "
        f"{about['machine']['vector_unit']}."
    ]
    prefill = results.of("prefill", dtype="float32")
    for name in OTHERS:
        ratios = [ratio for entry in prefill if (ratio := entry.ratio(name)) is not None]
        if ratios:
            said.append(
                f"{PEERS[name].title} takes {geometric_mean(ratios):.2f} times as long "
                f"({min(ratios):.2f} to {max(ratios):.2f}) as fusedattn."
            )
    head = f"{said[0]} In float32 prefill, full and causal, as the geometric mean of all shapes "
    text = head + "(and from the least to the most):\n\n"
    return text + "\n".join(f"- {line}" for line in said[1:]) + "\n\n" + pictures("docs/pictures/")


BLOCKS: dict[str, Callable[[Results], str]] = {
    "circumstances": circumstances,
    "goals": goals,
    "prefill": lambda results: cases(results, "prefill"),
    "masks": lambda results: cases(results, "mask", "window"),
    "decode": lambda results: cases(results, "decode"),
    "backward": lambda results: cases(results, "backward"),
    "length": lambda results: cases(results, "length"),
    "tiny": lambda results: cases(results, "tiny"),
    "ways": ways,
    "startup": startup,
    "memory": memory,
    "growth": growth,
    "pictures": lambda _: pictures("pictures/"),
    "summary": summary,
}

_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n)(.*?)(<!-- end of bench -->)", re.DOTALL)


def filled(text: str, results: Any, blocks: Mapping[str, Callable[[Any], str]] = BLOCKS) -> str:
    """Return a document with every marked block written anew; without results, that it is empty.

    Raises
    ------
    KeyError
        If a marker names no block.
    """

    def block(found: re.Match[str]) -> str:
        content = blocks[found[2]]
        inside = NOT_MEASURED if results is None else content(results)
        return f"{found[1]}\n{inside}\n\n{found[4]}"

    return _BLOCK.sub(block, text)


def write(results: Results, documents: Iterable[Path] = DOCUMENTS) -> None:
    """Write the blocks of some documents."""
    for document in documents:
        document.write_text(filled(document.read_text(), results))
