"""Planted mutants: attention functions with one mistake each, of the kinds the field has made."""

from kit_mutants import arithmetic, functions, positions, state  # noqa: F401  (each plants its own)
from kit_mutants.registry import MUTANTS

__all__ = ["MUTANTS"]
