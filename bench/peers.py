"""What the benchmark compares, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fusedattn
from fusedattn.cli.machine import available_memory

Array = NDArray[Any]

# One turn of a peer: at least one call, and as many as fit into this time.
TURN_SECONDS, TURN_CALLS = 0.3, 200
ROWS_CHECKED = 16


class Case(NamedTuple):
    """A problem in float32; k and v have ``heads_kv`` heads."""

    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    head_dim: int
    causal: bool

    def inputs(self) -> tuple[Array, Array, Array]:
        """Return q, k, v: the same numbers in every process."""
        rng = np.random.default_rng(0)
        shapes = [(self.batch, h, self.seqlen, self.head_dim) for h in self[1:3] + self[2:3]]
        q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return q, k, v

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        return f"{self.batch},{heads},{self.seqlen},{self.head_dim}"


# The peers: each returns a function that computes the case.


def fused_peer(case: Case) -> Callable[[], Array]:
    q, k, v = case.inputs()
    return lambda: fusedattn.attention(q, k, v, causal=case.causal)


def torch_peer(case: Case) -> Callable[[], Array]:
    import torch

    q, k, v = (torch.from_numpy(array) for array in case.inputs())
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = case.heads != case.heads_kv

    def call() -> Array:
        with torch.inference_mode():
            found = attend(q, k, v, is_causal=case.causal, enable_gqa=grouped)
        answer: Array = found.numpy()
        return answer

    return call


def numpy_peer(case: Case) -> Callable[[], Array]:
    needed = 3 * case.batch * case.heads * case.seqlen**2 * 4
    if needed > 0.8 * (available_memory() or needed):
        raise MemoryError("its scores do not fit into memory")
    q, k, v = case.inputs()
    k, v = (array.repeat(case.heads // case.heads_kv, axis=1) for array in (k, v))
    hidden = ~np.tri(case.seqlen, dtype=bool)

    def call() -> Array:
        scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(case.head_dim))
        if case.causal:
            scores[..., hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights @ v

    return call


PEERS = {"fused": fused_peer, "torch": torch_peer, "numpy": numpy_peer}


def serve(peer: str, pipe: Any) -> None:
    """Answer with checked rows for a case, and with the seconds of each call for None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    call: Callable[[], Array] = lambda: np.empty(0)  # noqa: E731
    while True:
        try:
            case = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            if case is not None:
                call = PEERS[peer](case)
                pipe.send(call()[:, :, rows_checked(case)])
                continue
            call()  # wakes threads and caches after the others' turns
            seconds: list[float] = []
            while not seconds or (sum(seconds) < TURN_SECONDS and len(seconds) < TURN_CALLS):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            pipe.send(seconds)
        except Exception as error:  # whatever it is, it concerns this peer alone
            pipe.send(f"{type(error).__name__}: {error}")


def rows_checked(case: Case) -> Array:
    return np.linspace(0, case.seqlen - 1, min(case.seqlen, ROWS_CHECKED)).astype(int)


def workers(peers: list[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for peer in peers:
        pipes[peer], theirs = context.Pipe()
        context.Process(target=serve, args=(peer, theirs), daemon=True).start()
        theirs.close()
    return pipes


def ask(pipe: Any, question: Any) -> Any:
    try:
        pipe.send(question)
        return pipe.recv()
    except (EOFError, OSError):
        return "its process ended"
