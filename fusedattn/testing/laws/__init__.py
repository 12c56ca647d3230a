"""The laws of attention: plain functions that assert what any correct kernel promises.

Each takes a `Kernel` and a `Case` and raises `AssertionError` where the promise is broken; its
docstring gives the domain and says what breaks if it does not hold. `ALL` lists them with the calls
that are drawn for each and with what a kernel must declare to be held to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import KEYWORDS, Kernel
from fusedattn.testing.laws import equality, gradients, isolation, refusal, symmetry
from fusedattn.testing.sizes import HEAD_DIMS, Sizes
from fusedattn.testing.strategies import attention_problems

# For laws that call often or compare every (row, key, dim) triple.
SMALL = Sizes(
    seqlen_q=(1, 2, 3, 4, 5, 7, 8, 16, 17, 33),
    seqlen_k=(1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 65, 70),
    head_dim=(4, 1, 2, 3, 5, 8, 16, 33),
    head_dim_v=(4, 1, 2, 3, 5, 8, 16, 33),
)
# One more and one less than the usual blocks and vectors.
_AROUND = (1, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 95, 97, 127, 129, 191, 193, 257)
EDGES = Sizes(
    seqlen_q=(1, 2, 3, 7, 9, 15, 17, 33, 65, 129),
    seqlen_k=_AROUND,
    head_dim=HEAD_DIMS,
    head_dim_v=(1, 3, 5, 7, 9, 15, 17, 33, 65),
)
BATCHES = Sizes(
    seqlen_q=SMALL.seqlen_q,
    seqlen_k=SMALL.seqlen_k,
    head_dim=SMALL.head_dim,
    head_dim_v=SMALL.head_dim_v,
    batch=(2, 3, 4),
)
SQUARE = dataclasses.replace(SMALL, square=True)
FAR = Sizes((1, 3), (2, 5), (4, 8), (4, 8), (1, 2), (1, 2), (2,))

_POSITIONS = ("causal", "window_size", "alibi_slopes", "q_offset", "seqused_q", "seqused_k")
_MASKS = ("mask", "bias", "causal", "window_size", "seqused_k")


@dataclass(frozen=True)
class Law:
    """A law and the calls on which it is tried.

    `needs` must all be declared, and one of `any_of` (one of them is in every call drawn).
    `without` never occurs in a call; `share` is the part of the examples that the law gets.
    `moves` says that the law shifts ``q_offset``: without that keyword no position may matter.
    """

    name: str
    check: Callable[[Kernel, Case], None]
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    focus: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    sizes: Sizes | None = None
    tame: bool = False
    extreme: bool = False
    moves: bool = False
    share: float = 1.0
    when: Callable[[Kernel], str | None] = field(default=lambda kernel: None)

    def cases(self, kernel: Kernel) -> SearchStrategy[Case]:
        """Calls on which this law is tried."""
        supports, without = kernel.supports, set(self.without)
        if self.moves and not kernel.can("q_offset"):
            without |= set(_POSITIONS)
        choices: list[tuple[str, ...]] = [
            (name,) for name in self.any_of if name in supports and name not in without
        ]
        strategies: list[SearchStrategy[Case]] = [
            attention_problems(
                supports,
                kernel.dtypes,
                focus=(*self.focus, *choice),
                without=without,
                sizes=self.sizes,
                domain=kernel.domain,
                tame=self.tame,
                extreme=self.extreme,
            )
            for choice in choices or [()]
        ]
        return st.one_of(strategies)

    @property
    def promise(self) -> str:
        """First line of the law's docstring."""
        return (self.check.__doc__ or "").splitlines()[0]

    def not_promised(self, kernel: Kernel) -> str | None:
        """Why a kernel is not held to this law, or None."""
        missing = [name for name in self.needs if not kernel.can(name)]
        if missing:
            return f"{', '.join(missing)} not declared"
        if self.any_of and not any(kernel.can(name) for name in self.any_of):
            return f"none of {', '.join(self.any_of)} declared"
        return self.when(kernel)


def _gives_lse(kernel: Kernel) -> str | None:
    return None if kernel.gives_lse else "lse not reported"


def _deterministic(kernel: Kernel) -> str | None:
    return None if kernel.deterministic else "declared not deterministic"


def _threads(kernel: Kernel) -> str | None:
    return None if kernel.set_threads is not None else "set_threads not given"


def _gradient(kernel: Kernel) -> str | None:
    return None if kernel.gradient is not None else "gradient not given"


def _gradient_float64(kernel: Kernel) -> str | None:
    return _gradient(kernel) or (None if "float64" in kernel.dtypes else "float64 not declared")


def _undeclared(kernel: Kernel) -> str | None:
    return None if KEYWORDS - kernel.supports else "every keyword is declared"


_EACH = (
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
    "dropout_p",
    "layout",
    "out_dtype",
    "gqa",
    "head_dim_v",
    "leading_axes",
    "zero_size",
    "strides",
)
# A feature is tried together with what it has to work with.
_WITH = {"q_offset": _POSITIONS[:3]}

