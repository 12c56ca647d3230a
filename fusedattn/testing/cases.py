"""One call of an attention function, as data that can be changed, compared and printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedattn import reference
from fusedattn.problem import AttentionProblem, make_problem
from fusedattn.testing.literals import source
from fusedattn.testing.tolerance import Budget, forward_budget

Array = NDArray[Any]


class Answer(NamedTuple):
    """Result of a call in canonical axis order; `lse` is None where it was not asked for."""

    out: Array
    lse: Array | None


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call.

    Parameters
    ----------
    q, k, v : ndarray
        Canonical axis order, ``(*batch, heads, seq, dim)``, whatever the layout of the call.
    keywords : mapping
        Keywords of `fusedattn.attention`. ``layout`` says how q, k and v are handed over.
    placement : mapping
        How an argument lies in memory, see `fusedattn.testing.buffers.PLACEMENTS`; an entry for
        ``"out"`` says that the call is given a place to write to.
    seed : int
        What a law draws further, such as a permutation, it draws from this seed.
    half_weights : bool
        Whether the kernel rounds its weights to the half type of its inputs.
    """

    q: Array
    k: Array
    v: Array
    keywords: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    half_weights: bool = False

    @cached_property
    def problem(self) -> AttentionProblem:
        """The validated problem; the oracle's out is not rounded."""
        own = {k: v for k, v in self.keywords.items() if k not in ("layout", "return_lse")}
        return make_problem(self.q, self.k, self.v, return_lse=True, **own)

    @cached_property
    def expected(self) -> Answer:
        """What the reference says, out in float64 and never rounded to a smaller type."""
        wide = dataclasses.replace(self.problem, out_dtype=np.dtype(np.float64))
        result = reference.forward(wide)
        return Answer(result.out, result.lse)

    @cached_property
    def budget(self) -> Budget:
        """A-priori budget of an exact kernel."""
        half = self.half_weights and self.q.dtype.itemsize == 2
        return forward_budget(self.problem, rounds_weights_to=self.q.dtype if half else None)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator for what a law draws further."""
        return np.random.default_rng(self.seed)

    def change(self, **changes: Any) -> Case:
        """Copy with other fields; those that are no field of a case are keywords of the call."""
        fields = {f.name for f in dataclasses.fields(self)}
        keywords = {k: v for k, v in changes.items() if k not in fields}
        own = {k: v for k, v in changes.items() if k in fields}
        if keywords:
            own["keywords"] = {**own.get("keywords", self.keywords), **keywords}
        return dataclasses.replace(self, **own)

    def without(self, *keywords: str) -> Case:
        """Copy that does not pass these keywords."""
        kept = {k: v for k, v in self.keywords.items() if k not in keywords}
        return dataclasses.replace(self, keywords=kept)

    def code(self) -> str:
        """Python source of this case."""
        lines = [f"    {name}={source(getattr(self, name))}," for name in "qkv"]
        if self.keywords:
            items = ", ".join(f"{name!r}: {source(v)}" for name, v in self.keywords.items())
            lines.append(f"    keywords={{{items}}},")
        if self.placement:
            lines.append(f"    placement={dict(self.placement)!r},")
        if self.seed:
            lines.append(f"    seed={self.seed},")
        if self.half_weights:
            lines.append("    half_weights=True,")
        return "\n".join(["Case(", *lines, ")"])

    def __repr__(self) -> str:
        return self.code()
