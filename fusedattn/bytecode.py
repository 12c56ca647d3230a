"""What the bytecode of a function says: the names that it reads, and what no kernel can do."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

# Code objects to remember.
_CAPACITY = 4096
# Instructions that read a name from outside.
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
# Instructions that a compiled kernel has no equivalent of, and what a function does by them.
_REFUSED = {
    "RAISE_VARARGS": "raises an exception or asserts",
    "YIELD_VALUE": "is a generator",
    "STORE_GLOBAL": "assigns to a global variable",
    "IMPORT_NAME": "imports a module",
}


class CodeFacts(NamedTuple):
    """What one look at the bytecode says."""

    code: CodeType
    names: tuple[tuple[str, tuple[str, ...]], ...]  # read from outside, with attributes in turn
    refused: str | None  # what it does that no kernel can


_facts: dict[int, CodeFacts] = {}


def facts_of(code: CodeType) -> CodeFacts:
    """Return what the bytecode says, remembered for each code object."""
    known = _facts.get(id(code))
    if known is not None and known.code is code:
        return known
    names: dict[tuple[str, tuple[str, ...]], None] = {}
    refused = None
    for instruction, attributes in _instructions(code):
        if instruction.opname in _NAMES and instruction.argval not in code.co_cellvars:
            names[(str(instruction.argval), attributes)] = None
        refused = refused or _REFUSED.get(instruction.opname)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = facts_of(constant)
            refused = refused or inner.refused
            own = code.co_cellvars
            names |= dict.fromkeys(path for path in inner.names if path[0] not in own)
    if len(_facts) >= _CAPACITY:
        _facts.clear()
    facts = _facts[id(code)] = CodeFacts(code, tuple(names), refused)
    return facts


def _instructions(code: CodeType) -> Iterator[tuple[dis.Instruction, tuple[str, ...]]]:
    """Walk over the instructions, each with the attributes that are taken from its result."""
    listed = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "PUSH_NULL")]
    for i, instruction in enumerate(listed):
        attributes = []
        for following in listed[i + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            attributes.append(str(following.argval))
        yield instruction, tuple(attributes)
