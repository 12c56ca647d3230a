"""Kinds of calls: what two calls of `attention` share when they differ in contents only.

A kind is everything about a call but what its arrays hold: shapes, strides, dtypes and options.
`attention` remembers the latest kinds with the work of checking and preparing them, so a call like
an earlier one goes straight to the kernel; a `Plan` holds on to one kind, for a decode loop.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from fusedattn import checks, dispatch
from fusedattn.checks import Array
from fusedattn.problem import AttentionProblem, make_lengths, make_problem

# Kinds to remember. One takes some kilobytes, and 80 bytes more per batch item.
CAPACITY = 256


class Call(NamedTuple):
    """The arguments of `fusedattn.attention`."""

    q: Array
    k: Array
    v: Array
    q_offset: int | Array | None = None
    seqused_q: int | Array | None = None
    seqused_k: int | Array | None = None
    scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    mask: Array | None = None
    bias: Array | None = None
    alibi_slopes: Array | None = None
    softcap: float | None = None
    sinks: Array | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    layout: str = "bhsd"
    return_lse: bool = False
    out: Array | None = None
    out_dtype: Any = None
    backend: str | None = None

    def problem(self) -> AttentionProblem:
        """Check the arguments."""
        arguments = self._asdict()
        del arguments["backend"]
        return make_problem(**arguments)

    def inputs(self) -> dict[str, Array | None]:
        """The arrays that are read."""
        names = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks")
        return {name: getattr(self, name) for name in names}

    def kind(self) -> tuple[Any, ...] | None:
        """Return all that decides how the call is run, but no contents of arrays and no lengths.

        Types stand beside values because ``1 == True == 1.0``, and not all of them are accepted.
        None where there is something else in the place of an array.
        """
        q, k, v, q_offset, seqused_q, seqused_k, *options = self
        if not type(q) is type(k) is type(v) is np.ndarray:
            return None
        return (
            *(q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype),
            *(v.shape, v.strides, v.dtype),
            *(q_offset is None, seqused_q is None, seqused_k is None),
            *[None if option is None else _part(option) for option in options],
        )


def _part(argument: Any) -> Any:
    kind = type(argument)
    if kind is np.ndarray:
        return argument.shape, argument.strides, argument.dtype
    if kind is tuple:  # window_size
        return kind, argument, tuple(map(type, argument))
    return kind, argument


class Plan:
    """A kind of call, checked and prepared; see `fusedattn.plan`."""

    def __init__(self, problem: AttentionProblem, prepared: dispatch.Prepared) -> None:
        self._run = prepared.run
        self._out_shape = problem.restore(problem.empty_out()).shape
        self._out_dtype = problem.out_dtype
        self._lse_shape = problem.lse_shape if problem.return_lse else None
        self._lse_dtype = problem.accumulator
        self._seqlens = problem.seqlen_q, problem.seqlen_k
        self._batch = problem.batch_shape, problem.batch_size

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Compute a call of this kind."""
        out, lengths = call.out, None
        if out is None:
            out = np.empty(self._out_shape, self._out_dtype)
        else:
            checks.output(out, self._out_shape, self._out_dtype, call.inputs())
        if not (call.q_offset is call.seqused_q is call.seqused_k is None):
            given = call.q_offset, call.seqused_q, call.seqused_k
            lengths = make_lengths(*given, *self._seqlens, self._batch)
        lse = None if self._lse_shape is None else np.empty(self._lse_shape, self._lse_dtype)
        operands = (call.q, call.k, call.v, out, lse, call.mask, call.bias)
        self._run(operands, call.alibi_slopes, call.sinks, lengths)
        return out if lse is None else (out, lse)


_plans: dict[Any, Plan] = {}
_lock = threading.Lock()


def run(call: Call) -> Array | tuple[Array, Array]:
    """Compute a call, by the plan of its kind if there is one."""
    kind = call.kind()
    try:
        plan = _plans.get(kind)
    except TypeError:  # an argument without a hash, such as a list: a check will name it
        kind = plan = None
    if plan is not None:
        return plan.run(call)
    problem = call.problem()
    backend = dispatch.choose(problem, call.backend)
    if kind is not None and hasattr(backend, "prepare"):
        plan = Plan(problem, backend.prepare(problem))
        with _lock:
            while len(_plans) >= CAPACITY:
                del _plans[next(iter(_plans))]
            _plans[kind] = plan
    result = backend.forward(problem)
    out = problem.restore(result.out) if call.out is None else call.out
    return out if result.lse is None else (out, result.lse)
