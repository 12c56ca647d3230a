"""Numba's CUDA simulator, behind the methods of a toolchain: kernels are plain Python."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusedattn.cuda.inline import Block, Op
from fusedattn.cuda.tables import Kind
from fusedattn.cuda.toolchains import SIMULATOR
from fusedattn.undisturbed import undisturbed

# The simulator's module: while a kernel runs, Numba puts another in the place of this global.
_simulated: Any = None


class _Allocations(dict[Any, Any]):
    """Shared arrays by place of definition: one for all threads of a block.

    Numba asks for an array with `get` and enters a new one where there is none. Between the two
    another thread may do the same, and would be left with an array of its own; here it waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def get(self, key: Any, default: Any = None) -> Any:
        """Return an array, or None to the one thread that is to enter it."""
        self._lock.acquire()
        found = super().get(key, default)
        if found is not None:
            self._lock.release()
        return found

    def __setitem__(self, key: Any, array: Any) -> None:
        super().__setitem__(key, array)
        self._lock.release()


_preparing = threading.Lock()


class _Simulated:
    """Looks up each name in the module that is in place just now."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(_simulated, name)
        if name == "shared":
            with _preparing:
                if type(found._allocations) is dict:  # of a block that begins
                    found._allocations = _Allocations()
        return found


class Simulator:
    """Numba's CUDA simulator: kernels are plain Python, threads are threads."""

    name = SIMULATOR
    interprets = True
    cuda: Any
    types: Any

    def __init__(self) -> None:
        import numba
        from numba.core import config

        before = os.environ.get("NUMBA_ENABLE_CUDASIM")
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # read when numba.cuda is imported, and no later
        config.ENABLE_CUDASIM = True  # type: ignore[attr-defined]
        try:
            cuda = undisturbed(importlib.import_module, "numba.cuda")
        finally:
            del os.environ["NUMBA_ENABLE_CUDASIM"]
            if before is not None:
                os.environ["NUMBA_ENABLE_CUDASIM"] = before
        if not hasattr(cuda, "simulator"):
            raise RuntimeError(
                "numba.cuda was imported without its simulator; set NUMBA_ENABLE_CUDASIM=1 first"
            )
        global _simulated
        _simulated = cuda
        self.cuda, self.types = _Simulated(), numba.types

    def device(self, function: Callable[..., Any], **uses: Any) -> Any:
        """Return the function: threads call it as it is."""
        return function

    @staticmethod
    @contextlib.contextmanager
    def awake() -> Iterator[None]:
        """Let threads take turns quickly: the simulator polls while it waits for its threads."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(5e-5)
        try:
            yield
        finally:
            sys.setswitchinterval(before)

    @staticmethod
    def quiet(kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Let the threads of a kernel compute without floating-point warnings, as GPUs do."""

        def quietly(*arguments: Any) -> None:
            with np.errstate(all="ignore"):
                kernel(*arguments)

        return quietly

    def conversions(self) -> dict[str, Any]:
        """Conversions of NumPy scalars."""

        def half_to_float(bits: Any) -> Any:
            return np.float32(np.uint16(bits).view(np.float16))

        def float_to_half(x: Any) -> Any:
            return np.float32(x).astype(np.float16).view(np.uint16)

        return {
            "float_as_int": lambda x: int(np.float32(x).view(np.int32)),
            "int_as_float": lambda n: np.uint32(int(n) & 0xFFFFFFFF).view(np.float32),
            "half_to_float": half_to_float,
            "float_to_half": float_to_half,
        }

    def asm(self, op: Op | Block) -> Any:
        """Refuse: nothing interprets PTX here."""
        raise NotImplementedError("the simulator runs no PTX")

    def ltoir(self, function: Any, signature: Any, chip: str, threads: int) -> bytes:
        """Refuse: nothing is compiled here."""
        raise NotImplementedError("the simulator compiles nothing")

    def array_words(self, address: int, length: int, itemsize: int) -> tuple[int, ...]:
        """Refuse: the simulator takes arrays themselves."""
        raise NotImplementedError("the simulator takes NumPy arrays")

    def table(self, kind: Kind, real: Any) -> Any:
        """Hand on a `tables.HostTable`."""
        return lambda table, *words: table

    def table_type(self, kind: Kind, real: Any) -> Any:
        """Refuse: nothing is compiled here."""
        raise NotImplementedError("the simulator compiles nothing")

    def result_of(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Refuse: nothing is compiled here."""
        raise NotImplementedError("the simulator compiles nothing")
