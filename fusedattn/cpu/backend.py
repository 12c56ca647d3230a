"""The CPU backend: from a problem to finished arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cpu import threads
from fusedattn.cpu.choice import (
    ITEMS_PER_THREAD,
    groups_of,
    heads_per_item,
    panels_per_item,
    tile_of,
)
from fusedattn.cpu.compile import get_micro, get_rescue, get_worker, known_rescue
from fusedattn.cpu.interface import GROUPS, NEEDS_RESCUE
from fusedattn.cpu.scratch import working_memory
from fusedattn.cpu.template import Bound, Template
from fusedattn.cpu.tile import ROWS_PER_ITEM, host_isa, takes_matrix, tile_for
from fusedattn.cpu.user.code import UserCode
from fusedattn.problem import AttentionProblem, Gradients, Lengths, Result
from fusedattn.undisturbed import undisturbed

# Below this much work waking a thread costs more than it saves.
ALONE_FLOPS = 5_000_000
# The matrix unit does more in that time.
ALONE_MATRIX_FLOPS = 15_000_000
# Above this much work (some milliseconds) the caller only waits, so that Ctrl-C is heard: were
# every row to take the exact path, 200 times as slow, its own share could last half a second.
LONG_FLOPS = 300_000_000
# Numbers of rows that call for each of the panel widths.
WARMUP_ROWS = (1, 32, 4096)
# Groups of micro-kernels of which a call takes one.
PRODUCTS = ("rows", "panels", "matrix")


class Prepared:
    """A kernel with all it needs to know, for any number of calls that differ in contents only."""

    def __init__(self, problem: AttentionProblem) -> None:
        tile = tile_of(problem)
        natives: dict[str, int] = {}
        for group in groups_of(problem):
            natives |= get_micro(tile, group).addresses
        self._user = UserCode(problem, tile)
        addresses = natives | self._user.passes
        self._template = Template(problem, tile, addresses, threads.get_num_threads())
        self._flops = problem.flops
        self._alone_flops = ALONE_MATRIX_FLOPS if tile.matrix else ALONE_FLOPS
        pairs = problem.batch_size * problem.num_heads * problem.seqlen_q * problem.seqlen_k
        self._most_flops = 2 * (problem.head_dim + problem.head_dim_v) * pairs

    def run(
        self,
        operands: tuple[NDArray[Any] | None, ...],
        slopes: NDArray[Any] | None,
        sinks: NDArray[Any] | None,
        lengths: Lengths | None = None,
        aux: tuple[NDArray[Any], ...] = (),
    ) -> None:
        """Compute into out and lse: operands are ``(q, k, v, out, lse, mask, bias)``.

        ``lengths`` are given where they differ from those of the problem it was prepared for;
        ``aux`` are the arrays of its score_mod.
        """
        template, count = self._template, threads.get_num_threads()
        if template.items == 0:
            return
        flops = self._flops if lengths is None else self._most_flops
        # Then the keys of one may go to several threads.
        few_items = count > 1 and template.items < ITEMS_PER_THREAD * count
        split = few_items and template.chunks > 1 and flops >= self._alone_flops
        bound = template.bind(operands, slopes, sinks, lengths, aux, split)
        rescue, scalars = known_rescue(), self._user.scalars
        if rescue is not None and scalars is not None:
            bound.enter_functions(scalars)
            bound.enter_rescue(rescue)
        if self._execute(bound, flops):  # the first row ever that needs it: compile, start over
            self._user.compile_scalars()
            bound.enter_functions(self._user.scalars or {})
            bound.enter_rescue(get_rescue())
            bound.start_over()
            self._execute(bound, flops)

    def _execute(self, bound: Bound, flops: int) -> bool:
        """Run all items; return whether the rescue is missing."""
        worker, scratch_bytes = get_worker(), self._template.scratch_bytes
        if flops < self._alone_flops:
            return bool(worker(bound.address, working_memory(scratch_bytes)) == NEEDS_RESCUE)
        missing: list[bool] = []

        def work() -> None:
            if worker(bound.address, working_memory(scratch_bytes)) == NEEDS_RESCUE:
                missing.append(True)
                bound.stop()

        count = min(bound.work, threads.get_num_threads())
        threads.run(work, bound.stop, count, join_in=flops < LONG_FLOPS)
        return bool(missing)


class Cpu:
    """Fused kernels on the CPU."""

    name = "cpu"

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Every problem that passes validation runs."""
        del problem
        return []

    def unsupported_backward(self, problem: AttentionProblem) -> list[str]:
        """Reasons why the gradients of the problem cannot be computed here."""
        if problem.score_mod is None:
            return []
        from fusedattn.cpu import differentiate

        return differentiate.not_differentiable(problem)

    def describe(self, problem: AttentionProblem) -> list[str]:
        """Say which kernel would run, for `fusedattn.explain`."""
        tile, isa = tile_of(problem), host_isa()
        if "rows" in groups_of(problem):
            rows, how = heads_per_item(problem) * problem.seqlen_q, "the head dim"
        else:
            rows = panels_per_item(problem, tile, threads.get_num_threads()) * tile.lanes
            how = f"queries, {tile.lanes} at once"
        unit = f"{isa.name} and AMX" if tile.matrix else isa.name
        return [
            f"{unit}, lanes along {how}; {rows} rows x {tile.block_k} keys per block",
            f"up to {threads.get_num_threads()} threads",
        ]

    def prepare(self, problem: AttentionProblem) -> Prepared:
        """Return what runs this problem, and every other that differs in addresses only."""
        return Prepared(problem)

    def forward(self, problem: AttentionProblem) -> Result:
        """Compute ``out`` and, where asked for, ``lse``."""
        out = problem.out if problem.out is not None else problem.empty_out()
        lse = np.empty(problem.lse_shape, problem.accumulator) if problem.return_lse else None
        operands = (problem.q, problem.k, problem.v, out, lse, problem.mask, problem.bias)
        aux = () if problem.score_mod is None else problem.score_mod.aux
        self.prepare(problem).run(operands, problem.alibi_slopes, problem.sinks, aux=aux)
        return Result(out, lse)

    def backward(
        self,
        problem: AttentionProblem,
        d_out: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any],
        d_lse: NDArray[Any] | None = None,
        *,
        bias_grad: bool = True,
    ) -> Gradients:
        """Pull ``d_out`` and ``d_lse`` back to the operands; arrays in canonical axis order."""
        # Whoever does not train does not load it.
        module = undisturbed(import_module, "fusedattn.cpu.differentiate")
        found: Gradients = module.backward(problem, d_out, out, lse, d_lse, bias_grad=bias_grad)
        return found


CPU = Cpu()


def warmup(dtypes: Iterable[str] = ("float32",)) -> None:
    """Compile (or load) the kernels of these storage types."""
    for dtype, rows in itertools.product(dtypes, WARMUP_ROWS):
        kinds = {(False, takes_matrix(dtype, rows)), (False, takes_matrix(dtype, 1))}
        if rows <= ROWS_PER_ITEM:
            kinds.add((True, False))
        for few, matrix in kinds:
            tile = tile_for(dtype, dtype, rows, matrix=matrix)
            products = "rows" if few else "matrix" if tile.matrix else "panels"
            for group in GROUPS:
                if group == products or group not in PRODUCTS:
                    get_micro(tile, group)
    get_worker()
    get_rescue()
