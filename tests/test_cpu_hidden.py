"""What a row may not see changes no bit of it; a NaN that it does see always reaches it."""

import numpy as np
import pytest
from cpu_backend import DTYPES, assert_same_bits, attention_on, each_isa, normal, on_every_unit
from cpu_hiding import HIDING, KEYS, ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedattn import attention, dropout_mask
from fusedattn.testing import EVERYTHING, attention_problems
from fusedattn.testing.laws import SMALL
from fusedattn.testing.laws.equality import nan_reaches_the_output
from fusedattn.testing.laws.isolation import hidden_keys_do_not_leak, unseen_keys_do_not_matter

EXAMPLES = settings().max_examples
MASKING = ("mask", "bias", "causal", "window_size", "seqused_k")


@pytest.mark.deep
@settings(max_examples=10 * EXAMPLES)
@given(data=st.data())
def test_hidden_keys_do_not_leak_on_any_vector_unit(data):
    focus = data.draw(st.sampled_from(MASKING))
    case = data.draw(attention_problems(EVERYTHING, DTYPES, focus=(focus,)))
    on_every_unit(hidden_keys_do_not_leak, case)
    on_every_unit(unseen_keys_do_not_matter, case)


@pytest.mark.deep
@settings(max_examples=10 * EXAMPLES)
@given(case=attention_problems(EVERYTHING, DTYPES, without=("dropout_p",), tame=True, sizes=SMALL))
def test_nan_reaches_the_output_on_any_vector_unit(case):
    on_every_unit(nan_reaches_the_output, case)


POISON = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hiding", HIDING)
def test_hidden_poison_changes_no_bit(isa, dtype, hiding):
    options, seen = HIDING[hiding]
    options = {**options, "return_lse": True}
    fn = attention_on(isa)
    q, k, v = (normal(i, 1, n, 24, dtype=dtype) for i, n in enumerate((ROWS, KEYS, KEYS)))
    clean = fn(q, k, v, **options)
    for j in (0, 40, 95, 96, 97, KEYS - 1):
        blind = ~seen[:, j]
        if not blind.any():
            continue
        for value in POISON.values():
            for name in "kv":
                poisoned = {"k": k.copy(), "v": v.copy()}
                poisoned[name][:, j, 5:7] = value
                out, lse = fn(q, **poisoned, **options)
                assert_same_bits(out[:, blind], clean[0][:, blind])
                assert_same_bits(lse[:, blind], clean[1][:, blind])
                if not blind.all() and (name == "v" or np.isnan(value)):
                    assert not np.isfinite(out[:, ~blind, 5:7].astype(np.float32)).any()


@each_isa
def test_poison_in_a_dropped_value_changes_no_bit(isa):
    kept = dropout_mask((1, ROWS, KEYS), 0.5, 9)[0]
    options = {"dropout_p": 0.5, "seed": 9, "return_lse": True, "causal": True}
    fn = attention_on(isa)
    q, k, v = (normal(i, 1, n, 24) for i, n in enumerate((ROWS, KEYS, KEYS)))
    clean = fn(q, k, v, **options)
    for j in (0, 50, 96):
        used = kept[:, j] & (j <= np.arange(ROWS) + KEYS - ROWS)
        poisoned = v.copy()
        poisoned[:, j, 3] = np.nan
        out, lse = fn(q, k, poisoned, **options)
        assert_same_bits(out[:, ~used], clean[0][:, ~used])
        assert_same_bits(lse[:, ~used], clean[1][:, ~used])
        assert np.isnan(out[:, used, 3]).all()


@each_isa
def test_poison_beyond_the_lengths_of_a_batch_changes_no_bit(isa):
    fn, used = attention_on(isa), np.array([0, 1, 96, 97, 150])
    q, k, v = normal(0, 5, 2, 60, 16), normal(1, 5, 1, 150, 16), normal(2, 5, 1, 150, 16)
    options = {"seqused_k": used, "return_lse": True}
    clean = fn(q, k, v, **options)
    for i, n in enumerate(used):
        k[i, :, n:], v[i, :, n:] = np.nan, np.inf
    assert_same_bits(fn(q, k, v, **options), clean)
    for i, n in enumerate(used):
        assert_same_bits(clean[0][i], fn(q[i], k[i, :, :n], v[i, :, :n]))


def test_a_nan_stays_in_its_column():
    """Weights are finite: a NaN in one column of a value concerns that column alone."""
    q, k, v = normal(0, 1, 30, 8), normal(1, 1, 40, 8), normal(2, 1, 40, 8)
    clean = attention(q, k, v)
    v[0, 11, 3] = np.nan
    out = attention(q, k, v)
    assert np.isnan(out[..., 3]).all()
    others = np.arange(8) != 3
    np.testing.assert_allclose(out[..., others], clean[..., others], rtol=1e-5, atol=1e-6)


