"""Exact fused attention for NumPy people."""

__version__ = "0.1.0"
