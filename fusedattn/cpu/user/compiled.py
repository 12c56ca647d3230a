"""Compiled functions of the user's: found again in this process and on disk."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedattn.block_mask import Predicate
from fusedattn.cpu.cache import fetch
from fusedattn.cpu.compile import host_machine, load
from fusedattn.cpu.tile import Tile
from fusedattn.functions import UserFunction, digest_of
from fusedattn.undisturbed import undisturbed

# Functions to keep in memory; a call that runs holds on to its own.
_CAPACITY = 512

_compiled: dict[Any, Native] = {}


class Native(NamedTuple):
    """Machine code: an address, and what keeps it in memory."""

    address: int
    engine: Any


def score_pass(function: UserFunction, tile: Tile) -> Native:
    """Return the pass over a tile of scores."""
    from fusedattn.cpu.user import build

    detail = (function.fingerprint, *_shape(function, tile))
    return _get("score_mod", detail, lambda: build.score_pass(function, tile))


def mask_pass(predicate: Predicate, tile: Tile) -> Native:
    """Return the pass that writes the mask of a tile."""
    from fusedattn.cpu.user import build

    detail = (predicate.structure(), tile.width, tile.vectors)
    return _get("mask_mod", detail, lambda: build.mask_pass(predicate, tile))


def score_scalar(function: UserFunction) -> Native:
    """Return the function for one score in float64."""
    from fusedattn.cpu.user import build

    detail = (function.fingerprint, function.aux_kinds)
    return _get("score_mod_one", detail, lambda: build.score_scalar(function))


def mask_scalar(predicate: Predicate) -> Native:
    """Return the function for one entry of the mask."""
    from fusedattn.cpu.user import build

    return _get("mask_mod_one", predicate.structure(), lambda: build.mask_scalar(predicate))


def slope_pass(function: UserFunction, grad: UserFunction | None, tile: Tile) -> Native:
    """Return the pass that multiplies gradients by the derivative of a score_mod."""
    from fusedattn.cpu.user import build

    given = None if grad is None else grad.fingerprint
    detail = (function.fingerprint, given, *_shape(function, tile))
    return _get("score_slope", detail, lambda: build.slope_pass(function, grad, tile))


def aux_pass(function: UserFunction, tile: Tile) -> Native:
    """Return the pass that adds to the gradients of the aux arrays."""
    from fusedattn.cpu.user import build

    detail = (function.fingerprint, *_shape(function, tile))
    return _get("score_aux", detail, lambda: build.aux_pass(function, tile))


def _shape(function: UserFunction, tile: Tile) -> tuple[Any, ...]:
    return (function.aux_kinds, tile.bits, tile.width, tile.vectors)


def _get(name: str, detail: Any, build: Callable[[], Any]) -> Native:
    found = _compiled.get((name, detail))
    return undisturbed(_make, name, detail, build) if found is None else found


def _make(name: str, detail: Any, build: Callable[[], Any]) -> Native:
    """Compile or load; one thread at a time, and the next finds it done."""
    found = _compiled.get((name, detail))
    if found is not None:
        return found

    def compile_it() -> bytes:
        return bytes(host_machine().emit_object(build()))

    code = fetch(name, digest_of(detail), compile_it)
    loaded = load(code, [name])
    while len(_compiled) >= _CAPACITY:
        del _compiled[next(iter(_compiled))]
    native = _compiled[(name, detail)] = Native(loaded.addresses[name], loaded.engine)
    return native
