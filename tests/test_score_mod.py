"""score_mod: what a function may be, what it sees, and that no stale code runs."""

import math
import shutil
import types

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal, python

import fusedattn
from fusedattn import attention
from fusedattn.cpu.user import compiled
from fusedattn.functions import fingerprint
from fusedattn.kernel_files import cache_dir

BACKENDS = ("reference", "blocked", "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
TABLE = normal(9, 4, 200)


def operands(dtype=np.float32, rows=50, keys=70):
    return normal(0, 2, 4, rows, 16), normal(1, 2, 2, keys, 16), normal(2, 2, 2, keys, 12)


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def relative(score, batch, head, q_idx, k_idx, table):
    return score + table[head, k_idx - q_idx + 60] * (batch + 1)


@each_backend
def test_a_score_mod_sees_flat_batch_query_head_row_and_key(backend):
    q, k, v = operands()
    row, key = np.arange(50)[:, None], np.arange(70)
    bias = TABLE[:, key - row + 60] * np.arange(1, 3)[:, None, None, None]
    options = {"return_lse": True, "backend": backend, "causal": True, "q_offset": 5}
    expected = attention(q, k, v, bias=bias.astype(np.float32), **options)
    got = attention(q, k, v, score_mod=relative, score_mod_aux=(TABLE,), **options)
    assert_close(got, expected)
    # Two leading axes: the batch index is flat.
    split = [x.reshape(2, 1, *x.shape[1:]) for x in (q, k, v)]
    parts = attention(*split, score_mod=relative, score_mod_aux=(TABLE,), **options)
    assert_close([x.reshape(got[i].shape) for i, x in enumerate(parts)], got)


@each_backend
def test_the_score_is_scaled_and_comes_before_softcap_alibi_and_bias(backend):
    q, k, v = operands()
    bias, slopes = normal(5, 50, 70), np.array([0.1, 0.2, 0.3, 0.0])
    scores = 0.3 * q.astype(float) @ k.astype(float).repeat(2, 1).swapaxes(-1, -2)
    scores = 5 * np.tanh((scores * 0.5 + 1) / 5) + bias
    distance = np.abs(np.arange(50)[:, None] + 20 - np.arange(70))
    scores -= slopes[:, None, None] * distance
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v.repeat(2, 1)
    out = attention(
        q, k, v, scale=0.3, score_mod=lambda score, b, h, q, k: score * 0.5 + 1, softcap=5.0,
        bias=bias, alibi_slopes=slopes, backend=backend,
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, atol=2e-5)


@each_backend
def test_arguments_with_defaults_and_starred_ones_are_arguments(backend):
    q, k, v = operands()
    for factor in (0.5, 2.0):
        expected = attention(q, k, v, bias=np.float32(factor) * TABLE[0, :70], backend=backend)

        def default(score, batch, head, q_idx, k_idx, table, factor=factor):
            return score + factor * table[0, k_idx]

        def starred(score, *others):
            return score + factor * others[4][0, others[3]]  # noqa: B023

        for function in (default, starred):
            out = attention(q, k, v, score_mod=function, score_mod_aux=(TABLE,), backend=backend)
            np.testing.assert_allclose(out, expected, atol=2e-5)


@each_backend
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "bool"])
def test_small_integers_neither_wrap_nor_saturate(backend, dtype):
    q, k, v = operands()
    table = (np.arange(70) * 37 % 120).astype(dtype)
    wide = table.astype(int)
    bias = (wide[:50, None] - wide) + 3 * (wide[:50, None] + wide)

    def score_mod(score, batch, head, q_idx, k_idx, table):
        difference, total = table[q_idx] - table[k_idx], table[q_idx] + table[k_idx]
        return score + 0.01 * (difference + 3 * total)

    aux = {"score_mod": score_mod, "score_mod_aux": (table,)}
    if dtype == "bool":  # True - True is for numbers alone

        def of_bools(score, batch, head, q_idx, k_idx, table):
            return score + 0.01 * ((k_idx > 5) + (k_idx > 9) + table[k_idx] + (table[k_idx] + True))

        aux["score_mod"] = of_bools
        later = np.arange(70)
        bias = (later > 5).astype(int) + (later > 9) + table + table + 1
    out = attention(q, k, v, **aux, backend=backend)
    expected = attention(q, k, v, bias=0.01 * bias, backend=backend)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def factorial(n):
    return 1.0 if n <= 1 else n * factorial(n - 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda score, b, h, q, k: [score, 1.0][0],
        lambda score, b, h, q, k: math.erf(score),
        lambda score, b, h, q, k: score + 1 / factorial(k % 5),
    ],
    ids=["lists", "calls", "recursion"],
)
def test_the_compiler_says_nothing_where_code_is_no_vector(function, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FUSEDATTN_CACHE_DIR", str(tmp_path))
    compiled._compiled.clear()
    q, k, v = operands()
    attention(q, k, v, score_mod=function, scale=0.1357)
    assert capfd.readouterr() == ("", "")


@each_backend
@pytest.mark.parametrize("later", [{}, {"softcap": 3.0, "bias": normal(3, 50, 70)}])
def test_minus_infinity_hides_a_key_as_a_mask_does(backend, later):
    q, k, v = operands()
    row, key = np.arange(50)[:, None], np.arange(70)
    mask = (row + key) % 3 == 0
    mask[7] = False
    options = {"return_lse": True, "backend": backend, **later}
    k[:, :, 69], v[:, :, 69] = np.nan, np.inf
    v[:, :, 68] = np.nan

    def third(score, batch, head, q_idx, k_idx):
        if k_idx >= 68 or q_idx == 7:
            return -math.inf
        return score if (q_idx + k_idx) % 3 == 0 else -math.inf

    mask[:, 68:] = False
    got = attention(q, k, v, score_mod=third, **options)
    expected = attention(q, k, v, mask=mask, **options)
    assert not np.isnan(got[0]).any()
    assert (got[0][:, :, 7] == 0).all()
    assert (got[1][:, :, 7] == -np.inf).all()
    if backend == "cpu":
        assert_close(got, expected)
    # A key hidden from some rows only does not leak into them.
    v[:, :, 10] = np.nan
    dirty = attention(q, k, v, score_mod=third, **options)
    rows = np.flatnonzero(~mask[:, 10])
    assert_same_bits(
        tuple(x[:, :, rows] for x in dirty), tuple(x[:, :, rows] for x in got)
    ) if backend == "cpu" else assert_close(
        [x[:, :, rows] for x in dirty], [x[:, :, rows] for x in got]
    )
    assert np.isnan(dirty[0][:, :, np.flatnonzero(mask[:, 10])]).all()


@each_backend
def test_what_lies_in_hidden_pairs_is_never_asked_for(backend):
    """A table over the visible distances alone: hidden pairs would index outside of it."""
    q, k, v = operands(rows=70)
    table = normal(4, 70)
    out = attention(
        q, k, v, score_mod=lambda s, b, h, q, k, t: s + t[q - k], score_mod_aux=(table,),
        causal=True, backend=backend,
    )  # fmt: skip
    row, key = np.arange(70)[:, None], np.arange(70)
    expected = attention(q, k, v, bias=table[row - key], causal=True, backend=backend)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64", "int8", "uint16", "int32", "int64", "bool"],
)
def test_aux_arrays_of_every_dtype_and_stride(dtype, rows):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = operands(rows=rows)
    table = (np.arange(4 * 140).reshape(140, 4) % 5 - (dtype[0] in "fi")).astype(kind)
    options = {
        "score_mod": lambda s, b, h, q, k, t, one: s + t[h][k - q] * one[()] if t[h, k] else s,
        "score_mod_aux": (table[::2].T, np.array(2, np.int16)),
    }
    got = attention(q, k, v, backend="cpu", **options)
    np.testing.assert_allclose(got, attention(q, k, v, backend="reference", **options), atol=1e-5)


