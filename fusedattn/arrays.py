"""Arrays in the memory of a GPU, in and out: DLPack, ``__cuda_array_interface__``, torch.

Such an array becomes an ndarray that says where it lies and how, so that one validation serves both
kinds of memory; its elements are never touched from Python. Results come in the caller's own kind,
on the stream that the caller's library works on.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn import checks, dispatch
from fusedattn.problem import AttentionProblem

Array = NDArray[Any]

_FIELDS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "out")
# DLPack's numbers of memory on a GPU, and its dtypes by (code, bits).
_ON_GPU = 2
_DTYPES = {
    (2, 16): np.dtype(np.float16),
    (2, 32): np.dtype(np.float32),
    (2, 64): np.dtype(np.float64),
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(np.bool_),
}
# Kinds of calls to remember, each with its prepared launch.
CAPACITY = 256


class View(NamedTuple):
    """What is known about an array on a GPU."""

    shadow: Array  # shape, strides, dtype and address; not to be read
    device: int
    keep: Any  # holds on to the memory


class _Where:
    """What NumPy asks of an object that lends it memory."""

    def __init__(self, address: int, shape: Any, strides: Any, dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": tuple(shape),
            "strides": tuple(strides),
            "typestr": dtype.str if dtype.kind != "V" else "<u2",
        }


def _shadow(address: int, shape: Any, strides: Any, dtype: np.dtype[Any]) -> Array:
    # NumPy wants an address even for nothing.
    array = np.asarray(_Where(address or 16, shape, strides, dtype))
    return array if array.dtype == dtype else array.view(dtype)


def on_gpu(array: object) -> bool:
    """Whether an object is an array in the memory of a GPU."""
    if type(array) is np.ndarray:
        return False
    if _library(array) == "torch":
        return bool(array.is_cuda)  # type: ignore[attr-defined]
    if hasattr(array, "__cuda_array_interface__"):
        return True
    where = getattr(array, "__dlpack_device__", None)
    return where is not None and int(where()[0]) == _ON_GPU


def _library(array: object) -> str:
    return type(array).__module__.partition(".")[0]


def view(name: str, array: Any, stream: int) -> View:
    """View an array on a GPU; work on ``stream`` is ordered after what its owner began."""
    library = _library(array)
    if library == "torch":
        return _view_torch(array)
    if hasattr(array, "__dlpack__"):
        return _view_dlpack(array, stream)
    if hasattr(array, "__cuda_array_interface__"):
        return _view_interface(array)
    raise TypeError(
        f"{name} must lie in the memory of a GPU as q does, but is {checks.describe(array)}"
    )


def _view_torch(array: Any) -> View:
    dtype = _torch_dtypes()[array.dtype]
    size = dtype.itemsize
    strides = [step * size for step in array.stride()]
    shadow = _shadow(array.data_ptr(), array.shape, strides, dtype)
    return View(shadow, array.device.index or 0, array)


def _torch_dtypes() -> dict[Any, np.dtype[Any]]:
    global _torch
    if _torch is None:
        torch = sys.modules["torch"]
        names = ("float16", "bfloat16", "float32", "float64", "bool")
        _torch = {getattr(torch, name): np.dtype(name) for name in names}
    return _torch


_torch: dict[Any, np.dtype[Any]] | None = None


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, as the first member of its managed tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _view_dlpack(array: Any, stream: int) -> View:
    # Stream 0 is ambiguous in the protocol; 1 names the legacy default stream.
    capsule = array.__dlpack__(stream=stream or 1)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    dtype = _DTYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise TypeError(f"an array must have dtype {checks.FLOAT_NAMES}, but is {array.dtype}")
    shape = tensor.shape[: tensor.ndim]
    if tensor.strides:
        strides = [step * dtype.itemsize for step in tensor.strides[: tensor.ndim]]
    else:
        strides = list(np.empty((0, *shape[1:]), dtype).strides) if shape else []
    address = (tensor.data or 0) + tensor.byte_offset
    # The capsule is not consumed: it goes back to its maker, who keeps the memory meanwhile.
    return View(_shadow(address, shape, strides, dtype), tensor.device_id, (capsule, array))


def _view_interface(array: Any) -> View:
    said = array.__cuda_array_interface__
    dtype = np.dtype(said["typestr"])
    shape = said["shape"]
    strides = said.get("strides") or np.empty((0, *shape[1:]), dtype).strides
    device = getattr(getattr(array, "device", None), "id", 0)
    return View(_shadow(said["data"][0], shape, strides, dtype), device, array)


def stream_of(array: Any, given: Any = None) -> int:
    """Return the stream to work on: the one given, else the current one of the array's library."""
    if given is not None:
        for name in ("cuda_stream", "ptr", "handle"):
            given = getattr(given, name, given)
        return int(getattr(given, "value", given) or 0)
    library = _library(array)
    if library == "torch":
        stream: int = sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
        return stream
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    said = getattr(array, "__cuda_array_interface__", {})
    return int(said.get("stream") or 0)


