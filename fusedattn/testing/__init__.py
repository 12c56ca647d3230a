"""A property-test kit that judges any attention function.

`check_attention` holds a callable to the laws of attention; the strategies, laws and budgets can be
used alone. Install with ``pip install 'fusedattn[testing]'``.
"""

from fusedattn.testing import adapters, laws
from fusedattn.testing.buffers import PLACEMENTS, Placed
from fusedattn.testing.cases import Answer, Case
from fusedattn.testing.check import check_attention
from fusedattn.testing.compare import assert_within
from fusedattn.testing.gradient_tolerance import backward_budget
from fusedattn.testing.kernel import CAPABILITIES, EVERYTHING, KEYWORDS, Kernel
from fusedattn.testing.literals import unpack
from fusedattn.testing.report import Failure, Outcome, Report
from fusedattn.testing.sizes import Shapes, Sizes
from fusedattn.testing.strategies import (
    attention_problems,
    layouts,
    magnitudes,
    masks,
    shapes,
)
from fusedattn.testing.tolerance import Budget, forward_budget, merge_budget

__all__ = [
    "CAPABILITIES",
    "EVERYTHING",
    "KEYWORDS",
    "PLACEMENTS",
    "Answer",
    "Budget",
    "Case",
    "Failure",
    "Kernel",
    "Outcome",
    "Placed",
    "Report",
    "Shapes",
    "Sizes",
    "adapters",
    "assert_within",
    "attention_problems",
    "backward_budget",
    "check_attention",
    "forward_budget",
    "laws",
    "layouts",
    "magnitudes",
    "masks",
    "merge_budget",
    "shapes",
    "unpack",
]
