"""Measure `fusedattn` beside other libraries: ``python bench/run.py``, or ``-m fusedattn bench``.

Needs the extra ``bench``; a library that is not installed is left out, and said to be. Every answer
is checked against float64 before anything is timed. docs/performance.md says how to read the
results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is measured is this checkout

from bench import apart, machine, results  # noqa: E402
from bench.cases import QUICK, Case, all_cases, select  # noqa: E402
from bench.goals import GOALS  # noqa: E402
from bench.markdown import seconds  # noqa: E402
from bench.measure import compare  # noqa: E402
from bench.peers import OURS, PEERS  # noqa: E402
from bench.workers import MACHINE, Worker, working  # noqa: E402
from fusedattn import get_num_threads  # noqa: E402

ROUNDS, QUICK_ROUNDS = 5, 2


def main(
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Cases whose name holds this; * is any text. Repeat."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PEERS)}; fused always. Repeat. [all]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few short cases, two rounds.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help=f"Turns of each peer on each case. [{ROUNDS}]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every peer. [as fusedattn would use]")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything here too.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases, and end.")] = False,
) -> None:
    """Time attention beside other libraries, and say what part of the machine it uses.

    Without --case and --quick it also measures start-up, memory and growth, and sets the whole
    beside the goals. Have a quiet machine, and time.
    """
    whole = not (case or quick)
    chosen = select(all_cases(), case or (QUICK if quick else ()))
    if not chosen:
        raise typer.BadParameter("no case has such a name; --list names them", param_hint="--case")
    unknown = set(peer or ()) - set(PEERS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}", param_hint="--peer")
    if list_cases:
        for each in chosen:
            typer.echo(f"{each.name}: {each.source}")
        return
    console = Console()
    names = [name for name in PEERS if name == OURS or not peer or name in peer]
    for name in names:
        if PEERS[name].missing:
            console.print(f"{PEERS[name].title} is left out: {PEERS[name].missing}.")
    names = [name for name in names if not PEERS[name].missing]
    count, turns = threads or get_num_threads(), rounds or (QUICK_ROUNDS if quick else ROUNDS)

    about = machine.describe(count)
    records: list[dict[str, Any]] = []
    beside: dict[str, Any] = {}

    def keep() -> None:
        if json_file is not None:
            results.write(json_file, about, records, beside)

    with working([MACHINE, *names], count) as workers:
        for record in _measure(chosen, workers, turns):
            records.append(record)
            keep()  # a run that is ended loses nothing
        beside = _apart(workers, count, turns) if whole else {}
        keep()
    found = results.Results(
        {"format": results.FORMAT, "about": about, "apart": beside, "cases": records}
    )
    report(console, found, whole)
    if any(not entry.measured(OURS) for entry in found.entries):
        raise typer.Exit(1)


def _progress() -> Progress:
    errors = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    described = TextColumn("{task.description}")
    return Progress(
        described, *columns, console=errors, transient=True, disable=not errors.is_terminal
    )


def _measure(
    cases: list[Case], workers: dict[str, Worker], rounds: int
) -> Iterator[dict[str, Any]]:
    with _progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            yield compare(case, workers, rounds)
            progress.advance(task)


def _apart(workers: dict[str, Worker], threads: int, rounds: int) -> dict[str, Any]:
    with _progress() as progress:
        task = progress.add_task("growth", total=3)
        found: dict[str, Any] = {"growth": apart.growth(workers[OURS], threads, rounds)}
        progress.update(task, description="memory", completed=1)
        found["memory"] = list(apart.memory())
        progress.update(task, description="start-up", completed=2)
        return found | {"startup": apart.startup()}


def report(console: Console, found: results.Results, whole: bool) -> None:
    """Print the cases; after a whole run the goals too."""
    headings, rows = ["case", *_HEADINGS], [_cells(entry) for entry in found.entries]
    present = [i for i, _ in enumerate(headings) if any(row[i] for row in rows)]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in present:
        shown.add_column(
            headings[i].replace(" ", "\n"), justify="right" if i else "left", no_wrap=True
        )
    for row in rows:
        shown.add_row(*(row[i] for i in present))
    unlimited = console.options.update(width=1000)
    if console.measure(shown, options=unlimited).maximum <= console.width:
        console.print(shown)
    else:  # a list, where the table does not fit
        for row in rows:
            facts = [f"{headings[i]} {row[i]}" for i in present[1:] if row[i]]
            console.print(f"{row[0]}\n  {', '.join(facts)}", highlight=False)
    console.print("Peers: their fastest time over ours, and in brackets that of the medians.")
    for entry in found.entries:
        for name in PEERS:
            if entry.note(name):
                console.print(f"{entry.name}, {PEERS[name].title}: {entry.note(name)}")
    if whole:
        console.print(_goals(found))


_HEADINGS = [
    *("fastest", "median", "of machine"),
    *(peer.title for name, peer in PEERS.items() if name != OURS),
    *("error", "of torch's"),
]


def _cells(entry: results.Entry) -> list[str]:
    """Name, fastest and median time, part of the machine, peers, error; empty where unmeasured."""
    others = [name for name in PEERS if name != OURS]
    if not entry.measured(OURS):
        return [entry.name, *[""] * len(_HEADINGS)]
    cells = [entry.name, seconds(entry.best()), seconds(entry.median()), f"{entry.fraction():.2f}"]
    for name in others:
        ratio, medians = entry.ratio(name), entry.ratio_of_medians(name)
        cells.append("" if ratio is None else f"{ratio:.2f} ({medians:.2f})")
    ours, torch = entry.rms(), entry.rms("torch")
    return [*cells, f"{ours:.2g}", f"{ours / torch:.2f}" if torch and ours is not None else ""]


def _goals(found: results.Results) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("goal", "at least", "aim", "reached", "met", "worst case"):
        shown.add_column(heading, justify="left" if heading in ("goal", "worst case") else "right")
    for goal in GOALS:
        shown.add_row(*goal.cells(found))
    return shown


if __name__ == "__main__":
    typer.run(main)
