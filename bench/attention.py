"""Time `fusedattn.attention` beside PyTorch's SDPA and naive NumPy: ``python bench/attention.py``.

Needs the extra ``bench`` (PyTorch itself may be missing). Every peer runs in a process of its own
that lives as long as the benchmark, because threads that spin after a call slow down whoever comes
next; the peers take turns, so that a busy machine slows them all. Each answer is checked before it
is timed, against the float64 reference under the error bound of the test kit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from peers import PEERS, Case, ask, rows_checked, workers
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fusedattn
from fusedattn.cli.machine import cpu_name
from fusedattn.testing import forward_budget

# After a turn the threads of some libraries spin on for a while.
PAUSE_SECONDS = 0.25


SHAPES = ["1,8,2048,64", "1,8,512,64", "1,16,4096,128", "1,32/8,2048,128", "8,12,128,64"]


def fault(case: Case, answer: Any) -> str | None:
    """Return what is wrong with the rows that a peer computed."""
    if isinstance(answer, str):
        return answer
    q, k, v = case.inputs()
    worst = 0.0
    for index, row in enumerate(rows_checked(case)):
        one = fusedattn.make_problem(
            q[:, :, row : row + 1], k, v, causal=case.causal, q_offset=int(row)
        )
        expected = fusedattn.dispatch.load("reference").forward(one).out
        error = np.abs(answer[:, :, index : index + 1] - expected.astype(np.float64))
        worst = max(worst, float((error / forward_budget(one).out).max()))
    return None if worst <= 1.0 else f"wrong: error {worst:.3g} times the bound"


def compare(case: Case, pipes: dict[str, Any], rounds: int) -> Iterator[dict[str, Any]]:
    """Check every peer, then let them take turns; yields one result a peer."""
    notes = {peer: fault(case, ask(pipe, case)) for peer, pipe in pipes.items()}
    seconds: dict[str, list[float]] = {peer: [] for peer, note in notes.items() if not note}
    for _ in range(rounds):
        for peer, measured in seconds.items():
            time.sleep(PAUSE_SECONDS)
            answer = ask(pipes[peer], None)
            if isinstance(answer, str):
                notes[peer] = answer
            else:
                measured += answer
    flops = fusedattn.make_problem(*case.inputs(), causal=case.causal).flops
    for peer, note in notes.items():
        result = {"peer": peer, "shape": str(case), "causal": case.causal, "note": note}
        if not note:
            median = statistics.median(seconds[peer])
            result |= {"median": median, "minimum": min(seconds[peer])}
            result["gflops"] = flops / median / 1e9
        yield result


# --- starting up ---------------------------------------------------------------------------------

STARTUP = """
import time, numpy
a = time.perf_counter(); import fusedattn; b = time.perf_counter()
x = numpy.ones((1, 1, 64, 64), numpy.float32); fusedattn.attention(x, x, x)
print(b - a, time.perf_counter() - b)
"""


def startup() -> dict[str, float]:
    """Seconds of import and first call in fresh processes, with an empty cache and a full one."""
    with tempfile.TemporaryDirectory() as folder:

        def fresh() -> tuple[float, float]:
            root = str(Path(fusedattn.__file__).parents[1])
            environment = os.environ | {"FUSEDATTN_CACHE_DIR": folder, "PYTHONPATH": root}
            command = [sys.executable, "-c", STARTUP]
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            imported, called = (float(word) for word in done.stdout.split())
            return imported, called

        cold, *cached = (fresh() for _ in range(4))
    return {
        "import beyond NumPy": statistics.median(imported for imported, _ in cached),
        "first call, cold": cold[1],
        "first call, cached": statistics.median(called for _, called in cached),
    }


# --- the program ---------------------------------------------------------------------------------


def read_shape(text: str, causal: bool) -> Case:
    found = re.fullmatch(r"(\d+),(\d+)(?:/(\d+))?,(\d+),(\d+)", text.replace(" ", ""))
    if found is None:
        raise typer.BadParameter(f"{text!r} is not BATCH,HEADS[/HEADS_KV],SEQLEN,HEAD_DIM")
    batch, heads, heads_kv, seqlen, dim = found.groups()
    return Case(int(batch), int(heads), int(heads_kv or heads), int(seqlen), int(dim), causal)


def machine() -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    packages = ("numpy", "numba", "llvmlite", "torch")
    return {
        "cpu": cpu_name(),
        "threads": fusedattn.get_num_threads(),
        "python": platform.python_version(),
        "fusedattn": fusedattn.__version__,
        **{package: installed(package) for package in packages},
        "commit": commit,
    }


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="float32, milliseconds", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("shape", "keys", "peer"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("median", "minimum", "ratio of\nmedians", "ratio of\nminima", "GFLOP/s"):
        shown.add_column(heading, justify="right")
    ours: dict[str, Any] = {}
    for result in results:
        ours = result if result["peer"] == "fused" else ours
        cells = [result["shape"], "causal" if result["causal"] else "full"]
        cells = [*(cells if result is ours else ["", ""]), result["peer"]]
        if not result["note"]:
            kinds = ("median", "minimum")
            cells += [f"{result[kind] * 1e3:.2f}" for kind in kinds]
            cells += [f"{result[kind] / ours[kind]:.2f}" if kind in ours else "" for kind in kinds]
            cells.append(f"{result['gflops']:.0f}")
        shown.add_row(*cells)
    return shown


def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="BATCH,HEADS[/HEADS_KV],SEQLEN,HEAD_DIM; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each peer on each problem.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here too.")
    ] = None,
) -> None:
    """Time attention beside PyTorch and naive NumPy, full and causal."""
    console = Console()
    cases = [read_shape(text, causal) for text in shape or SHAPES for causal in (False, True)]
    peers = [peer for peer in PEERS if peer != "torch" or importlib.util.find_spec("torch")]
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items() if value))

    started, pipes = startup(), workers(peers)
    results: list[dict[str, Any]] = []
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        for case in progress.track(cases, description="measuring"):
            results += compare(case, pipes, rounds)
    console.print(table(results))
    for result in results:
        if result["note"]:
            console.print(f"{result['shape']}, {result['peer']}: {result['note']}")
    for name, seconds in started.items():
        console.print(f"{name}: {seconds:.3f} s", highlight=False)
    if json_file is not None:
        whole = {"machine": about, "startup": started, "results": results}
        json_file.write_text(json.dumps(whole, indent=2) + "\n")
    if any(result["peer"] == "fused" and result["note"] for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
