"""What the user's functions of one problem bring to its kernel."""

from __future__ import annotations

from fusedattn.block_mask import Predicate
from fusedattn.cpu.tile import Tile
from fusedattn.cpu.user import compiled
from fusedattn.cpu.user.compiled import Native
from fusedattn.problem import AttentionProblem


class UserCode:
    """The compiled functions of a problem; whoever holds this keeps their code in memory."""

    def __init__(self, problem: AttentionProblem, tile: Tile) -> None:
        self._score_mod, self._predicate = problem.score_mod, predicate_of(problem)
        self._passes: dict[str, Native] = {}
        self._scalars: dict[str, Native] | None = None
        if self._score_mod is not None:
            self._passes["score_mod"] = compiled.score_pass(self._score_mod, tile)
        if self._predicate is not None:
            self._passes["mask_mod"] = compiled.mask_pass(self._predicate, tile)

    def add_gradients(self, problem: AttentionProblem, tile: Tile) -> None:
        """Compile what pulls gradients back through the score_mod.

        Raises
        ------
        TypeError
            If it does what the compiled rules of differentiation do not know.
        """
        function = problem.score_mod
        if function is not None:
            slope = compiled.slope_pass(function, problem.score_mod_grad, tile)
            self._passes["score_slope"] = slope
            if any(array.dtype.kind not in "iub" for array in function.aux):
                self._passes["score_aux"] = compiled.aux_pass(function, tile)

    @property
    def passes(self) -> dict[str, int]:
        """Addresses of the passes over a tile, by name."""
        return {name: native.address for name, native in self._passes.items()}

    @property
    def scalars(self) -> dict[str, int] | None:
        """Addresses of the functions for one pair, by name; None before `compile_scalars`."""
        if self._scalars is None:
            return None if self._passes else {}
        return {name: native.address for name, native in self._scalars.items()}

    def compile_scalars(self) -> None:
        """Compile what the rescue needs."""
        scalars: dict[str, Native] = {}
        if self._score_mod is not None:
            scalars["score_mod_one"] = compiled.score_scalar(self._score_mod)
        if self._predicate is not None:
            scalars["mask_mod_one"] = compiled.mask_scalar(self._predicate)
        self._scalars = scalars


def predicate_of(problem: AttentionProblem) -> Predicate | None:
    """Return what partial blocks ask."""
    return None if problem.block_mask is None else problem.block_mask.predicate