# Quiet and signalling, either sign, with the low bits of the payload set: arithmetic on the bits of
# an exponent could turn them into numbers.
PAYLOADS = {
    "float32": (0x7FC00000, 0x7FC00001, 0xFFC0ABCD, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
    "float64": (0x7FF8000000000000, 0x7FF8000000000001, 0xFFF80000DEADBEEF, 0x7FF0000000000001,
                0xFFFFFFFFFFFFFFFF),
    "float16": (0x7E00, 0x7E01, 0xFEAB, 0x7C01, 0xFC01, 0x7FFF),
    "bfloat16": (0x7FC0, 0x7FC1, 0xFFCB, 0x7F81, 0xFF81, 0x7FFF),
}  # fmt: skip


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attended_nan_of_any_payload_reaches_the_output(isa, dtype):
    fn = attention_on(isa)
    arrays = [normal(i, 1, n, 9, dtype=dtype) for i, n in enumerate((20, 101, 101))]
    for payload in PAYLOADS[dtype]:
        for index, name in enumerate("qkv"):
            for row in (0, 7, 19):
                operands = [x.copy() for x in arrays]
                operands[index].view(f"u{arrays[0].itemsize}")[0, row, 4] = payload
                out, lse = fn(*operands, return_lse=True)
                if name == "q":
                    assert np.isnan(out[0, row]).all()
                    assert np.isnan(lse[0, row])
                    assert not np.isnan(np.delete(out, row, axis=1)).any()
                elif name == "k":
                    assert np.isnan(out).all()
                    assert np.isnan(lse).all()
                else:
                    assert np.isnan(out[..., 4]).all()
                    assert not np.isnan(lse).any()


@each_isa
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"alibi_slopes": np.ones(1)}, {"scale": 0.0}]
)
def test_no_pass_over_the_scores_loses_a_nan(isa, options):
    q, k, v = normal(0, 1, 20, 9), normal(1, 1, 101, 9), normal(2, 1, 101, 9)
    for payload in PAYLOADS["float32"]:
        k.view(np.uint32)[0, 50, 4] = payload
        out, lse = attention_on(isa)(q, k, v, return_lse=True, causal=True, **options)
        sees = np.arange(20) + 101 - 20 >= 50
        assert np.isnan(out[0, sees]).all()
        assert np.isnan(lse[0, sees]).all()


@each_isa
@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks"])
def test_a_nan_in_an_operand_of_the_scores_reaches_the_output(isa, name):
    q, k, v = normal(0, 3, 20, 9), normal(1, 3, 101, 9), normal(2, 3, 101, 9)
    for payload in PAYLOADS["float32"]:
        value = np.zeros((3, 20, 101) if name == "bias" else 3, np.float32)
        value.view(np.uint32)[(1, 7, 60) if name == "bias" else 1] = payload
        out, lse = attention_on(isa)(q, k, v, return_lse=True, **{name: value})
        row = (1, 7) if name == "bias" else 1
        assert np.isnan(out[row]).all()
        assert np.isnan(lse[row]).all()
        assert not np.isnan(np.delete(out, 1, axis=0)).any()


@each_isa
def test_a_nan_bias_under_a_mask_never_matters(isa):
    q, k, v = normal(0, 1, 20, 9), normal(1, 1, 101, 9), normal(2, 1, 101, 9)
    mask = np.random.default_rng(0).random((20, 101)) < 0.5
    clean = np.where(mask, 0.5, 0.0)
    expected = attention_on(isa)(q, k, v, mask=mask, bias=clean, return_lse=True)
    for value in (np.nan, np.inf, -np.inf):
        other = attention_on(isa)(
            q, k, v, mask=mask, bias=np.where(mask, 0.5, value), return_lse=True
        )
        assert_same_bits(other, expected)


@each_isa
def test_infinite_scores_follow_ieee(isa):
    """A score of -inf weighs 0, one of +inf makes out and lse NaN."""
    q, k, v = np.ones((1, 4, 3), np.float32), normal(1, 1, 101, 3), normal(2, 1, 101, 3)
    q[0, 2] = -1
    for value, nan_rows in ((-np.inf, [0, 0, 1, 0]), (np.inf, [1, 1, 0, 1])):
        nan_rows = np.array(nan_rows, bool)
        k[0, 60, 1] = value
        out, lse = attention_on(isa)(q, k, v, return_lse=True)
        np.testing.assert_array_equal(np.isnan(lse[0]), nan_rows)
        np.testing.assert_array_equal(np.isnan(out[0]).all(-1), nan_rows)
        without = [np.delete(x, 60, axis=1) for x in (k, v)]
        expected, expected_lse = attention(q[:, ~nan_rows], *without, return_lse=True)
        np.testing.assert_allclose(out[:, ~nan_rows], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:, ~nan_rows], expected_lse, rtol=1e-6)


def test_garbage_in_the_values_is_repaired_on_many_rows_at_once():
    """Every row of a large call needs the rescue, on several threads."""
    q, k, v = normal(0, 4, 500, 16), normal(1, 4, 500, 16), normal(2, 4, 500, 16)
    mask = np.ones((500, 500), bool)
    mask[:, ::7] = False
    clean = attention(q, k, v, causal=True, mask=mask)
    k[:, ::7], v[:, ::7] = np.nan, np.nan
    mask[0, 0] = True
    out = attention(q, k, v, causal=True, mask=mask)
    assert np.isnan(out[:, 0]).all()
    assert_same_bits(out[:, 1:], clean[:, 1:])
