"""The CPU backend: from a problem to finished arrays."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from fusedattn.cpu import threads
from fusedattn.cpu.cache import KernelCache
from fusedattn.cpu.forward import STOP, WORKER_SIGNATURE, make_worker
from fusedattn.cpu.params import STORAGE_NAME, Lowered, Slot, lower
from fusedattn.cpu.tile import Tile, tile_for
from fusedattn.problem import AttentionProblem, Result

# Below this much work waking a thread costs more than it saves.
ALONE_FLOPS = 5_000_000
# Above this much work (some hundredths of a second) the caller only waits, so that Ctrl-C is heard.
LONG_FLOPS = 2_000_000_000

_Worker = Callable[[int, int], int]
_workers: dict[Tile, tuple[_Worker, object]] = {}
_compile_lock = threading.Lock()
_scratch = threading.local()


def kernel(tile: Tile) -> _Worker:
    """Return the native worker of a tile, compiled or loaded on first use."""
    found = _workers.get(tile)
    if found is None:
        with _compile_lock:
            found = _workers.get(tile)
            if found is None:
                found = _workers[tile] = _compile(tile)
    return found[0]


def _compile(tile: Tile) -> tuple[_Worker, object]:
    from numba.core.ccallback import CFunc

    compiled = CFunc(
        make_worker(tile),
        (WORKER_SIGNATURE.args, WORKER_SIGNATURE.return_type),
        locals={},
        options={"error_model": "numpy"},
    )
    compiled._cache = KernelCache(tile)
    compiled.compile()
    # ctypes lets go of the GIL for the length of the call.
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return prototype(compiled.address), compiled


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
        worker = kernel(tile)
        if out.size:
            _run(worker, lower(problem, tile, out, lse), problem.flops)
        return Result(out, lse)


CPU = Cpu()


def _empty_out(problem: AttentionProblem) -> np.ndarray:
    """Fresh output, contiguous in the caller's axis order."""
    *leading, heads, rows, dim = problem.out_shape
    if problem.layout == "bhsd":
        return np.empty(problem.out_shape, problem.out_dtype)
    return np.empty((*leading, rows, heads, dim), problem.out_dtype).swapaxes(-3, -2)


def _run(worker: _Worker, lowered: Lowered, flops: int) -> None:
    address, counter = lowered.address, lowered.keep_alive[-1]
    scratch_bytes, items = lowered[Slot.SCRATCH_BYTES], lowered[Slot.ITEMS]

    def work() -> None:
        worker(address, _working_memory(scratch_bytes))

    def stop() -> None:
        counter[0] = STOP

    count = 1 if flops < ALONE_FLOPS else min(threads.get_num_threads(), items)
    join_in = flops < LONG_FLOPS
    if count == 1 and join_in:
        work()
    else:
        threads.run(work, stop, count, join_in=join_in)


def warmup(dtypes: Iterable[str] = ("float32",)) -> None:
    """Compile (or load) the kernels of these storage types."""
    for dtype in dtypes:
        kernel(tile_for(dtype, dtype))
