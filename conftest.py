"""Doctests of what is around optional packages are collected where those are installed."""

import gc
import os
from importlib.util import find_spec

# Before NumPy is loaded, here and by workers: their small products gain nothing from threads of
# BLAS, which spin while they wait and take a processor from the other worker.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

collect_ignore = [
    f"fusedattn/interop/{name}.py" for name in ("torch", "jax") if find_spec(name) is None
]


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end, and much of what compilers build."""
    gc.freeze()
    gc.set_threshold(5000)
