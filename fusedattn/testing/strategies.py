"""Hypothesis strategies for calls of an attention function.

A draw decides the few things that shrink well: shapes, which features are on, styles of values, and
a seed; NumPy fills the arrays from that seed. So large arrays cost nothing to draw, a smaller
example is a smaller call, and each draw is reproducible.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from fusedattn.testing import fill
from fusedattn.testing.buffers import PLACEMENTS, Array
from fusedattn.testing.build import broadcastable, build, place
from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import EVERYTHING, OPTIONS, as_supports
from fusedattn.testing.sizes import MAX_LOGITS, Domain, Shapes, Sizes, sizes_within


@st.composite
def shapes(
    draw: st.DrawFn,
    supports: Collection[str] = EVERYTHING,
    focus: Collection[str] = (),
    sizes: Sizes | None = None,
) -> Shapes:
    """Draw the sizes of a call that the declared capabilities allow.

    Parameters
    ----------
    supports : collection of str
        Capabilities as for `check_attention`: ``gqa``, ``head_dim_v``, ``leading_axes``,
        ``zero_size``; all by default.
    focus : collection of str
        Those that every draw has.
    sizes : Sizes, optional
        Sizes to choose from.

    Returns
    -------
    strategy of Shapes

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5)
    ... @given(shapes(supports={"gqa"}))
    ... def heads_are_shared_evenly(drawn):
    ...     assert drawn.num_heads % drawn.num_heads_kv == 0
    >>> heads_are_shared_evenly()
    """
    sizes = sizes or Sizes()
    seqlen_k = draw(st.sampled_from(sizes.seqlen_k))
    seqlen_q = draw(st.sampled_from(sizes.seqlen_q))
    square = sizes.square
    if square is None:
        square = seqlen_k in sizes.seqlen_q and draw(st.integers(0, 2)) == 2
    if square and seqlen_k**2 <= MAX_LOGITS:
        seqlen_q = seqlen_k
    head_dim = draw(st.sampled_from(sizes.head_dim))
    head_dim_v = head_dim
    if "head_dim_v" in supports and ("head_dim_v" in focus or draw(st.booleans())):
        head_dim_v = draw(st.sampled_from(sizes.head_dim_v))
    heads_kv = draw(st.sampled_from(sizes.num_heads_kv))
    group = 1
    if "gqa" in supports and ("gqa" in focus or draw(st.booleans())):
        group = draw(st.sampled_from(sizes.group_size))
    batch_shape: tuple[int, ...] = (draw(st.sampled_from(sizes.batch)),)
    if "leading_axes" in supports and ("leading_axes" in focus or draw(st.integers(0, 3)) == 3):
        batch_shape = draw(st.sampled_from([(), (2, 3), (1, 2), (3, 1), (1, 1, 2)]))
    elif draw(st.integers(0, 3)) == 3:
        # Equal sizes let an array broadcast along the wrong axis without an error.
        batch_shape = (heads_kv * group,)
    if sizes.batch == Sizes.batch and "gqa" not in focus and draw(st.integers(0, 9)) == 9:
        # All sizes alike: no mistake about axes shows in a shape.
        seqlen_q = seqlen_k = heads_kv = draw(st.sampled_from((2, 3, 4)))
        group, batch_shape, head_dim_v = 1, (seqlen_q,), head_dim
    # Long sequences come alone.
    if sizes.square is None:
        seqlen_q = max(1, min(seqlen_q, MAX_LOGITS // seqlen_k))
    while (n := int(np.prod(batch_shape))) * heads_kv * group * seqlen_q * seqlen_k > MAX_LOGITS:
        if n > 1:
            batch_shape = tuple(1 for _ in batch_shape)
        elif heads_kv > 1:
            heads_kv = 1
        elif group > 2:
            group = 2
        else:
            break
    drawn = Shapes(
        batch_shape, heads_kv * group, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
    )
    if "zero_size" in supports and ("zero_size" in focus or draw(st.integers(0, 11)) == 11):
        empty = draw(st.sampled_from(["seqlen_k", "seqlen_q", "batch", "heads"]))
        if empty == "batch" and batch_shape:
            drawn = drawn._replace(batch_shape=(*batch_shape[:-1], 0))
        elif empty == "heads":
            drawn = drawn._replace(num_heads=0, num_heads_kv=0)
        elif empty == "seqlen_q":
            drawn = drawn._replace(seqlen_q=0)
        else:
            drawn = drawn._replace(seqlen_k=0)
    return drawn


def magnitudes() -> st.SearchStrategy[tuple[str, str, str, float | None]]:
    """Draw styles of q, k and v, and the size of the logits.

    Returns
    -------
    strategy of (str, str, str, float or None)
        Three of the styles of `fusedattn.testing.fill`, such as ``"ties"`` or ``"subnormal"``, and
        the standard deviation of the logits; None stands for the largest of the domain.
    """
    plain = st.just("normal")
    return st.tuples(
        plain | st.sampled_from(fill.STYLES),
        plain | st.sampled_from(fill.STYLES),
        plain | st.sampled_from(fill.V_STYLES),
        st.just(1.0) | st.sampled_from(fill.SPREADS),
    )


def layouts() -> st.SearchStrategy[str]:
    """Draw how an array lies in memory: one of `fusedattn.testing.PLACEMENTS`.

    Returns
    -------
    strategy of str

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn.testing import PLACEMENTS, Placed
    >>> all(Placed(np.eye(3), how).view[1, 1] == 1 for how in PLACEMENTS)
    True
    """
    return st.sampled_from(PLACEMENTS)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Array:
    """Draw a boolean mask that broadcasts to the shape of the logits.

    Parameters
    ----------
    shape : tuple of int
        ``(..., heads, seqlen_q, seqlen_k)``.

    Returns
    -------
    strategy of ndarray of bool
        True = attend. Some hide whole rows, some whole keys.

    Examples
    --------
    >>> import numpy as np
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5)
    ... @given(masks((2, 3, 4)))
    ... def fits(mask):
    ...     assert np.broadcast_shapes(mask.shape, (2, 3, 4)) == (2, 3, 4)
    >>> fits()
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return fill.mask_values(rng, broadcastable(rng, shape))