def scaled(x):
    return x * FACTOR


FACTOR = 0.5
settings = types.ModuleType("settings")
settings.offset = 1.0


def with_helpers(score, batch, head, q_idx, k_idx):
    return scaled(score) + settings.offset


@each_backend
def test_a_changed_constant_is_never_stale(backend, monkeypatch):
    q, k, v = operands()

    def lse(**options):
        return attention(q, k, v, return_lse=True, backend=backend, **options)[1]

    for factor, offset in ((0.5, 1.0), (0.25, 1.0), (0.25, -2.0), (0.5, 1.0)):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        monkeypatch.setattr(settings, "offset", offset)
        expected = lse(scale=0.25 * factor, bias=np.full((1, 1), offset, np.float32))
        np.testing.assert_allclose(lse(score_mod=with_helpers), expected, atol=1e-5)
    closed = 0.5

    def closure(score, batch, head, q_idx, k_idx):
        return score * closed

    for closed in (0.5, 0.125):
        np.testing.assert_allclose(lse(score_mod=closure), lse(scale=0.25 * closed), atol=1e-5)


def test_a_plan_refuses_a_function_that_has_changed(monkeypatch):
    q, k, v = operands()
    plan = fusedattn.plan(q, k, v, score_mod=with_helpers)
    assert_same_bits(plan(q, k, v), attention(q, k, v, score_mod=with_helpers))
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    with pytest.raises(ValueError, match="score_mod, or a number that it reads"):
        plan(q, k, v)


