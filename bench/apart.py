"""What is no ratio to a peer: starting up, memory, and how cost grows with length and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cases import Case, all_cases
from bench.measure import Asked
from fusedattn.cli.machine import available_memory
from fusedattn.cli.measure import MeasurementFailed, measure_apart, naive_bytes

ROOT = Path(__file__).resolve().parents[1]

STARTUP = """
import time, numpy
a = time.perf_counter(); import fusedattn; b = time.perf_counter()
x = numpy.ones((1, 1, 64, 64), numpy.float32)
c = time.perf_counter(); fusedattn.attention(x, x, x); d = time.perf_counter()
print(b - a, d - c)
"""
COLD, CACHED = 3, 5

# The heads of memory and growth, (1, 8, seqlen, 64).
HEADS, HEAD_DIM = 8, 64
MEMORY_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Part of the available memory that naive attention may take.
SAFE_SHARE = 0.7


def startup() -> dict[str, list[float]]:
    """Return seconds of import and first call, each in a fresh process."""

    def fresh(folder: str) -> tuple[float, float]:
        environment = os.environ | {"FUSEDATTN_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", STARTUP]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT
        )
        imported, called = (float(word) for word in done.stdout.split())
        return imported, called

    times: dict[str, list[float]] = {"import": [], "cold": [], "cached": []}
    for _ in range(COLD):
        with tempfile.TemporaryDirectory() as folder:
            times["cold"].append(fresh(folder)[1])
            for _ in range(-(-CACHED // COLD)):
                imported, called = fresh(folder)
                times["import"].append(imported)
                times["cached"].append(called)
    return times


def memory(lengths: tuple[int, ...] = MEMORY_LENGTHS) -> Iterator[dict[str, Any]]:
    """Yield the peak beyond inputs and output, naive where it fits, each in a fresh process."""
    for method in ("fused", "naive"):
        for seqlen in lengths:
            needed, available = naive_bytes(seqlen, HEADS), available_memory()
            entry: dict[str, Any] = {"method": method, "seqlen": seqlen, "bytes": None}
            if method == "naive" and available is not None and needed > SAFE_SHARE * available:
                yield entry | {"note": "does not fit into memory", "needed": needed}
                continue
            try:
                sample = measure_apart(method, seqlen, HEADS, HEAD_DIM)
                yield entry | {"bytes": sample.peak_bytes, "note": None}
            except MeasurementFailed as failure:
                yield entry | {"note": str(failure)}


def _full(seqlen: int) -> Case:
    wanted = (f"1,{HEADS},{seqlen},{HEAD_DIM}", "full", "float32")
    return next(c for c in all_cases() if (c.shape, c.variant, c.dtype) == wanted)


def growth(ours: Asked, threads: int, rounds: int) -> dict[str, Any]:
    """Return times at two lengths and with one thread and all, in turns."""
    settings = [(2048, threads), (16384, threads)]
    by_length = ours.ask("own", [(_full(seqlen), count) for seqlen, count in settings], rounds)
    by_threads = []
    if threads > 1:
        by_threads = ours.ask("own", [(_full(2048), 1), (_full(2048), threads)], rounds)
    return {"length": by_length, "threads": by_threads}
