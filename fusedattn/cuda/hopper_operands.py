"""What the Hopper kernel is given for the features of scores: from a problem to its parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn.cuda import user
from fusedattn.cuda.hopper_scores import PLACES, Features
from fusedattn.problem import AttentionProblem, batch_offsets

Array = NDArray[Any]

# Operands by the kernels' names, in the order of the parameters.
OPERANDS = ("mask", "bias", "slopes", "sinks")
# Factors of scores, and caps, are taken from 2**-LIMIT to 2**LIMIT: nothing leaves float32.
_LIMIT = 60


def operands_of(problem: AttentionProblem) -> dict[str, Array | None]:
    """Return the operands of scores by the kernels' names."""
    return {
        "mask": problem.mask,
        "bias": problem.bias,
        "slopes": problem.alibi_slopes,
        "sinks": problem.sinks,
    }


def features_of(problem: AttentionProblem) -> Features:
    """Return what the kernel is compiled for."""

    def name(array: Array | None) -> str | None:
        return None if array is None else array.dtype.name

    return Features(
        softcap=problem.softcap is not None,
        slopes=name(problem.alibi_slopes),
        sinks=name(problem.sinks),
        bias=name(problem.bias),
        bias_pairs=problem.bias is not None and _in_pairs(problem.bias, 2),
        mask=problem.mask is not None,
        mask_pairs=problem.mask is not None and _in_pairs(problem.mask, 1),
        dropout=problem.dropout_p > 0.0,
        functions=user.functions_of(problem),
    )


def _in_pairs(array: Array, itemsize: int) -> bool:
    """Whether an even key and the next lie side by side in one aligned word."""
    address: int = array.__array_interface__["data"][0]
    *others, last = array.strides
    return (
        array.itemsize == last == itemsize
        and address % (2 * itemsize) == 0
        and all(stride % (2 * itemsize) == 0 for stride in others)
    )


def unsupported(problem: AttentionProblem) -> list[str]:
    """Reasons why the kernel does not take the features of a problem."""
    reasons = []
    if problem.block_mask is not None and problem.block_mask.kinds.size >= 2**31:
        reasons.append("block_mask has 2**31 blocks or more")
    if problem.softcap is not None and not 2.0**-_LIMIT < problem.softcap < 2.0**_LIMIT:
        reasons.append("softcap is far from 1")
    return reasons


def place_table(problem: AttentionProblem) -> NDArray[np.int64]:
    """Where the operands of each item of the batch begin; see `hopper_scores.PLACES`."""
    table = np.zeros((problem.batch_size, len(PLACES)), np.int64)
    for name, array in operands_of(problem).items():
        if array is not None:
            inner = 3 if name in ("mask", "bias") else 1
            steps = array.strides[:-inner] or (0,) * len(problem.batch_shape)
            table[:, PLACES.index(name)] = batch_offsets(problem.batch_shape, steps)
    return table


def numbers_of(problem: AttentionProblem) -> tuple[int | float, ...]:
    """Strides in bytes, dropout's threshold and seed, and factors."""
    strides: list[int] = []
    for name, array in operands_of(problem).items():
        axes = 3 if name in ("mask", "bias") else 1
        strides += (0,) * axes if array is None else array.strides[-axes:]
    threshold = int(problem.dropout_p * 2.0**32)
    words = (threshold, problem.seed & 0xFFFFFFFF, problem.seed >> 32)
    softcap = problem.softcap or 1.0
    return (
        *strides,
        *(word - 2**32 if word >= 2**31 else word for word in words),
        *(problem.scale, softcap, 1.0 / softcap, 1.0 / (1.0 - problem.dropout_p)),
    )


def exponent_factor(problem: AttentionProblem, features: Features) -> float:
    """Return what a score is multiplied by to become an exponent of 2."""
    return (1.0 if features.natural else problem.scale) / math.log(2.0)
