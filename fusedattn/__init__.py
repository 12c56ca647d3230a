"""Exact fused attention for NumPy people.

NumPy arrays in, NumPy arrays out: `attention`, its gradient, and what belongs to them. Importing
this package loads NumPy and `ml_dtypes` alone; the compiler comes with the first call that needs
it.
"""

from fusedattn.api import attention, attention_weights, dropout_mask, explain, plan
from fusedattn.block_mask import BlockMask, make_block_mask
from fusedattn.gradients import attention_backward
from fusedattn.merge import merge
from fusedattn.problem import Gradients, make_problem
from fusedattn.runtime import get_num_threads, set_num_threads, warmup

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "Gradients",
    "__version__",
    "attention",
    "attention_backward",
    "attention_weights",
    "dropout_mask",
    "explain",
    "get_num_threads",
    "make_block_mask",
    "make_problem",
    "merge",
    "plan",
    "set_num_threads",
    "warmup",
]
