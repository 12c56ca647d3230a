"""Mistakes in a function of the user's are told as such: its name, its line, and what is wrong."""

import inspect
import math
import random

import numpy as np
import pytest

from fusedattn import attention, make_block_mask

Q = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float32)
TABLE = np.zeros(4)
NUMBERS = [1.0, 2.0]


class Thing:
    x = 1.0


thing = Thing()


def nothing(score, batch, head, q_idx, k_idx):
    pass


def nothing_sometimes(score, batch, head, q_idx, k_idx):
    if q_idx > k_idx:
        return score


def text(score, batch, head, q_idx, k_idx):
    return "x"


def complex_number(score, batch, head, q_idx, k_idx):
    return score * 1j


def truth(score, batch, head, q_idx, k_idx):
    return q_idx > k_idx


def unknown_attribute(score, batch, head, q_idx, k_idx):
    y = score + 1
    return y.foo


def unknown_name(score, batch, head, q_idx, k_idx):
    return score + undefined  # noqa: F821


def an_object(score, batch, head, q_idx, k_idx):
    return score + thing.x


def an_outer_array(score, batch, head, q_idx, k_idx):
    return score + TABLE[q_idx]


def an_outer_list(score, batch, head, q_idx, k_idx):
    return score + NUMBERS[0]


def an_outer_class(score, batch, head, q_idx, k_idx):
    return score + Thing.x


def chance(score, batch, head, q_idx, k_idx):
    return score + random.random()


def chance_of_numpy(score, batch, head, q_idx, k_idx):
    return score + np.random.rand()  # noqa: NPY002


def output(score, batch, head, q_idx, k_idx):
    print(score)
    return score


def by_name(score, batch, head, q_idx, k_idx, *, factor=2.0):
    return score * factor


def half_power(head):
    return 2 ** -(head + 1)


def integer_power(score, batch, head, q_idx, k_idx):
    slope = half_power(head)
    return score - slope * (q_idx - k_idx) ** 2


def an_exception(score, batch, head, q_idx, k_idx):
    if q_idx > k_idx:
        raise ValueError("no")
    return score


def missing_argument(score, batch, head, q_idx, k_idx):
    return math.hypot(score)


def too_many_indices(score, batch, head, q_idx, k_idx, table):
    return score + table[q_idx, k_idx]


def assignment(score, batch, head, q_idx, k_idx, table):
    table[0] = 1.0
    return score


def too_few_parameters(score, batch, head, q_idx):
    return score


MISTAKES = {
    nothing: (TypeError, "must return a real number, but returned none"),
    nothing_sometimes: (TypeError, "must return a real number, but returned"),
    text: (TypeError, "must return a real number, but returned"),
    complex_number: (TypeError, "must return a real number, but returned complex"),
    truth: (TypeError, "must return a real number, but returned bool"),
    unknown_attribute: (TypeError, "line {last}.*foo"),
    unknown_name: (NameError, "undefined"),
    an_object: (TypeError, r"reads thing, which is of type .*Thing"),
    an_outer_array: (TypeError, "reads TABLE, which is an array .* pass it as an array in aux"),
    an_outer_list: (TypeError, "reads NUMBERS, which is .*list.* pass it as an array in aux"),
    an_outer_class: (TypeError, "reads Thing, which is of type"),
    chance: (TypeError, r"reads random.random, which is"),
    chance_of_numpy: (TypeError, r"reads np.random.rand, which is"),
    output: (TypeError, "prints, which a kernel cannot"),
    by_name: (TypeError, "must take the 5 arguments .* takes factor by name alone"),
    integer_power: (TypeError, "power"),
    an_exception: (TypeError, "raises an exception"),
    missing_argument: (TypeError, "line {last}.*hypot"),
    too_many_indices: ((TypeError, IndexError), "line {last}"),
    assignment: (TypeError, "line {second}"),
    too_few_parameters: (TypeError, "must take the 5 arguments"),
}


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
@pytest.mark.parametrize("function", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_names_the_function_its_line_and_what_is_wrong(function, backend):
    kind, message = MISTAKES[function]
    lines, first = inspect.getsourcelines(function)
    message = message.format(last=first + len(lines) - 1, second=first + 1)
    aux = (TABLE,) if "table" in inspect.signature(function).parameters else ()
    with pytest.raises(kind, match=f"(?is){message}") as caught:
        attention(Q, Q, Q, score_mod=function, score_mod_aux=aux, backend=backend)
    told = str(caught.value)
    assert f"score_mod {function.__name__}" in told
    assert f'File "{__file__}", line {first}' in told
    # Not Numba's stack, nor ours.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert len(told) < 600


@pytest.mark.parametrize("value", [3, "x", Thing(), math.sin, Thing.__init__])
def test_what_is_no_python_function_is_refused(value):
    with pytest.raises(TypeError, match="score_mod must be a Python function"):
        attention(Q, Q, Q, score_mod=value)


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (TABLE, "score_mod_aux must be a tuple of arrays"),
        ((1.0,), r"score_mod_aux\[0\] must be a numpy.ndarray"),
        ((TABLE, TABLE.astype(complex)), r"score_mod_aux\[1\] must have dtype"),
        ((TABLE.astype(">f4"),), "byte order"),
        ((np.array(["x"]),), "must have dtype"),
    ],
)
def test_aux_arrays_are_checked(aux, message):
    with pytest.raises(TypeError, match=message):
        attention(Q, Q, Q, score_mod=lambda score, b, h, q, k, *t: score, score_mod_aux=aux)


