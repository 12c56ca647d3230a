"""Calls whose arrays lie on a GPU: kinds of them, prepared once and then started.

As `fusedattn.plan` for arrays in host memory: a kind is everything about a call but the contents of
its arrays and the memory they lie in.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fusedattn import arrays, checks, dispatch
from fusedattn.arrays import Array, Kind, View
from fusedattn.functions import fingerprint, plain_function
from fusedattn.problem import AttentionProblem, make_lengths

# Kinds of calls to remember, each with its prepared launch.
CAPACITY = 256

# Arrays of a call, and what kernels call them.
_INPUTS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks")
_OPERANDS = {**{name: name for name in _INPUTS}, "alibi_slopes": "slopes", "out": "out"}
_NAMES = tuple(_OPERANDS.items())
_LENGTHS = ("q_offset", "seqused_q", "seqused_k")


class Aux(NamedTuple):
    """The arrays of a score_mod: on the GPU, or in host memory, whence each call copies them."""

    kinds: list[Kind]
    on_gpu: dict[str, Any]  # by the names of messages
    addresses: dict[str, int]  # by the kernels' names
    in_host: dict[str, Array]  # dense, in C order


class DevicePlan:
    """A kind of call, checked and prepared; see `fusedattn.plan`.

    It holds on to no array, and any number of threads may call it at once.
    """

    def __init__(self, call: Any) -> None:
        if call.backend not in (None, "cuda"):
            dispatch.load(call.backend)
            raise NotImplementedError(
                f"backend {call.backend!r} takes arrays in host memory, but q lies on a GPU"
            )
        stream = arrays.stream_of(call.q, call.stream)
        self._kinds, _ = _described(_operands_of(call), stream)
        views = {
            name: arrays.view(name, array, stream)
            for name in _OPERANDS
            if (array := getattr(call, name)) is not None
        }
        shadows = {name: seen.shadow for name, seen in views.items()}
        self._score_mod, self._computes = call.score_mod, _computes(call.score_mod)
        aux: Any = call.score_mod_aux
        if isinstance(aux, (tuple, list)):  # or a check will name it
            self._aux_kinds = _aux_of(aux, stream).kinds
            seen_aux = [_view_aux(name, array, stream) for name, array in _named_aux(aux)]
            views |= {
                f"score_mod_aux[{i}]": seen
                for i, seen in enumerate(seen_aux)
                if seen.device is not None
            }
            aux = tuple(seen.shadow for seen in seen_aux)
        devices = {name: seen.device for name, seen in views.items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"all arrays must lie on one GPU, but lie on {devices}")
        problem = call._replace(stream=None, score_mod_aux=aux, **shadows).problem()
        backend: Any = dispatch.choose(problem, "cuda")
        reasons = backend.unsuitable(problem)
        if reasons:
            raise NotImplementedError(f"backend 'cuda' not able to run this: {'; '.join(reasons)}")
        if problem.out is None:
            problem = replace(problem, out=_dense_out(problem))
        self._lengths_given = [getattr(call, name) is not None for name in _LENGTHS]
        batch = problem.batch_shape, problem.batch_size
        self._seqlens: tuple[int, int, Any] = problem.seqlen_q, problem.seqlen_k, batch
        self._out_shape = problem.restore(problem.out).shape
        self._out_dtype = problem.out_dtype
        self._lse_shape = problem.lse_shape if problem.return_lse else None
        self._lse_dtype = problem.accumulator
        self._prepared = None
        if math.prod(problem.out_shape):
            self._prepared = backend.prepare_on(problem, devices["q"])
        # Where the elements of each array lie, relative to the first.
        self._reach = {_OPERANDS[name]: _reach(shadow) for name, shadow in shadows.items()}
        for i, shadow in enumerate(aux):
            self._reach[_aux_name(i)] = _reach(shadow)

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        q_offset: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        score_mod_aux: Any = (),
        mask: Any = None,
        bias: Any = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """Compute `fusedattn.attention` of these arguments, with the options of the plan.

        Raises
        ------
        ValueError
            If an array differs from the planned one in shape, strides, dtype, GPU or alignment, or
            is given where it was not, or the reverse; or if the score_mod has changed.
        """
        operands = (q, k, v, mask, bias, alibi_slopes, sinks, out)
        number = arrays.stream_of(q, stream)
        kinds, addresses = _described(operands, number)
        if kinds != self._kinds:
            for name, kind, planned in zip(_OPERANDS, kinds, self._kinds, strict=True):
                if kind != planned:
                    was = _told(planned)
                    raise ValueError(f"{name} is {_told(kind)}, but when planned was {was}")
        aux = _aux_of(score_mod_aux, number)
        if aux.kinds != self._aux_kinds:
            told, was = (", ".join(map(_told, some)) for some in (aux.kinds, self._aux_kinds))
            raise ValueError(f"score_mod_aux is ({told}), but when planned was ({was})")
        lengths = (q_offset, seqused_q, seqused_k)
        for name, length, given in zip(_LENGTHS, lengths, self._lengths_given, strict=True):
            if (length is not None) != given:
                one, other = ("given", "not given") if given else ("not given", "given")
                raise ValueError(f"{name} is {other}, but when planned was {one}")
        if self._score_mod is not None and _computes(self._score_mod) != self._computes:
            raise ValueError("score_mod, or a number that it reads, was another one when planned")
        return self.run(operands, lengths, addresses, aux, number)

    def run(
        self,
        operands: tuple[Any, ...],
        lengths: tuple[Any, Any, Any],
        addresses: dict[str, int],
        aux: Aux,
        stream: int,
    ) -> Any:
        """Compute a call of this kind; ``operands`` are its arrays, in the order of the names."""
        addresses |= aux.addresses
        in_host = aux.in_host
        if any(self._lengths_given):
            resolved = make_lengths(*lengths, *self._seqlens)
            if self._prepared is not None:
                in_host = in_host | self._prepared.tables(resolved)
        q, out, lse = operands[0], operands[-1], None
        if out is None:
            out = arrays.empty_like(q, self._out_shape, self._out_dtype)
            addresses["out"] = arrays.address_of(out, stream)
        elif self._may_overlap(addresses):
            _check_overlap(operands, aux, stream)
        if self._lse_shape is not None:
            lse = arrays.empty_like(q, self._lse_shape, self._lse_dtype)
            addresses["lse"] = arrays.address_of(lse, stream)
        if self._prepared is not None:
            with self._prepared.where.current():
                self._prepared.run(addresses, stream, in_host)
        return out if lse is None else (out, lse)

    def _may_overlap(self, addresses: dict[str, int]) -> bool:
        low, high = self._reach["out"]
        start, end = addresses["out"] + low, addresses["out"] + high
        for name, address in addresses.items():
            low, high = self._reach[name]
            if name != "out" and address + low < end and start < address + high:
                return True
        return False


def _check_overlap(operands: tuple[Any, ...], aux: Aux, stream: int) -> None:
    given = dict(zip(_OPERANDS, operands, strict=True)) | aux.on_gpu
    shadows = {
        name: arrays.view(name, array, stream).shadow
        for name, array in given.items()
        if array is not None
    }
    out = shadows.pop("out")
    checks.output(out, out.shape, out.dtype, {**shadows})


def _described(operands: tuple[Any, ...], stream: int) -> tuple[list[Kind | None], dict[str, int]]:
    """Return the kinds of a call's arrays, and their addresses by the kernels' names."""
    kinds: list[Kind | None] = []
    addresses: dict[str, int] = {}
    for (name, kernel_name), array in zip(_NAMES, operands, strict=True):
        if array is None:
            kinds.append(None)
        else:
            kind, addresses[kernel_name] = arrays.described(name, array, stream)
            kinds.append(kind)
    return kinds, addresses


def _aux_name(i: int) -> str:
    return f"score_mod_aux_{i}"


def _named_aux(aux: Any) -> list[tuple[str, Any]]:
    return [(f"score_mod_aux[{i}]", array) for i, array in enumerate(aux)]


def _view_aux(name: str, array: Any, stream: int) -> View:
    """View an array of the score_mod: where it lies, or in C order from host memory."""
    if arrays.on_gpu(array):
        return arrays.view(name, array, stream)
    return View(np.asarray(checks.plain_array(name, array), order="C"), None, array)


def _aux_of(aux: Any, stream: int) -> Aux:
    """Describe the arrays of the score_mod."""
    if type(aux) is tuple and not aux:
        return _NO_AUX
    found = Aux([], {}, {}, {})
    for i, (name, array) in enumerate(_named_aux(aux) if isinstance(aux, (tuple, list)) else ()):
        if arrays.on_gpu(array):
            found.on_gpu[name] = array
            kind, found.addresses[_aux_name(i)] = arrays.described(name, array, stream)
        else:
            held = found.in_host[_aux_name(i)] = _view_aux(name, array, stream).shadow
            kind = (held.shape, held.strides, held.dtype, None, 0)
        found.kinds.append(kind)
    return found


_NO_AUX = Aux([], {}, {}, {})


def _computes(score_mod: Any) -> Any:
    """Return all that the results of a score_mod depend on; None without one."""
    plain = plain_function(score_mod)
    return None if plain is None else fingerprint(plain, "score_mod")


def _told(kind: Kind | None) -> str:
    if kind is None:
        return "not given"
    shape, strides, dtype, device, rest = kind
    if device is None:
        return f"an array of dtype {dtype} and shape {shape} in host memory"
    return (
        f"an array of dtype {dtype}, shape {tuple(shape)} and strides {tuple(strides)} on device "
        f"{device}, {rest} bytes past a multiple of {arrays.ALIGNED}"
    )


def _reach(shadow: Array) -> tuple[int, int]:
    """Return from where to where the bytes of an array lie, relative to its first element."""
    low, high = np.lib.array_utils.byte_bounds(shadow)
    first: int = shadow.__array_interface__["data"][0]
    return int(low) - first, int(high) - first


_plans: dict[Any, DevicePlan] = {}
_lock = threading.Lock()


def _operands_of(call: Any) -> tuple[Any, ...]:
    return (*call[:3], call.mask, call.bias, call.alibi_slopes, call.sinks, call.out)


def run(call: Any) -> Any:
    """Compute a call of `attention` whose arrays lie on a GPU, by the plan of its kind."""
    stream = arrays.stream_of(call.q, call.stream)
    operands = _operands_of(call)
    kinds, addresses = _described(operands, stream)
    aux = _aux_of(call.score_mod_aux, stream)
    key = _key(call, [*kinds, *aux.kinds])
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument without a hash, such as a list: a check will name it
        key = plan = None
    if plan is None:
        plan = DevicePlan(call)
        if key is not None:
            with _lock:
                while len(_plans) >= CAPACITY:
                    del _plans[next(iter(_plans))]
                _plans[key] = plan
    lengths = (call.q_offset, call.seqused_q, call.seqused_k)
    return plan.run(operands, lengths, addresses, aux, stream)


def _key(call: Any, kinds: list[Any]) -> Any:
    """All that decides how a call is run but its lengths, of which counts which are given."""
    # Not the score_mod counts but what it computes, which follows the globals that it reads; a
    # block mask itself, because what it holds never changes.
    computes = _computes(call.score_mod)
    if computes is None and call.score_mod is not None:
        return None  # no function: a check will name it
    # Types stand beside values because 1 == True == 1.0, and not all of them are accepted.
    options = (
        *(call.scale, call.causal, call.window_size, call.softcap, call.dropout_p, call.seed),
        *(call.layout, call.return_lse, call.out_dtype, call.backend, type(call.score_mod_aux)),
        *(computes, call.block_mask, call.q_offset is None),
        *(call.seqused_q is None, call.seqused_k is None),
    )
    return (*kinds, *options, *map(type, options), *map(type, call.window_size or ()))


def _dense_out(problem: AttentionProblem) -> Array:
    """An output as the caller's library will lay it out; only shape and strides are read."""
    flat = np.broadcast_to(np.zeros((), problem.out_dtype), problem.out_shape)
    shape = problem.restore(flat).shape
    strides = arrays.dense_strides(shape, problem.out_dtype.itemsize)
    # Any address that is as well aligned as new memory.
    return problem.restore(arrays.placed(4096, shape, strides, problem.out_dtype))
