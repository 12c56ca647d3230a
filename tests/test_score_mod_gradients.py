"""Gradients through a score_mod, to its score and to its arrays, and past a block mask."""

import math

import ml_dtypes
import numpy as np
import pytest
from cpu_backend import assert_same_bits, normal

from fusedattn import attention, attention_backward, make_block_mask
from fusedattn.functions import user_function
from fusedattn.pointwise import evaluate
from fusedattn.slopes import d_score

each_backend = pytest.mark.parametrize("backend", ["reference", "blocked", "cpu"])


def bucket(distance):
    if distance < 4:
        return distance
    return min(9, 4 + int(math.log(distance / 4)))


def winding(score, batch, head, q_idx, k_idx, table, gain, document):
    if document[k_idx] == 2 and q_idx % 2:
        return -math.inf
    bent = math.tanh(score) * gain[batch] + table[head][bucket(abs(q_idx - k_idx))]
    return max(bent, 0.3 * score) if q_idx < k_idx else bent * table[head, 0] + score


def operands(kind=np.float64):
    q, k, v = normal(0, 2, 4, 9, 5), normal(1, 2, 2, 13, 5), normal(2, 2, 2, 13, 3)
    aux = (normal(3, 4, 10).astype(kind), normal(4, 2).astype(kind), np.arange(13) // 3)
    return [x.astype(kind) for x in (q, k, v)], aux


OPTIONS = {
    "alone": {},
    "all": {
        "softcap": 2.0,
        "causal": True,
        "q_offset": 6,
        "alibi_slopes": np.array([0.1, 0.2, 0.0, 0.3]),
        "sinks": np.array([0.1, -1.0, 0.5, 0.0]),
        "dropout_p": 0.3,
        "seed": 7,
        "bias": normal(8, 4, 9, 13).astype(np.float64),
    },
    "blocks": {
        "block_mask": make_block_mask(
            lambda b, h, q, k: (q + k) % 5 < 4, None, None, 9, 13, block=(2, 4)
        )
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_backend
@each_option
def test_gradients_are_the_limits_of_differences(backend, options):
    (q, k, v), aux = operands()
    options = {**options, "score_mod": winding}
    d_out, d_lse = normal(5, 2, 4, 9, 3).astype(float), normal(6, 2, 4, 9).astype(float)

    def loss(q, k, v, aux):
        out, lse = attention(
            q, k, v, score_mod_aux=aux, return_lse=True, backend=backend, **options
        )
        return (d_out * out).sum() + (d_lse * np.where(np.isfinite(lse), lse, 0)).sum()

    out, lse = attention(q, k, v, score_mod_aux=aux, return_lse=True, backend=backend, **options)
    found = attention_backward(
        d_out, q, k, v, out, lse, d_lse=d_lse, score_mod_aux=aux, backend=backend, **options
    )
    assert found.d_score_mod_aux[2] is None
    pairs = [(x, d) for x, d in zip((q, k, v), found[:3], strict=True)]
    pairs += list(zip(aux[:2], found.d_score_mod_aux[:2], strict=True))
    rng = np.random.default_rng(0)
    for array, gradient in pairs:
        assert gradient.shape == array.shape
        assert gradient.dtype == array.dtype
        for _ in range(6):
            move = rng.standard_normal(array.shape)
            step, before = 1e-6, array.copy()
            array[...] = before + step * move
            above = loss(q, k, v, aux)
            array[...] = before - step * move
            below = loss(q, k, v, aux)
            array[...] = before
            np.testing.assert_allclose(
                (above - below) / (2 * step), (gradient * move).sum(), rtol=2e-6, atol=2e-8
            )


@each_backend
def test_a_table_of_positions_has_the_gradient_of_the_bias_it_stands_for(backend):
    """T5's bias by distance: its gradient is that of the dense bias, added up by distance."""
    q, k, v = normal(0, 2, 4, 60, 8), normal(1, 2, 2, 60, 8), normal(2, 2, 2, 60, 8)
    table = normal(3, 4, 119)
    row, key = np.arange(60)[:, None], np.arange(60)
    bias = table[:, row - key + 59]
    out, lse = attention(q, k, v, bias=bias, causal=True, return_lse=True)
    d_out = normal(4, *out.shape)
    dense = attention_backward(d_out, q, k, v, out, lse, bias=bias, causal=True, backend=backend)
    found = attention_backward(
        d_out, q, k, v, out, lse, causal=True, backend=backend, score_mod_aux=(table,),
        score_mod=lambda score, b, h, q, k, table: score + table[h, q - k + 59],
    )  # fmt: skip
    expected = np.zeros((4, 119))
    np.add.at(expected, (slice(None), row - key + 59), dense.d_bias)
    np.testing.assert_allclose(found.d_score_mod_aux[0], expected, atol=2e-5)
    for one, other in zip(found[:3], dense[:3], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@each_backend
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_gradients_to_tables_of_every_float_dtype(backend, kind):
    q = normal(0, 2, 30, 8)
    table = normal(3, 59).astype(kind)
    arguments = {"score_mod": lambda s, b, h, q, k, t: s + t[q - k + 29], "score_mod_aux": (table,)}
    out, lse = attention(q, q, q, return_lse=True, **arguments)
    d_out = normal(4, *out.shape)
    found, again = (
        attention_backward(d_out, q, q, q, out, lse, backend=backend, **arguments).d_score_mod_aux[
            0
        ]
        for _ in range(2)
    )
    assert_same_bits(found, again)
    assert found.dtype == kind
    wide = {**arguments, "score_mod_aux": (table.astype(np.float64),)}
    expected = attention_backward(d_out, q, q, q, out, lse, backend="reference", **wide)
    unit = float(ml_dtypes.finfo(kind).eps)
    np.testing.assert_allclose(
        found.astype(float), expected.d_score_mod_aux[0], rtol=unit, atol=1e-5
    )


@each_backend
def test_the_users_own_derivative_is_taken(backend):
    q = normal(0, 2, 30, 8)
    calls = {"score_mod": lambda score, b, h, q, k: 3.0 * math.sin(score)}
    out, lse = attention(q, q, q, return_lse=True, **calls)
    d_out = normal(4, *out.shape)
    arguments = (d_out, q, q, q, out, lse)
    expected = attention_backward(*arguments, backend=backend, **calls)
    given = attention_backward(
        *arguments,
        backend=backend,
        score_mod_grad=lambda score, b, h, q, k: 3.0 * math.cos(score),
        **calls,
    )
    for one, other in zip(given[:3], expected[:3], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    other = attention_backward(
        *arguments, backend=backend, score_mod_grad=lambda score, b, h, q, k: 0.0, **calls
    )
    assert not other.d_q.any()
    assert other.d_v.any()


UNARY = {
    "exp": (-2, 2),
    "expm1": (-2, 2),
    "log": (0.1, 3),
    "log2": (0.1, 3),
    "log10": (0.1, 3),
    "log1p": (-0.9, 3),
    "sqrt": (0.1, 3),
    "sin": (-3, 3),
    "cos": (-3, 3),
    "tan": (-1, 1),
    "asin": (-0.9, 0.9),
    "acos": (-0.9, 0.9),
    "atan": (-3, 3),
    "sinh": (-2, 2),
    "cosh": (-2, 2),
    "tanh": (-2, 2),
    "asinh": (-2, 2),
    "acosh": (1.1, 3),
    "atanh": (-0.9, 0.9),
    "fabs": (-2, 2),
    "floor": (0.1, 0.9),
    "cbrt": (0.1, 2),
    "exp2": (-2, 2),
}
BINARY = {
    "divide": lambda x: (2.0 + x) / (3.0 - x),
    "power": lambda x: (2.0 + x) ** (1.5 * x),
    "square": lambda x: x**2 - x**3,
    "remainder": lambda x: x % 0.7,
    "negative": lambda x: -x + +x * 2,
    "hypot": lambda x: math.hypot(x, 2.0 * x + 1.0),
    "atan2": lambda x: math.atan2(x, 1.0 + x * x),
    "maximum": lambda x: np.maximum(x, 0.1) + np.minimum(x, 0.5 * x),
    "abs": lambda x: abs(x) * x,
    "where": lambda x: np.where(x > 0.2, x * x, 2.0 * x),
    "clip": lambda x: np.clip(x, -0.4, 0.5),
    "conditional": lambda x: x * x if x > 0.1 else 1.0,
    "copysign": lambda x: math.copysign(x, -1.0),
    "reciprocal": lambda x: 1 / (2 + x),
    "float": lambda x: float(x) * int(3.7),
}


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_the_rules_of_dual_numbers_are_the_limits_of_differences(name):
    low, high = UNARY.get(name, (-0.93, 0.97))
    if name in UNARY:
        of_math = getattr(math, name, None)
        if of_math is None:
            pytest.skip(f"math.{name} is newer than this Python")
        inner = of_math

        def f(score, batch, head, q_idx, k_idx):
            return inner(score) * 2.0
    else:
        rule = BINARY[name]

        def f(score, batch, head, q_idx, k_idx):
            return rule(score)

    scores = np.random.default_rng(0).uniform(low, high, 200)
    where = np.zeros((4, 200), np.int64)
    function = user_function("score_mod", f, ())
    step = 1e-6
    above, below = (evaluate(function, scores + move, *where) for move in (step, -step))
    # Jumps of floor, remainder and conditions are not looked at.
    smooth = np.abs(above - below) < 1e-3
    assert smooth.mean() > 0.9
    expected = ((above - below) / (2 * step))[smooth]
    np.testing.assert_allclose(
        d_score(function, None, scores, *where)[smooth], expected, rtol=1e-6, atol=1e-6
    )


def test_what_cannot_be_differentiated_asks_for_its_derivative():
    q = normal(0, 2, 5, 4)
    arguments = {"score_mod": lambda score, b, h, q, k: math.gamma(abs(score) + 1.0)}
    out, lse = attention(q, q, q, return_lse=True, **arguments)
    with pytest.raises(
        TypeError, match=r"score_mod <lambda> .*cannot be differentiated.*score_mod_grad"
    ):
        attention_backward(out, q, q, q, out, lse, backend="reference", **arguments)
    with pytest.raises(TypeError, match=r"score_mod_grad .*must take the 5 arguments"):
        attention_backward(out, q, q, q, out, lse, score_mod_grad=lambda score: 1.0, **arguments)
    with pytest.raises(ValueError, match="score_mod_grad must be None without"):
        attention_backward(out, q, q, q, out, lse, score_mod_grad=lambda s, b, h, q, k: 1.0)


@each_backend
def test_hidden_pairs_and_weights_of_zero_take_nothing_back(backend):
    q, k, v = normal(0, 1, 20, 4), normal(1, 1, 20, 4), normal(2, 1, 20, 4)
    k[:, 15:] = np.nan
    arguments = {
        "score_mod": lambda s, b, h, q, k, t: s * t[q] if k < 15 else -math.inf,
        "score_mod_aux": (normal(3, 20),),
    }
    v[:, 15:] = np.inf
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    found = attention_backward(
        normal(4, *out.shape), q, k, v, out, lse, backend=backend, **arguments
    )
    for gradient in (*found[:3], found.d_score_mod_aux[0]):
        assert np.isfinite(gradient).all()
    assert not found.d_k[:, 15:].any()
    assert not found.d_v[:, 15:].any()


COMPILED = {
    "arithmetic": lambda x: (2.0 + x) / (9.0 - x) * -x + +x,
    "power": lambda x: (9.0 + x) ** 1.5 + x**2,
    "exponentials": lambda x: math.exp(-x) + math.expm1(x) * math.log(9.0 + x) + math.log1p(x * x),
    "waves": lambda x: math.sin(x) * math.cos(x) + math.tanh(x) + math.atan(x) + math.sqrt(9.0 + x),
    "numpy": lambda x: (
        np.exp(-x) + np.tanh(x) * np.maximum(x, 0.1) + np.minimum(x, 0.5) + np.abs(x)
    ),
    "where": lambda x: np.where(x > 0.2, x * x, 2.0 * x),
    "branches": lambda x: x * x if x >= 0.1 else (1.0 if x < -0.5 else 3.0 * max(x, -0.2)),
    "abs": lambda x: abs(x) + math.fabs(x - 1.0) + min(x, 0.3) + float(x),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_dual_numbers_are_those_of_numpy(name):
    rule, kind = COMPILED[name], np.float32 if name == "numpy" else np.float64
    q, k, v = (normal(i, 1, 40, 6).astype(kind) for i in range(3))
    arguments = {
        "score_mod": lambda score, b, h, q, k, t: rule(score) + rule(t[q]) * score,
        "score_mod_aux": (normal(3, 40).astype(kind),),
        "backend": "cpu",
    }
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    d_out = normal(4, *out.shape).astype(kind)
    found = attention_backward(d_out, q, k, v, out, lse, **arguments)
    expected = attention_backward(d_out, q, k, v, out, lse, **{**arguments, "backend": "reference"})
    atol = 1e-4 if kind is np.float32 else 1e-11
    pairs = [*zip(found[:3], expected[:3], strict=True)]
    for one, other in [*pairs, (found.d_score_mod_aux[0], expected.d_score_mod_aux[0])]:
        np.testing.assert_allclose(one, other, rtol=atol, atol=atol)


@each_backend
def test_a_function_may_ask_how_long_the_tables_are_that_it_is_differentiated_by(backend):
    q = normal(0, 2, 6, 4)
    aux = (normal(3, 2, 9), normal(4, 5))
    d_out = normal(5, 2, 6, 4)

    def asks(score, b, h, q_idx, k_idx, table, gain):
        return score * gain[k_idx % len(gain)] + table[h][q_idx % table.shape[1]] * table.ndim

    def knows(score, b, h, q_idx, k_idx, table, gain):
        return score * gain[k_idx % 5] + table[h][q_idx % 9] * 2

    def gradients(score_mod):
        arguments = {"score_mod": score_mod, "score_mod_aux": aux}
        out, lse = attention(q, q, q, return_lse=True, **arguments)
        d_lse = normal(6, *lse.shape)
        return attention_backward(
            d_out, q, q, q, out, lse, d_lse=d_lse, backend=backend, **arguments
        )

    found, expected = gradients(asks), gradients(knows)
    assert np.abs(expected.d_score_mod_aux[0]).max() > 0.1
    pairs = zip(found.d_score_mod_aux, expected.d_score_mod_aux, strict=True)
    for one, other in [*pairs, *zip(found[:3], expected[:3], strict=True)]:
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_threads_and_blocks_of_keys_move_no_bit_of_the_gradients(set_threads):
    q, k, v = normal(0, 3, 4, 200, 24), normal(1, 3, 2, 900, 24), normal(2, 3, 2, 900, 24)
    table, gain = normal(3, 4, 1200), normal(4, 3)
    arguments = {
        "score_mod": lambda s, b, h, q, k, table, gain: s * gain[b] + table[h][k - q + 200],
        "score_mod_aux": (table, gain),
    }
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    d_out = normal(5, *out.shape)
    results = []
    for count in (1, 2, 3, 3):
        set_threads(count)
        found = attention_backward(d_out, q, k, v, out, lse, backend="cpu", **arguments)
        results.append((*found[:3], *found.d_score_mod_aux))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    expected = attention_backward(d_out, q, k, v, out, lse, backend="blocked", **arguments)
    for one, other in zip(results[0][3:], expected.d_score_mod_aux, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3, rtol=1e-4)


def test_a_backend_says_which_function_it_cannot_differentiate():
    q = normal(0, 2, 6, 4)
    arguments = {"score_mod": lambda score, b, h, q, k: math.atan2(score, 2.0)}
    out, lse = attention(q, q, q, return_lse=True, **arguments)
    with pytest.raises(NotImplementedError, match=r"cpu: score_mod <lambda> .*score_mod_grad"):
        attention_backward(out, q, q, q, out, lse, backend="cpu", **arguments)
    found = attention_backward(out, q, q, q, out, lse, **arguments)
    given = attention_backward(
        out, q, q, q, out, lse, backend="cpu",
        score_mod_grad=lambda score, b, h, q, k: 2.0 / (4.0 + score * score), **arguments,
    )  # fmt: skip
    for one, other in zip(given[:3], found[:3], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
