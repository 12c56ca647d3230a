"""The CPU backend: from a problem to finished arrays."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu import threads
from fusedattn.cpu.compile import get_micro, get_rescue, get_worker, known_rescue
from fusedattn.cpu.forward import NEEDS_RESCUE, STOP
from fusedattn.cpu.params import STORAGE_NAME, Lowered, lower
from fusedattn.cpu.tile import tile_for
from fusedattn.problem import AttentionProblem, Result

# Below this much work waking a thread costs more than it saves.
ALONE_FLOPS = 5_000_000
# Above this much work (some hundredths of a second) the caller only waits, so that Ctrl-C is heard.
LONG_FLOPS = 2_000_000_000

_scratch = threading.local()


def _working_memory(size: int) -> int:
    """Address of at least ``size`` bytes that belong to this thread, on a cache line."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.nbytes < size + 64:
        buffer = _scratch.buffer = np.empty(size + 64, np.uint8)
        _scratch.address = -(-buffer.ctypes.data // 64) * 64
    address: int = _scratch.address
    return address


class Cpu:
    """Fused kernels on the CPU."""

    name = "cpu"

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Every problem that passes validation runs."""
        del problem
        return []

    def forward(self, problem: AttentionProblem) -> Result:
        """Compute ``out`` and, where asked for, ``lse``."""
        out = problem.out if problem.out is not None else _empty_out(problem)
        lse = np.empty(problem.lse_shape, problem.accumulator) if problem.return_lse else None
        tile = tile_for(STORAGE_NAME[problem.dtype], STORAGE_NAME[problem.out_dtype])
        if out.size:
            lowered = lower(problem, tile, out, lse)
            lowered.natives(get_micro(tile).addresses | known_rescue())
            _run(lowered, problem.flops)
        return Result(out, lse)


CPU = Cpu()


def _empty_out(problem: AttentionProblem) -> NDArray[Any]:
    """Fresh output, contiguous in the caller's axis order."""
    *leading, heads, rows, dim = problem.out_shape
    if problem.layout == "bhsd":
        return np.empty(problem.out_shape, problem.out_dtype)
    return np.empty((*leading, rows, heads, dim), problem.out_dtype).swapaxes(-3, -2)


def _run(lowered: Lowered, flops: int) -> None:
    worker, address = get_worker(), lowered.address
    scratch_bytes, items = int(lowered.record["scratch_bytes"]), int(lowered.record["items"])

    needs_rescue: list[bool] = []

    def work() -> None:
        if worker(address, _working_memory(scratch_bytes)) == NEEDS_RESCUE:
            needs_rescue.append(True)
            stop()

    def stop() -> None:
        lowered.counter[0] = STOP

    count = 1 if flops < ALONE_FLOPS else min(threads.get_num_threads(), items)
    threads.run(work, stop, count, join_in=flops < LONG_FLOPS)
    if needs_rescue:  # the first time ever: compile it and start over
        lowered.natives(get_rescue())
        lowered.counter[0] = 0
        threads.run(work, stop, count, join_in=flops < LONG_FLOPS)


def warmup(dtypes: Iterable[str] = ("float32",)) -> None:
    """Compile (or load) the kernels of these storage types."""
    for dtype in dtypes:
        get_micro(tile_for(dtype, dtype))
    get_worker()
    get_rescue()
