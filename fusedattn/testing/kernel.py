"""The function under test, what it promises, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import checks
from fusedattn.problem import AttentionProblem
from fusedattn.testing.buffers import Placed, poison
from fusedattn.testing.cases import Answer, Case

Array = NDArray[Any]

# Keywords that a drawn call may have, in the order in which they are drawn.
OPTIONS = (
    "scale",
    "causal",
    "window_size",
    "q_offset",
    "seqused_q",
    "seqused_k",
    "mask",
    "bias",
    "alibi_slopes",
    "softcap",
    "sinks",
    "score_mod",
    "block_mask",
    "dropout_p",
    "layout",
    "out",
    "out_dtype",
)
KEYWORDS = frozenset({*OPTIONS, "score_mod_aux", "seed", "return_lse"})
CAPABILITIES = frozenset(
    {
        "gqa",  # fewer KV heads than query heads
        "head_dim_v",  # head_dim_v other than head_dim
        "leading_axes",  # no or several leading axes, not just one
        "zero_size",  # batch, heads or lengths of 0
        "strides",  # arrays that are not C-contiguous
        "unseen_nan",  # keys that no row sees may hold anything
        "hidden_nan",  # a key hidden from a row does not leak into it, whatever it holds
        "full_range",  # V up to the largest finite number
    }
)
# A confession, weights are rounded to the half type of the inputs; and a keyword of gradients.
CONFESSIONS = frozenset({"half_weights", "d_lse"})
EVERYTHING = KEYWORDS | CAPABILITIES


class OutsideDomain(Exception):
    """A law asked for a call that the kernel's domain does not admit."""


@dataclass(frozen=True)
class Kernel:
    """An attention function with its declared capabilities; see `check_attention`."""

    fn: Callable[..., Any]
    supports: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float32",)
    returns_lse: bool = False
    gradient: Callable[..., Any] | None = None
    bitwise: bool = False
    deterministic: bool = True
    domain: Callable[[AttentionProblem], str | None] | None = None
    set_threads: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("fn", "gradient", "domain", "set_threads"):
            value = getattr(self, name)
            if not callable(value) and (name == "fn" or value is not None):
                raise TypeError(f"{name} must be callable, but is {checks.describe(value)}")
        for name in ("returns_lse", "bitwise", "deterministic"):
            checks.flag(name, getattr(self, name))
        unknown = self.supports - KEYWORDS - CAPABILITIES - CONFESSIONS
        if unknown:
            raise ValueError(
                f"supports names {sorted(unknown)}, which is neither a keyword of attention() nor "
                f"one of {sorted(CAPABILITIES | CONFESSIONS)}"
            )

    def can(self, *names: str) -> bool:
        """Whether all of these keywords and capabilities are declared."""
        return self.supports.issuperset(names)

    @property
    def gives_lse(self) -> bool:
        """Whether the function can report its lse."""
        return self.returns_lse or "return_lse" in self.supports

    @property
    def name(self) -> str:
        """How the function calls itself."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, case: Case) -> Answer:
        """Call the function on fresh guarded copies and check what any call must keep to.

        No input and nothing around it is written, nothing outside `out` is, and the results have
        the promised shapes and types and lie in memory of their own.
        """
        reason = None if self.domain is None else self.domain(case.problem)
        if reason is not None:
            raise OutsideDomain(reason)
        placed = place(case)
        bshd = case.keywords.get("layout") == "bshd"
        problem = case.problem
        out = None
        if "out" in case.placement:
            empty = np.full(problem.out_shape, poison(problem.out_dtype), problem.out_dtype)
            out = Placed(empty, dense(case, "out", bshd))
        arguments: dict[str, Any] = {**case.keywords}
        arguments |= views_of(placed, arguments)
        if out is not None:
            arguments["out"] = out.view
        if bshd:
            for name in ("q", "k", "v", "out"):
                if name in arguments:
                    arguments[name] = arguments[name].swapaxes(-3, -2)
        q, k, v = (arguments.pop(name) for name in "qkv")
        result = quietly(self.fn, q, k, v, **arguments)

        pair = self.returns_lse or bool(case.keywords.get("return_lse"))
        raw_out, raw_lse = _unpack(result, pair)
        answer = _canonical(raw_out, raw_lse, problem, bshd)
        for name, buffer in placed.items():
            assert buffer.untouched(), f"the call wrote to its input {name}, or next to it"
            for label, array in (("out", raw_out), ("lse", raw_lse)):
                assert array is None or not buffer.overlaps(array), f"{label} is a view of {name}"
        if out is not None:
            got = out.view.swapaxes(-3, -2) if bshd else out.view
            assert raw_out is arguments["out"] or _same_memory(raw_out, got), (
                "the call was given `out` but returned another array"
            )
            assert out.untouched_outside(), "the call wrote outside `out`"
        return answer


def quietly(fn: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call without floating-point warnings: NaN and overflow are judged by their results."""
    with np.errstate(all="ignore"):
        return fn(*arguments, **keywords)


