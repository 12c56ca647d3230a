"""Products by the matrix unit keep every law, and what it cannot do never shows."""

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import assert_same_bits, attention_on, normal
from hypothesis import settings

from fusedattn import dropout_mask
from fusedattn.cpu import tile
from fusedattn.cpu.tile import FEW_ROWS
from fusedattn.testing import EVERYTHING, PLACEMENTS, Case, Placed
from fusedattn.testing.laws.equality import equals_reference
from fusedattn.testing.suite import make_suite
from cpu_backend import kernel_on

pytestmark = pytest.mark.skipif(
    not tile.host_isa().matrix, reason="this machine has no matrix unit, or the system bars it"
)
TYPES = ("bfloat16", "float16")
each_type = pytest.mark.parametrize("dtype", TYPES)
attention = attention_on(tile.AMX)
EXAMPLES = settings().max_examples // 7

TestMatrix = make_suite(
    attention, supports=EVERYTHING, dtypes=TYPES, bitwise=True, max_examples=EXAMPLES
)
