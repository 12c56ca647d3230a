"""The tile shapes of the Hopper kernel, by head dims and by what a call asks for."""

from __future__ import annotations

from typing import NamedTuple

from fusedattn.cuda.hopper_scores import PLAIN, Features


class Tile(NamedTuple):
    """The shape of a tile, and how warpgroups share the matrix unit."""

    warpgroups: int  # that compute, of 64 rows each
    block_k: int
    stages: int
    turns: bool = False


Tiles = dict[tuple[int, int], Tile]

# By head dims, rounded up. From 128 on the warpgroups find better turns by themselves.
PLAIN_TILES: Tiles = {
    (64, 64): Tile(3, 128, 3, turns=True),
    (128, 128): Tile(2, 128, 2),
    (192, 128): Tile(2, 128, 2),
    (256, 256): Tile(2, 80, 2),
}
# The same for short sequences of which most tiles end at the diagonal: flat ones waste less.
SHORT_TILES: Tiles = {(64, 64): Tile(2, 128, 4, turns=True)}
# The same where something is done to scores, and where keys are hidden one by one: both take
# registers.
FEATURED_TILES: Tiles = {**PLAIN_TILES, **SHORT_TILES}
HIDING_TILES: Tiles = {
    (64, 64): Tile(2, 128, 4, turns=True),
    (128, 128): Tile(2, 128, 2, turns=True),
    (192, 128): Tile(2, 64, 2),
    (256, 256): Tile(2, 64, 2),
}
# The same with a block mask and nothing else: most tiles are then as plain as without.
BLOCK_TILES: Tiles = {**FEATURED_TILES, (256, 256): Tile(2, 64, 2)}
# The same for few queries, where bytes under way count and nothing else.
FEW_TILES: Tiles = {
    (64, 64): Tile(1, 128, 4),
    (128, 128): Tile(1, 128, 3),
    (192, 128): Tile(1, 128, 2),
    (256, 256): Tile(1, 64, 3),
}


def tile_for(dims: tuple[int, int], features: Features, *, short: bool = False) -> Tile:
    """Return the tile for many queries; ``short`` for sequences that are, and end at a diagonal."""
    if features == PLAIN:
        return (PLAIN_TILES | SHORT_TILES if short else PLAIN_TILES)[dims]
    if not (features.hides or features.blocks):
        return FEATURED_TILES[dims]
    if not features.hides and features == Features(functions=features.functions):
        return BLOCK_TILES[dims]
    # Addresses of single keys take the registers that turns would.
    tile = HIDING_TILES[dims]
    return tile if features.pairs else tile._replace(turns=False)
