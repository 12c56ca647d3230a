"""Which keys a query row sees, as one half-open interval.

Causal masks, sliding windows, query offsets and sequence lengths all say the same kind of thing:
row ``i`` sees the keys ``k_lo <= j < k_hi``. Two integers per batch item bound ``j`` relative to
the row, two lengths cut the rectangle off, and one scalar formula (`row_interval`) turns them into
the interval. Kernels see these four integers and never the word "window". The functions below are
plain scalar arithmetic without a decorator, so that a compiler can wrap them for its own target.

In every drawing a line is a query row, a column a key, ``1`` is seen and ``.`` is hidden.

No mask: each row sees each key.

>>> print(draw(3, 5))
1 1 1 1 1
1 1 1 1 1
1 1 1 1 1

Causal: query ``i`` stands at key position ``p = i + q_offset`` and sees ``j <= p``. The default
offset ``seqlen_k - seqlen_q`` puts the last query on the last key (bottom-right), so queries that
continue a cache see all of it.

>>> print(draw(3, 5, causal=True))
1 1 1 . .
1 1 1 1 .
1 1 1 1 1

``q_offset=0`` aligns the first query with the first key (top-left).

>>> print(draw(3, 5, causal=True, q_offset=0))
1 . . . .
1 1 . . .
1 1 1 . .

With more queries than keys, bottom-right alignment leaves the first rows without any key.

>>> print(draw(5, 3, causal=True))
. . .
. . .
1 . .
1 1 .
1 1 1

``window_size=(left, right)`` sees ``p - left <= j <= p + right``, both ends included; ``None``
leaves a side open.

>>> print(draw(5, 5, window_size=(1, 2)))
1 1 1 . .
1 1 1 1 .
. 1 1 1 1
. . 1 1 1
. . . 1 1
>>> print(draw(4, 6, window_size=(None, 0)))
1 1 1 . . .
1 1 1 1 . .
1 1 1 1 1 .
1 1 1 1 1 1

A causal window is the intersection of both: the right side closes at 0.

>>> print(draw(5, 5, window_size=(2, 2), causal=True))
1 . . . .
1 1 . . .
1 1 1 . .
. 1 1 1 .
. . 1 1 1

Lengths cut rows and keys off, and the default offset follows them.

>>> print(draw(4, 6, causal=True, seqused_q=2, seqused_k=5))
1 1 1 1 . .
1 1 1 1 1 .
. . . . . .
. . . . . .
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Rows, keys and offsets stay below this, so that positions and their sums fit 32 bits with room.
MAX_SEQLEN = 2**30
# An open side of a window. Positions stay below 2**31 in magnitude: adding this passes every key.
UNBOUNDED = 2**31

# What a tile of rows x keys holds; plain integers, so that compiled code can compare them.
SKIP = 0  # no row of it sees any key of it
FULL = 1  # every row of it sees every key of it
EDGE = 2  # neither: look at each row's interval


def relative_bounds(
    causal: bool, window_size: tuple[int | None, int | None], q_offset: int
) -> tuple[int, int]:
    """Bounds of the keys seen, relative to the row: ``i + k_from <= j < i + k_to``.

    >>> relative_bounds(False, (1, 2), q_offset=10)
    (9, 13)
    >>> relative_bounds(True, (1, 2), q_offset=10)
    (9, 11)
    """
    left, right = window_size
    behind = UNBOUNDED if left is None else min(left, UNBOUNDED)
    ahead = UNBOUNDED if right is None else min(right, UNBOUNDED)
    if causal:
        ahead = 0
    return q_offset - behind, q_offset + ahead + 1


def row_interval(
    row: int, k_from: int, k_to: int, seqused_q: int, seqused_k: int
) -> tuple[int, int]:
    """Half-open interval ``(k_lo, k_hi)`` of the keys that a row sees; empty where they are equal.

    Always ``0 <= k_lo <= k_hi <= seqused_k``, and within ``seqused_q`` both ends never fall from a
    row to the next: that is what `block_interval` and `tile_kind` rest on.

    >>> row_interval(2, k_from=-1, k_to=1, seqused_q=4, seqused_k=5)
    (1, 3)
    """
    if row >= seqused_q:
        return 0, 0
    k_lo = min(max(row + k_from, 0), seqused_k)
    k_hi = max(min(row + k_to, seqused_k), k_lo)
    return k_lo, k_hi


def block_interval(
    row_lo: int, row_hi: int, k_from: int, k_to: int, seqused_q: int, seqused_k: int
) -> tuple[int, int]:
    """Smallest interval that holds the keys seen by any row of ``row_lo <= i < row_hi``.

    >>> block_interval(1, 3, k_from=-1, k_to=1, seqused_q=4, seqused_k=5)
    (0, 3)
    """
    row_hi = min(row_hi, seqused_q)
    if row_lo >= row_hi:
        return 0, 0
    k_lo = min(max(row_lo + k_from, 0), seqused_k)
    k_hi = max(min(row_hi - 1 + k_to, seqused_k), k_lo)
    return k_lo, k_hi


def common_interval(
    row_lo: int, row_hi: int, k_from: int, k_to: int, seqused_q: int, seqused_k: int
) -> tuple[int, int]:
    """Interval of the keys that every row of ``row_lo <= i < row_hi`` sees; may be empty.

    >>> common_interval(1, 3, k_from=-1, k_to=1, seqused_q=4, seqused_k=5)
    (1, 2)
    """
    if row_hi > seqused_q:
        return 0, 0
    k_lo = max(row_hi - 1 + k_from, 0)
    return k_lo, max(min(row_lo + k_to, seqused_k), k_lo)


def tile_kind(
    row_lo: int,
    row_hi: int,
    key_lo: int,
    key_hi: int,
    k_from: int,
    k_to: int,
    seqused_q: int,
    seqused_k: int,
) -> int:
    """`SKIP`, `FULL` or `EDGE` for the rows ``[row_lo, row_hi)`` and keys ``[key_lo, key_hi)``.

    The tile is not empty. Exact, not an estimate: rows move by one key at a time and see at least
    their own position, so the union of a block's intervals has no gap, and two comparisons decide
    whether it meets the tile.

    With ``window_size=(2, 0)`` and tiles of 2 rows by 2 keys::

        1 . | . . | . .        edge skip skip
        1 1 | . . | . .
        ----+-----+----
        1 1 | 1 . | . .        edge edge skip
        . 1 | 1 1 | . .

    >>> [tile_kind(0, 2, key, key + 2, -2, 1, 4, 6) for key in (0, 2, 4)]
    [2, 0, 0]
    >>> tile_kind(1, 3, 0, 2, -2, 1, 4, 6)
    1
    """
    k_lo, k_hi = block_interval(row_lo, row_hi, k_from, k_to, seqused_q, seqused_k)
    if k_hi <= key_lo or k_lo >= min(key_hi, seqused_k):
        return SKIP
    all_lo, all_hi = common_interval(row_lo, row_hi, k_from, k_to, seqused_q, seqused_k)
    return FULL if all_lo <= key_lo and key_hi <= all_hi else EDGE


class KeyRange(NamedTuple):
    """The four integers of one batch item, with the formulas above as methods.

    >>> keys = KeyRange(k_from=-1, k_to=1, seqused_q=4, seqused_k=5)
    >>> keys.row(2), keys.block(1, 3), keys.tile(1, 3, 0, 3) == EDGE
    ((1, 3), (0, 3), True)
    """

    k_from: int
    k_to: int
    seqused_q: int
    seqused_k: int

    def row(self, row: int) -> tuple[int, int]:
        """Keys ``(k_lo, k_hi)`` that the row sees."""
        return row_interval(row, *self)

    def block(self, row_lo: int, row_hi: int) -> tuple[int, int]:
        """Smallest interval that holds what any row of the block sees."""
        return block_interval(row_lo, row_hi, *self)

    def tile(self, row_lo: int, row_hi: int, key_lo: int, key_hi: int) -> int:
        """`SKIP`, `FULL` or `EDGE`."""
        return tile_kind(row_lo, row_hi, key_lo, key_hi, *self)


def visible_pairs(
    k_from: NDArray[np.int64],
    k_to: NDArray[np.int64],
    seqused_q: NDArray[np.int64],
    seqused_k: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Count the (row, key) pairs inside the intervals, per batch item, without walking the rows.

    ``k_hi - k_lo = clip(i + k_to, 0, n) - clip(i + k_from, 0, n)``, and the sum of a clipped ramp
    over the rows has a closed form. Exact in int64 up to 2**30 rows and keys.
    """
    return _ramp_sum(k_to, seqused_q, seqused_k) - _ramp_sum(k_from, seqused_q, seqused_k)


