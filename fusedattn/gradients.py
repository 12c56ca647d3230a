"""The public gradient: check, choose a backend, run, return the caller's layout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedattn import checks, dispatch
from fusedattn.block_mask import BlockMask
from fusedattn.functions import user_function
from fusedattn.problem import AttentionProblem, Gradients, make_problem

Array = NDArray[Any]


def attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    d_lse: Array | None = None,
    bias_grad: bool = True,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    q_offset: int | Array | None = None,
    seqused_q: int | Array | None = None,
    seqused_k: int | Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_aux: tuple[Array, ...] = (),
    score_mod_grad: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    out_dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> Gradients:
    """Gradients of `attention`: what comes back through its results, pulled back to its operands.

    With ``out, lse = attention(q, k, v, return_lse=True, **options)`` and a loss whose gradients
    with respect to these are `d_out` and `d_lse`, the gradients of the loss with respect to q, k,
    v, bias and sinks. The weights are computed again, tile by tile, and never stored: working
    memory grows with the length, not with its square.

    Parameters
    ----------
    d_out : ndarray, (..., heads, seqlen_q, head_dim_v)
        Gradient with respect to out, in out's dtype.
    q, k, v : ndarray
        As given to `attention`.
    out : ndarray, (..., heads, seqlen_q, head_dim_v)
        What `attention` returned; in q's dtype, or float32 if that was its `out_dtype`.
    lse : ndarray, (..., heads, seqlen_q)
        What it returned with ``return_lse=True``; float32, or float64 for float64 inputs.
    d_lse : ndarray, (..., heads, seqlen_q), optional
        Gradient with respect to lse, in lse's dtype. None is zero: the loss does not use lse.
    bias_grad : bool
        Whether to compute the gradient of bias.
    scale, causal, window_size, q_offset, seqused_q, seqused_k, mask, bias, alibi_slopes : optional
        As given to `attention`.
    softcap, sinks, dropout_p, seed : optional
        As given to `attention`. The same seed drops the same entries.
    score_mod, score_mod_aux, block_mask : optional
        As given to `attention`.
    score_mod_grad : function, optional
        ``score_mod_grad(score, batch, head, q_idx, k_idx, *aux) -> d_score``: the derivative of
        what `score_mod` returns by `score`. By default it is computed by forward-mode dual
        numbers, which know the arithmetic operators, comparisons, `min`, `max`, `abs`, and the
        functions of `math` and NumPy that have an elementary derivative.
    layout : {"bhsd", "bshd"}
        With ``"bshd"`` q, k, v, out, d_out and the gradients d_q, d_k, d_v are ``(..., seqlen,
        heads, dim)``; mask, bias, lse, d_lse and d_bias are not concerned.
    out_dtype : dtype, optional
        Dtype that out and d_out must have; by default whichever of the two possible ones out has.
    backend : {"cpu", "blocked", "reference"}, optional
        Default: the first that can. One asked for by name never falls back silently.

    Returns
    -------
    Gradients
        A named tuple; each gradient has the shape and dtype of its operand.

        ``d_q``, ``d_k``, ``d_v``
            With fewer KV heads than heads, d_k and d_v are summed over the heads that share one.
        ``d_bias``
            Summed over the axes along which bias was broadcast; None without a bias or with
            ``bias_grad=False``.
        ``d_sinks``
            None without sinks.
        ``d_score_mod_aux``
            A tuple with one entry for each array of `score_mod_aux`: the gradient, in the shape and
            dtype of the array, or None for integers and bool. By dual numbers, from what each read
            of an element does to the score; added up in a fixed order. None without a score_mod.

    Raises
    ------
    TypeError, ValueError
        Before any work, naming the argument, what it is and what was expected.
    NotImplementedError
        If the backend asked for cannot do this; lists every backend and its reasons.

    Notes
    -----
    A row that sees no key has a constant out: its d_q is 0 and it has no share in d_k, d_v and
    d_bias. With a sink its lse is the sink, and d_sinks gets its d_lse; without one its d_out and
    d_lse are ignored, whatever they hold, and so are those of rows from `seqused_q` on. A hidden
    or dropped entry is left out by selection: what a row does not see changes nothing in its share,
    NaN included.

    Masks, slopes, scale and softcap have no gradient. Where a bias of -inf hides a key its gradient
    is 0.

    No finite input gives inf or NaN where the domain of `attention` is kept and the terms of each
    gradient, taken as positive numbers, add up to less than a quarter of the largest number of its
    type and of the accumulator. Let ``t = 2 * sum(|d_out_d|) * max|v| / (1 - dropout_p) + |d_lse|``
    be the largest of any row and ``s = max(1, |scale|)``; the terms add up to ``s * t * max|k|``
    for d_q, to the sums over rows of ``s * t * |q|`` for d_k and of ``|d_out| / (1 - dropout_p)``
    for d_v, and of ``t`` over all that an element of bias or sinks serves. Logits may be of any
    size.

    Weights follow from lse as ``exp(score - lse)``. Where ``|lse|`` is so large that its rounding
    would show (above 2**12 in float32, 2**41 in float64), the maximum and sum of the row are
    computed again. Below that, out and lse may also come from more keys than k and v hold, as when
    the keys are spread over several workers: the result is then this part's share.

    The algorithm is the backward pass of FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.2
    and algorithm 2), with gradients of lse, bias, softcap and sinks.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import attention, attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 2, 120, 64), dtype=np.float32)
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> d_out = np.ones_like(out)  # the loss is out.sum()
    >>> gradients = attention_backward(d_out, q, k, v, out, lse, causal=True)
    >>> gradients.d_q.shape, gradients.d_k.shape, gradients.d_bias
    ((2, 8, 100, 64), (2, 2, 120, 64), None)

    The weights of each row sum to 1, and so does what the row gives to the values:

    >>> bool(np.allclose(gradients.d_v.sum(axis=-2), 4 * 100, rtol=1e-5))
    True
    """
    if out_dtype is None and getattr(out, "dtype", None) == np.float32:
        out_dtype = np.float32
    problem = make_problem(
        q, k, v, scale=scale, causal=causal, window_size=window_size, q_offset=q_offset,
        seqused_q=seqused_q, seqused_k=seqused_k, mask=mask, bias=bias, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, score_mod=score_mod, score_mod_aux=score_mod_aux,
        block_mask=block_mask, dropout_p=dropout_p, seed=seed, layout=layout, out_dtype=out_dtype,
    )  # fmt: skip
    if score_mod_grad is not None:
        if score_mod is None:
            raise ValueError("score_mod_grad must be None without a score_mod, but is given")
        derivative = user_function("score_mod_grad", score_mod_grad, score_mod_aux)
        problem = dataclasses.replace(problem, score_mod_grad=derivative)
    bias_grad = checks.flag("bias_grad", bias_grad)
    d_out, out = (_rows(problem, *given) for given in (("d_out", d_out), ("out", out)))
    lse = _per_row(problem, "lse", lse)
    d_lse = None if d_lse is None else _per_row(problem, "d_lse", d_lse)
    chosen = dispatch.choose(problem, backend, backward=True)
    found = chosen.backward(problem, d_out, out, lse, d_lse, bias_grad=bias_grad)
    d_q, d_k, d_v = (problem.restore(x) for x in found[:3])
    return found._replace(d_q=d_q, d_k=d_k, d_v=d_v)


def _rows(problem: AttentionProblem, name: str, value: object) -> Array:
    """Check out or its gradient in the caller's layout and view it canonically."""
    *batch, heads, rows, dim = problem.out_shape
    axes = "(..., heads, seqlen_q, head_dim_v)"
    shape = (*batch, heads, rows, dim)
    if problem.layout == "bshd":
        axes, shape = "(..., seqlen_q, heads, head_dim_v)", (*batch, rows, heads, dim)
    what = "q's, or float32 where out was asked for in it"
    array = checks.companion(name, value, shape, problem.out_dtype, axes, what)
    return problem.restore(array)


def _per_row(problem: AttentionProblem, name: str, value: object) -> Array:
    """Check lse or its gradient."""
    axes, what = "(..., heads, seqlen_q)", "lse is float64 for float64 inputs, else float32"
    return checks.companion(name, value, problem.lse_shape, problem.accumulator, axes, what)
