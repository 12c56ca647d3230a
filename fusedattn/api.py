"""The public functions: check, choose a backend, run, return the caller's layout."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedattn import checks, dispatch
from fusedattn.block_mask import BlockMask
from fusedattn.dispatch import Explanation
from fusedattn.plan import Call, Plan, find, run
from fusedattn.problem import make_problem

if TYPE_CHECKING:
    from fusedattn.device_plan import DevicePlan

Array = NDArray[Any]


class Options(TypedDict, total=False):
    """Keywords of `attention`, for type checkers; `attention` says what they mean."""

    scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None] | None
    q_offset: int | Array | None
    seqused_q: int | Array | None
    seqused_k: int | Array | None
    mask: Array | None
    bias: Array | None
    alibi_slopes: Array | None
    softcap: float | None
    sinks: Array | None
    score_mod: Callable[..., Any] | None
    score_mod_aux: tuple[Array, ...]
    block_mask: BlockMask | None
    dropout_p: float
    seed: int | None
    layout: str
    out: Array | None
    out_dtype: DTypeLike | None
    backend: str | None
    stream: Any


@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
) -> Array: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Array, Array]: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: bool, **options: Unpack[Options]
) -> Array | tuple[Array, Array]: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
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
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    out: Array | None = None,
    out_dtype: DTypeLike | None = None,
    backend: str | None = None,
    stream: Any = None,
) -> Array | tuple[Array, Array]:
    """Exact attention, ``softmax(scale * q k^T + ...) v``, without the matrix of scores.

    The keys are walked in blocks with an online softmax, so the working memory does not grow with
    the square of the length and no finite input overflows on the way (see Notes).

    Parameters
    ----------
    q : ndarray, (..., heads, seqlen_q, head_dim)
        Queries, in float16, bfloat16 (`ml_dtypes`), float32 or float64. Any number of leading batch
        axes, none too; any strides. Any axis but the last may have length 0.
    k : ndarray, (..., heads_kv, seqlen_k, head_dim)
        Keys. Query head ``h`` reads KV head ``h // (heads // heads_kv)``, so one KV head may serve
        several query heads (GQA, MQA). Dtype and leading axes are those of q.
    v : ndarray, (..., heads_kv, seqlen_k, head_dim_v)
        Values.
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(head_dim)``. May be 0 or negative.
    causal : bool
        Query ``i`` stands at key position ``p = i + q_offset`` and sees key ``j`` iff ``j <= p``.
    window_size : (left, right), optional
        Sees ``j`` iff ``p - left <= j <= p + right``, both ends included; None leaves a side open.
    q_offset : int or integer array, optional
        Position of the first query among the keys. Default ``seqlen_k - seqlen_q`` of the lengths
        in use: the last query stands on the last key. 0 aligns the first query with the first key.
        An array broadcasts to the leading axes.
    seqused_q, seqused_k : int or integer array, optional
        How many rows of q, and of k and v, count; per batch item where an array is given. Rows from
        `seqused_q` on give 0 and an lse of -inf.
    mask : ndarray of bool, optional
        True = attend. Broadcasts to ``(..., heads, seqlen_q, seqlen_k)``.
    bias : ndarray of a float dtype, optional
        Added to the scores; -inf hides the key. Broadcasts as `mask`.
    alibi_slopes : ndarray of a float dtype, (heads,) or (..., heads), optional
        Adds ``-slope * |p - j|`` to the scores.
    softcap : float, optional
        Replaces each score by ``softcap * tanh(score / softcap)``, before ALiBi and bias.
    sinks : ndarray of a float dtype, (heads,), optional
        One more logit per head that takes weight and gives no value.
    score_mod : function, optional
        ``score_mod(score, batch, head, q_idx, k_idx, *aux) -> score``: a Python function of
        scalars (or one compiled by `numba.njit`), compiled into the kernel. `score` is
        ``scale * q k^T`` in the accumulator's type, `batch` the flat index over the leading axes,
        `head` the query head, `q_idx` the row of q (without `q_offset`). A result of -inf hides
        the key. It may read numbers and call functions from outside; a change of any of them makes
        it another function. It cannot raise exceptions or use Python objects.
    score_mod_aux : tuple of ndarray
        Arrays that the score_mod reads by index, such as a table of relative positions: of a
        float dtype (read in the accumulator's type where it is a half type), integers (read as
        int64; uint64 as it is) or bool. Where q lies on a GPU, they lie there or in host memory.
        Indices count from the end where negative. One that lies outside reads the nearest element;
        with ``FUSEDATTN_CHECK_INDICES=1`` in the environment it raises an IndexError that names
        function, line and pair (slowly: every visible pair is looked at in NumPy first).
    block_mask : BlockMask, optional
        From `fusedattn.make_block_mask`: empty blocks are skipped, partial ones masked.
    dropout_p : float
        Probability with which a weight is dropped; those kept are divided by ``1 - dropout_p``.
    seed : int, optional
        ``0 <= seed < 2**64``; required with dropout. One seed, one mask, on every backend.
    layout : {"bhsd", "bshd"}
        ``"bshd"``: q, k, v and out are ``(..., seqlen, heads, dim)``; mask, bias and lse are not
        concerned.
    return_lse : bool
        Also return the log-sum-exp of each row.
    out : ndarray, optional
        Where to write the result: of its shape, layout and dtype, overlapping no input.
    out_dtype : dtype, optional
        q's dtype (the default) or float32.
    backend : {"cpu", "cuda", "blocked", "reference"}, optional
        Default: the first that can, and ``"cuda"`` for arrays in the memory of a GPU (of CuPy,
        torch or Numba), whose results come in kind. One asked for by name never falls back
        silently.
    stream : int or stream of CuPy, torch or Numba, optional
        CUDA stream to work on, for arrays on a GPU; default the current one of their library.

    Returns
    -------
    out : ndarray, (..., heads, seqlen_q, head_dim_v)
        0 in a row that sees no key. The array given as `out`, if one was.
    lse : ndarray, (..., heads, seqlen_q)
        Only with `return_lse`. Natural logarithm of the sum of the exponentials of the scores seen
        (and the sink), before dropout; float32, or float64 for float64 inputs. -inf in a row that
        sees no key and has no sink.

    Raises
    ------
    TypeError, ValueError
        Before any work, naming the argument, what it is and what was expected.
    NotImplementedError
        If the backend asked for cannot run this; lists every backend and its reasons.

    Notes
    -----
    The order of operations is ``scale * q k^T``, score_mod, softcap, ALiBi, bias, masks, softmax
    with sinks, dropout, ``@ v``. Hidden keys are left out by selection: whatever they hold, NaN and
    inf too, has no influence on a row that does not see them. NaN in a key or value that a row does
    see makes the row NaN.

    No finite input gives inf or NaN as long as ``max(1, |scale|) * sum(|q_d k_d|) + |bias| +
    |alibi|`` stays below a quarter of the largest accumulator number; v may go up to its largest.

    Half types are accumulated in float32. The same inputs give the same bits, whatever the strides,
    the layout, the number of threads and the other items of the batch.

    The algorithm is the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867) in the
    blocked form of FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1).

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import attention
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 2, 120, 64), dtype=np.float32)
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((2, 8, 100, 64), (2, 8, 100))

    A row that sees nothing is 0, not NaN:

    >>> nothing = np.zeros((100, 120), bool)
    >>> bool((attention(q, k, v, mask=nothing) == 0).all())
    True
    """
    call = Call(
        q, k, v, q_offset, seqused_q, seqused_k, score_mod_aux, mask, bias, alibi_slopes, sinks,
        out, scale, causal, window_size, softcap, score_mod, block_mask, dropout_p, seed, layout,
        return_lse, out_dtype, backend, stream,
    )  # fmt: skip
    if type(q) is not np.ndarray:
        on_gpu, device_plan = _for_gpus()
        if on_gpu(q):
            return device_plan.run(call)  # type: ignore[no-any-return]
    return run(call)


def plan(q: Array, k: Array, v: Array, **options: Any) -> "Plan | DevicePlan":
    """Check and prepare a kind of call of `attention` once, for a loop of many such calls.

    `attention` itself remembers the latest kinds and runs by the same plans: a plan in hand saves
    it the search, and says at once where a call strays from what was planned.

    Parameters
    ----------
    q, k, v : ndarray
        Arrays of the shapes, strides and dtypes to come, as in `attention`, in host memory or on a
        GPU; nothing is read.
    **options
        As in `attention`. Of ``q_offset``, ``seqused_q``, ``seqused_k``, ``mask``, ``bias``,
        ``alibi_slopes``, ``sinks`` and ``out`` those that each call will be given.

    Returns
    -------
    Plan
        ``plan(q, k, v, q_offset=..., seqused_q=..., seqused_k=..., mask=..., bias=...,
        alibi_slopes=..., sinks=..., out=...)`` returns what `attention` would, in one call of it
        the arguments that were given here and no others. It holds on to no array; any number of
        threads may share it. For arrays on a GPU a `DevicePlan`, which also takes ``stream=``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`.

    Examples
    --------
    Generating token by token, with room for 512 keys:

    >>> import numpy as np
    >>> from fusedattn import attention, plan
    >>> cache = np.ones((2, 1, 8, 512, 64), np.float32)
    >>> q = np.ones((1, 32, 1, 64), np.float32)
    >>> step = plan(q, *cache, seqused_k=512)
    >>> for seqlen in range(100, 103):
    ...     out = step(q, *cache, seqused_k=seqlen)
    >>> bool((out == attention(q, *cache, seqused_k=102)).all())
    True
    """
    _check_keywords("plan", options, set(Call._fields))
    if type(q) is not np.ndarray:
        on_gpu, device_plan = _for_gpus()
        if on_gpu(q):
            return device_plan.DevicePlan(Call(q, k, v, **options))  # type: ignore[no-any-return]
    return find(Call(q, k, v, **options))


@functools.cache
def _for_gpus() -> tuple[Callable[[object], bool], Any]:
    """Return what arrays on a GPU need, imported when something else than an ndarray comes."""
    from fusedattn import arrays, device_plan

    return arrays.on_gpu, device_plan


def attention_weights(q: Array, k: Array, v: Array | None = None, **options: Any) -> Array:
    """Weights with which `attention` multiplies v: the first thing to look at when results differ.

    Computed by the reference. This is the matrix that `attention` never builds: it takes
    ``8 * heads * seqlen_q * seqlen_k`` bytes per batch item.

    Parameters
    ----------
    q, k, v : ndarray
        As in `attention`; the values do not matter, so v may be left out.
    **options
        The keywords of `attention`, without `backend`, `out`, `out_dtype` and `return_lse`.

    Returns
    -------
    ndarray of float64, (..., heads, seqlen_q, seqlen_k)
        0 where a key is hidden or dropped. Rows sum to 1 without dropout and sinks, to 0 where they
        see no key.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import attention_weights
    >>> x = np.zeros((1, 3, 4), np.float32)
    >>> attention_weights(x, x, causal=True)[0].round(2)
    array([[1.  , 0.  , 0.  ],
           [0.5 , 0.5 , 0.  ],
           [0.33, 0.33, 0.33]])
    """
    from fusedattn import reference

    others = {"out", "out_dtype", "return_lse", "backend", "stream"}
    _check_keywords("attention_weights", options, set(Call._fields) - others)
    return reference.weights(make_problem(q, k, k if v is None else v, **options))


def dropout_mask(shape: Sequence[int], dropout_p: float, seed: int) -> Array:
    """Return the weights that dropout keeps, as `attention` does on every backend.

    Parameters
    ----------
    shape : (..., heads, seqlen_q, seqlen_k)
        Shape of the weights.
    dropout_p : float
        Probability of dropping, in [0, 1).
    seed : int
        As given to `attention`.

    Returns
    -------
    ndarray of bool
        True = kept. Entry ``(..., head, row, key)`` is kept iff ``u >= floor(dropout_p * 2**32)``,
        where ``u`` is word ``key % 4`` of Philox4x32-10 (Salmon et al. 2011) with the seed as key
        and the counter ``(key // 4, row, head, flat batch index)``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not such a shape, probability or seed.

    Examples
    --------
    >>> from fusedattn import dropout_mask
    >>> dropout_mask((1, 2, 6), dropout_p=0.5, seed=1).astype(int)
    array([[[1, 1, 1, 1, 1, 1],
            [1, 0, 0, 0, 1, 1]]])
    """
    from fusedattn import reference

    if not isinstance(shape, Sequence):
        raise TypeError(
            "shape must be a tuple (..., heads, seqlen_q, seqlen_k), but is "
            f"{checks.describe(shape)}"
        )
    sizes = tuple(checks.integer("each axis of shape", size, 0, sys.maxsize) for size in shape)
    if len(sizes) < 3:
        raise ValueError(f"shape must be (..., heads, seqlen_q, seqlen_k), but is {sizes}")
    probability, key = checks.dropout(dropout_p, seed)
    return reference.keep_mask(sizes, probability, key)


def explain(
    q: Array, k: Array, v: Array, *, backend: str | None = None, **options: Any
) -> Explanation:
    """Say what a call of `attention` would run, on which backend, and why not on the others.

    Nothing is computed, and only shapes, strides and dtypes are read:
    ``np.broadcast_to(np.float32(0), shape)`` stands for an array of any size.

    Parameters
    ----------
    q, k, v, backend, **options
        As in `attention`.

    Returns
    -------
    Explanation
        Print it, or read `backend`, `reasons`, `details` and `problem`.

    Raises
    ------
    TypeError, ValueError
        As `attention`. A backend that cannot run the problem is no error here.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import explain
    >>> q = np.zeros((1, 8, 2048, 64), np.float32)
    >>> answer = explain(q, q, q, causal=True, backend="reference")
    >>> answer.backend, answer.reasons["reference"]
    ('reference', [])
    >>> print(answer)
    runs on reference
      ...
      4.3 GFLOP over the key intervals (50% of all pairs), 16 MiB of inputs and outputs
      ...
    """
    _check_keywords("explain", options, set(Call._fields) - {"stream"})
    return dispatch.explain(make_problem(q, k, v, **options), backend)


def _check_keywords(function: str, given: dict[str, Any], known: set[str]) -> None:
    unknown = given.keys() - known
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
