"""Inline PTX as data: what every toolchain turns into its own kind of inline assembly."""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    """One instruction (or a few) of inline PTX on scalars.

    ``text`` names its operands ``$0``, ``$1``, ... with the result, if any, first. ``result`` and
    ``arguments`` hold one letter each: ``f`` float32, ``r`` int32, ``l`` int64.
    """

    text: str
    result: str = ""
    arguments: str = ""


class Block(NamedTuple):
    """Inline PTX on whole local arrays, which become registers, and on scalars after them.

    ``arrays`` says ``(letter, length, written)`` of each; a written one is also read. ``text`` is
    made by `fusedattn.cuda.ptx` with the operand numbers of `operands`.
    """

    text: str
    arrays: tuple[tuple[str, int, bool], ...]
    scalars: str = ""

    @staticmethod
    def operands(
        arrays: tuple[tuple[str, int, bool], ...], scalars: str
    ) -> tuple[list[list[str]], list[str]]:
        """Return the names of the operands: of each array's elements, and of the scalars."""
        names: list[list[str]] = [[] for _ in arrays]
        count = 0
        for index, (_, length, written) in enumerate(arrays):
            if written:
                names[index] = [f"${count + i}" for i in range(length)]
                count += length
        count *= 2  # every written element is an operand again, as an input
        for index, (_, length, written) in enumerate(arrays):
            if not written:
                names[index] = [f"${count + i}" for i in range(length)]
                count += length
        return names, [f"${count + i}" for i in range(len(scalars))]


def constraints_of(op: Op | Block) -> str:
    """LLVM's constraint string; other memory may be read or written by any of them."""
    if isinstance(op, Op):
        parts = [f"={op.result}"] if op.result else []
        parts += op.arguments
    else:
        written = [letter for letter, length, out in op.arrays if out for _ in range(length)]
        read = [letter for letter, length, out in op.arrays if not out for _ in range(length)]
        parts = [f"={letter}" for letter in written]
        parts += [str(i) for i in range(len(written))] + read + list(op.scalars)
    return ",".join([*parts, "~{memory}"])
