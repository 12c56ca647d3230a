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

from fusedattn.cpu.micro.base import LOG2_E
from fusedattn.cpu.micro.bias_gradients import BiasGradients
from fusedattn.cpu.micro.gradients import GradientRows, Gradients
from fusedattn.cpu.micro.panels import Panels
from fusedattn.cpu.micro.parts import Parts
from fusedattn.cpu.micro.passes import Passes
from fusedattn.cpu.micro.pipeline import Pipeline
from fusedattn.cpu.micro.rows import Rows
from fusedattn.cpu.micro.softmax import UNSEEN
from fusedattn.cpu.simd import define
from fusedattn.cpu.tile import Tile

__all__ = ["BACKWARD_GROUPS", "GROUPS", "LOG2_E", "SIGNATURES", "UNSEEN", "emit_module"]

# Arguments of each micro-kernel, see `define` and the methods of the classes for their names. Every
# address points to rows of ``tile.lanes`` elements on a cache line, or to the caller's own memory.
# They come in groups, each a module that is compiled when a call first needs it.
GROUPS = {
    "common": {
        "weights": "iifiii>",
        "hide_outside": "iiiii>",
        "unpack": "iiiiii>",
        "stage": "iiiiiiii>",
        "copy": "iiiiiiii>",
        "dot": "iiiii>f",
    },
    "panels": {
        "scores": "iiiiii>",
        "accumulate": "iiiiiii>",
        "pack": "iiiif>",
    },
    "matrix": {
        "configure": ">",
        "release": ">",
        "split_keys": "iiiiiiiii>i",
        "pack_queries": "iiiiifi>i",
        "split_values": "iiiiiiii>i",
        "keep_values": "iiiiii>",
        "split_weights": "iii>",
        "matrix_scores": "iiiiiiii>",
        "add_rest_scores": "iiiiiii>",
        "weights_and_products": "iifiiiiiiiiiiiiiiiiiiii>",
        "matrix_accumulate": "iiiiiiiii>",
        "add_rest_values": "iiiiiii>",
    },
    "rows": {
        "row_scores": "iiiiiiiiii>",
        "row_scores_of_reals": "iiiiiiiiii>",
        "row_accumulate": "iiiiiiiiiii>",
        "row_accumulate_of_reals": "iiiiiiiiiii>",
        "gather": "iiiif>",
    },
    "passes": {
        "multiply": "iif>",
        "softcap": "iif>",
        "alibi": "iiiii>",
        "bias_tile": "iiiiii>",
        "add": "iii>",
    },
    "mask": {
        "mask_tile": "iiiiii>i",
        "hide_masked": "iii>",
    },
    "user": {"mark_hidden": "iii>", "both": "iii>", "summary": "iii>i"},
    "dropout": {"drop": "iiiiiiii>"},
}
# Those of the backward pass, which uses most of the others again.
BACKWARD_GROUPS = {
    "gradients": {
        "differentiate": "iiifiiii>",
        "products": "iiiiiiii>",
        "pack_d_out": "iiiif>",
        "stage_d_out": "iiiiiiii>",
        "dot_out": "iiiii>f",
        "unpack_d_q": "iiiiii>",
        "write_rows": "iiiiiiifi>",
    },
    "softcap_gradients": {"softcap_slope": "iifi>", "bend": "iii>"},
    "dropout_gradients": {
        "keep_tile": "iiiiiiiif>",
        "differentiate_dropped": "iiifiiii>",
    },
    "bias_gradients": {"sum_keys": "iii>", "sum_lanes": "iiiii>", "add_rows": "iiiii>"},
}
_GROUPS = GROUPS | BACKWARD_GROUPS
SIGNATURES = {name: letters for group in _GROUPS.values() for name, letters in group.items()}


class _All(Panels, Parts, Pipeline, Rows, Gradients, BiasGradients, Passes, GradientRows):
    """Every micro-kernel under its name."""


def emit_module(tile: Tile, group: str) -> ir.Module:
    """Return the module with one group of micro-kernels for a tile shape."""
    module, writer = ir.Module(name=f"fusedattn_{group}"), _All(tile)
    for name, signature in _GROUPS[group].items():
        define(module, name, signature, getattr(writer, name), tile.bits, tile.width)
    return module
