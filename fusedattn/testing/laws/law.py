"""A law: what it asks for, on which calls, and who is held to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import KEYWORDS, Kernel
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

POSITIONS = ("causal", "window_size", "alibi_slopes", "q_offset", "seqused_q", "seqused_k")


@dataclass(frozen=True)
class Law:
    """A law and the calls on which it is tried, those with one `feature` where it is given.

    `needs` must all be declared, and one of `any_of` (one of them is in every call drawn).
    `without` never occurs in a call; `share` is the part of the examples that the law gets.
    `moves` says that the law shifts ``q_offset``: without that keyword no position may matter.
    """

    check: Callable[[Kernel, Case], None]
    feature: str | None = None
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

    @property
    def name(self) -> str:
        """Name of the check, with the feature in square brackets."""
        name = self.check.__name__
        return name if self.feature is None else f"{name}[{self.feature}]"

    def cases(self, kernel: Kernel) -> SearchStrategy[Case]:
        """Calls on which this law is tried."""
        supports, without = kernel.supports, set(self.without)
        if self.moves and not kernel.can("q_offset"):
            without |= set(POSITIONS)
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


def gives_lse(kernel: Kernel) -> str | None:
    """Why a law about the lse does not apply, or None."""
    return None if kernel.gives_lse else "lse not reported"


def deterministic(kernel: Kernel) -> str | None:
    """Why a law about equal calls does not apply, or None."""
    return None if kernel.deterministic else "declared not deterministic"


def threads(kernel: Kernel) -> str | None:
    """Why a law about threads does not apply, or None."""
    return None if kernel.set_threads is not None else "set_threads not given"


def gradient(kernel: Kernel) -> str | None:
    """Why a law about gradients does not apply, or None."""
    return None if kernel.gradient is not None else "gradient not given"


def gradient_float64(kernel: Kernel) -> str | None:
    """Why a law about float64 gradients does not apply, or None."""
    return gradient(kernel) or (None if "float64" in kernel.dtypes else "float64 not declared")


def undeclared(kernel: Kernel) -> str | None:
    """Why there is no keyword to refuse, or None."""
    return None if KEYWORDS - kernel.supports else "every keyword is declared"
