"""The demonstration: memory, time and error of fused attention beside naive NumPy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fusedattn import explain, get_num_threads, warmup
from fusedattn.cli.machine import available_memory, binary_size, cpu_name
from fusedattn.cli.measure import MeasurementFailed, Sample, measure_apart, naive_bytes

# Part of the available memory that naive attention may take; the rest is not ours to risk.
_SAFE_SHARE = 0.8

Measure = Callable[[str, int, int, int], Sample]


@dataclass(frozen=True)
class Row:
    """One sequence length.

    Attributes
    ----------
    naive
        None where it was not run, or ended without a result.
    why_not
        The reason for that.
    naive_bytes
        Memory that naive attention needs by calculation.
    """

    seqlen: int
    fused: Sample
    naive: Sample | None
    why_not: str
    naive_bytes: int

    @property
    def time_ratio(self) -> float | None:
        """Time of naive over that of fused."""
        return self.naive.seconds / self.fused.seconds if self.naive else None


def run(console: Console, seqlens: Sequence[int], heads: int, head_dim: int) -> list[Row]:
    """Measure, print and conclude."""
    console.print(_machine(heads, head_dim), highlight=False)
    start = time.perf_counter()
    warmup()
    console.print(f"Kernels ready in {time.perf_counter() - start:.1f} s.\n", highlight=False)

    rows: list[Row] = []
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        # Both methods do work in proportion to the square of the length.
        task = progress.add_task("measuring", total=sum(seqlen**2 for seqlen in seqlens))
        for seqlen in seqlens:
            progress.update(task, description=f"seqlen {seqlen}")
            rows.append(compare(seqlen, heads, head_dim))
            progress.advance(task, seqlen**2)
    for part in report(rows, console):
        console.print(part, highlight=False)
    return rows


def compare(seqlen: int, heads: int, head_dim: int, measure: Measure = measure_apart) -> Row:
    """Measure both ways at one length, naive only where its arrays fit into memory."""
    fused = measure("fused", seqlen, heads, head_dim)
    needed, available = naive_bytes(seqlen, heads), available_memory()
    naive, why_not = None, ""
    if available is not None and needed > _SAFE_SHARE * available:
        why_not = f"of the {binary_size(available)} available {_SAFE_SHARE:.0%} were given to it"
    else:
        try:
            naive = measure("naive", seqlen, heads, head_dim)
        except MeasurementFailed as failure:
            why_not = str(failure)
    return Row(seqlen, fused, naive, why_not, needed)


def _machine(heads: int, head_dim: int) -> str:
    from fusedattn.cpu.tile import host_isa

    example = np.broadcast_to(np.float32(0), (1, heads, 1024, head_dim))
    backend = explain(example, example, example).backend
    memory = available_memory()
    room = "" if memory is None else f", {binary_size(memory)} of memory available"
    return (
        f"Machine: {os.cpu_count()} x {cpu_name()}{room}\n"
        f"Backend: {backend}, {host_isa().name}, {get_num_threads()} thread(s)\n"
        f"Problem: float32, (batch, heads, seqlen, head_dim) = (1, {heads}, seqlen, {head_dim})"
    )


def report(rows: Sequence[Row], console: Console) -> list[Table | Text]:
    """Return what to print: a table (a list on a narrow terminal), notes and the conclusion."""
    headings = ["seqlen", "naive memory", "fused memory", "naive time", "fused time"]
    headings += ["time ratio", "max error"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    parts: list[Table | Text] = [table]
    unlimited = console.options.update(width=1000)
    if console.measure(table, options=unlimited).maximum > console.width:
        parts = [Text(_as_list(headings, row)) for row in rows]
    notes = (
        "Memory: peak beyond inputs and output, each in a fresh process. Time: fastest of up to "
        "20 calls. Error: against the float64 reference"
    )
    sampled = [row for row in rows if row.fused.rows_checked < row.seqlen]
    notes += "".join(f", at {row.seqlen} on {row.fused.rows_checked} rows" for row in sampled) + "."
    for row in rows:
        if row.naive is None:
            notes += f" Naive at {row.seqlen}: size in brackets computed, not run ({row.why_not})."
    return [*parts, Text(notes + "\n", "dim"), Text(conclusion(rows), "bold")]


def _as_list(headings: Sequence[str], row: Row) -> str:
    lines = [f"{name:<13} {cell}" for name, cell in zip(headings, cells(row), strict=True)]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    """Return one line of the table."""
    naive_memory = f"({binary_size(row.naive_bytes)})"
    naive_time = "-"
    if row.naive is not None:
        naive_memory, naive_time = _memory(row.naive.peak_bytes), _duration(row.naive.seconds)
    ratio = row.time_ratio
    return [
        str(row.seqlen),
        naive_memory,
        _memory(row.fused.peak_bytes),
        naive_time,
        _duration(row.fused.seconds),
        "-" if ratio is None else f"{ratio:.1f}x",
        f"{row.fused.max_error:.1e}",
    ]


def _memory(count: int | None) -> str:
    return "unknown" if count is None else binary_size(count)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def conclusion(rows: Sequence[Row]) -> str:
    """Say in one sentence what the numbers show, whatever they are."""
    last = max(rows, key=lambda row: row.seqlen)
    error = max(row.fused.max_error for row in rows)
    said = f"With {last.seqlen} queries and keys, fused attention needed "
    fused_peak = last.fused.peak_bytes
    said += "" if fused_peak is None else f"{binary_size(fused_peak)} of working memory and "
    said += f"{_duration(last.fused.seconds)}, naive NumPy "
    if last.naive is None:
        said += f"would have needed {binary_size(last.naive_bytes)} and was not run"
    else:
        if fused_peak is not None and last.naive.peak_bytes is not None:
            times = last.naive.peak_bytes / max(fused_peak, 1)
            said += f"{binary_size(last.naive.peak_bytes)} ({times:,.0f} times as much) and "
        said += f"{_duration(last.naive.seconds)} ({last.time_ratio:.1f} times as long)"
    return said + f", and no output was further than {error:.1e} from the float64 reference."