def dense(case: Case, name: str, bshd: bool) -> str:
    """Placement of an argument: what is handed over in bshd order is contiguous in that order."""
    how = case.placement.get(name, "plain")
    return "seq_first" if bshd and how == "plain" else how


def place(case: Case) -> dict[str, Placed]:
    """Lay the arrays of a call out in guarded memory, in canonical axis order."""
    bshd = case.keywords.get("layout") == "bshd"
    placed = {name: Placed(getattr(case, name), dense(case, name, bshd)) for name in "qkv"}
    for name, value in case.keywords.items():
        if isinstance(value, np.ndarray):
            placed[name] = Placed(value, case.placement.get(name, "plain"))
    for i, value in enumerate(case.keywords.get("score_mod_aux", ())):
        placed[_aux_name(i)] = Placed(value, "plain")
    return placed


def views_of(placed: dict[str, Placed], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what is handed over of the guarded copies; those of aux arrays are one argument."""
    views: dict[str, Any] = {
        name: buffer.view for name, buffer in placed.items() if not name.endswith("]")
    }
    if "score_mod_aux" in arguments:
        count = len(arguments["score_mod_aux"])
        views["score_mod_aux"] = tuple(placed[_aux_name(i)].view for i in range(count))
    return views


def _aux_name(index: int) -> str:
    return f"score_mod_aux[{index}]"


def _same_memory(first: Array, second: Array) -> bool:
    one, two = first.__array_interface__, second.__array_interface__
    return bool(one["data"][0] == two["data"][0] and first.shape == second.shape)


def _unpack(result: Any, pair: bool) -> tuple[Any, Any]:
    if not pair:
        assert not isinstance(result, tuple), "the call returned a tuple, expected out alone"
        return result, None
    is_pair = isinstance(result, tuple) and len(result) == 2
    assert is_pair, f"the call returned {type(result).__name__}, expected the pair (out, lse)"
    return result[0], result[1]


def _canonical(out: Any, lse: Any, problem: AttentionProblem, bshd: bool) -> Answer:
    assert isinstance(out, np.ndarray), f"out is of type {type(out).__name__}, expected ndarray"
    assert out.dtype == problem.out_dtype, f"out has dtype {out.dtype}, not {problem.out_dtype}"
    if bshd and out.ndim >= 3:
        out = out.swapaxes(-3, -2)
    assert out.shape == problem.out_shape, f"out has shape {out.shape}, not {problem.out_shape}"
    if lse is None:
        return Answer(out.copy(), None)
    assert isinstance(lse, np.ndarray), f"lse is of type {type(lse).__name__}, expected ndarray"
    assert lse.dtype == problem.accumulator, f"lse has {lse.dtype}, not {problem.accumulator}"
    assert lse.shape == problem.lse_shape, f"lse has shape {lse.shape}, not {problem.lse_shape}"
    return Answer(out.copy(), lse.copy())


def as_names(argument: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return names that were given one by one: a text would be taken for its letters."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must hold names, but is {checks.describe(value)}")
    return tuple(value)


def as_dtypes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the types of q, k and v, of which there is at least one."""
    dtypes = as_names("dtypes", names)
    if not dtypes:
        raise ValueError("dtypes must hold at least one dtype, but is empty")
    return tuple(checks.storage_dtype("dtypes", dtype).name for dtype in dtypes)


def as_supports(names: Iterable[str]) -> frozenset[str]:
    """Return declared names as a set; ``dropout_p`` and ``score_mod`` bring others along."""
    chosen = frozenset(as_names("supports", names))
    brought = {"dropout_p": "seed", "score_mod": "score_mod_aux"}
    return chosen | {other for name, other in brought.items() if name in chosen}
