"""`attention` for JAX arrays on the CPU: under jit, vmap and grad.

Import it by name: ``import fusedattn.interop.jax``. `fusedattn` itself never loads JAX. The work is
done by a callback to the host, which reads the operands where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from fusedattn.api import attention as forward
from fusedattn.gradients import attention_backward
from fusedattn.problem import Gradients, make_problem

__all__ = ["attention"]

Array = NDArray[Any]
Operands = dict[str, Any]

# Operands that have a gradient, in the order of `Gradients`.
_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
# What may be an array: with the number of axes that it has without leading ones, and so may grow to
# when a call is batched. The axes of q, k and v are all spelled out.
_OWN_AXES = {"mask": 3, "bias": 3, "alibi_slopes": 1, "q_offset": 0, "seqused_q": 0, "seqused_k": 0}


class _Settings(NamedTuple):
    """What is known when a function is traced."""

    options: tuple[tuple[str, Any], ...]  # keywords that are no arrays
    axes: tuple[tuple[str, int], ...]  # number of axes of each operand, before any vmap


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Exact attention on JAX arrays, with gradients of q, k, v, bias and sinks.

    Parameters
    ----------
    q, k, v : jax.Array
        As in `fusedattn.attention`; float64 needs ``jax_enable_x64``.
    bias, sinks : jax.Array, optional
        As there, of any float dtype.
    return_lse : bool
        Also return the log-sum-exp of each row, which is differentiable too.
    **options
        The other keywords of `fusedattn.attention`. mask, alibi_slopes, q_offset, seqused_q and
        seqused_k may be JAX arrays, traced ones too; everything else is static. There is no `out`.

    Returns
    -------
    out : jax.Array, (..., heads, seqlen_q, head_dim_v)
    lse : jax.Array, (..., heads, seqlen_q)
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As `fusedattn.attention`, while the function is traced where shapes and dtypes are at fault,
        else from the callback; if alibi_slopes, of which there is no gradient, is differentiated.

    Notes
    -----
    Reverse mode only, and once: JAX refuses `jvp`, and the gradient of the gradient.

    Under `vmap` the batch becomes leading axes of one call. With sinks or dropout it is one call
    for each item instead, since all items share the sinks, and each has dropout's mask of a call of
    its own.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from fusedattn.interop.jax import attention
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 2, 5, 8)) for i in range(3))
    >>> loss = lambda q: attention(q, k, v, causal=True).sum()
    >>> jax.jit(jax.grad(loss))(q).shape
    (1, 2, 5, 8)
    """
    if "out" in options:
        raise TypeError("attention of JAX arrays has no argument out: JAX owns its results")
    operands: Operands = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    operands |= {name: options[name] for name in _OWN_AXES if _is_array(options.get(name))}
    operands = {name: x for name, x in operands.items() if x is not None}
    for name, x in operands.items():
        if not _is_array(x):
            raise TypeError(f"{name} must be a jax.Array, but is of type {type(x).__name__}")
        operands[name] = jax.numpy.asarray(x)  # NumPy's, in the types that JAX is set to
    static = {name: x for name, x in options.items() if name not in operands}
    if isinstance(static.get("window_size"), list):
        static["window_size"] = tuple(static["window_size"])  # JAX needs a hash of it
    if static.get("out_dtype") is not None:
        static["out_dtype"] = np.dtype(static["out_dtype"])
    settings = _Settings(
        tuple(sorted(static.items())), tuple((name, x.ndim) for name, x in operands.items())
    )
    _problem(settings, operands)  # complains now, not from inside a compiled program
    out, lse = _attention(settings, operands)
    return (out, lse) if return_lse else out


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def _problem(settings: _Settings, operands: Operands) -> Any:
    """Check shapes, dtypes and static options on stand-ins without memory.

    What lengths and offsets hold is not known yet; the callback checks it.
    """
    known = {name: x for name, x in operands.items() if not name.startswith(("seqused", "q_off"))}
    stand_ins: Operands = {
        name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in known.items()
    }
    options = {name: x for name, x in settings.options if name != "backend"}
    return make_problem(**stand_ins, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: _Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Return out and lse of a call."""
    problem = _problem(settings, operands)
    out = problem.restore(np.broadcast_to(np.zeros((), problem.out_dtype), problem.out_shape))
    results = _like(out), jax.ShapeDtypeStruct(problem.lse_shape, problem.accumulator)
    out, lse = _callback(functools.partial(_run, settings), results, settings, operands)
    return out, lse


def _forward(settings: _Settings, operands: Operands) -> tuple[Any, Any]:
    if "alibi_slopes" in operands and operands["alibi_slopes"].perturbed:
        raise ValueError(
            "alibi_slopes has no gradient, but is differentiated; use jax.lax.stop_gradient"
        )
    perturbed = {name: x.perturbed for name, x in operands.items()}
    values = {name: x.value for name, x in operands.items()}
    out, lse = _attention(settings, values)
    return (out, lse), (values, out, lse, perturbed)


def _backward(settings: _Settings, kept: Any, incoming: Any) -> tuple[Operands]:
    operands, out, lse, perturbed = kept
    given = dict(operands) | {"out": out, "lse": lse}
    for name, x, like in zip(("d_out", "d_lse"), incoming, (out, lse), strict=True):
        if not isinstance(x, jax.custom_derivatives.SymbolicZero):
            given[name] = x
        elif name == "d_out":
            given[name] = jax.numpy.zeros_like(like)
    axes = settings.axes + tuple((n, x.ndim) for n, x in given.items() if n not in operands)
    settings = _Settings(settings.options, axes)
    wanted = [name for name in _DIFFERENTIABLE if name in operands]
    with_bias = perturbed.get("bias", False)
    if not with_bias and "bias" in wanted:
        wanted.remove("bias")
    results = tuple(_like(operands[name]) for name in wanted)
    run = functools.partial(_run_backward, settings, bool(with_bias))
    found = dict(zip(wanted, _callback(run, results, settings, given), strict=True))
    return ({name: found.get(name) for name in operands},)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _like(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _callback(
    run: Callable[[Operands], Any], results: Any, settings: _Settings, operands: Operands
) -> Any:
    """Call back to the host; see the notes of `attention` about vmap."""
    together = "sinks" not in operands and not dict(settings.options).get("dropout_p")
    method = "expand_dims" if together else "sequential"
    return jax.pure_callback(run, results, operands, vmap_method=method)


def _run(settings: _Settings, operands: Operands) -> tuple[Array, Array]:
    arrays, _ = _arrays(settings, operands)
    out, lse = forward(**arrays, **dict(settings.options), return_lse=True)
    return out, lse


def _run_backward(settings: _Settings, bias_grad: bool, operands: Operands) -> tuple[Array, ...]:
    arrays, added = _arrays(settings, operands)
    found = attention_backward(**arrays, bias_grad=bias_grad, **dict(settings.options))
    if found.d_bias is not None:
        # Without the axes that were put between those of vmap and the bias's own.
        own = operands["bias"].shape[len(added) :]
        found = found._replace(d_bias=found.d_bias.reshape((*added, *own)))
    return tuple(x for x in Gradients(*found)[:5] if x is not None)


def _arrays(settings: _Settings, operands: Operands) -> tuple[Operands, tuple[int, ...]]:
    """View operands as arrays that fit together, and return the axes that vmap has added in front.

    An operand that is the same for all items has 1 there. Those with fewer axes than q get the
    missing ones behind the added ones, where broadcasting expects them.
    """
    arrays = {name: np.asarray(x) for name, x in operands.items()}
    axes = dict(settings.axes)
    count = arrays["q"].ndim - axes["q"]
    added = np.broadcast_shapes(*(x.shape[:count] for x in arrays.values()))
    if not count:
        return arrays, added
    leading = axes["q"] - 3
    for name, x in arrays.items():
        front, own = x.shape[:count], x.shape[count:]
        if name in _OWN_AXES:
            own = (1,) * (leading + _OWN_AXES[name] - len(own)) + own
            x = x.reshape((*front, *own))
        if name not in _OWN_AXES or name == "bias":  # a bias has a gradient for each item
            x = np.broadcast_to(x, (*added, *own))
        arrays[name] = x
    return arrays, added
