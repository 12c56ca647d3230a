"""What a score_mod costs, what a block mask saves, and PyTorch's FlexAttention beside both.

    python bench/flex.py [--repeats N] [--threads N] [--no-torch]

Everything is checked against the reference, or against the other side, before it is timed. Times
of one table are taken in turns (A B A B ...), so that a noisy machine disturbs all alike; printed
are minima and the ratio of medians. PyTorch runs in a process of its own, compiled by its inductor,
which needs a C++ compiler; where it does not run, the table says why.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedattn
from fusedattn import attention, make_block_mask

BLOCK = 128
Array = NDArray[Any]


def operands(batch: int, heads: int, rows: int, dim: int) -> Array:
    return np.random.default_rng(0).standard_normal((3, batch, heads, rows, dim), np.float32)


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, taken in turns: a list of seconds for each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def row(name: str, times: list[float], base: list[float], note: str = "") -> None:
    ratio = statistics.median(times) / statistics.median(base)
    print(f"  {name:34s} {min(times) * 1e3:9.2f} ms   {ratio:6.3f}   {note}", flush=True)


# --- score_mods ---------------------------------------------------------------------------------


def scaled(score: float, batch: int, head: int, q_idx: int, k_idx: int) -> float:
    return score * 0.5


def causal(score: float, batch: int, head: int, q_idx: int, k_idx: int) -> float:
    return score if q_idx >= k_idx else -math.inf


def alibi(score: float, batch: int, head: int, q_idx: int, k_idx: int, slopes: Any) -> Any:
    return score - slopes[head] * abs(q_idx - k_idx)


def relative(score: float, batch: int, head: int, q_idx: int, k_idx: int, table: Any) -> Any:
    return score + table[head, q_idx - k_idx + 2047]


def capped(score: float, batch: int, head: int, q_idx: int, k_idx: int) -> Any:
    return 20.0 * math.tanh(score / 20.0)


def documents(score: float, batch: int, head: int, q_idx: int, k_idx: int, document: Any) -> Any:
    return score if document[q_idx] == document[k_idx] else -math.inf


def score_mods(repeats: int) -> None:
    shape = (1, 8, 2048, 64)
    q, k, v = operands(*shape)
    rng = np.random.default_rng(1)
    # Gentle slopes: steep ones make weights so small that some processors slow down.
    slopes = np.full(8, 0.01, np.float32)
    table = rng.standard_normal((8, 4095), np.float32)
    mods: dict[str, tuple[Callable[..., Any], tuple[Array, ...]]] = {
        "score * 0.5": (scaled, ()),
        "causal by -inf": (causal, ()),
        "documents by -inf": (documents, (np.repeat(np.arange(8), 256),)),
        "ALiBi": (alibi, (slopes,)),
        "relative table": (relative, (table,)),
        "20 tanh(score / 20)": (capped, ()),
    }
    runs: dict[str, Callable[[], Any]] = {"none": lambda: attention(q, k, v)}
    for name, (mod, aux) in mods.items():
        options: dict[str, Any] = {"score_mod": mod, "score_mod_aux": aux}
        some = [x[:, :, :300] for x in (q, k, v)]
        expected = attention(*some, **options, backend="reference")
        assert np.abs(attention(*some, **options) - expected).max() < 1e-4, name
        runs[name] = functools.partial(attention, q, k, v, **options)
    times = in_turns(runs, repeats)
    print(f"score_mod at {shape}, time over that without one (goal: at most 1.25)")
    for name, taken in times.items():
        row(name, taken, times["none"])


# --- block masks --------------------------------------------------------------------------------


def listed(batch: int, head: int, q_idx: int, k_idx: int, kept: Any) -> Any:
    return kept[q_idx // 128, k_idx // 128]


def sparsity(repeats: int) -> None:
    rows = 4096
    q, k, v = operands(1, 8, rows, 64)
    blocks = rows // BLOCK
    runs: dict[str, Callable[[], Any]] = {}
    shares: dict[str, float] = {}
    for share in (1.0, 0.5, 0.25, 0.1):
        kept = np.random.default_rng(2).random((blocks, blocks)) < share
        kept[np.arange(blocks), np.arange(blocks)] = True
        mask = make_block_mask(listed, None, None, rows, rows, aux=(kept,), block=(BLOCK, BLOCK))
        name = f"{kept.mean():.3f} of the blocks kept"
        shares[name] = kept.mean()
        runs[name] = functools.partial(attention, q, k, v, block_mask=mask)
        dense = kept.repeat(BLOCK, 0).repeat(BLOCK, 1)
        assert (runs[name]() == attention(q, k, v, mask=dense)).all(), name
    times = in_turns(runs, repeats)
    full = next(iter(times.values()))
    print(
        f"block mask at (1, 8, {rows}, 64), blocks of {BLOCK}: time over all blocks, and over ideal"
    )
    for name, taken in times.items():
        over = statistics.median(taken) / statistics.median(full) / shares[name]
        row(name, taken, full, f"{over:.3f} of ideal (goal: at most 1.15)")


# --- PyTorch ------------------------------------------------------------------------------------


def _torch_worker(pipe: Any, threads: int) -> None:
    """Run PyTorch's side: say what is wrong, or time each mask when asked to."""
    try:
        import torch
        from torch.nn.attention import flex_attention as flex

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        compiled = torch.compile(flex.flex_attention)
        tensors = [torch.from_numpy(x) for x in operands(1, 8, 2048, 64)]
        document = torch.arange(8).repeat_interleave(256)
        masks = {
            "causal": lambda b, h, q, k: q >= k,
            "window of 256": lambda b, h, q, k: (q >= k) & (q - k <= 256),
            "documents": lambda b, h, q, k: document[q] == document[k],
        }
        made = {
            name: flex.create_block_mask(mask, None, None, 2048, 2048, device="cpu")
            for name, mask in masks.items()
        }
        results = {name: compiled(*tensors, block_mask=mask).numpy() for name, mask in made.items()}
        pipe.send(("ready", results))
        while (name := pipe.recv()) is not None:
            start = time.perf_counter()
            compiled(*tensors, block_mask=made[name])
            pipe.send(time.perf_counter() - start)
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"))


