"""One tile's arithmetic: the micro-kernels, written as vector IR and called from the macro loops.

A panel of queries lies across the lanes, so a tile of scores is stored transposed, as
``S[key][lane]``: no operation of the softmax is horizontal, keys and value columns enter by
broadcast from the caller's own rows, and nothing but the queries is ever packed. A matrix unit
wants more: see `Matrix` and `Parts`. There is no mask logic here beyond "select minus infinity", no
allocation and no loop over tiles.

Arithmetic that decides bits:

* every score is one chain of FMAs over at most ``CHAIN`` head dims, chains added in order;
* every output column of a block is one chain of FMAs over the block's keys, begun at zero, and
  joins the running output by one FMA. A hidden key is ``fma(v, 0, acc) = acc``, so a tile that is
  skipped, computed in part or computed in full gives the same bits;
* the running maximum is an integer in log2 units, so every rescaling is an exact power of two.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); block order,
FlashAttention-2 (arXiv:2307.08691), algorithm 1; register tiles, Goto & van de Geijn 2008.
"""

from __future__ import annotations

from llvmlite import ir

from fusedattn.cpu.interface import BACKWARD_GROUPS, GROUPS
from fusedattn.cpu.micro.bias_gradients import BiasGradients
from fusedattn.cpu.micro.gradients import GradientRows, Gradients
from fusedattn.cpu.micro.panels import Panels
from fusedattn.cpu.micro.parts import Parts
from fusedattn.cpu.micro.passes import Passes
from fusedattn.cpu.micro.pipeline import Pipeline
from fusedattn.cpu.micro.rows import Rows
from fusedattn.cpu.simd import define
from fusedattn.cpu.tile import Tile


class _All(Panels, Parts, Pipeline, Rows, Gradients, BiasGradients, Passes, GradientRows):
    """Every micro-kernel under its name."""


def emit_module(tile: Tile, group: str) -> ir.Module:
    """Return the module with one group of micro-kernels for a tile shape."""
    module, writer = ir.Module(name=f"fusedattn_{group}"), _All(tile)
    for name, signature in (GROUPS | BACKWARD_GROUPS)[group].items():
        define(module, name, signature, getattr(writer, name), tile.bits, tile.width)
    return module
