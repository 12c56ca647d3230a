"""The laws of attention: plain functions that assert what any correct kernel promises.

Each takes a `Kernel` and a `Case` and raises `AssertionError` where the promise is broken; its
docstring gives the domain and says what breaks if it does not hold. `ALL` lists them with the calls
that are drawn for each and with what a kernel must declare to be held to it.
"""

from __future__ import annotations

import dataclasses

from fusedattn.testing.kernel import OPTIONS
from fusedattn.testing.laws import (
    equality,
    gradient_isolation,
    gradients,
    isolation,
    refusal,
    symmetry,
)
from fusedattn.testing.laws.law import (
    BATCHES,
    EDGES,
    FAR,
    POSITIONS,
    SMALL,
    SQUARE,
    Law,
    deterministic,
    gives_lse,
    gradient,
    gradient_float64,
    threads,
    undeclared,
)

_MASKS = ("mask", "bias", "causal", "window_size", "seqused_k", "score_mod", "block_mask")

# What has a law of its own: to equal the reference in calls that have it.
_EACH = (
    *(name for name in OPTIONS if name != "out"),
    "gqa",
    "head_dim_v",
    "leading_axes",
    "zero_size",
    "strides",
)
# A feature is tried together with what it has to work with.
_WITH = {"q_offset": POSITIONS[:3]}

# All of them without "out", which no gradient is written into, and without score_mods, for whose
# gradients no budget is derived (`ALL` says so).
_GRADIENTS: tuple[Law, ...] = (
    Law(gradients.gradients_equal_reference, sizes=SMALL, when=gradient),
    *(
        Law(
            gradients.gradients_equal_reference,
            name,
            needs=(name,),
            focus=(name,),
            any_of=_WITH.get(name, ()),
            sizes=SMALL,
            share=0.3,
            when=gradient,
        )
        for name in _EACH
    ),
    Law(
        gradients.finite_gradients, sizes=SMALL, extreme=True, needs=("full_range",), when=gradient
    ),
    Law(
        gradients.rows_without_keys_pull_nothing_back,
        any_of=_MASKS,
        tame=True,
        sizes=SMALL,
        share=0.5,
        when=gradient,
    ),
    Law(
        gradients.d_lse_is_shared_out,
        needs=("bias", "d_lse", "full_range"),
        without=("bias", "sinks", "alibi_slopes"),
        tame=True,
        sizes=SMALL,
        share=0.3,
        when=gradient,
    ),
    Law(
        gradients.adjoint_identity,
        without=("zero_size", "out_dtype"),
        sizes=SMALL,
        tame=True,
        share=0.3,
        when=gradient_float64,
    ),
    Law(
        gradient_isolation.hidden_entries_do_not_leak_into_gradients,
        needs=("hidden_nan",),
        any_of=_MASKS,
        tame=True,
        sizes=SMALL,
        share=0.5,
        when=gradient,
    ),
    Law(
        gradient_isolation.same_call_same_gradients,
        share=0.3,
        when=lambda kernel: gradient(kernel) or deterministic(kernel),
    ),
    Law(
        gradient_isolation.threads_do_not_matter_to_gradients,
        share=0.3,
        when=lambda kernel: gradient(kernel) or threads(kernel),
    ),
    Law(
        gradient_isolation.gradients_of_batch_items_are_independent,
        without=("dropout_p", "leading_axes"),
        sizes=BATCHES,
        share=0.3,
        when=gradient,
    ),
    Law(
        gradient_isolation.memory_layout_does_not_matter_to_gradients,
        any_of=("strides", "layout"),
        sizes=SMALL,
        share=0.3,
        when=gradient,
    ),
)

ALL: tuple[Law, ...] = (
    Law(refusal.undeclared_keywords_are_refused, tame=True, share=0.02, when=undeclared),
    Law(equality.equals_reference),
    *(
        Law(
            equality.equals_reference,
            name,
            needs=(name,),
            focus=(name,),
            any_of=_WITH.get(name, ()),
            share=0.5,
        )
        for name in _EACH
    ),
    Law(equality.finite_in_finite_out, extreme=True),
    Law(equality.in_hull, without=("dropout_p",), sizes=SMALL),
    Law(
        equality.rows_without_keys,
        any_of=("mask", "bias", "seqused_k", "causal", "window_size"),
        sizes=SMALL,
    ),
    Law(equality.nan_reaches_the_output, without=("dropout_p",), tame=True, sizes=SMALL, share=0.5),
    Law(symmetry.shift_of_all_logits, needs=("bias",), without=("bias",), sizes=SMALL, share=0.5),
    Law(symmetry.order_of_keys, without=(*POSITIONS, "dropout_p"), share=0.5),
    Law(symmetry.every_key_twice, without=(*POSITIONS, "dropout_p"), sizes=SMALL, share=0.5),
    Law(symmetry.split_and_merge, without=("dropout_p",), moves=True, share=0.5, when=gives_lse),
    Law(
        symmetry.groups_equal_repeated_heads, needs=("gqa",), focus=("gqa",), sizes=SMALL, share=0.4
    ),
    Law(symmetry.linear_in_v, sizes=SMALL, share=0.3),
    Law(
        symmetry.later_keys_change_nothing,
        needs=("causal",),
        focus=("causal",),
        without=("dropout_p", "window_size"),
        tame=True,
        share=0.5,
    ),
    Law(symmetry.rows_are_independent, without=("dropout_p", "zero_size"), moves=True, share=0.5),
    Law(isolation.unseen_keys_do_not_matter, needs=("unseen_nan",), any_of=_MASKS),
    Law(isolation.hidden_keys_do_not_leak, needs=("hidden_nan",), any_of=_MASKS),
    Law(
        isolation.batch_items_are_independent,
        without=("dropout_p", "leading_axes"),
        sizes=BATCHES,
        share=0.5,
    ),
    Law(isolation.same_call_same_bits, share=0.5, when=deterministic),
    Law(isolation.earlier_calls_do_not_matter, share=0.5),
    Law(isolation.memory_layout_does_not_matter, any_of=("strides", "layout", "out"), share=0.5),
    Law(isolation.memory_outside_is_not_read, sizes=EDGES, tame=True),
    Law(isolation.only_out_is_written, needs=("out",), focus=("out",), sizes=EDGES, share=0.5),
    Law(
        isolation.far_memory_is_reached,
        needs=("strides",),
        without=("leading_axes", "zero_size", "layout", "out", "strides"),
        sizes=FAR,
        tame=True,
        share=0.08,
    ),
    Law(
        isolation.operands_may_be_one_array,
        without=("gqa", "head_dim_v", "layout", "out", "strides", "zero_size"),
        sizes=SQUARE,
        tame=True,
        share=0.1,
    ),
    Law(isolation.concurrent_calls_do_not_mix, sizes=EDGES, tame=True, share=0.15),
    Law(isolation.threads_do_not_matter, share=0.3, when=threads),
    *(dataclasses.replace(law, without=(*law.without, "out", "score_mod")) for law in _GRADIENTS),
)

__all__ = [
    "ALL",
    "BATCHES",
    "EDGES",
    "SMALL",
    "Law",
    "equality",
    "gradient_isolation",
    "gradients",
    "isolation",
    "refusal",
    "symmetry",
]
