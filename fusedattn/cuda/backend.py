"""The CUDA backend: from a problem to finished arrays, on a GPU or in Numba's simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import combine, compiler, driver, exact, portable, tensor_cores
from fusedattn.cuda.params import SPLIT_QUERIES, compact, span_of
from fusedattn.cuda.toolchains import SIMULATOR
from fusedattn.problem import AttentionProblem, Gradients, Result

Array = NDArray[Any]
Prepared = portable.Prepared | tensor_cores.Prepared | exact.Prepared

_INPUTS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks")
# How kernels call what a problem calls otherwise.
_NAMES = {"alibi_slopes": "slopes"}


class Cuda:
    """Kernels for NVIDIA GPUs, written in Python."""

    name = "cuda"

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """What is missing on this machine; the kernels have code for everything."""
        del problem
        missing = compiler.missing()
        if not missing and compiler.chosen_name() != SIMULATOR:
            missing = list(driver.missing())
        return missing

    def unsupported_backward(self, problem: AttentionProblem) -> list[str]:
        """There are no gradients on a GPU yet."""
        del problem
        return ["no gradients on a GPU yet"]

    def backward(
        self,
        problem: AttentionProblem,
        d_out: Array,
        out: Array,
        lse: Array,
        d_lse: Array | None,
        *,
        bias_grad: bool,
    ) -> Gradients:
        """Refuse: see `unsupported_backward`."""
        raise NotImplementedError("; ".join(self.unsupported_backward(problem)))

    def describe(self, problem: AttentionProblem) -> list[str]:
        """Say which kernel would run, for `fusedattn.explain`."""
        if compiler.chosen_name() == SIMULATOR:
            return ["portable kernel in Numba's CUDA simulator"]
        where = driver.device(0)
        reasons = not_tensor_cores(problem, where)
        compiled = f"{where.chip}, compiled by {compiler.chosen_name()}"
        if not reasons and problem.dtype == np.float32:
            block_q, block_k = exact.tile_of(problem)
            return [f"exact Hopper kernel, {compiled}, tiles of {block_q} x {block_k}"]
        if not reasons:
            tile = tensor_cores.config_of(problem)
            return [f"Hopper kernel, {compiled}, tiles of {tile.block_q} x {tile.block_k}"]
        config = portable.config_of(problem, portable.tile_of(problem))
        return [
            f"portable kernel, {compiled}, tiles of {config.block_q} x {config.block_k}",
            f"not the Hopper kernel: {'; '.join(reasons)}",
        ]

    def forward(self, problem: AttentionProblem) -> Result:
        """Compute a problem whose arrays are in host memory: they are copied there and back."""
        out = problem.empty_out() if problem.out is None else problem.out
        lse = np.empty(problem.lse_shape, problem.accumulator)
        if out.size:
            held: dict[str, Any] = {
                name: compact(array)
                for name in _INPUTS
                if (array := getattr(problem, name)) is not None
            }
            # Whatever the strides were, the same kernel runs.
            held |= {name: np.array(getattr(problem, name), order="C") for name in ("q", "k", "v")}
            if problem.score_mod is not None:
                aux = tuple(compact(array) for array in problem.score_mod.aux)
                held["score_mod"] = replace(problem.score_mod, aux=aux)
            made = np.empty(problem.out_shape, problem.out_dtype)
            dense = replace(problem, **held, out=made)
            if compiler.chosen_name() == SIMULATOR:
                portable.simulate(dense, portable.operands_of(dense, made, lse))
            else:
                self._there_and_back(dense, made, lse)
            out[...] = made
        return Result(out, lse if problem.return_lse else None)

    def _there_and_back(self, problem: AttentionProblem, out: Array, lse: Array) -> None:
        where = driver.device(0)
        with where.current():
            memories = {}
            for name in _INPUTS:
                array = getattr(problem, name)
                if array is not None:
                    flat = portable.flat_of(array)
                    memories[_NAMES.get(name, name)] = driver.upload(where, flat)
            for i, array in enumerate(problem.score_mod.aux if problem.score_mod else ()):
                memories[f"score_mod_aux_{i}"] = driver.upload(where, portable.flat_of(array))
            memories["out"] = driver.Memory(where, out.nbytes)
            if problem.return_lse:
                memories["lse"] = driver.Memory(where, lse.nbytes)
            addresses = {name: memory.address for name, memory in memories.items()}
            self.prepare_on(problem, 0).run(addresses, 0)
            driver.download(memories["out"], out)
            if problem.return_lse:
                driver.download(memories["lse"], lse)

    def prepare_on(self, problem: AttentionProblem, ordinal: int) -> Prepared:
        """Choose a kernel and prepare its launches; ``problem.out`` says where out lies."""
        where = driver.device(ordinal)
        if not_tensor_cores(problem, where):
            return portable.Prepared(problem, where)
        if problem.dtype == np.float32:
            return exact.Prepared(problem, where)
        return tensor_cores.Prepared(problem, where)

    def unsuitable(self, problem: AttentionProblem) -> list[str]:
        """Reasons why arrays in the memory of a GPU cannot be used where they lie."""
        names = (*_INPUTS, "out")
        arrays = {name: getattr(problem, name) for name in names}
        return [
            f"the strides of {name} are no multiples of its item size"
            for name, array in arrays.items()
            if array is not None and span_of(array) is None
        ]


def not_tensor_cores(problem: AttentionProblem, where: driver.Device) -> list[str]:
    """Reasons why a problem does not take the Hopper kernel of its dtype on a GPU."""
    if where.capability != (9, 0):
        return [f"compute capability {where.major}.{where.minor}, not 9.0"]
    if problem.dtype != np.float32:
        reasons = tensor_cores.unsupported(problem)
        if combine.splits_of(problem) > 1 and not where.has_pools:
            reasons.append("the GPU has no memory pools for partial results")
        return reasons
    reasons = [
        f"{name} is not implemented in it"
        for name in ("score_mod", "block_mask")
        if getattr(problem, name) is not None
    ]
    if problem.seqlen_q <= SPLIT_QUERIES:
        reasons.append("queries are so few that their keys are split")
    return reasons + exact.unsupported(problem)


CUDA = Cuda()