ALL: tuple[Law, ...] = (
    Law(
        "undeclared_keywords_are_refused",
        refusal.undeclared_keywords_are_refused,
        tame=True,
        share=0.02,
        when=_undeclared,
    ),
    Law("equals_reference", equality.equals_reference),
    *(
        Law(
            f"equals_reference[{name}]",
            equality.equals_reference,
            needs=(name,),
            focus=(name,),
            any_of=_WITH.get(name, ()),
            share=0.5,
        )
        for name in _EACH
    ),
    Law("finite_in_finite_out", equality.finite_in_finite_out, extreme=True),
    Law("in_hull", equality.in_hull, without=("dropout_p",), sizes=SMALL),
    Law(
        "rows_without_keys",
        equality.rows_without_keys,
        any_of=("mask", "bias", "seqused_k", "causal", "window_size"),
        sizes=SMALL,
    ),
    Law(
        "nan_reaches_the_output",
        equality.nan_reaches_the_output,
        without=("dropout_p",),
        tame=True,
        sizes=SMALL,
        share=0.5,
    ),
    Law(
        "shift_of_all_logits",
        symmetry.shift_of_all_logits,
        needs=("bias",),
        without=("bias",),
        sizes=SMALL,
        share=0.5,
    ),
    Law("order_of_keys", symmetry.order_of_keys, without=(*_POSITIONS, "dropout_p"), share=0.5),
    Law(
        "every_key_twice",
        symmetry.every_key_twice,
        without=(*_POSITIONS, "dropout_p"),
        sizes=SMALL,
        share=0.5,
    ),
    Law(
        "split_and_merge",
        symmetry.split_and_merge,
        without=("dropout_p",),
        moves=True,
        share=0.5,
        when=_gives_lse,
    ),
    Law(
        "groups_equal_repeated_heads",
        symmetry.groups_equal_repeated_heads,
        needs=("gqa",),
        focus=("gqa",),
        sizes=SMALL,
        share=0.4,
    ),
    Law("linear_in_v", symmetry.linear_in_v, sizes=SMALL, share=0.3),
    Law(
        "later_keys_change_nothing",
        symmetry.later_keys_change_nothing,
        needs=("causal",),
        focus=("causal",),
        without=("dropout_p", "window_size"),
        tame=True,
        share=0.5,
    ),
    Law(
        "rows_are_independent",
        symmetry.rows_are_independent,
        without=("dropout_p", "zero_size"),
        moves=True,
        share=0.5,
    ),
    Law(
        "unseen_keys_do_not_matter",
        isolation.unseen_keys_do_not_matter,
        needs=("unseen_nan",),
        any_of=_MASKS,
    ),
    Law(
        "hidden_keys_do_not_leak",
        isolation.hidden_keys_do_not_leak,
        needs=("hidden_nan",),
        any_of=_MASKS,
    ),
    Law(
        "batch_items_are_independent",
        isolation.batch_items_are_independent,
        without=("dropout_p", "leading_axes"),
        sizes=BATCHES,
        share=0.5,
    ),
    Law("same_call_same_bits", isolation.same_call_same_bits, share=0.5, when=_deterministic),
    Law("earlier_calls_do_not_matter", isolation.earlier_calls_do_not_matter, share=0.5),
    Law(
        "memory_layout_does_not_matter",
        isolation.memory_layout_does_not_matter,
        any_of=("strides", "layout", "out"),
        share=0.5,
    ),
    Law("memory_outside_is_not_read", isolation.memory_outside_is_not_read, sizes=EDGES, tame=True),
    Law(
        "only_out_is_written",
        isolation.only_out_is_written,
        needs=("out",),
        focus=("out",),
        sizes=EDGES,
        share=0.5,
    ),
    Law(
        "far_memory_is_reached",
        isolation.far_memory_is_reached,
        needs=("strides",),
        without=("leading_axes", "zero_size", "layout", "out", "strides"),
        sizes=FAR,
        tame=True,
        share=0.08,
    ),
    Law(
        "operands_may_be_one_array",
        isolation.operands_may_be_one_array,
        without=("gqa", "head_dim_v", "layout", "out", "strides"),
        sizes=SQUARE,
        tame=True,
        share=0.1,
    ),
    Law(
        "concurrent_calls_do_not_mix",
        isolation.concurrent_calls_do_not_mix,
        sizes=EDGES,
        tame=True,
        share=0.15,
    ),
    Law("threads_do_not_matter", isolation.threads_do_not_matter, share=0.3, when=_threads),
    Law(
        "gradients_equal_reference",
        gradients.gradients_equal_reference,
        without=("layout", "out", "zero_size"),
        sizes=SMALL,
        when=_gradient,
    ),
    Law(
        "adjoint_identity",
        gradients.adjoint_identity,
        without=("layout", "out", "zero_size", "out_dtype"),
        sizes=SMALL,
        tame=True,
        share=0.3,
        when=_gradient_float64,
    ),
)

__all__ = [
    "ALL",
    "BATCHES",
    "EDGES",
    "SMALL",
    "Law",
    "equality",
    "gradients",
    "isolation",
    "refusal",
    "symmetry",
]
