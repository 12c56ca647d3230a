"""How a problem reaches a kernel: one record, whose fields are named here and only here.

Kernels take the address of this record, so one compilation serves every dtype, shape, stride and
option. Addresses of the caller's arrays are those of batch item 0; what each item adds stands in
the ``*_offsets`` tables, so any leading axes with any strides will do.
"""

from __future__ import annotations

import numpy as np

from fusedattn.cpu.interface import SIGNATURES

# An operand is an address, three strides in bytes and the address of its batch offsets.
OPERANDS = {
    "q": ("head", "row", "dim"),
    "k": ("head", "row", "dim"),
    "v": ("head", "row", "dim"),
    "out": ("head", "row", "dim"),
    "mask": ("head", "row", "key"),
    "bias": ("head", "row", "key"),
}

# Functions of the user's: passes over a tile, and for one pair.
USER_FUNCTIONS = {
    "score_mod": "iiiiiii>",
    "mask_mod": "iiiiiii>",
    "score_mod_one": "fiiiii>f",
    "mask_mod_one": "iiiii>i",
    "score_slope": "iiiiiiii>",
    "score_aux": "iiiiiiiiiii>",
}

# A thread's working memory, by field: where each part begins.
SCRATCH = (
    "queries", "output", "scores_tile", "bias_tile", "mask_tile", "keys", "values",
    "seen_values", "shown_tile", "seen", "keep_k", "keep_v", "row_queries", "row_output", "row_max",
    "kinds", "row_sum", "alpha", "factor", "check", "q_rows", "out_rows", "mask_rows", "bias_rows",
    "low", "high", "position", "row", "head", "slope", "bounds", "bad", "exact", "partial",
    "softcap_slope", "raw_tile", "query_rows", "weight_parts", "product", "has_rest",
)  # fmt: skip

_INTEGERS = [
    *(f"run_{name}" for name in SIGNATURES),  # addresses of the micro-kernels
    *(f"run_{name}" for name in USER_FUNCTIONS),  # of the user's functions, 0 without
    "run_mark_visible",  # addresses of the rescue, 0 until it is compiled
    "run_rescue",
    "counter",  # the atomic counter that hands out items, itself
    "items",
    "few_rows",  # 1: lanes along the head dim, one panel an item
    "matrix",  # 1: products by the matrix unit
    "key_group",  # tiles of scores begin at multiples of so many keys
    "parts",  # that each element has
    "queries_bytes",  # of the queries of a panel
    "queries_part",  # of one part of them, and so on
    "keys_part",
    "values_part",
    "weights_bytes",  # of the weights of a tile, in parts
    "chunk_keys",  # of few rows: keys whose sums start from nothing
    "chunks",
    "partial_bytes",
    "states",  # if chunks go to several threads: a count per item, then their states; else 0
    "panels",  # panels of a full item
    "heads_per_item",  # query heads of one KV group that share the lanes of an item
    "head_groups",
    "row_blocks",
    "width",
    "lanes",
    "block_k",
    "real_bytes",
    "storage",  # code of the type of q, k and v
    "out_storage",
    "bias_storage",
    "num_heads",
    "group_size",
    "seqlen_q",
    "seqlen_k",
    "head_dim",
    "head_dim_v",
    *(
        f"{name}{field}"
        for name, strides in OPERANDS.items()
        for field in ("", *(f"_{axis}" for axis in strides), "_offsets")
    ),
    "lse",  # accumulator type, contiguous (batch, head, row); 0 if not wanted
    "slopes",  # float64, contiguous (batch, head); 0 without
    "sinks",  # float64, contiguous (head); 0 without
    "k_from",  # tables with one int64 per batch item, from here
    "k_to",
    "q_offset",
    "seqused_q",
    "seqused_k",  # to here
    "score_words",  # descriptions of the aux arrays of the score_mod
    "mask_words",  # and of those of the block mask's functions
    "marks",  # 1: passes come after a score_mod, so what it hides is written down
    "kinds",  # of the block mask's blocks, one byte each; 0 without
    "kinds_batch",  # steps in bytes, 0 where all have the same
    "kinds_head",
    "kinds_row",
    "kinds_rows",  # rows and keys of a block
    "kinds_keys",
    "natural_units",  # 1: scale, then the passes in natural units; 0: straight to log2
    "exact",  # 1: every row takes the exact path
    "dropout",
    "threshold",
    "seed",
    "stage_k",  # 1: key blocks are copied as reals first
    "stage_v",
    "keys_stride",
    "values_stride",
    "row_queries_stride",
    "row_output_stride",
    *(f"at_{name}" for name in SCRATCH),
    "scratch_bytes",
]
# ``unlift`` makes an accumulated output what it is.
_REALS = ["scale", "to_log2", "query_sign", "softcap", "keep_scale", "unseen", "unlift"]

PARAMS = np.dtype(
    [(name, np.int64) for name in _INTEGERS] + [(name, np.float64) for name in _REALS]
)

OFFSETS = {name: 8 * index for index, name in enumerate(_INTEGERS + _REALS)}

# Where the counter lies in the record.
COUNTER = OFFSETS["counter"]
# A counter at or above this value tells the workers to stop.
STOP = 1 << 62
