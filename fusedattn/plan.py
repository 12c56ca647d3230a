"""Kinds of calls: what two calls of `attention` share when they differ in contents only.

A kind is everything about a call but what its arrays hold: shapes, strides, dtypes and options.
`attention` remembers the latest kinds with the work of checking and preparing them, so a call like
an earlier one goes straight to the kernel; a `Plan` holds on to one kind, for a decode loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedattn import checks, dispatch
from fusedattn.block_mask import BlockMask
from fusedattn.checks import Array
from fusedattn.functions import are_checked, fingerprint, plain_function
from fusedattn.problem import AttentionProblem, make_lengths, make_problem

# Kinds to remember. One takes some kilobytes, and 80 bytes more per batch item.
CAPACITY = 256


class Call(NamedTuple):
    """The arguments of `fusedattn.attention`: first those that calls of one kind differ in."""

    q: Array
    k: Array
    v: Array
    q_offset: int | Array | None = None
    seqused_q: int | Array | None = None
    seqused_k: int | Array | None = None
    score_mod_aux: tuple[Array, ...] = ()
    mask: Array | None = None
    bias: Array | None = None
    alibi_slopes: Array | None = None
    sinks: Array | None = None
    out: Array | None = None
    scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    score_mod: Callable[..., Any] | None = None
    block_mask: BlockMask | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    layout: str = "bhsd"
    return_lse: bool = False
    out_dtype: Any = None
    backend: str | None = None
    stream: Any = None

    def problem(self) -> AttentionProblem:
        """Check the arguments, of arrays in host memory."""
        if self.stream is not None:
            raise TypeError("stream is for arrays on a GPU, but q is in host memory")
        arguments = self._asdict()
        del arguments["backend"], arguments["stream"]
        return make_problem(**arguments)

    def kind(self) -> tuple[Any, ...] | None:
        """Return all that decides how the call is run, but no contents of arrays and no lengths.

        Types stand beside numbers because ``1 == True == 1.0``, and not all of them are accepted.
        None where there is something else in the place of an array or of a window.
        """
        window_size, options, function = self.window_size, self[OPTIONS:], None
        if self.score_mod is not None:
            # Not the object counts but what it computes, which follows the globals that it reads.
            function, options = self.computes(), self._replace(score_mod=None)[OPTIONS:]
        try:
            forms = _forms(*self[:OPTIONS])
            sides = None if window_size is None else (*map(type, window_size),)
        except (AttributeError, TypeError):
            return None
        return forms, options, (*map(type, options),), sides, function

    def computes(self) -> tuple[Any, ...] | None:
        """Return all that the results of the score_mod depend on, None without one."""
        plain = plain_function(self.score_mod)
        return None if plain is None else fingerprint(plain, "score_mod")


# The place of the first option.
OPTIONS = Call._fields.index("scale")

Form = tuple[Any, ...] | bool | None


def _forms(
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    seqused_q: Any,
    seqused_k: Any,
    score_mod_aux: Any,
    *optional: Any,
) -> tuple[Form, ...]:
    """Type, shape, strides and dtype of each array, and which lengths are given."""
    return (
        (type(q), q.shape, q.strides, q.dtype),
        (type(k), k.shape, k.strides, k.dtype),
        (type(v), v.shape, v.strides, v.dtype),
        q_offset is not None,
        seqused_q is not None,
        seqused_k is not None,
        ("aux", *[(type(a), a.shape, a.strides, a.dtype) for a in score_mod_aux]),
        *[None if a is None else (type(a), a.shape, a.strides, a.dtype) for a in optional],
    )


def _describe(form: Form) -> str:
    if not isinstance(form, tuple):
        return "given" if form else "not given"
    if form[0] == "aux":
        return f"({', '.join(map(_describe, form[1:]))})"
    kind, shape, strides, dtype = form
    return f"a {kind.__name__} of dtype {dtype}, shape {shape} and strides {strides}"


class Plan:
    """A kind of call, checked and prepared; see `fusedattn.plan`.

    It holds on to no array, and any number of threads may call it at once.
    """

    def __init__(self, call: Call) -> None:
        problem = call.problem()
        self._backend = dispatch.choose(problem, call.backend)
        prepare = getattr(self._backend, "prepare", None)
        self._prepared: dispatch.Prepared | None = None if prepare is None else prepare(problem)
        self._forms = _forms(*call[:OPTIONS])
        self._options: tuple[Any, ...] = call[OPTIONS:]
        self._computes = call.computes()
        self._out_shape = problem.restore(problem.empty_out()).shape
        self._out_dtype = problem.out_dtype
        self._lse_shape = problem.lse_shape if problem.return_lse else None
        self._lse_dtype = problem.accumulator
        self._seqlens = problem.seqlen_q, problem.seqlen_k
        self._batch = problem.batch_shape, problem.batch_size

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        q_offset: int | Array | None = None,
        seqused_q: int | Array | None = None,
        seqused_k: int | Array | None = None,
        score_mod_aux: tuple[Array, ...] = (),
        mask: Array | None = None,
        bias: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        out: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """Compute `fusedattn.attention` of these arguments, with the options of the plan.

        Raises
        ------
        ValueError
            If an argument differs from the planned one in type, shape, strides or dtype, or is
            given where it was not, or the reverse.
        TypeError, ValueError
            As `fusedattn.attention`.
        """
        arguments = (
            *(q, k, v, q_offset, seqused_q, seqused_k, score_mod_aux),
            *(mask, bias, alibi_slopes, sinks, out),
        )
        try:
            forms = _forms(*arguments)
        except (AttributeError, TypeError):
            forms = ()
        if forms != self._forms:
            Call(*arguments, *self._options).problem()  # tells a mistake as `attention` tells it
            for name, form, planned in zip(Call._fields, forms, self._forms, strict=False):
                if form != planned:
                    was = _describe(planned)
                    raise ValueError(f"{name} is {_describe(form)}, but when planned was {was}")
        if self._computes is not None and Call(*arguments, *self._options).computes() != (
            self._computes
        ):
            raise ValueError("score_mod, or a number that it reads, was another one when planned")
        return self.run(arguments)

    def run(self, arguments: tuple[Any, ...]) -> Array | tuple[Array, Array]:
        """Compute a call of this kind."""
        q, k, v, q_offset, seqused_q, seqused_k, score_mod_aux, *others = arguments
        mask, bias, alibi_slopes, sinks, out = others
        if self._computes is not None and are_checked():
            dispatch.check_indices(Call(*arguments, *self._options).problem())
        if self._prepared is None:
            problem = Call(*arguments, *self._options).problem()
            result = self._backend.forward(problem)
            given = problem.restore(result.out) if out is None else out
            return given if result.lse is None else (given, result.lse)
        if out is None:
            out = np.empty(self._out_shape, self._out_dtype)
        else:
            inputs = {n: a for n, a in zip(Call._fields, arguments, strict=False) if n in INPUTS}
            inputs |= {f"score_mod_aux[{i}]": array for i, array in enumerate(score_mod_aux)}
            checks.output(out, self._out_shape, self._out_dtype, inputs)
        lengths = None
        if not (q_offset is seqused_q is seqused_k is None):
            lengths = make_lengths(q_offset, seqused_q, seqused_k, *self._seqlens, self._batch)
        lse = None if self._lse_shape is None else np.empty(self._lse_shape, self._lse_dtype)
        operands = (q, k, v, out, lse, mask, bias)
        self._prepared.run(operands, alibi_slopes, sinks, lengths, tuple(score_mod_aux))
        return out if lse is None else (out, lse)


# The arrays that are read, which `out` must not overlap.
INPUTS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks")

_plans: dict[Any, Plan] = {}
_lock = threading.Lock()


def find(call: Call) -> Plan:
    """Return the plan of a call's kind, which is made and remembered if there is none."""
    kind = call.kind()
    try:
        plan = _plans.get(kind)
    except TypeError:  # an option without a hash, such as a list
        kind = plan = None
    if plan is None:
        plan = Plan(call)
        if kind is not None:
            with _lock:
                while len(_plans) >= CAPACITY:
                    del _plans[next(iter(_plans))]
                _plans[kind] = plan
    return plan


def run(call: Call) -> Array | tuple[Array, Array]:
    """Compute a call, by the plan of its kind."""
    return find(call).run(call[:OPTIONS])
