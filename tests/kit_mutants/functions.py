"""Mistakes in the use of the caller's functions."""

import numpy as np

from kit_mutants.registry import replace

replace("score_mod_last", late=True)
replace("score_mod_hides_nothing", left_by_mod=lambda self, seen, scores: seen)
replace("score_mod_of_the_first_item", told=lambda self, b, h, i, j: (0 * b, h, i, j))
replace("score_mod_of_the_first_head", told=lambda self, b, h, i, j: (b, 0 * h, i, j))
replace("score_mod_with_axes_swapped", told=lambda self, b, h, i, j: (h, b, i, j))
replace("partial_blocks_are_full", in_blocks=lambda self, mask: by_blocks(mask, (1, 2)))
replace("partial_blocks_are_empty", in_blocks=lambda self, mask: by_blocks(mask, (1,)))
replace("block_mask_ignored", in_blocks=lambda self, mask: np.ones((1, 1, 1, 1), bool))


def by_blocks(mask, kinds):
    """Whole blocks of some kinds, whatever their function says."""
    shown = np.isin(mask.kinds, kinds)
    shown = shown.repeat(mask.block[0], 2).repeat(mask.block[1], 3)
    return shown[:, :, : mask.seqlen_q, : mask.seqlen_k]
