"""The driver: which GPUs there are, their memory, and starting kernels, through cuda-bindings.

Everything runs in the primary context of a device, which CuPy, torch and Numba use as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from fusedattn.cuda.compiler import Compiled

# Shared memory that a kernel gets without asking.
STATIC_SHARED = 48 * 1024
# Scratch memory that a GPU keeps for the next call: to map it anew costs more than a decode.
_KEPT = 256 * 2**20


@functools.cache
def api() -> Any:
    """cuda-bindings' driver module."""
    from cuda.bindings import driver

    return driver


def check(result: tuple[Any, ...]) -> Any:
    """Return what a driver call returned, or raise with the driver's name for the error."""
    error, *values = result
    if int(error):
        _, name = api().cuGetErrorName(error)
        _, text = api().cuGetErrorString(error)
        words = [part.decode() if part else "unknown" for part in (name, text)]
        raise RuntimeError(f"CUDA: {words[0]} ({words[1]})")
    return values[0] if values else None


@functools.cache
def library() -> ctypes.CDLL:
    """Return the driver itself, for what each launch calls: without cuda-bindings' objects."""
    loaded = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    loaded.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    loaded.cuMemAllocFromPoolAsync.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p),
    ]
    loaded.cuMemFreeAsync.argtypes = [ctypes.c_uint64, ctypes.c_void_p]
    return loaded


@functools.cache
def missing() -> tuple[str, ...]:
    """Reasons why no kernel can be started here; empty if one can."""
    try:
        error, *_ = api().cuInit(0)
    except ImportError:
        return ("the package cuda-bindings is not installed (pip install 'fusedattn[cuda]')",)
    except RuntimeError:  # cuda-bindings raises subclasses of its own
        return ("no NVIDIA driver is installed (libcuda could not be loaded)",)
    if int(error):
        _, name = api().cuGetErrorName(error)
        return (f"the NVIDIA driver does not start ({name.decode()})",)
    if not check(api().cuDeviceGetCount()):
        return ("there is no NVIDIA GPU",)
    return ()


class Device:
    """One GPU and its primary context."""

    def __init__(self, ordinal: int) -> None:
        driver = api()
        check(driver.cuInit(0))
        self.ordinal = ordinal
        self.handle = check(driver.cuDeviceGet(ordinal))
        attribute = driver.CUdevice_attribute
        self.major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        self.minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.multiprocessors = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.context = check(driver.cuDevicePrimaryCtxRetain(self.handle))
        self._context = int(self.context)
        # Without pools (some virtual GPUs) there is no scratch memory.
        self.has_pools = bool(self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED))
        self._pool: Any = None
        self._functions: dict[Any, Function] = {}
        self._lock = threading.Lock()

    def _attribute(self, which: Any) -> int:
        return int(check(api().cuDeviceGetAttribute(which, self.handle)))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        return self.major, self.minor

    @property
    def chip(self) -> str:
        """Name of the chip for compilers; on Hopper with the instructions of that chip alone."""
        return f"sm_{self.major}{self.minor}" + ("a" if self.capability == (9, 0) else "")

    @property
    def pool(self) -> Any:
        """The pool that scratch memory comes from; its context has to be current."""
        if self._pool is None:
            with self._lock:
                if self._pool is None:
                    self._pool = self._make_pool()
        return self._pool

    def _make_pool(self) -> Any:
        driver = api()
        asked = driver.CUmemPoolProps()
        asked.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        asked.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        asked.location.id = self.ordinal
        pool = check(driver.cuMemPoolCreate(asked))
        threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        check(driver.cuMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(_KEPT)))
        return pool

    def current(self) -> _Current:
        """Return what makes the context current on this thread for a while, if it is not."""
        return _Current(self.context, self._context)

    def function(self, key: Any, compiled: Any, shared: int = 0) -> Function:
        """Return a kernel loaded on this device; ``compiled()`` is asked for it once."""
        function = self._functions.get(key)
        if function is None:
            code = compiled()
            with self._lock, self.current():
                function = self._functions.get(key)
                if function is None:
                    function = self._functions[key] = Function(code, shared)
        return function


class _Current:
    """Makes a context current while it is entered."""

    __slots__ = ("_address", "_context", "_pushed")

    def __init__(self, context: Any, address: int) -> None:
        self._context, self._address = context, address
        self._pushed = False

    def __enter__(self) -> None:
        now = ctypes.c_void_p()
        library().cuCtxGetCurrent(ctypes.byref(now))
        if now.value != self._address:
            check(api().cuCtxPushCurrent(self._context))
            self._pushed = True

    def __exit__(self, *raised: object) -> None:
        if self._pushed:
            check(api().cuCtxPopCurrent())


@functools.cache
def device(ordinal: int) -> Device:
    """Return a GPU by its number."""
    return Device(ordinal)


