"""The text: Python's standard library, which is wherever Python is.

Characters are bytes of ASCII; everything else becomes a question mark. Every tenth module is kept
for validation, so that no sentence of it has been seen in training.
"""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint8]
UNKNOWN = b"?"


class Corpus(NamedTuple):
    """Texts as indices into `alphabet`, which holds the characters of the training text."""

    alphabet: bytes
    training: Tokens
    validation: Tokens

    def encode(self, text: str) -> Tokens:
        """Turn text into indices; a character that is not in the alphabet becomes a `?`."""
        return index_of(self.alphabet)[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]

    def decode(self, tokens: Tokens) -> str:
        """Turn indices into text."""
        return np.frombuffer(self.alphabet, np.uint8)[tokens].tobytes().decode("ascii")


def index_of(alphabet: bytes) -> Tokens:
    """Return for each of 256 bytes its place in the alphabet."""
    table = np.full(256, alphabet.index(UNKNOWN), np.uint8)
    table[np.frombuffer(alphabet, np.uint8)] = np.arange(len(alphabet))
    return table


def modules(folder: Path | None = None) -> list[Path]:
    """Return the modules at the top of the standard library, in the order of their names."""
    return sorted((folder or Path(sysconfig.get_path("stdlib"))).glob("*.py"))


def standard_library(folder: Path | None = None, every: int = 10) -> Corpus:
    """Read the modules; each `every`-th is for validation."""
    texts = [
        path.read_text("utf-8", "replace").encode("ascii", "replace") for path in modules(folder)
    ]
    held_out = b"\n".join(texts[every - 1 :: every])
    del texts[every - 1 :: every]
    training = b"\n".join(texts)
    alphabet = bytes(sorted(set(training) | set(UNKNOWN)))
    table = index_of(alphabet)
    both = (table[np.frombuffer(text, np.uint8)] for text in (training, held_out))
    return Corpus(alphabet, *both)


def windows(tokens: Tokens, starts: NDArray[np.int64], length: int) -> tuple[Tokens, Tokens]:
    """Cut pieces of a text, (len(starts), length), and the characters that come next."""
    places = starts[:, None] + np.arange(length)
    return tokens[places], tokens[places + 1]


def spread(tokens: Tokens, count: int, length: int) -> NDArray[np.int64]:
    """Return starts of pieces without overlap, evenly spread over a text: `count`, or all.

    There is a character before each piece, and one after.
    """
    pieces = (len(tokens) - 2) // length
    return 1 + np.linspace(0, pieces - 1, min(count, pieces)).astype(np.int64) * length
