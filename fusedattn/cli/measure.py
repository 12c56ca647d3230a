"""Memory, time and error of one way to compute attention at one length, in a process of its own.

The peak memory of a process only ever rises, so each number needs a fresh one:
``python -m fusedattn.cli.measure fused 4096 1 64`` prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cli.machine import peak_extra

Array = NDArray[Any]

# The reference is computed on as many rows as keep its matrix of scores below this many entries.
_REFERENCE_ENTRIES = 2**24
# The call is repeated until one of these is used up, and once at least unless that takes too long:
# the first one may have waited for a virtual machine to get its memory.
_TIMED_SECONDS, _TIMED_CALLS = 2.0, 20
_TOO_LONG = 10.0


@dataclass(frozen=True)
class Sample:
    """What was measured.

    Attributes
    ----------
    peak_bytes
        Most memory held during the first call beyond inputs and output; None where the system does
        not say.
    seconds
        Time of the fastest call, which other programs disturbed least.
    max_error
        Largest distance from the float64 reference on `rows_checked` rows of each head.
    """

    peak_bytes: int | None
    seconds: float
    max_error: float
    rows_checked: int


class MeasurementFailed(Exception):
    """The process ended without a result; the message says how."""


def naive(q: Array, k: Array, v: Array, out: Array) -> None:
    """Attention as the textbook has it: three arrays of all scores at its worst moment."""
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    np.matmul(weights, v, out=out)


def naive_bytes(seqlen: int, heads: int) -> int:
    """Return what `naive` needs beyond inputs and output."""
    return 3 * heads * seqlen * seqlen * np.dtype(np.float32).itemsize


def fused(q: Array, k: Array, v: Array, out: Array) -> None:
    """Attention as this library has it."""
    from fusedattn import attention

    attention(q, k, v, out=out)


def _warm_up_naive() -> None:
    """Start the threads of BLAS."""
    small = np.ones((1, 1, 256, 8), np.float32)
    naive(small, small, small, np.empty_like(small))


def _warm_up_fused() -> None:
    """Load the kernels. No call, so that working memory kept from it cannot hide the next one's."""
    from fusedattn import warmup

    warmup()


METHODS: dict[str, tuple[Callable[[], None], Callable[[Array, Array, Array, Array], None]]] = {
    "naive": (_warm_up_naive, naive),
    "fused": (_warm_up_fused, fused),
}


def measure(method: str, seqlen: int, heads: int, head_dim: int) -> Sample:
    """Measure in this process, which has computed nothing large before."""
    warm_up, function = METHODS[method]
    warm_up()
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, seqlen, head_dim), np.float32) for _ in range(3))
    out = np.full_like(q, 0.0)
    seconds: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        function(q, k, v, out)
        seconds.append(time.perf_counter() - start)

    peak = peak_extra(call)
    while seconds[0] < _TOO_LONG and len(seconds) < _TIMED_CALLS:
        if len(seconds) > 1 and sum(seconds) > _TIMED_SECONDS:
            break
        call()
    error, rows = _max_error(q, k, v, out)
    return Sample(peak, min(seconds), error, rows)


def _max_error(q: Array, k: Array, v: Array, out: Array) -> tuple[float, int]:
    from fusedattn import attention

    heads, seqlen = q.shape[1:3]
    count = max(1, min(seqlen, _REFERENCE_ENTRIES // (heads * seqlen)))
    rows = np.linspace(0, seqlen - 1, count).astype(np.intp)
    wide = [array.astype(np.float64) for array in (q[:, :, rows], k, v)]
    expected = attention(*wide, backend="reference")
    return float(np.abs(out[:, :, rows] - expected).max()), count


def measure_apart(method: str, seqlen: int, heads: int, head_dim: int) -> Sample:
    """Measure in a fresh process.

    Raises
    ------
    MeasurementFailed
        If there is no result, for want of memory or whatever else.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    arguments = [method, str(seqlen), str(heads), str(head_dim)]
    done = subprocess.run(
        [sys.executable, "-m", "fusedattn.cli.measure", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [_ending(done.returncode)]
        raise MeasurementFailed(said[-1])
    return Sample(**json.loads(done.stdout))


def _ending(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _main(arguments: list[str]) -> None:
    method, *numbers = arguments
    seqlen, heads, head_dim = (int(number) for number in numbers)
    print(json.dumps(asdict(measure(method, seqlen, heads, head_dim))))


if __name__ == "__main__":
    _main(sys.argv[1:])
