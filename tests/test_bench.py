"""The benchmark: what it measures, that it checks first, and how it counts."""

import dataclasses
import time

import numpy as np
import pytest

import fusedattn
from bench import measure, peers, verify, workers
from bench.cases import DTYPES, PREFILL, QUICK, Case, all_cases, select
from bench.peers import PEERS, Unsupported, Way, fused
from fusedattn.testing.rows import attended

# One of each kind of case, small: name, sizes (batch, heads, heads_kv, seqlen_q, seqlen_k, dim).
SMALL = {
    "full": ((2, 4, 4, 48, 48, 32), {}),
    "causal grouped": ((1, 4, 2, 48, 48, 32), {"causal": True}),
    "back": ((1, 2, 2, 64, 64, 32), {"causal": True, "window_size": (15, 0)}),
    "around": ((1, 2, 2, 64, 64, 32), {"window_size": (8, 7)}),
    "mask": ((1, 2, 2, 40, 40, 32), {"operand": "mask"}),
    "bias": ((1, 2, 2, 40, 40, 32), {"operand": "bias"}),
    "lengths": ((1, 2, 2, 40, 40, 32), {"lengths": (23,)}),
    "decode": ((1, 4, 2, 1, 96, 32), {}),
    "decode of four": ((1, 4, 2, 4, 96, 32), {"causal": True}),
    "decodes of many lengths": ((3, 4, 2, 1, 64, 32), {"lengths": (10, 64, 33)}),
}


def small(kind, dtype="float32"):
    sizes, options = SMALL[kind]
    group = "decode" if kind.startswith("decode") else "prefill"
    return Case(group, "small", kind, "a test", *sizes, **options, dtype=dtype)


# --- the cases ------------------------------------------------------------------------------------


def listed(dtype, **fields):
    return {
        (c.batch, c.heads, c.heads_kv, c.seqlen_q, c.seqlen_k, c.head_dim, c.causal)
        for c in all_cases()
        if c.dtype == dtype and all(getattr(c, name) == value for name, value in fields.items())
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_is_there_in_every_dtype(dtype):
    square = [
        *((1, 8, 8, 512, 64), (1, 8, 8, 2048, 64), (1, 16, 16, 4096, 128), (1, 8, 8, 8192, 64)),
        *((1, 32, 8, 2048, 128), (8, 12, 12, 128, 64), (1, 12, 12, 64, 64)),
    ]
    both = {(*s[:3], s[3], *s[3:], causal) for s in square for causal in (False, True)}
    assert listed(dtype, group="prefill") == both
    gradients = {(1, 8, 2048, 64), (1, 16, 2048, 128), (8, 12, 128, 64)}
    if dtype == "float32":
        assert listed(dtype, group="backward") == {
            (batch, heads, heads, seqlen, seqlen, dim, causal)
            for batch, heads, seqlen, dim in gradients
            for causal in (False, True)
        }
    at_2048 = {(1, 8, 8, 2048, 2048, 64, False)}
    for variant in ("dense", "lengths", "bias"):
        assert listed(dtype, group="mask", variant=variant) == at_2048
    assert {c[3] for c in listed(dtype, group="window")} == {8192}
    decodes = {
        (1, heads, 8, queries, keys, 128, queries > 1)
        for heads in (32, 8)
        for queries in (1, 4)
        for keys in (4096, 32768)
    }
    assert listed(dtype, group="decode", batch=1) == decodes
    (many,) = (c for c in all_cases() if c.batch == 32 and c.dtype == dtype)
    assert len(set(many.lengths)) > 24
    assert max(many.lengths) == many.seqlen_k
    assert listed(dtype, group="tiny") == {(1, 1, 1, 16, 16, 64, False)}


def test_windows_hold_1024_keys():
    for case in select(all_cases(), ["window/*/float32"]):
        seen = case.visible(np.array([4000]), None)
        assert seen.sum() == 1024


def test_names_are_unique_and_sources_are_given():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.source for case in cases)
    assert all(source.count("arXiv:") == 1 for _, source in PREFILL)


def test_a_pattern_is_part_of_a_name_or_has_stars():
    cases = all_cases()
    assert select(cases, []) == cases
    assert {c.group for c in select(cases, ["tiny", "mask/*/bias/*16"])} == {"tiny", "mask"}
    assert select(cases, ["mask/*/bias/*16"]) == [
        c for c in cases if c.variant == "bias" and c.dtype != "float32"
    ]
    assert select(cases, ["nothing like it"]) == []
    assert all(select(cases, [pattern]) for pattern in QUICK)


@pytest.mark.parametrize("kind", SMALL)
def test_what_others_are_told_is_visible_is_what_we_are_told(kind):
    case = small(kind)
    inputs = case.inputs()
    problem = fusedattn.make_problem(*inputs[:3], **case.options(inputs))
    told = case.visible(np.arange(case.seqlen_q), inputs.mask)
    told = np.ones((1, 1, 1, 1), bool) if told is None else told
    seen = attended(problem)
    np.testing.assert_array_equal(np.broadcast_to(told, seen.shape), seen)


