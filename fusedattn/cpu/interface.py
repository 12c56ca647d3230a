"""What callers and kernels agree on: names, signatures and a few numbers, as plain data.

Nothing here needs a compiler: a process that finds its kernels on disk loads none.
"""

from __future__ import annotations

LOG2_E = 1.4426950408889634
# The running maximum before any key was seen. Finite, so that no lane ever computes inf - inf;
# below every score of the promised domain (at most max/4, times log2(e)).
UNSEEN = {32: -3.0e38, 64: -1.6e308}
# What the matrix unit makes of numbers is kept this much larger, see `fusedattn.cpu.micro.matrix`.
LIFT = 2.0**30
# What a worker returns if a row needs the rescue, which is not compiled yet.
NEEDS_RESCUE = 1

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
# The rescue is compiled when a row first needs it, and called by address like a micro-kernel.
RESCUE_SIGNATURES = {"mark_visible": "iiiiiii>", "rescue": "iiii>i"}


def unlift(parts: int) -> float:
    """The factor that makes an output of elements in so many parts what it is."""
    return LIFT**-2 if parts == 3 else LIFT**-1
