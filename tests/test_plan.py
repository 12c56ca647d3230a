"""Plans: one path for `attention` and for loops, that remembers kinds of calls and no contents."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fusedattn
from fusedattn import attention, plan
from fusedattn.cpu.lowering import address_of
from fusedattn.plan import CAPACITY, Call, _plans, find

RNG = np.random.default_rng(0)
Q = RNG.standard_normal((2, 4, 1, 8), np.float32)
K, V = RNG.standard_normal((2, 2, 2, 30, 8), np.float32)
MASK = RNG.random((2, 1, 1, 30)) < 0.7
LENGTHS = np.array([30, 7])


def equal(ours, theirs):
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    return all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_lse": True, "backend": "reference"},
        {"causal": True, "window_size": (3, None), "layout": "bhsd", "backend": "blocked"},
        {"softcap": 2.0, "dropout_p": 0.5, "seed": 3, "return_lse": True},
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"seqused_k": 12, "q_offset": LENGTHS},
        {"mask": MASK, "sinks": np.ones(4, np.float16), "seqused_q": 1},
        {"bias": RNG.standard_normal(30), "alibi_slopes": np.ones(4, np.float32)},
    ],
)
def test_a_plan_returns_what_attention_returns(options, arguments):
    prepared = plan(Q, K, V, **arguments, **options)
    others = {
        name: RNG.permuted(x, axis=-1) if isinstance(x, np.ndarray) else x
        for name, x in arguments.items()
    }
    for q, changing in ((Q, arguments), (2 * Q, others)):
        expected = attention(q, K, V, **changing, **options)
        assert equal(prepared(q, K, V, **changing), expected)
        out = np.empty_like(Q)
        given = plan(Q, K, V, **changing, **options, out=out)(q, K, V, **changing, out=out)
        assert (given[0] if options.get("return_lse") else given) is out
        assert equal(given, expected)


def test_attention_runs_by_the_same_plan(monkeypatch):
    prepared = plan(Q, K, V, scale=0.123)
    seen = []
    monkeypatch.setattr(type(prepared), "run", lambda self, arguments: seen.append(self))
    attention(Q, K, V, scale=0.123)
    prepared(Q, K, V)
    assert [*map(id, seen)] == [id(prepared)] * 2


@pytest.mark.parametrize(
    ("planned", "called", "message"),
    [
        ({}, {"mask": MASK}, r"mask is a ndarray of dtype bool, shape \(2, 1, 1, 30\) .*not given"),
        ({"mask": MASK}, {}, "mask is not given, but when planned was a ndarray of dtype bool"),
        ({"seqused_k": 3}, {}, "seqused_k is not given, but when planned was given"),
        ({}, {"seqused_k": 3}, "seqused_k is given, but when planned was not given"),
        ({"mask": MASK}, {"mask": MASK[:1]}, r"mask is .*\(1, 1, 1, 30\) .* was .*\(2, 1, 1, 30\)"),
        ({"mask": MASK}, {"mask": MASK.repeat(2, -1)[..., ::2]}, "mask .* strides .* was .*"),
        ({}, {"q": Q[:1], "k": K[:1], "v": V[:1]}, r"q is .* shape \(1, 4, 1, 8\) .* was"),
        ({}, {"q": Q.astype("f2"), "k": K.astype("f2"), "v": V.astype("f2")}, "q is .* float16"),
        ({}, {"seqused_k": 31}, "seqused_k must be in the range 0 to 30"),
    ],
)
def test_a_call_that_strays_is_told_where(planned, called, message):
    arrays = {name: called.pop(name, x) for name, x in {"q": Q, "k": K, "v": V}.items()}
    with pytest.raises(ValueError, match=message):
        plan(Q, K, V, **planned)(**arrays, **called)


def test_what_is_no_array_is_told_as_by_attention():
    prepared = plan(Q, K, V)
    for arguments in ([Q.tolist(), K, V], [Q, K, np.ma.array(V)]):
        messages = []
        for function in (prepared, attention):
            with pytest.raises(TypeError) as error:
                function(*arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'casual'"):
        plan(Q, K, V, casual=True)


def test_output_over_an_input_is_refused_by_every_call():
    out = np.empty_like(Q)
    prepared = plan(Q, K, V, out=out)
    prepared(Q, K, V, out=out)
    with pytest.raises(ValueError, match="out"):
        prepared(Q, K, V, out=Q)


def test_a_plan_holds_on_to_no_array():
    arrays = [x.copy() for x in (Q, K, V, MASK)]
    alive = [weakref.ref(x) for x in arrays]
    prepared = plan(*arrays[:3], mask=arrays[3])
    prepared(*arrays[:3], mask=arrays[3])
    del arrays
    gc.collect()
    assert [x() for x in alive] == [None] * 4


def test_equal_numbers_of_other_types_are_other_kinds():
    """1 == True == 1.0, and not all of them are accepted."""
    attention(Q, K, V, causal=True, scale=1, window_size=(1, 1))
    for wrong in ({"causal": 1}, {"scale": True}, {"window_size": (True, 1)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            attention(Q, K, V, **{"causal": True, "scale": 1, "window_size": (1, 1), **wrong})


def test_the_number_of_remembered_kinds_is_bounded():
    for i in range(CAPACITY + 5):
        attention(Q, K, V, scale=1.0 + i)
    assert len(_plans) == CAPACITY
    prepared = find(Call(Q, K, V, scale=1.0))
    assert find(Call(2 * Q, K, V, scale=1.0)) is prepared


def test_threads_may_share_a_plan():
    prepared = plan(Q, K, V, seqused_k=1)
    expected = [attention(Q, K, V, seqused_k=n).tobytes() for n in range(31)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda n: prepared(Q, K, V, seqused_k=n % 31).tobytes(), range(310))
    assert [*found] == expected * 10


def test_a_plan_takes_memory_mapped_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "keys", np.float32, "w+", shape=K.shape)
    mapped[:] = K
    prepared = plan(Q, mapped, V)
    assert equal(prepared(Q, mapped, V), attention(Q, K, V))
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=Q.shape)
    assert attention(Q, mapped, V, out=out) is out
    assert equal(out, attention(Q, K, V))


@pytest.mark.parametrize("array", [Q, K[1:, :, 3::2], V[..., ::-1], np.empty((0, 3)), MASK.T])
def test_the_address_of_an_array_is_where_numpy_says(array):
    assert address_of(array) == array.__array_interface__["data"][0]


def test_every_public_option_can_be_planned():
    assert set(fusedattn.api.Options.__annotations__) | {"return_lse"} == set(Call._fields[3:])
