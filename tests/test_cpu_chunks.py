"""Few rows against many keys: the keys go in chunks, wherever each chunk is computed."""

import numpy as np
import pytest
from cpu_backend import DTYPES, assert_same_bits, attention_on, each_isa, normal, python

from fusedattn import attention
from fusedattn.cpu.backend import CPU
from fusedattn.cpu.compile import get_worker
from fusedattn.cpu.lowering import address_of
from fusedattn.cpu.tile import CHUNK_KEYS
from fusedattn.problem import make_problem
from fusedattn.reference import forward
from fusedattn.testing import assert_within, forward_budget

KEYS = 2 * CHUNK_KEYS + 130
OPTIONS = {
    "full": {},
    "window": {"window_size": (CHUNK_KEYS, None), "q_offset": KEYS - 30},
    "lengths": {"seqused_k": CHUNK_KEYS + 1},
    "second_chunk_hidden": {"mask": np.arange(KEYS) // CHUNK_KEYS != 1},
    "scores": {"softcap": 5.0, "bias": 30 * normal(4, KEYS), "sinks": np.array([1.0, -2.0, 0, 9])},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "exact": {"scale": 2.0**101},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def operands(dtype="float32", batch=1, rows=2, keys=KEYS):
    shapes = (4, rows, 40), (1, keys, 40), (1, keys, 33)
    # Keys so large that the maximum grows from chunk to chunk for some rows, and not for others.
    arrays = [normal(i, batch, *shape) for i, shape in enumerate(shapes)]
    return [(x * (4 if i == 1 else 1)).astype(dtype) for i, x in enumerate(arrays)]


@pytest.mark.parametrize("dtype", DTYPES)
@each_option
def test_chunks_fold_to_what_the_reference_says(dtype, options):
    q, k, v = operands(dtype)
    problem = make_problem(q, k, v, **options, return_lse=True)
    expected, budget = forward(problem), forward_budget(problem)
    out, lse = attention(q, k, v, **options, return_lse=True)
    assert_within(out, expected.out, budget.out)
    assert_within(lse, expected.lse, budget.lse)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@each_option
def test_who_computes_a_chunk_moves_no_bit(set_threads, dtype, options):
    arrays = operands(dtype)
    results = []
    for count in (1, 2, 3, 16):
        set_threads(count)
        results += [attention(*arrays, **options, return_lse=True) for _ in range(3)]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@each_isa
def test_a_long_batch_item_keeps_its_bits_among_many(isa):
    """Few items are shared out by chunks, many are not."""
    fn = attention_on(isa)
    q, k, v = operands(batch=9)
    lengths = np.array([KEYS, 1, 0, 30, CHUNK_KEYS, CHUNK_KEYS + 1, 3, 3, 3])
    together = fn(q, k, v, seqused_k=lengths, return_lse=True)
    for i, length in enumerate(lengths):
        alone = fn(*(x[i : i + 1] for x in (q, k, v)), seqused_k=int(length), return_lse=True)
        assert_same_bits(alone, [x[i : i + 1] for x in together])
    assert (together[0][2] == 0).all()
    assert (together[1][2] == -np.inf).all()


@each_isa
def test_keys_that_are_there_but_not_used_move_no_bit(isa):
    fn = attention_on(isa)
    q, k, v = operands()
    for length in (1, CHUNK_KEYS - 1, CHUNK_KEYS, CHUNK_KEYS + 1):
        expected = fn(q, k[:, :, :length], v[:, :, :length], return_lse=True)
        assert_same_bits(fn(q, k, v, seqused_k=length, return_lse=True), expected)


RESCUE = """
import numpy as np, fusedattn
from fusedattn.cpu.compile import known_rescue
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 2, 2, 64), np.float32)
k, v = rng.standard_normal((2, 1, 1, 5000, 64), np.float32)
mask = np.ones((2, 5000), bool)
mask[1, [7, 4900]] = False
clean = fusedattn.attention(q, k, v, mask=mask)
v[..., [7, 4900], :] = np.nan
assert known_rescue() is None
for _ in range(2):
    out = fusedattn.attention(q, k, v, mask=mask)
    assert np.isnan(out[:, :, 0]).all()
    assert out[:, :, 1].tobytes() == clean[:, :, 1].tobytes()
    assert known_rescue() is not None
"""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_hidden_nan_does_not_leak_through_any_chunk(tmp_path, count):
    """The first row that needs the rescue starts the call over, counts of chunks included."""
    python(RESCUE, FUSEDATTN_NUM_THREADS=count)


def test_a_call_that_starts_over_forgets_how_many_chunks_were_done():
    """Or an item would be folded while one of its states is still to come."""
    q, k, v = operands()
    problem = make_problem(q, k, v)
    out, expected = problem.empty_out(), attention(q, k, v)
    template = CPU.prepare(problem)._template
    bound = template.bind((q, k, v, out, None, None, None), None, None, None, (), split=True)
    scratch = np.empty(template.scratch_bytes + 64, np.uint8)
    for _ in range(2):
        out.fill(np.nan)
        get_worker()(bound.address, -(-address_of(scratch) // 64) * 64)
        assert_same_bits(out, expected)
        assert bound._counts.tolist() == [template.chunks] * template.items
        bound.start_over()
        assert bound._counts.tolist() == [0] * template.items
