"""The law of honest signatures: what a function does not know, it must refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fusedattn.block_mask import BlockMask, make_block_mask
from fusedattn.testing import functions
from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import KEYWORDS, Kernel
from fusedattn.testing.laws.common import assert_equals_reference


def undeclared_keywords_are_refused(kernel: Kernel, case: Case) -> None:
    """A keyword that is not declared raises, or is honoured after all; it is never ignored.

    If this does not hold, ``causal=True`` runs without a mask and nobody notices.
    """
    base = _plain_case(kernel, case.seed)
    for name in sorted(KEYWORDS - kernel.supports):
        for extra in _uses(name, base, kernel):
            asked = base.change(**extra) if name != "out" else base.change(placement=extra)
            # A kernel that always reports its lse is not asked to know the keyword for it.
            honest = dataclasses.replace(kernel, supports=KEYWORDS)
            try:
                answer = honest(asked)
            except AssertionError as wrong:
                raise AssertionError(f"{name} is not declared but accepted: {wrong}") from None
            except Exception:
                continue  # it refused, in whatever words
            try:
                assert_equals_reference(answer, asked)
            except AssertionError as wrong:
                raise AssertionError(
                    f"{name}={next(iter(extra.values()))!r} is not declared and does not raise, "
                    f"but has no or another effect: {wrong}"
                ) from None


def _plain_case(kernel: Kernel, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(kernel.dtypes[0])
    for length, dim in ((5, 4), (8, 8), (16, 16), (64, 64), (128, 64), (128, 128)):
        shape = (2, 2, length, dim)
        q, k, v = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
        case = Case(q, k, v, {"return_lse": True} if kernel.can("return_lse") else {})
        if kernel.domain is None or kernel.domain(case.problem) is None:
            break
    return case


def _tri_blocks(rows: int, keys: int) -> BlockMask:
    aux = (np.arange(rows), np.arange(keys), np.arange(1))
    return make_block_mask(functions.later, None, None, rows, keys, aux=aux, block=(2, 2))


def _uses(name: str, case: Case, kernel: Kernel) -> list[dict[str, Any]]:
    """Return uses of a keyword that change the result of the case."""
    problem = case.problem
    heads, rows, keys = problem.num_heads, problem.seqlen_q, problem.seqlen_k
    mask = np.tri(rows, keys, dtype=np.bool_)
    mask[0, 0] = False
    causal = {"causal": True} if kernel.can("causal") else {"window_size": (None, 0)}
    uses: dict[str, list[dict[str, Any]]] = {
        "scale": [{"scale": 3.0}],
        "causal": [{"causal": True}],
        "window_size": [{"window_size": (1, 1)}],
        "q_offset": [{"q_offset": 1, **causal}],
        "seqused_q": [{"seqused_q": rows - 2}],
        "seqused_k": [{"seqused_k": keys - 2}],
        "mask": [{"mask": mask}],
        "bias": [{"bias": np.where(mask, np.float32(0.5), np.float32(-2.0))}],
        "alibi_slopes": [{"alibi_slopes": np.full(heads, 0.5, np.float32)}],
        "softcap": [{"softcap": 0.25}],
        "score_mod": [functions.draw_score_mod(case.rng, problem.batch_size, rows, keys)],
        "block_mask": [{"block_mask": _tri_blocks(rows, keys)}],
        "sinks": [{"sinks": np.ones(heads, np.float32)}],
        "dropout_p": [{"dropout_p": 0.5, "seed": 7}],
        "layout": [{"layout": "bshd"}],
        "out": [{"out": "plain"}],
        "return_lse": [] if kernel.returns_lse else [{"return_lse": True}],
        "out_dtype": [{"out_dtype": np.float32}] if case.q.dtype.itemsize != 4 else [],
    }
    return uses.get(name, [])
