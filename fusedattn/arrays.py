"""Arrays in the memory of a GPU, in and out: DLPack, ``__cuda_array_interface__``, torch.

Such an array becomes an ndarray that says where it lies and how, so that one validation serves both
kinds of memory; its elements are never touched from Python. Results come in the caller's own kind,
on the stream that the caller's library works on.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusedattn import checks

Array = NDArray[Any]
# Shape, strides, dtype, GPU, and the address modulo `ALIGNED`.
Kind = tuple[Any, Any, Any, Any, int]

# What the widest loads of kernels ask of an address.
ALIGNED = 16
# DLPack's numbers of memory on a GPU, and its dtypes by (code, bits).
_ON_GPU = 2
_DTYPES = {
    (2, 16): np.dtype(np.float16),
    (2, 32): np.dtype(np.float32),
    (2, 64): np.dtype(np.float64),
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(np.bool_),
    **{(0, bits): np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{(1, bits): np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


class View(NamedTuple):
    """What is known about an array on a GPU."""

    shadow: Array  # shape, strides, dtype and address; not to be read
    device: int | None  # None: an array in host memory, which may be read
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


def dense_strides(shape: Any, itemsize: int) -> list[int]:
    """Return the strides of an array in C order."""
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return strides[: len(shape)]


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
    kind: Any = type(array)
    return _library_of(kind)


@functools.cache
def _library_of(kind: Any) -> str:
    module: str = kind.__module__
    return module.partition(".")[0]


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
    dtype = _torch_dtypes().get(array.dtype)
    if dtype is None:
        raise TypeError(f"an array must have dtype {checks.FLOAT_NAMES}, but is {array.dtype}")
    size = dtype.itemsize
    strides = [step * size for step in array.stride()]
    shadow = _shadow(array.data_ptr(), array.shape, strides, dtype)
    return View(shadow, array.device.index or 0, array)


def _torch_dtypes() -> dict[Any, np.dtype[Any]]:
    global _torch
    if _torch is None:
        torch = sys.modules["torch"]
        known = {dtype.name: dtype for dtype in _DTYPES.values()}
        _torch = {getattr(torch, n): dtype for n, dtype in known.items() if hasattr(torch, n)}
    return _torch


_torch: dict[Any, np.dtype[Any]] | None = None


@functools.cache
def _torch_dtype(dtype: np.dtype[Any]) -> Any:
    # Asked for at every call, and the name of a dtype is made anew each time.
    return getattr(sys.modules["torch"], dtype.name)


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
        strides = dense_strides(shape, dtype.itemsize)
    address = (tensor.data or 0) + tensor.byte_offset
    # The capsule is not consumed: it goes back to its maker, who keeps the memory meanwhile.
    return View(_shadow(address, shape, strides, dtype), tensor.device_id, (capsule, array))


def _view_interface(array: Any) -> View:
    said = array.__cuda_array_interface__
    dtype = np.dtype(said["typestr"])
    shape = said["shape"]
    strides = said.get("strides") or dense_strides(shape, dtype.itemsize)
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
        return _torch_stream(array.device.index)
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    said = getattr(array, "__cuda_array_interface__", {})
    return int(said.get("stream") or 0)


def _torch_stream(device: int) -> int:
    torch = sys.modules["torch"]
    # What compiled kernels of torch ask: the number alone, without an object around it.
    ask = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    stream: int = ask(device) if ask else torch.cuda.current_stream(device).cuda_stream
    return stream


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
        return torch.empty(shape, dtype=_torch_dtype(dtype), device=array.device)
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


def address_of(array: Any, stream: int) -> int:
    """Return the address of an array's first element."""
    if _library(array) == "torch":
        address: int = array.data_ptr()
        return address
    return _address(view("out", array, stream).shadow)


def described(name: str, array: Any, stream: int) -> tuple[Kind, int]:
    """Return all about an array but its contents and its memory, and where that begins."""
    if _library(array) == "torch":
        address = array.data_ptr()
        kind = (array.shape, array.stride(), array.dtype, array.device, address % ALIGNED)
        return kind, address
    seen = view(name, array, stream)
    address = _address(seen.shadow)
    shadow = seen.shadow
    return (shadow.shape, shadow.strides, shadow.dtype, seen.device, address % ALIGNED), address


def _address(shadow: Array) -> int:
    address: int = shadow.__array_interface__["data"][0]
    return address


def placed(address: int, shape: Any, strides: Any, dtype: np.dtype[Any]) -> Array:
    """Return an ndarray that says where elements lie, on whatever device; not to be read."""
    return _shadow(address, shape, strides, dtype)
