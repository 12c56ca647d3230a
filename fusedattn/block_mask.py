"""Block masks: which blocks of the scores are empty, full or partial.

A `mask_mod` says for each (batch, head, q_idx, k_idx) whether the query sees the key. `BlockMask`
looks at it once, block by block: attention then skips empty blocks, computes full ones without a
mask and asks the function in partial ones only. Where the function does not depend on the batch
item or the head, one entry stands for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import checks
from fusedattn.checks import Array
from fusedattn.functions import UserFunction, rebuilt, user_function
from fusedattn.masks import EDGE, FULL, MAX_SEQLEN, SKIP
from fusedattn.pointwise import evaluate

Kinds = NDArray[np.uint8]
Bool = NDArray[np.bool_]

# Pairs that are looked at together while a mask is built, or one block where that is larger.
_PAIRS = 1 << 17

_SYMBOLS = {SKIP: ".", EDGE: "+", FULL: "#"}
# A drawing has no more columns; a character then stands for several blocks.
_COLUMNS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Predicate:
    """Functions joined by "and", "or" and "not"; a leaf holds one.

    ``by_batch`` and ``by_head`` say whether a leaf is asked about each batch item and head, or
    about the first for all of them.
    """

    operation: str
    parts: tuple[Predicate, ...] = ()
    leaf: UserFunction | None = None
    by_batch: bool = True
    by_head: bool = True

    def leaves(self) -> Iterator[Predicate]:
        """Walk over the functions, from left to right."""
        if self.leaf is not None:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def structure(self) -> tuple[Any, ...]:
        """What compiled code depends on."""
        if self.leaf is not None:
            key = (self.leaf.fingerprint, self.leaf.aux_kinds, self.by_batch, self.by_head)
            return ("leaf", *key)
        return (self.operation, *(part.structure() for part in self.parts))

    def __call__(self, batch: Array, head: Array, row: Array, key: Array) -> Bool:
        """Whether the query sees the key, for each of some pairs."""
        if self.leaf is not None:
            batch = batch if self.by_batch else np.zeros_like(batch)
            head = head if self.by_head else np.zeros_like(head)
            return evaluate(self.leaf, batch, head, row, key)
        first, *others = (part(batch, head, row, key) for part in self.parts)
        if self.operation == "not":
            return ~first
        return first & others[0] if self.operation == "and" else first | others[0]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockMask:
    """Which blocks of the scores are empty, full or partial; made by `make_block_mask`.

    Attributes
    ----------
    kinds : ndarray of uint8, (batch, heads, blocks_q, blocks_k)
        `fusedattn.masks.SKIP`, `FULL` or `EDGE` for each block. An axis of batch or heads has
        length 1 where all items or heads have the same mask.
    seqlen_q, seqlen_k : int
        Lengths that it was made for.
    block : (int, int)
        Rows and keys of a block.
    predicate : Predicate
        What is asked in partial blocks.

    Examples
    --------
    >>> causal = make_block_mask(lambda b, h, q, k: q >= k, None, None, 512, 512)
    >>> causal
    BlockMask(batch=1, heads=1, seqlen_q=512, seqlen_k=512, block=(128, 128)), 37.5% empty
    +...
    #+..
    ##+.
    ###+
    >>> near = make_block_mask(lambda b, h, q, k: abs(q - k) < 100, None, None, 512, 512)
    >>> print(causal & near)
    +...
    ++..
    .++.
    ..++
    """

    kinds: Kinds
    seqlen_q: int
    seqlen_k: int
    block: tuple[int, int]
    predicate: Predicate

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, seqlen_q, seqlen_k)``, 1 where all items or heads share one mask."""
        return (*self.kinds.shape[:2], self.seqlen_q, self.seqlen_k)

    @property
    def sparsity(self) -> float:
        """Share of the (row, key) pairs that lie in empty blocks, between 0 and 1."""
        return 1.0 - self._share(self.kinds != SKIP)

    def _share(self, chosen: Bool) -> float:
        rows = _lengths(self.seqlen_q, self.block[0]).astype(np.float64)
        keys = _lengths(self.seqlen_k, self.block[1]).astype(np.float64)
        pairs = self.kinds.shape[0] * self.kinds.shape[1] * self.seqlen_q * self.seqlen_k
        return float(np.einsum("bhqk,q,k->", chosen, rows, keys)) / pairs if pairs else 1.0

    def __and__(self, other: BlockMask) -> BlockMask:
        """Return the mask of what both show."""
        return self._joined("and", other, SKIP, FULL)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Return the mask of what either shows."""
        return self._joined("or", other, FULL, SKIP)

    def __invert__(self) -> BlockMask:
        """Return the mask of what this one hides."""
        swapped = np.array([FULL, SKIP, EDGE], np.uint8)[self.kinds]
        return replace(
            self, kinds=_read_only(swapped), predicate=Predicate("not", (self.predicate,))
        )

    def _joined(self, operation: str, other: object, wins: int, neutral: int) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented  # type: ignore[no-any-return]
        mine = (self.seqlen_q, self.seqlen_k, self.block)
        theirs = (other.seqlen_q, other.seqlen_k, other.block)
        if mine != theirs:
            raise ValueError(
                "block masks must have the same lengths and blocks to be joined, but have "
                f"(seqlen_q, seqlen_k, block) = {mine} and {theirs}"
            )
        try:
            first, second = np.broadcast_arrays(self.kinds, other.kinds)
        except ValueError:
            raise ValueError(
                "block masks must have the same batch and heads, or 1, to be joined, but have "
                f"{self.kinds.shape[:2]} and {other.kinds.shape[:2]}"
            ) from None
        kinds = np.full(first.shape, EDGE, np.uint8)
        kinds[first == neutral] = second[first == neutral]
        kinds[second == neutral] = first[second == neutral]
        kinds[(first == wins) | (second == wins)] = wins
        both = (first == EDGE) & (second == EDGE)
        predicate = Predicate(operation, (self.predicate, other.predicate))
        _classify(predicate, kinds, both, *mine)
        return replace(self, kinds=_read_only(kinds), predicate=predicate)

    def seen(self, batch: int, head: int, rows: slice, keys: slice) -> Bool | None:
        """Which keys some rows see, ``(rows, keys)``; None where they see all of them."""
        at = (batch if self.kinds.shape[0] > 1 else 0, head if self.kinds.shape[1] > 1 else 0)
        if rows.stop <= rows.start or keys.stop <= keys.start:
            return None
        blocks = self.kinds[at][_blocks(rows, self.block[0]), _blocks(keys, self.block[1])]
        if (blocks == FULL).all():
            return None
        shape = (rows.stop - rows.start, keys.stop - keys.start)
        if (blocks == SKIP).all():
            return np.zeros(shape, bool)
        # The function is asked about partial blocks alone, here and in the kernels.
        row, key = np.arange(rows.start, rows.stop), np.arange(keys.start, keys.stop)
        kinds = self.kinds[at][np.ix_(row // self.block[0], key // self.block[1])]
        shown: Bool = kinds == FULL
        i, j = np.nonzero(kinds == EDGE)
        shown[i, j] = self.predicate(
            np.full(i.shape, at[0]), np.full(i.shape, at[1]), row[i], key[j]
        )
        return shown

    def to_mask(self) -> Bool:
        """Return the dense mask, ``(batch, heads, seqlen_q, seqlen_k)``, True = attend."""
        mask = np.ones(self.shape, bool)
        for batch, head in np.ndindex(*self.kinds.shape[:2]):
            for row in range(0, self.seqlen_q, self.block[0]):
                rows = slice(row, min(row + self.block[0], self.seqlen_q))
                seen = self.seen(batch, head, rows, slice(0, self.seqlen_k))
                if seen is not None:
                    mask[batch, head, rows] = seen
        return mask

    def _one(self, batch: int, head: int) -> Kinds:
        """Kinds of one batch item and head."""
        batches, heads = self.kinds.shape[:2]
        checks.integer("batch", batch, 0, batches - 1)
        checks.integer("head", head, 0, heads - 1)
        return self.kinds[batch, head]  # type: ignore[no-any-return]

    def plot(self, ax: Any = None, batch: int = 0, head: int = 0) -> Any:
        """Draw one batch item and head through matplotlib; return the axes.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        batch, head : int
            Which mask.
        """
        from matplotlib import colors, pyplot

        if ax is None:
            ax = pyplot.subplots()[1]
        shades = colors.ListedColormap(["white", "#1f5f8b", "#a6cbe3"])  # SKIP, FULL, EDGE
        extent = (0, self.seqlen_k, self.seqlen_q, 0)
        kinds = self._one(batch, head)
        cells = np.repeat(kinds, _lengths(self.seqlen_q, self.block[0]), 0)
        cells = np.repeat(cells, _lengths(self.seqlen_k, self.block[1]), 1)
        ax.imshow(cells, shades, vmin=0, vmax=2, extent=extent, interpolation="nearest")
        ax.set_xlabel("key")
        ax.set_ylabel("query")
        ax.set_title(f"{self.sparsity:.0%} empty")
        return ax

    def draw(self, batch: int = 0, head: int = 0) -> str:
        """Draw one batch item and head: ``#`` full, ``+`` partial, ``.`` empty."""
        kinds = self._one(batch, head)
        step = max(1, -(-max(kinds.shape, default=1) // _COLUMNS))
        lines = []
        for row in range(0, kinds.shape[0], step):
            cells = [
                kinds[row : row + step, key : key + step] for key in range(0, kinds.shape[1], step)
            ]
            lines.append("".join(_SYMBOLS[_summary(cell)] for cell in cells))
        return "\n".join(lines)

    def __str__(self) -> str:
        """Drawing of the first batch item and head."""
        return self.draw() if self.kinds.size else ""

    def __repr__(self) -> str:
        """Sizes, share of empty blocks, and the drawing."""
        batch, heads, seqlen_q, seqlen_k = self.shape
        return (
            f"BlockMask(batch={batch}, heads={heads}, seqlen_q={seqlen_q}, seqlen_k={seqlen_k}, "
            f"block={self.block}), {self.sparsity:.1%} empty\n{self}"
        )


def make_block_mask(
    mask_mod: Callable[..., Any],
    batch: int | None,
    heads: int | None,
    seqlen_q: int,
    seqlen_k: int,
    *,
    aux: tuple[Array, ...] = (),
    block: tuple[int, int] = (128, 128),
) -> BlockMask:
    """Look at a mask function once, block by block.

    The result may be used for any number of calls. It holds copies of the function's outer values
    and of its arrays, so what happens to them later does not change it. The memory needed is that
    of one byte for a block, and of some tiles while the mask is made.

    Parameters
    ----------
    mask_mod : function
        ``mask_mod(batch, head, q_idx, k_idx, *aux) -> bool``, of scalars; True = attend. `q_idx` is
        the row of q, `head` the query head, `batch` the flat index over the leading axes.
    batch, heads : int or None
        For how many batch items and heads; None (or 1) where all of them have the same mask: the
        function is then asked about index 0.
    seqlen_q, seqlen_k : int
        Lengths of q and k.
    aux : tuple of ndarray
        Arrays that the function reads by index: document numbers, lengths.
    block : (int, int)
        Rows and keys of a block. Small blocks skip more, large ones are quicker to look at.

    Returns
    -------
    BlockMask
        Joined by ``&``, ``|`` and ``~``; `repr` draws it.

    Raises
    ------
    TypeError, ValueError, IndexError
        If an argument is not as it should be, or the function fails: the message names the
        function, its file and line, and the pair.

    Notes
    -----
    The idea is FlexAttention's (Dong et al. 2024, arXiv:2412.05496, section 3.2).

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import make_block_mask
    >>> document = np.array([0] * 48 + [1] * 80)
    >>> def same_document(batch, head, q_idx, k_idx, document):
    ...     return document[q_idx] == document[k_idx]
    >>> make_block_mask(same_document, None, None, 128, 128, aux=(document,), block=(32, 32))
    BlockMask(batch=1, heads=1, seqlen_q=128, seqlen_k=128, block=(32, 32)), 25.0% empty
    #+..
    ++++
    .+##
    .+##
    """
    counts = (
        1 if batch is None else checks.integer("batch", batch, 0, MAX_SEQLEN),
        1 if heads is None else checks.integer("heads", heads, 0, MAX_SEQLEN),
    )
    lengths = (
        checks.integer("seqlen_q", seqlen_q, 0, MAX_SEQLEN),
        checks.integer("seqlen_k", seqlen_k, 0, MAX_SEQLEN),
    )
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"block must be a pair (rows, keys), but is {checks.describe(block)}")
    sides = (
        checks.integer("block[0]", block[0], 1, MAX_SEQLEN),
        checks.integer("block[1]", block[1], 1, MAX_SEQLEN),
    )
    function = user_function("mask_mod", mask_mod, aux)
    function = replace(
        function,
        function=rebuilt(function.function),
        aux=tuple(_read_only(array.copy()) for array in function.aux),
    )
    predicate = Predicate("leaf", (), function, counts[0] > 1, counts[1] > 1)
    kinds = np.zeros(
        (*counts, *(-(-n // m) for n, m in zip(lengths, sides, strict=True))), np.uint8
    )
    _classify(predicate, kinds, np.ones(kinds.shape, bool), *lengths, sides)
    return BlockMask(_read_only(kinds), *lengths, sides, predicate)


def _classify(
    predicate: Predicate,
    kinds: Kinds,
    chosen: Bool,
    seqlen_q: int,
    seqlen_k: int,
    block: tuple[int, int],
) -> None:
    """Enter the kinds of the chosen blocks by asking about each of their pairs."""
    together = max(1, _PAIRS // (block[0] * block[1]))
    for batch, head, block_q in itertools.product(*map(range, kinds.shape[:3])):
        places = np.flatnonzero(chosen[batch, head, block_q])
        row = np.arange(block_q * block[0], min((block_q + 1) * block[0], seqlen_q))
        for start in range(0, len(places), together):
            some = places[start : start + together]
            key = (some[:, None] * block[1] + np.arange(block[1])).ravel()
            owner = np.repeat(np.arange(len(some)), block[1])
            key, owner = key[key < seqlen_k], owner[key < seqlen_k]
            pairs = (np.repeat(row, len(key)), np.tile(key, len(row)))
            where = (np.full(pairs[0].shape, batch), np.full(pairs[0].shape, head))
            shown = predicate(*where, *pairs).reshape(len(row), len(key)).sum(axis=0)
            count = np.bincount(owner, shown, len(some))
            whole = np.bincount(owner, minlength=len(some)) * len(row)
            kinds[batch, head, block_q, some] = np.where(
                count == 0, SKIP, np.where(count == whole, FULL, EDGE)
            )


def _blocks(span: slice, size: int) -> slice:
    return slice(span.start // size, -(-span.stop // size))


def _lengths(length: int, size: int) -> NDArray[np.int64]:
    """Lengths of the blocks of a sequence: all alike but the last."""
    starts = np.arange(0, length, size)
    return np.minimum(starts + size, length) - starts


def _summary(cell: Kinds) -> int:
    kind = int(cell.flat[0])
    return kind if (cell == kind).all() else EDGE


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array
