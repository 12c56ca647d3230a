"""The public functions around the backends, and the choice between them."""

import inspect

import ml_dtypes
import numpy as np
import pytest

import fusedattn
from fusedattn import api, attention, attention_weights, dispatch, dropout_mask, explain, plan
from fusedattn.plan import OPTIONS, Call, Plan
from fusedattn.problem import Result, make_problem

Q = np.random.default_rng(0).standard_normal((2, 4, 5, 8)).astype(np.float32)
K = np.random.default_rng(1).standard_normal((2, 2, 7, 8)).astype(np.float32)
V = np.random.default_rng(2).standard_normal((2, 2, 7, 3)).astype(np.float32)


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_attention_and_make_problem_take_the_same_keywords():
    ours = keywords(attention)
    assert ours.pop("backend") is ours.pop("stream") is None
    assert ours == keywords(make_problem)


def test_gradients_take_the_keywords_of_attention_that_say_what_was_computed():
    ours, theirs = keywords(attention), keywords(fusedattn.attention_backward)
    for name in ("return_lse", "out", "stream"):  # of the call, not of its result
        del ours[name]
    for name in ("d_lse", "bias_grad", "score_mod_grad"):
        del theirs[name]
    assert ours == theirs


def test_a_kind_of_call_has_every_argument_of_attention():
    assert Call._field_defaults == keywords(attention)
    given = set(Call._fields[:OPTIONS]) - {"q", "k", "v"}
    assert set(keywords(Plan.__call__)) == given


def test_a_stream_is_for_arrays_on_a_gpu():
    attention(Q, K, V, scale=0.3)  # a remembered kind does not let one through
    for function in (attention, fusedattn.plan):
        with pytest.raises(TypeError, match="stream is for arrays on a GPU"):
            function(Q, K, V, scale=0.3, stream=0)


def test_the_types_of_the_keywords_name_them_all():
    assert set(api.Options.__annotations__) == set(keywords(attention)) - {"return_lse"}