@st.composite
def attention_problems(
    draw: st.DrawFn,
    supports: Collection[str] = EVERYTHING,
    dtypes: Collection[str] = ("float32",),
    *,
    focus: Collection[str] = (),
    without: Collection[str] = (),
    sizes: Sizes | None = None,
    domain: Domain | None = None,
    tame: bool = False,
    extreme: bool = False,
) -> Case:
    """Draw a call inside the domain of the numerics contract.

    Parameters
    ----------
    supports : collection of str
        Keywords and capabilities to draw from; all by default.
    dtypes : collection of str
        Types of q, k and v to choose from.
    focus : collection of str
        Features that every draw has. Any other comes in one draw of four.
    without : collection of str
        Features that no draw has.
    sizes : Sizes, optional
        Sizes to choose from.
    domain : callable, optional
        ``domain(problem)`` returns None for a call that it admits.
    tame : bool
        Values of moderate size only.
    extreme : bool
        Logits and values at the end of the range in every draw.

    Returns
    -------
    strategy of Case

    Raises
    ------
    ValueError
        If `domain` admits no call of the sizes to choose from.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5)
    ... @given(attention_problems(supports={"causal", "gqa"}))
    ... def out_has_the_shape_of_q(case):
    ...     assert case.expected.out.shape == (*case.q.shape[:-1], case.v.shape[-1])
    >>> out_has_the_shape_of_q()
    """
    chosen = as_supports(supports) - frozenset(without)
    if domain is not None:
        sizes = sizes_within(domain, chosen, tuple(dtypes), sizes or Sizes())
    size = draw(shapes(chosen, focus, sizes))
    dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
    styles = ("normal", "normal", "normal", 1.0) if tame else draw(magnitudes())
    if extreme:
        styles = (*styles[:2], "huge", None)
    on = {
        name
        for name in (*OPTIONS, "strides")
        if name in chosen and (name in focus or draw(st.integers(0, 3)) == 3)
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = build(rng, size, dtype, styles, on, "full_range" in chosen, len(dtypes) > 1)
    if "return_lse" in chosen and ("return_lse" in focus or rng.random() < 0.8):
        case = case.change(return_lse=True)
    if "strides" in on:
        case = place(rng, case)
    if "half_weights" in chosen:
        case = case.change(half_weights=True)
    if domain is not None:
        assume(domain(case.problem) is None)
    return case
