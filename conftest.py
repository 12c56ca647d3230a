"""Doctests of what is around optional packages are collected where those are installed."""

from importlib.util import find_spec

collect_ignore = [
    f"fusedattn/interop/{name}.py" for name in ("torch", "jax") if find_spec(name) is None
]