def beside_torch(repeats: int) -> None:
    q, k, v = operands(1, 8, 2048, 64)
    document = np.repeat(np.arange(8), 256)
    masks: dict[str, tuple[Callable[..., Any], tuple[Array, ...]]] = {
        "causal": (lambda b, h, q, k: q >= k, ()),
        "window of 256": (lambda b, h, q, k: (q >= k) & (q - k <= 256), ()),
        "documents": (lambda b, h, q, k, d: d[q] == d[k], (document,)),
    }
    print("PyTorch's FlexAttention, compiled, at (1, 8, 2048, 64): its time over ours (goal: 1.5)")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_torch_worker, args=(there, fusedattn.get_num_threads()))
    worker.start()
    state, results = here.recv()
    if state == "failed":
        print(f"  did not run: {results}")
        worker.join()
        return
    for name, (mask, aux) in masks.items():
        made = make_block_mask(mask, None, None, 2048, 2048, aux=aux, block=(BLOCK, BLOCK))
        out = attention(q, k, v, block_mask=made)
        assert np.abs(out - results[name]).max() < 1e-4, name
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(repeats):
            here.send(name)
            theirs.append(here.recv())
            start = time.perf_counter()
            attention(q, k, v, block_mask=made)
            ours.append(time.perf_counter() - start)
        row(f"{name}, ours", ours, ours)
        row(f"{name}, PyTorch", theirs, ours)
    here.send(None)
    worker.join()


# --- the first call -----------------------------------------------------------------------------

FIRST = """
import math, sys, time
import numpy as np
import fusedattn
def mod(score, batch, head, q_idx, k_idx, table):
    return 20.0 * math.tanh((score + table[head, abs(q_idx - k_idx)]) / 20.0)
q, table = np.ones((2, 200, 64), np.float32), np.ones((2, 200), np.float32)
fusedattn.attention(q, q, q)
start = time.perf_counter()
fusedattn.attention(q, q, q, score_mod=mod, score_mod_aux=(table,))
print(time.perf_counter() - start)
"""


def first_call() -> None:
    folder = tempfile.mkdtemp()
    environment = {**os.environ, "FUSEDATTN_CACHE_DIR": folder}

    def run() -> float:
        done = subprocess.run(
            [sys.executable, "-c", FIRST],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    try:
        print("first call of a new function, after one of attention without it (goal: under 4 s)")
        print(f"  compiled                           {run() * 1e3:9.0f} ms")
        print(f"  from the cache, in a new process   {run() * 1e3:9.0f} ms", flush=True)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        fusedattn.set_num_threads(arguments.threads)
    print(f"{fusedattn.get_num_threads()} threads, float32")
    first_call()
    score_mods(arguments.repeats)
    sparsity(arguments.repeats)
    if not arguments.no_torch:
        beside_torch(arguments.repeats)


if __name__ == "__main__":
    main()