@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "mask"])
def test_flops_are_those_of_the_pairs_that_are_seen(kind):
    case = small(kind)
    seen = case.visible(np.arange(case.seqlen_q), None)
    seen = np.ones((1, 1, 1, 1), bool) if seen is None else seen
    shape = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    assert case.flops == 4 * case.head_dim * np.broadcast_to(seen, shape).sum()


def test_bytes_are_those_of_the_keys_that_count():
    case = small("decodes of many lengths", "float16")
    keys_and_values = 2 * (10 + 64 + 33) * 2 * 32
    queries_and_output = 2 * 3 * 4 * 32
    assert case.bytes_moved == 2 * (keys_and_values + queries_and_output)


# --- checking before timing -----------------------------------------------------------------------


class Direct:
    """A station without a process, which keeps what it was asked."""

    def __init__(self, name):
        self.station = workers.Station(name, 1)
        self.asked = []

    def ask(self, verb, *arguments):
        self.asked.append(verb)
        return getattr(self.station, verb)(*arguments)


def wrong(case):
    """Ours with a slip: only the first half of the keys."""
    right = fused(case)["attention"]

    def call():
        q, k, v, *_ = case.inputs()
        half = case.seqlen_k // 2
        return fusedattn.attention(q, k[:, :, :half], v[:, :, :half])

    return {"right": right, "wrong": Way(call, np.asarray)}


@pytest.fixture
def planted(monkeypatch):
    """Put a function in the place of a peer."""

    def plant(name, forward):
        monkeypatch.setitem(PEERS, name, PEERS[name]._replace(forward=forward))
        return Direct(name)

    return plant


@pytest.mark.parametrize("name", ["fused", "numpy"])
def test_wrong_numbers_are_refused_before_anything_is_timed(planted, name):
    worker = planted(name, lambda case: {"wrong": wrong(case)["wrong"]})
    found = measure.compare(small("full"), {"machine": Direct("machine"), name: worker}, rounds=2)
    entry = found["peers"][name]
    assert "wrong: an error of" in entry["note"]
    assert entry["rounds"] == []
    assert worker.asked == ["prepare", "forget"]


def test_of_several_ways_a_wrong_one_is_never_chosen(planted):
    worker = planted("numpy", wrong)
    found = measure.compare(
        small("full"), {"machine": Direct("machine"), "numpy": worker}, rounds=1
    )
    entry = found["peers"]["numpy"]
    assert (entry["way"], entry["note"]) == ("right", None)
    assert list(entry["refused"]) == ["wrong"]
    assert len(entry["rounds"]) == 1


def test_a_number_that_is_not_finite_is_refused_wherever_it_is(planted):
    case = small("full")

    def spoiled(case):
        out = fused(case)["attention"].call()
        out[1, 2, 7, 3] = np.nan  # a row that is not compared
        return {"spoiled": Way(lambda: out, np.asarray)}

    assert 7 not in verify.sample(dataclasses.replace(case, seqlen_q=4096, seqlen_k=4096)).rows
    answers = planted("torch", spoiled).ask("prepare", case, verify.sample(case))
    assert answers == {"spoiled": "wrong: not everywhere finite"}


def test_a_peer_that_cannot_gives_its_reason(planted):
    def refuses(case):
        raise Unsupported("not on a Sunday")

    def fails():
        raise RuntimeError("out of\n order")

    case, machine = small("full"), Direct("machine")
    found = measure.compare(case, {"machine": machine, "jax": planted("jax", refuses)}, rounds=1)
    assert found["peers"]["jax"]["note"] == "not on a Sunday"
    broken = planted("jax", lambda case: {"only": Way(fails, np.asarray)})
    found = measure.compare(case, {"machine": machine, "jax": broken}, rounds=1)
    assert found["peers"]["jax"]["note"] == "only: RuntimeError: out of order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL)
def test_ours_keeps_the_strict_bound(kind, dtype):
    case = small(kind, dtype)
    expected = verify.truth(case)
    answer = expected.sample.of(fused(case)["attention"].call())
    verdict = verify.judge(answer, expected, ours=True)
    assert verdict.fault is None
    assert 0 < verdict.of_bound <= 1