def _ramp_sum(
    start: NDArray[np.int64], rows: NDArray[np.int64], top: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sum of ``clip(start + i, 0, top)`` over ``0 <= i < rows``."""
    rising = np.clip(-start, 0, rows)  # rows before this one give 0
    flat = np.clip(top - start, rising, rows)  # rows from this one on give `top`
    count = flat - rising
    # Each summand of the ramp is below `top`, so the product stays below 2**61.
    first = np.where(count > 0, start + rising, 0)
    total: NDArray[np.int64] = (2 * first + count - 1) * count // 2 + (rows - flat) * top
    return total


def draw(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    q_offset: int | None = None,
    seqused_q: int | None = None,
    seqused_k: int | None = None,
) -> str:
    """Draw which keys each row sees, one line a row; see the top of this module."""
    rows = seqlen_q if seqused_q is None else seqused_q
    length = seqlen_k if seqused_k is None else seqused_k
    offset = length - rows if q_offset is None else q_offset
    keys = KeyRange(*relative_bounds(causal, window_size, offset), rows, length)
    lines = []
    for row in range(seqlen_q):
        k_lo, k_hi = keys.row(row)
        lines.append(" ".join("1" if k_lo <= j < k_hi else "." for j in range(seqlen_k)))
    return "\n".join(lines)
