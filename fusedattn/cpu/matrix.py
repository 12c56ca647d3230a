"""Tiles of scores and of weighted values by the matrix unit: between the loops and its kernels.

What the matrix unit multiplies is copied first, in parts (see `fusedattn.cpu.micro.matrix`): the
queries of an item, and a block of keys and values for all panels of the item. The working memory
says which of them have a rest.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from fusedattn.cpu.interface import SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.memory import get_i64, set_i64, set_u8
from fusedattn.cpu.record import params_at
from fusedattn.cpu.simd import native

_call = {name: native(signature) for name, signature in SIGNATURES.items()}
split_keys = _call["split_keys"]
pack_queries = _call["pack_queries"]
split_values = _call["split_values"]
keep_values = _call["keep_values"]
split_weights = _call["split_weights"]
matrix_scores = _call["matrix_scores"]
add_rest_scores = _call["add_rest_scores"]
weights_and_products = _call["weights_and_products"]
matrix_accumulate = _call["matrix_accumulate"]
add_rest_values = _call["add_rest_values"]

# Which operands have a rest: the keys and values of the block, then the queries of each panel.
KEYS, VALUES, QUERIES = 0, 1, 2


@kernel("iii>")
def split_panel(params, w, panel):
    """Copy the queries of a panel."""
    p = params_at(params)
    target, rows = w + p.at_queries + panel * p.queries_bytes, w + p.at_query_rows
    table = w + p.at_q_rows + panel * p.lanes * 8
    part, q_dim, head_dim, sign = p.queries_part, p.q_dim, p.head_dim, p.query_sign
    has_rest = pack_queries(p.run_pack_queries, target, part, table, q_dim, head_dim, sign, rows)
    set_i64(w + p.at_has_rest, QUERIES + panel, has_rest)


@kernel("iiiiii>")
def split_block(params, w, keys, values, n, alone):
    """Copy n keys and values; of a row alone, zeros for those that it does not see."""
    p = params_at(params)
    keep = w + p.at_keep_k if alone else 0
    at, part, stride = w + p.at_keys, p.keys_part, p.keys_stride
    has_rest = split_keys(
        p.run_split_keys, at, part, stride, keys, p.k_row, p.k_dim, n, p.head_dim, keep
    )
    set_i64(w + p.at_has_rest, KEYS, has_rest)
    at, part, stride = w + p.at_values, p.values_part, p.values_stride
    has_rest = split_values(
        p.run_split_values, at, part, stride, values, p.v_row, p.v_dim, n, p.head_dim_v
    )
    set_i64(w + p.at_has_rest, VALUES, has_rest)


@kernel("iiiii>")
def keep_block(params, w, n, unseen, alone):
    """Enter zeros for values of the block: the first ``unseen``, and what a row alone drops."""
    p = params_at(params)
    keep = w + p.at_keep_v
    for j in range(n):
        if j < unseen:
            set_u8(keep, j, 0)
        elif not alone:
            set_u8(keep, j, 1)
    for i in range(p.parts + get_i64(w + p.at_has_rest, VALUES)):
        at, stride = w + p.at_values + i * p.values_part, p.values_stride
        keep_values(p.run_keep_values, at, at, stride, n, p.head_dim_v, keep)


@kernel("iiiii>")
def score_tile(params, w, panel, keys, n):
    """Scores of n keys of the block against a panel."""
    p = params_at(params)
    s, queries = w + p.at_scores_tile, w + p.at_queries + panel * p.queries_bytes
    run, part, stride, of_queries = p.run_matrix_scores, p.keys_part, p.keys_stride, p.queries_part
    matrix_scores(run, keys, part, stride, n, queries, of_queries, s, p.head_dim)
    add_rests(params, w, panel, keys, n)


@kernel("iiiii>")
def add_rests(params, w, panel, keys, n):
    """Add what the rests, if there are any, make of the scores."""
    p = params_at(params)
    of_keys = get_i64(w + p.at_has_rest, KEYS)
    of_queries = get_i64(w + p.at_has_rest, QUERIES + panel)
    if of_keys + of_queries == 0:
        return
    s, product, head_dim, stride = w + p.at_scores_tile, w + p.at_product, p.head_dim, p.keys_stride
    queries = w + p.at_queries + panel * p.queries_bytes
    run, rest_keys, rest_queries = (
        p.run_add_rest_scores,
        keys + p.keys_part,
        queries + p.queries_part,
    )
    if of_keys:
        add_rest_scores(run, rest_keys, stride, n, queries, s, head_dim, product)
    if of_queries:
        add_rest_scores(run, keys, stride, n, rest_queries, s, head_dim, product)


@kernel("iiiiiiiiiii>")
def weigh_tile(
    params, w, panel, n, side, old_panel, old_values, old_n, next_panel, next_keys, next_n
):
    """Weights of a tile, in parts, beside products of its neighbours, if there are any.

    The values of the tile before are accumulated. The scores of the tile make room for those of the
    next. Factors and parts of weights have two sides, of which tiles take one in turn.
    """
    p = params_at(params)
    row_bytes, columns, product = p.lanes * p.real_bytes, p.head_dim_v, w + p.at_product
    maxima, sums = w + p.at_row_max + panel * row_bytes, w + p.at_row_sum + panel * row_bytes
    alpha, old_alpha = factors(params, w, side), factors(params, w, 1 - side)
    parts, old_parts = weight_parts(params, w, side), weight_parts(params, w, 1 - side)
    output = w + p.at_output + old_panel * columns * row_bytes
    queries = w + p.at_queries + next_panel * p.queries_bytes
    weights_and_products(
        p.run_weights_and_products, w + p.at_scores_tile, n, p.to_log2, maxima, alpha, sums, parts,
        old_values, p.values_part, p.values_stride, old_n, old_parts, output, columns, old_alpha,
        product, next_keys, p.keys_part, p.keys_stride, next_n, queries, p.queries_part, p.head_dim,
    )  # fmt: skip
    if old_n:
        add_rest(params, w, old_panel, old_values, old_n, 1 - side)
    if next_n:
        add_rests(params, w, next_panel, next_keys, next_n)


@kernel("iii>i")
def factors(params, w, side):
    """Where the factors that rescale what was accumulated before a tile lie."""
    p = params_at(params)
    return w + p.at_alpha + side * p.lanes * p.real_bytes


@kernel("iii>i")
def weight_parts(params, w, side):
    """Where the parts of the weights of a tile lie."""
    p = params_at(params)
    return w + p.at_weight_parts + side * p.weights_bytes


@kernel("iiii>")
def split_tile(params, w, n, side):
    """Weights that stand, in parts."""
    p = params_at(params)
    split_weights(p.run_split_weights, w + p.at_scores_tile, n, weight_parts(params, w, side))


@kernel("iiii>i")
def seen_values(params, w, values, n):
    """Copy n values of the block, but for those that no row of the panel may see.

    They may hold anything: they are not even multiplied by 0.
    """
    p = params_at(params)
    run, seen, keep, part = p.run_keep_values, w + p.at_seen_values, w + p.at_seen, p.values_part
    for i in range(p.parts + get_i64(w + p.at_has_rest, VALUES)):
        at, columns = values + i * part, p.head_dim_v
        keep_values(run, seen + i * part, at, p.values_stride, n, columns, keep)
    return seen


@kernel("iiiiii>")
def accumulate_tile(params, w, panel, values, n, side):
    """Add n values of the block, by their weights, to the output of a panel."""
    p = params_at(params)
    columns, run = p.head_dim_v, p.run_matrix_accumulate
    alpha, parts = factors(params, w, side), weight_parts(params, w, side)
    output = w + p.at_output + panel * columns * p.lanes * p.real_bytes
    part, stride, product = p.values_part, p.values_stride, w + p.at_product
    matrix_accumulate(run, values, part, stride, n, parts, output, columns, alpha, product)
    add_rest(params, w, panel, values, n, side)


@kernel("iiiiii>")
def add_rest(params, w, panel, values, n, side):
    """Add what the rests of n values, if there are any, make of the output of a panel."""
    p = params_at(params)
    if not get_i64(w + p.at_has_rest, VALUES):
        return
    columns, rest, parts = p.head_dim_v, values + p.values_part, weight_parts(params, w, side)
    output = w + p.at_output + panel * columns * p.lanes * p.real_bytes
    run, stride, product = p.run_add_rest_values, p.values_stride, w + p.at_product
    add_rest_values(run, rest, stride, n, parts, output, columns, product)