def test_the_truth_is_that_of_the_chosen_heads_and_rows():
    case = Case("decode", "", "", "", 6, 32, 8, 40, 64, 8, lengths=(64, 9, 50, 51, 52, 53))
    expected = verify.truth(case)
    assert [len(indices) for indices in expected.sample] == [4, 8, 32]
    inputs = case.inputs()
    wide = [array.astype(np.float64) for array in inputs[:3]]
    everything = fusedattn.attention(*wide, seqused_k=np.array(case.lengths), backend="reference")
    np.testing.assert_allclose(expected.out, expected.sample.of(everything), rtol=1e-13)


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "fused"])
@pytest.mark.parametrize("kind", SMALL)
def test_each_installed_peer_computes_the_same(peer, kind, monkeypatch):
    pytest.importorskip(PEERS[peer].package)
    monkeypatch.setenv("FUSEDATTN_NUM_THREADS", "1")
    unsupported = []
    for dtype in DTYPES:
        case = small(kind, dtype)
        expected = verify.truth(case)
        try:
            answers = workers.Station(peer, 1).prepare(case, expected.sample)
        except Unsupported:
            unsupported.append(dtype)
            continue
        faults = [verify.judge(answer, expected, ours=False).fault for answer in answers.values()]
        assert not [fault for fault in faults if fault and fault.startswith("wrong")], faults
        if all(faults):
            unsupported.append(dtype)
    assert "float32" not in unsupported


def gradients(causal):
    return Case("backward", "small", "full", "a test", 2, 3, 3, 40, 40, 32, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("peer", ["fused", "torch"])
def test_gradients_are_checked_in_all_three_operands(peer, causal):
    pytest.importorskip(PEERS[peer].package)
    case = gradients(causal)
    expected = verify.truth(case)
    (way,) = PEERS[peer].ways(case).values()
    answer = way.read(way.call())
    assert verify.judge(expected.sample.of(answer), expected, ours=peer == "fused").fault is None
    for row in (0, case.seqlen_q, 2 * case.seqlen_q):  # the first ones of q, k and v
        slip = answer.copy()
        slip[:, :, row : row + 5, 0] += 1e-3
        assert "wrong" in verify.judge(expected.sample.of(slip), expected, ours=False).fault


def test_gradients_are_asked_of_those_who_have_them():
    case = gradients(False)
    with pytest.raises(Unsupported, match="no gradients"):
        PEERS["numpy"].ways(case)
    forward = dataclasses.replace(case, group="prefill")
    assert case.flops == 5 * forward.flops // 2


# --- turns ----------------------------------------------------------------------------------------


def test_a_short_call_is_timed_in_batches_and_a_long_one_once():
    calls = []
    turn = workers.take_turn(lambda: calls.append(None))
    assert len(turn) == workers.TURN_SAMPLES
    assert len(calls) > 50 * len(turn)
    assert max(turn) < 1e-3
    (once,) = workers.take_turn(lambda: time.sleep(workers.LONG_SECONDS))
    assert once >= workers.LONG_SECONDS


class Scripted:
    """A worker whose turns take so long."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.turns = 0

    def ask(self, verb, *arguments):
        assert verb == "turn"
        self.turns += 1
        return [self.seconds]


@pytest.mark.parametrize(
    ("seconds", "turns"),
    [
        pytest.param(1.9, 6, id="close"),
        pytest.param(10.0, 1, id="far off and long"),
        pytest.param(3.5, 2, id="far off"),
    ],
)
def test_only_a_peer_that_is_far_off_is_not_asked_again(monkeypatch, seconds, turns):
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    asked = {"machine": Scripted(0.1), "fused": Scripted(1.0), "torch": Scripted(seconds)}
    entries = {name: {"note": None, "rounds": []} for name in asked}
    for _ in range(6):
        measure._round(entries, asked)
    assert asked["torch"].turns == turns
    assert asked["fused"].turns == asked["machine"].turns == 6
    assert entries["torch"]["rounds"] == [[seconds]] * turns


def test_workers_are_processes_that_answer_and_end():
    with workers.working(["machine", "fused", "numpy"], 1) as started:
        found = measure.compare(select(all_cases(), ["tiny/*/float32"])[0], started, rounds=2)
        own = started["fused"].ask("own", [(small("full"), 1)], 1)
        started["numpy"].end()
        with pytest.raises(Unsupported, match="its process ended"):
            started["numpy"].ask("turn")
        assert started["numpy"].ask("forget") is None, "a new process serves the next case"
    assert found["machine"]["probe"] == "fma"
    for name in ("fused", "numpy"):
        entry = found["peers"][name]
        assert entry["note"] is None
        assert [len(turn) > 0 for turn in entry["rounds"]] == [True, True]
        assert 0 < entry["rms"] < 1e-6
    assert len(own[0]["rounds"]) == len(own[0]["machine"]) == 1


@pytest.mark.parametrize("peer", ["jax", "numpy", "onnxruntime"])
def test_who_stores_all_scores_is_not_asked_where_they_do_not_fit(monkeypatch, peer):
    pytest.importorskip(PEERS[peer].package)
    monkeypatch.setenv("FUSEDATTN_NUM_THREADS", "1")
    case = dataclasses.replace(small("bias"), heads=1, heads_kv=1)
    scores = 3 * 4 * 40 * 40
    monkeypatch.setattr(peers, "available_memory", lambda: scores)
    with pytest.raises(Unsupported, match="its scores take 19 KiB of memory"):
        PEERS[peer].forward(case)
    monkeypatch.setattr(peers, "available_memory", lambda: 2 * scores)
    assert PEERS[peer].forward(case)