def test_equal_functions_share_what_was_prepared():
    def make(slope):
        return lambda score, batch, head, q_idx, k_idx: score - slope * abs(q_idx - k_idx)

    one, other, third = (fingerprint(make(slope), "score_mod") for slope in (0.5, 0.5, 0.25))
    assert one == other != third
    # Numbers that compare equal may compute something else.
    kinds = {fingerprint(make(slope), "score_mod") for slope in (1, 1.0, True, 0.0, -0.0)}
    assert len(kinds) == 5


CACHED = """
import sys, math
import numpy as np
import fusedattn
from fusedattn.cpu.user import build
SLOPE = float(sys.argv[1])
def away(score, batch, head, q_idx, k_idx, t):
    return score - SLOPE * abs(q_idx - k_idx) + t[k_idx]
if sys.argv[2] == "cached":
    build.score_pass = None
q = np.random.default_rng(0).standard_normal((2, 40, 16), np.float32)
t = np.zeros(40)
out = fusedattn.attention(q, q, q, score_mod=away, score_mod_aux=(t,), backend="cpu")
want = fusedattn.attention(q, q, q, score_mod=away, score_mod_aux=(t,), backend="reference")
assert np.abs(out - want).max() < 1e-5
print(len(list(__import__("pathlib").Path(sys.argv[3]).glob("score_mod-*"))))
"""


def test_code_is_kept_on_disk_under_everything_that_it_depends_on(tmp_path):
    attention(*operands())  # the kernels themselves need not be compiled again
    for path in cache_dir().glob("[!s]*.bin"):
        shutil.copy(path, tmp_path)
    folder = {"FUSEDATTN_CACHE_DIR": tmp_path}
    assert python(CACHED, 0.5, "new", tmp_path, **folder) == "1\n"
    assert python(CACHED, 0.5, "cached", tmp_path, **folder) == "1\n"
    # Another constant in an outer variable, the same code: compiled anew, and right.
    assert python(CACHED, 0.25, "new", tmp_path, **folder) == "2\n"
    assert python(CACHED.replace("- SLOPE", "+ SLOPE"), 0.5, "new", tmp_path, **folder) == "3\n"


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=["last", "softcap"])
def test_threads_and_neighbours_move_no_bit(set_threads, rows, options):
    q, k, v = normal(0, 3, 4, rows, 24), normal(1, 3, 2, 700, 24), normal(2, 3, 2, 700, 24)
    table = normal(3, 4, 900)

    def mod(score, batch, head, q_idx, k_idx, table):
        if (q_idx + k_idx) % 7 == head:
            return -math.inf
        return math.tanh(score) + table[head, 100 + k_idx - q_idx]

    arguments = {"score_mod": mod, "score_mod_aux": (table,), "return_lse": True, **options}
    whole = attention(q, k, v, **arguments)
    for count in (1, 3):
        set_threads(count)
        assert_same_bits(attention(q, k, v, **arguments), whole)
    for i in range(3):
        one = attention(q[i], k[i], v[i], **arguments)
        assert_same_bits(one, tuple(x[i] for x in whole))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exp_and_tanh_are_within_two_units_in_the_last_place(kind):
    rng = np.random.default_rng(0)
    top = 88.0 if kind is np.float32 else 709.0
    x = np.concatenate(
        [rng.uniform(-top, top, 3000), rng.standard_normal(3000), rng.uniform(-1e-3, 1e-3, 999)]
    )
    x = np.concatenate([x, [0.0, -0.0, 1e-30, -1e4, -top * 1.15, np.nan]]).astype(kind)

    def exp(score, batch, head, q_idx, k_idx, x):
        return math.exp(x[q_idx])

    def tanh(score, batch, head, q_idx, k_idx, x):
        return math.tanh(x[q_idx])

    # One key for each row: the score is the value itself, and so is the lse.
    rows, key = np.zeros((1, len(x), 1), kind), np.zeros((1, 1, 1), kind)
    for mod in (exp, tanh):
        lse = attention(rows, key, key, score_mod=mod, score_mod_aux=(x,), return_lse=True)[1][0]
        expected = getattr(np, mod.__name__)(x.astype(np.longdouble))
        finite = np.isfinite(expected)
        error = np.abs(lse[finite] - expected[finite])
        # Beyond its own two units, the way to log2 and back costs the rounding of each product.
        unit = np.finfo(kind).eps
        assert (error <= unit * (3 * np.abs(expected[finite]) + 2)).all()
        assert np.isnan(lse[np.isnan(x)]).all()