def empty_like(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return new memory in the kind of an array, on its GPU.

    Raises
    ------
    TypeError
        If the array's library is not one of CuPy, torch and Numba.
    """
    library = _library(array)
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=array.device)
    if library == "cupy":
        cupy = sys.modules["cupy"]
        with array.device:
            return cupy.empty(shape, dtype)
    if library in ("numba", "numba_cuda_mlir"):
        cuda = importlib.import_module(f"{library}.cuda")
        return cuda.device_array(shape, dtype)
    raise TypeError(
        f"q must be an array of CuPy, torch or Numba, or out be given, but is "
        f"{checks.describe(array)}"
    )


class _Known(NamedTuple):
    """A kind of call that was checked and prepared."""

    head_dim_v: int
    out_dtype: np.dtype[Any]
    lse_shape: tuple[int, ...] | None
    lse_dtype: np.dtype[Any]
    prepared: Any  # None where there is nothing to compute


_known: dict[Any, _Known] = {}
_lock = threading.Lock()
_KERNEL_NAMES = {"alibi_slopes": "slopes"}
_POSITIONS = tuple((name, _KERNEL_NAMES.get(name, name)) for name in _FIELDS)


def run(call: Any) -> Any:
    """Compute a call of `attention` whose arrays lie on a GPU; see there."""
    if call.backend not in (None, "cuda"):
        dispatch.load(call.backend)
        raise NotImplementedError(
            f"backend {call.backend!r} takes arrays in host memory, but q lies on a GPU"
        )
    for name in ("score_mod", "block_mask"):
        if getattr(call, name) is not None:  # before anybody reads what it carries along
            raise NotImplementedError(
                f"backend 'cuda' not able to run this: no {name} on a GPU yet"
            )
    number = stream_of(call.q, call.stream)
    kinds: list[Any] = []
    addresses: dict[str, int] = {}
    views: dict[str, View] = {}
    for name, kernel_name in _POSITIONS:
        array = getattr(call, name)
        if array is None:
            kinds.append(None)
        elif _library(array) == "torch":
            address = addresses[kernel_name] = array.data_ptr()
            kinds.append(
                (array.shape, array.stride(), array.dtype, array.device.index, address % 16)
            )
        else:
            seen = views[name] = view(name, array, number)
            address = addresses[kernel_name] = _address(seen.shadow)
            shadow = seen.shadow
            kinds.append((shadow.shape, shadow.strides, shadow.dtype, seen.device, address % 16))
    known = None
    key = _key(call, kinds)
    if key is not None:
        known = _known.get(key)
    if known is not None and call.out is not None:  # what it overlaps with may be new
        shadows = {
            name: view(name, array, number).shadow
            for name in _FIELDS
            if (array := getattr(call, name)) is not None
        }
        out = shadows.pop("out")
        checks.output(out, out.shape, out.dtype, {**shadows})
    if known is None:
        known = _prepare(call, number, views)
        if key is not None:
            with _lock:
                while len(_known) >= CAPACITY:
                    del _known[next(iter(_known))]
                _known[key] = known
    return _launch(call, known, addresses, number)


def _launch(call: Any, known: _Known, addresses: dict[str, int], stream: int) -> Any:
    out, lse = call.out, None
    if out is None:
        out = empty_like(call.q, (*call.q.shape[:-1], known.head_dim_v), known.out_dtype)
        addresses["out"] = _address_of(out, stream)
    if known.lse_shape is not None:
        lse = empty_like(call.q, known.lse_shape, known.lse_dtype)
        addresses["lse"] = _address_of(lse, stream)
    if known.prepared is not None:
        with known.prepared.where.current():
            known.prepared.run(addresses, stream)
    return out if lse is None else (out, lse)


def _address(shadow: Array) -> int:
    address: int = shadow.__array_interface__["data"][0]
    return address


def _address_of(array: Any, stream: int) -> int:
    if _library(array) == "torch":
        address: int = array.data_ptr()
        return address
    return _address(view("out", array, stream).shadow)


def _key(call: Any, kinds: list[Any]) -> Any:
    """All that decides how a call is run; None where contents of other arrays decide too."""
    if not (call.q_offset is call.seqused_q is call.seqused_k is None):
        return None
    options = (
        *(call.scale, call.causal, call.window_size, call.softcap, call.dropout_p, call.seed),
        *(call.layout, call.return_lse, call.out_dtype, call.score_mod_aux),
    )
    # Types stand beside values because 1 == True == 1.0, and not all of them are accepted.
    key = (*kinds, *options, *map(type, options), *map(type, call.window_size or ()))
    try:
        hash(key)
    except TypeError:  # an argument without a hash, such as a list: a check will name it
        return None
    return key


def _prepare(call: Any, stream: int, views: dict[str, View]) -> _Known:
    """Check a call and prepare its launch."""
    for name in _FIELDS:
        array = getattr(call, name)
        if array is not None and name not in views:
            views[name] = view(name, array, stream)
    shadows = {name: seen.shadow for name, seen in views.items()}
    call = call._replace(stream=None, **shadows)
    devices = {name: seen.device for name, seen in views.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all arrays must lie on one GPU, but lie on {devices}")
    problem = call.problem()
    backend: Any = dispatch.choose(problem, "cuda")
    reasons = backend.unsuitable(problem)
    if reasons:
        raise NotImplementedError(f"backend 'cuda' not able to run this: {'; '.join(reasons)}")
    if problem.out is None:
        problem = replace(problem, out=_dense_out(problem))
    prepared = None
    if math.prod(problem.out_shape):
        prepared = backend.prepare_on(problem, devices["q"])
    lse_shape = problem.lse_shape if problem.return_lse else None
    return _Known(problem.head_dim_v, problem.out_dtype, lse_shape, problem.accumulator, prepared)


def _dense_out(problem: AttentionProblem) -> Array:
    """An output as the caller's library will lay it out; only shape and strides are read."""
    flat = np.broadcast_to(np.zeros((), problem.out_dtype), problem.out_shape)
    shape = problem.restore(flat).shape
    strides = [problem.out_dtype.itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    # Any address that is as well aligned as new memory.
    return problem.restore(_shadow(4096, shape, strides, problem.out_dtype))