def test_aux_without_a_function_is_refused():
    with pytest.raises(ValueError, match="score_mod_aux"):
        attention(Q, Q, Q, score_mod_aux=(TABLE,))


@pytest.mark.parametrize("aux", [None, 5, TABLE])
def test_aux_is_a_tuple_without_a_function_too(aux):
    with pytest.raises(TypeError, match="score_mod_aux must be a tuple of arrays"):
        attention(Q, Q, Q, score_mod_aux=aux)


def test_out_may_not_overlap_an_aux_array():
    out = np.zeros((2, 8, 4), np.float32)
    for _ in range(2):  # when the call is planned, and by the plan
        with pytest.raises(ValueError, match=r"out .* shares memory with score_mod_aux\[0\]"):
            attention(
                Q, Q, Q, score_mod=lambda score, b, h, q, k, t: score + t[b, q, k],
                score_mod_aux=(out,), out=out,
            )  # fmt: skip


def outside(score, batch, head, q_idx, k_idx, table):
    return score + table[q_idx + k_idx]


def test_an_index_outside_is_told_in_checked_mode_and_harmless_otherwise(monkeypatch):
    table = np.arange(10.0)
    held = table[np.minimum(np.add.outer(np.arange(8), np.arange(8)), 9)]
    out = attention(Q, Q, Q, score_mod=outside, score_mod_aux=(table,), backend="cpu")
    np.testing.assert_allclose(out, attention(Q, Q, Q, bias=held), atol=1e-5)
    empty = np.zeros(0)
    attention(Q, Q, Q, score_mod=outside, score_mod_aux=(empty,), backend="cpu")

    monkeypatch.setenv("FUSEDATTN_CHECK_INDICES", "1")
    line = inspect.getsourcelines(outside)[1]
    message = rf"score_mod outside .*line {line}\) failed in line {line + 1} .*q_idx 2, k_idx 8|7"
    with pytest.raises(IndexError, match=message):
        attention(Q, Q, Q, score_mod=outside, score_mod_aux=(table,), backend="cpu")
    with pytest.raises(IndexError, match="out of bounds"):
        attention(Q, Q, Q, score_mod=outside, score_mod_aux=(empty,), backend="cpu")
    # Hidden pairs are nobody's mistake.
    attention(Q, Q, Q, score_mod=outside, score_mod_aux=(table,), seqused_k=3, backend="cpu")


def test_a_mask_function_is_asked_in_numpy_when_its_mask_is_made():
    with pytest.raises(
        TypeError, match=r"mask_mod <lambda> .* must return a bool, but returned int"
    ):
        make_block_mask(lambda b, h, q, k: q - k, None, None, 8, 8)
    with pytest.raises(IndexError, match=r"mask_mod <lambda> .* out of bounds"):
        make_block_mask(lambda b, h, q, k, t: t[q] > 0, None, None, 8, 8, aux=(TABLE,))
    with pytest.raises(TypeError, match="mask_mod must be a Python function"):
        make_block_mask(np.ones((8, 8), bool), None, None, 8, 8)