def test_every_public_name_is_there():
    for name in fusedattn.__all__:
        assert getattr(fusedattn, name) is not None


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_the_layout_concerns_operands_and_output_but_not_mask_and_lse(backend):
    mask = np.random.default_rng(3).random((4, 5, 7)) < 0.7
    out, lse = attention(Q, K, V, mask=mask, return_lse=True, backend=backend)
    swapped = [array.swapaxes(1, 2) for array in (Q, K, V)]
    ours = attention(*swapped, mask=mask, return_lse=True, layout="bshd", backend=backend)
    np.testing.assert_array_equal(ours[0].swapaxes(1, 2), out)
    np.testing.assert_array_equal(ours[1], lse)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_the_out_that_was_given_is_returned(backend, layout):
    arrays = (Q, K, V) if layout == "bhsd" else [x.swapaxes(1, 2) for x in (Q, K, V)]
    plain = attention(*arrays, layout=layout, backend=backend)
    out = np.full(plain.shape, np.nan, np.float32)
    assert attention(*arrays, layout=layout, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_inputs_are_not_written(backend):
    copies = [x.copy() for x in (Q, K, V)]
    for array in copies:
        array.flags.writeable = False
    attention(*copies, causal=True, softcap=3.0, backend=backend)
    np.testing.assert_array_equal(copies[0], Q)


def test_half_results_can_be_had_in_float32():
    half = [x.astype(ml_dtypes.bfloat16) for x in (Q, K, V)]
    assert attention(*half, backend="blocked").dtype == ml_dtypes.bfloat16
    assert attention(*half, out_dtype="float32", backend="blocked").dtype == np.float32


def test_an_unknown_backend_is_named():
    expected = "backend must be None or one of cpu, cuda, blocked, reference, but is 'tpu'"
    with pytest.raises(ValueError, match=expected):
        attention(Q, K, V, backend="tpu")
    with pytest.raises(ValueError, match=expected):
        explain(Q, K, V, backend="tpu")
    for wrong in (["cpu"], {"cpu"}, 3):
        with pytest.raises(ValueError, match="backend must be None or one of"):
            attention(Q, K, V, backend=wrong)


class Lazy:
    name = "lazy"

    def __init__(self, *reasons):
        self.reasons = list(reasons)

    def unsupported(self, problem):
        return self.reasons

    def forward(self, problem):
        return Result(np.zeros(problem.out_shape), None)


def test_a_backend_asked_for_never_falls_back(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", Lazy("no float32", "no heads"))
    with pytest.raises(NotImplementedError) as caught:
        attention(Q, K, V, backend="cpu")
    message = str(caught.value)
    assert "cpu: no float32; no heads" in message
    assert "blocked: can run it" in message
    assert "reference: can run it" in message


def test_without_a_wish_the_first_that_can_runs(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", Lazy("no float32"))
    assert dispatch.choose(make_problem(Q, K, V)).name == "blocked"
    monkeypatch.setitem(dispatch._loaded, "cpu", Lazy())
    assert dispatch.choose(make_problem(Q, K, V)).name == "lazy"


def test_where_none_can_run_each_says_why(monkeypatch):
    for name in dispatch.NAMES:
        monkeypatch.setitem(dispatch._loaded, name, Lazy(f"{name} is tired"))
    with pytest.raises(NotImplementedError, match=r"(?s)cpu is.*blocked is.*reference is tired"):
        attention(Q, K, V)


def test_explain_says_what_runs_and_why_not_elsewhere(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", Lazy("no float32"))
    monkeypatch.setitem(dispatch._loaded, "cuda", Lazy("no GPU"))
    answer = explain(Q, K, V, causal=True, window_size=(3, None), softcap=2.0, sinks=np.zeros(4))
    assert answer.backend == "blocked"
    reasons = {"cpu": ["no float32"], "cuda": ["no GPU"], "blocked": [], "reference": []}
    assert answer.reasons == reasons
    text = str(answer)
    for part in ("runs on blocked", "causal", "window_size (3, None)", "softcap 2", "sinks"):
        assert part in text
    assert explain(Q, K, V, backend="cpu").backend is None


def test_explain_needs_no_memory_for_the_arrays():
    q = np.broadcast_to(np.float32(0), (64, 32, 2**17, 128))
    answer = explain(q, q, q, causal=True, backend="blocked")
    assert answer.problem.flops == 4 * 64 * 32 * 128 * (2**17 * (2**17 + 1) // 2)


def test_weights_are_those_that_multiply_v():
    options = {"causal": True, "dropout_p": 0.3, "seed": 5, "sinks": np.ones(4)}
    weights = attention_weights(Q, K, **options)
    assert (weights.shape, weights.dtype) == ((2, 4, 5, 7), np.float64)
    out = attention(Q, K, V, backend="reference", **options)
    np.testing.assert_allclose(out, weights @ np.repeat(V, 2, axis=1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["out", "out_dtype", "return_lse", "backend", "stream", "maks"])
def test_weights_refuse_what_they_do_not_have(name):
    with pytest.raises(TypeError, match=rf"attention_weights\(\) got an unexpected .* '{name}'"):
        attention_weights(Q, K, **{name: None})


@pytest.mark.parametrize("function", [attention, explain, plan])
def test_an_unknown_keyword_is_told_by_the_function_that_was_called(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected .* 'maks'"):
        function(Q, K, V, maks=None)


def test_the_dropout_mask_is_that_of_attention():
    kept = dropout_mask((2, 4, 5, 7), 0.4, 11)
    weights = attention_weights(Q, K, dropout_p=0.4, seed=11)
    np.testing.assert_array_equal(weights > 0, kept)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, 0.5, 1), TypeError, r"shape must be a tuple .* but is 5"),
        ((None, 0.5, 1), TypeError, r"shape must be a tuple"),
        (((5, 7), 0.5, 1), ValueError, r"shape must be \(..., heads, seqlen_q, seqlen_k\)"),
        (((1, 5, -7), 0.5, 1), ValueError, "each axis of shape must be in the range"),
        (((1, 5, 7.0), 0.5, 1), TypeError, "each axis of shape must be an int"),
        (((1, 5, 7), 1.0, 1), ValueError, "dropout_p must be in the range"),
        (((1, 5, 7), 0.5, None), ValueError, "seed must be an int"),
    ],
)
def test_a_bad_dropout_mask_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dropout_mask(*arguments)


@pytest.mark.parametrize("dtype", ["int64", "flaot32", None, 5])
def test_warmup_refuses_what_it_cannot_compile(dtype):
    with pytest.raises(TypeError, match=rf"dtypes must hold float16, .* but holds .?{dtype}"):
        fusedattn.warmup(dtypes=[dtype])


@pytest.mark.parametrize("dtypes", ["float32", np.float32, None])
def test_warmup_takes_a_sequence(dtypes):
    with pytest.raises(TypeError, match="dtypes must be a sequence of float16"):
        fusedattn.warmup(dtypes=dtypes)


@pytest.mark.parametrize(
    ("n", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_bad_number_of_threads_is_refused(n, error):
    with pytest.raises(error, match="n must be"):
        fusedattn.set_num_threads(n)