class Function:
    """A kernel in the memory of a GPU. Its context has to be current."""

    def __init__(self, compiled: Compiled, shared: int) -> None:
        driver = api()
        self._module = check(driver.cuModuleLoadData(compiled.cubin))
        self.handle = check(driver.cuModuleGetFunction(self._module, compiled.entry.encode()))
        self._address = int(self.handle)
        self.shared = shared
        if shared > STATIC_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self.handle, attribute, shared))

    def launch(
        self, grid: tuple[int, int, int], block: tuple[int, int], stream: int, words: Words
    ) -> None:
        """Start the kernel; its parameters are copied before this returns."""
        config = words.configured(grid, block, self.shared, stream)
        error = library().cuLaunchKernelEx(config, self._address, words.pointers, None)
        _check(error)


class Words:
    """What one launch is given: its parameters, a slot of 8 bytes each, and its configuration.

    Not for several threads at once.
    """

    def __init__(self, formats: str, values: tuple[Any, ...] = ()) -> None:
        self._struct = struct.Struct("<" + "".join(_SLOT_FORMAT[letter] for letter in formats))
        self._buffer = ctypes.create_string_buffer(max(1, self._struct.size))
        base = ctypes.addressof(self._buffer)
        self._list = (ctypes.c_void_p * len(formats))(*[base + 8 * i for i in range(len(formats))])
        self.pointers = ctypes.addressof(self._list)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._config_address = ctypes.addressof(self._config)
        if values:
            self.fill(*values)

    def fill(self, *values: Any) -> Words:
        """Enter the parameters."""
        self._struct.pack_into(self._buffer, 0, *values)
        return self

    def enter(self, first: int, addresses: tuple[int, ...]) -> None:
        """Enter some parameters that are addresses and stand side by side."""
        _addresses(len(addresses)).pack_into(self._buffer, 8 * first, *addresses)

    def configured(
        self, grid: tuple[int, int, int], block: tuple[int, int], shared: int, stream: int
    ) -> int:
        """Enter the configuration, and return its address."""
        _CONFIG.pack_into(self._config, 0, *grid, *block, 1, shared, stream, 0, 0)
        return self._config_address


@functools.cache
def _addresses(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")


# CUlaunchConfig: blocks, threads, bytes of shared memory, stream, no attributes.
_CONFIG = struct.Struct("<7I4xQQI4x")
# q: an address or int64, i: int32, f: float32.
_SLOT_FORMAT = {"q": "q", "i": "i4x", "f": "f4x"}


class Memory:
    """Memory on a GPU that lives as long as this object."""

    def __init__(self, where: Device, size: int) -> None:
        self.where = where
        with where.current():
            self.address = int(check(api().cuMemAlloc(max(1, size))))
        # Not at the end of the interpreter: the driver may be gone, and with it the memory.
        weakref.finalize(self, _free, where, self.address).atexit = False


def _free(where: Device, address: int) -> None:
    with contextlib.suppress(RuntimeError), where.current():
        check(api().cuMemFree(address))


@contextlib.contextmanager
def scratch(where: Device, size: int, stream: int) -> Iterator[int]:
    """Lend memory to what is started on a stream meanwhile; the context is current.

    It is taken and given back in the order of the stream, so two streams never share it.
    """
    driver, address = library(), ctypes.c_uint64()
    pool = int(where.pool)
    _check(driver.cuMemAllocFromPoolAsync(ctypes.byref(address), max(1, size), pool, stream))
    try:
        yield address.value
    finally:
        _check(driver.cuMemFreeAsync(address, stream))


def _check(error: int) -> None:
    if error:
        check((api().CUresult(error),))


@contextlib.contextmanager
def copied(where: Device, array: NDArray[Any], stream: int) -> Iterator[int]:
    """Lend a copy of an array, dense in C order; the array may be written again at once."""
    with scratch(where, array.nbytes, stream) as address:
        if array.nbytes:  # from pageable memory the call returns when all of it is read
            check(api().cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream))
        yield address


@contextlib.contextmanager
def all_copied(
    where: Device, arrays: Mapping[str, NDArray[Any]], stream: int
) -> Iterator[dict[str, int]]:
    """Lend copies of several arrays, by name."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(copied(where, array, stream))
            for name, array in arrays.items()
        }


def upload(where: Device, array: NDArray[Any], stream: int = 0) -> Memory:
    """Copy a contiguous array to a GPU; it may be written again as soon as this returns."""
    memory = Memory(where, array.nbytes)
    if array.nbytes:
        with where.current():
            check(api().cuMemcpyHtoDAsync(memory.address, array.ctypes.data, array.nbytes, stream))
            check(api().cuStreamSynchronize(stream))
    return memory


def download(memory: Memory, array: NDArray[Any]) -> None:
    """Fill a contiguous array from a GPU, after all that was started on the default stream."""
    if array.nbytes:
        with memory.where.current():
            check(api().cuMemcpyDtoH(array.ctypes.data, memory.address, array.nbytes))
