"""One tile of scores: what happens between the keys of a block and the output of a panel.

Scores, the passes that features add, weights, and what they add to the output. ``p`` is the
parameter record and ``w`` the address of the thread's working memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from fusedattn import masks
from fusedattn.cpu.interface import SIGNATURES
from fusedattn.cpu.kernel import kernel
from fusedattn.cpu.matrix import (
    accumulate_tile,
    factors,
    score_tile,
    seen_values,
    split_tile,
    weigh_tile,
)
from fusedattn.cpu.memory import (
    clear,
    copy_bytes,
    get_i64,
    get_u8,
    set_u8,
)
from fusedattn.cpu.params import USER_FUNCTIONS
from fusedattn.cpu.record import params_at
from fusedattn.cpu.simd import native

# What a tile of the dense mask holds.
NONE_SEEN, SOME_SEEN, ALL_SEEN, EACH_KEY_SEEN = 0, 1, 2, 4

_call = {name: native(signature) for name, signature in SIGNATURES.items()}
scores = _call["scores"]
weights = _call["weights"]
accumulate = _call["accumulate"]
hide_outside = _call["hide_outside"]
hide_masked = _call["hide_masked"]
mask_tile = _call["mask_tile"]
bias_tile = _call["bias_tile"]
multiply = _call["multiply"]
softcap = _call["softcap"]
softcap_slope = _call["softcap_slope"]
alibi = _call["alibi"]
add = _call["add"]
drop = _call["drop"]
mark_hidden = _call["mark_hidden"]
both = _call["both"]
summary = _call["summary"]
stage = _call["stage"]
copy = _call["copy"]
row_scores = _call["row_scores"]
row_accumulate = _call["row_accumulate"]
# Functions of the user's, see `fusedattn.cpu.user`.
score_mod, mask_mod = (native(USER_FUNCTIONS[name]) for name in ("score_mod", "mask_mod"))


@kernel("iiiiiiiii>")
def natural_units(params, w, tables, batch, panel, first_key, n, skip, mark):
    """The passes over a tile of raw scores whose order the specification fixes.

    ``tables`` is where the lane tables lie. The backward pass also wants the slope of the softcap.
    The score_mod is not asked about the first ``skip`` keys. ``mark``: write down which scores it
    has made minus infinity.
    """
    p = params_at(params)
    s = w + p.at_scores_tile
    multiply(p.run_multiply, s, n, p.scale)
    if p.run_score_slope:  # the backward pass differentiates there
        copy_bytes(w + p.at_raw_tile, s, n * p.lanes * p.real_bytes)
    if p.run_score_mod:
        at_lane = panel * p.lanes * 4
        rows, heads = tables + p.at_row + at_lane, tables + p.at_head + at_lane
        asked, key = s + skip * p.lanes * p.real_bytes, first_key + skip
        score_mod(p.run_score_mod, asked, n - skip, key, rows, heads, batch, p.score_words)
        if mark:
            mark_hidden(p.run_mark_hidden, s, n, w + p.at_shown_tile)
    cap = p.softcap
    if cap > 0.0:
        softcap(p.run_softcap, s, n, cap)
        if p.run_softcap_slope:
            softcap_slope(p.run_softcap_slope, s, n, cap, w + p.at_softcap_slope)
    if p.slopes:
        positions = tables + p.at_position + panel * p.lanes * 4
        slope = tables + p.at_slope + panel * p.lanes * p.real_bytes
        alibi(p.run_alibi, s, n, first_key, positions, slope)
    if p.bias:
        tile_at, table = w + p.at_bias_tile, tables + p.at_bias_rows + panel * p.lanes * 8
        offset, step = first_key * p.bias_key, p.bias_key
        bias_tile(p.run_bias_tile, tile_at, table, offset, step, n, p.bias_storage)
        add(p.run_add, s, n, tile_at)


@kernel("iiiiiiiiiiiiiiiiiiiii>i")
def attend_tile(
    params, w, batch, panel, first_key, n, skip, blocks, keys, k_stride, values, v_stride, groups,
    staged, side, old_panel, old_values, old_n, next_panel, next_keys, next_n,
):  # fmt: skip
    """One tile of scores: ``n`` keys from ``first_key`` on against one panel of rows.

    ``blocks``: what the block mask says of the tile, but for its first ``skip`` keys, which are
    hidden and which the user's functions are not asked about. ``groups`` of rows if there are few;
    ``staged``: 1 if keys are reals, plus 2 if values are, plus 4 if all lanes are one row.
    With a matrix unit the scores stand already, and make room for those of the next tile. The
    values of the tile before, ``old_n`` of ``old_panel``, are accumulated here, and those of this
    one later, by its weights on their ``side``. Returns where they lie, or 0 where there is nothing
    to accumulate.
    """
    p = params_at(params)
    s = w + p.at_scores_tile
    bounds = w + p.at_bounds
    at_lane = panel * p.lanes * 4
    rows, heads = w + p.at_row + at_lane, w + p.at_head + at_lane
    found, tile_at = ALL_SEEN | EACH_KEY_SEEN, w + p.at_mask_tile
    if p.mask:
        table = w + p.at_mask_rows + panel * p.lanes * 8
        offset, step = first_key * p.mask_key, p.mask_key
        found = mask_tile(p.run_mask_tile, tile_at, table, offset, step, n, w + p.at_seen)
    if blocks == masks.EDGE:
        shown = w + p.at_shown_tile if p.mask else tile_at
        asked, key = shown + skip * p.lanes, first_key + skip
        mask_mod(p.run_mask_mod, asked, n - skip, key, rows, heads, batch, p.mask_words)
        if p.mask:
            both(p.run_both, tile_at, n, shown)
    elif skip and not p.mask:
        for i in range(skip * p.lanes, n * p.lanes):
            set_u8(tile_at, i, 1)
    if skip:
        clear(tile_at, skip * p.lanes)
    if skip or blocks == masks.EDGE:
        found = summary(p.run_summary, tile_at, n, w + p.at_seen)
    mask_kind, each_key_seen = found & 3, found >= EACH_KEY_SEEN
    if mask_kind == NONE_SEEN:
        if next_n:
            score_tile(params, w, next_panel, next_keys, next_n)
        return 0
    head_dim, head_dim_v, row_bytes = p.head_dim, p.head_dim_v, p.lanes * p.real_bytes
    if p.few_rows:
        run = p.run_row_scores_of_reals if staged & 1 else p.run_row_scores
        queries, stride = w + p.at_row_queries, p.row_queries_stride
        row_scores(run, keys, k_stride, n, queries, stride, s, head_dim, groups, values, v_stride)
    elif not p.matrix:
        queries = w + p.at_queries + panel * head_dim * row_bytes
        scores(p.run_scores, keys, k_stride, n, queries, s, head_dim)
    marked = p.run_score_mod and (p.marks or staged & 4)
    if p.natural_units:
        natural_units(params, w, w, batch, panel, first_key, n, skip, 1 if marked else 0)
    last_low, first_high = get_i64(bounds, 4 * panel + 2), get_i64(bounds, 4 * panel + 3)
    if last_low > first_key or first_high < first_key + n:
        lows, highs = w + p.at_low, w + p.at_high
        hide_outside(p.run_hide_outside, s, n, first_key, lows + at_lane, highs + at_lane)
    if mask_kind == SOME_SEEN:
        hide_masked(p.run_hide_masked, s, n, tile_at)
    if marked:
        hide_masked(p.run_hide_masked, s, n, w + p.at_shown_tile)
        if staged & 4:  # values that the score_mod hides count as zeros: see the rescue
            for j in range(n):
                shown = get_u8(w + p.at_shown_tile, j * p.lanes)
                if p.matrix:
                    each_key_seen = False
                    set_u8(w + p.at_seen, j, shown)
                elif shown == 0:
                    clear(values + j * v_stride, v_stride)
    alpha = factors(params, w, side)
    running_max = w + p.at_row_max + panel * row_bytes
    row_sum = w + p.at_row_sum + panel * row_bytes
    if p.matrix and not p.dropout:
        weigh_tile(
            params, w, panel, n, side, old_panel, old_values, old_n, next_panel, next_keys, next_n
        )
    else:
        weights(p.run_weights, s, n, p.to_log2, running_max, alpha, row_sum)
    if p.dropout:
        drop(p.run_drop, s, n, first_key, p.threshold, p.seed, rows, heads, batch)
    if p.matrix:
        if p.dropout:
            split_tile(params, w, n, side)
            if old_n:
                accumulate_tile(params, w, old_panel, old_values, old_n, 1 - side)
            if next_n:
                score_tile(params, w, next_panel, next_keys, next_n)
        return values if each_key_seen else seen_values(params, w, values, n)
    if not each_key_seen:
        # What no row of the panel may see may hold anything: it is not even multiplied by 0.
        target, stride, keep = w + p.at_seen_values, p.values_stride, w + p.at_seen
        if staged & 2:
            size = p.real_bytes
            copy(p.run_copy, target, stride, values, v_stride, size, n, head_dim_v, keep)
        else:
            stage(p.run_stage, target, stride, values, v_stride, p.v_dim, n, head_dim_v, keep)
        values, v_stride, staged = target, stride, staged | 2
    if p.few_rows:
        run = p.run_row_accumulate_of_reals if staged & 2 else p.run_row_accumulate
        output, stride = w + p.at_row_output, p.row_output_stride
        soon = keys + n * k_stride  # past the last key there is nothing to fetch, and no harm in it
        row_accumulate(
            run, values, v_stride, n, s, output, stride, head_dim_v, alpha, groups, soon, k_stride
        )
    else:
        output = w + p.at_output + panel * head_dim_v * row_bytes
        accumulate(p.run_accumulate, values, v_stride, n, s, output, head_dim_v, alpha)
    return 0
