"""The benchmark's own loops, what it measures apart, and that it runs as a script."""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import bench_results as made
import numpy as np
import pytest

import fusedattn
from bench import apart, goals, markdown, measure, roofline, run, workers
from bench.cases import DTYPES, all_cases, select
from fusedattn.cpu.tile import host_isa

ROOT = Path(fusedattn.__file__).parents[1]


# --- the machine ----------------------------------------------------------------------------------


def test_the_read_loop_reads_every_byte_once():
    _, read, _ = roofline._loops()
    step = roofline.STREAMS * roofline.STREAM_VECTORS * host_isa().vector_bytes
    words = np.random.default_rng(0).integers(0, 2**32, 37 * step // 4 + 1024, np.uint32)
    start = -(-words.ctypes.data // 4096) * 4096 - words.ctypes.data
    words = words[start // 4 :][: 37 * step // 4]
    assert read(words.ctypes.data, 37) == int(np.bitwise_xor.reduce(words))


def test_the_multiply_adds_are_all_done():
    fma, *_ = roofline._loops()
    # Every sum x -> x / 2 + 1 ends at 2.
    assert fma(64, 0.5, 1.0) == 2.0 * roofline._sums()
    assert fma(1, 0.5, 1.0) == math.fsum(i / 2 + 1 for i in range(roofline._sums()))


@pytest.mark.skipif(host_isa().vector_bytes == 16, reason="written for x86-64 with AVX2 or more")
def test_the_loop_of_multiply_adds_has_nothing_else_in_it():
    lines = [
        line.split("#")[0].strip() for line in roofline.compile_loops(assembly=True).split("\n")
    ]
    adds = [i for i, line in enumerate(lines) if line.startswith("vfmadd")]
    assert len(adds) == roofline._sums()
    body = lines[adds[0] : adds[-1] + 1]
    others = [line for line in body if line and not line.startswith("vfmadd")]
    assert len(others) <= 2, others  # the counter
    assert not [line for line in body if "(" in line], "it must stay in registers"


def test_probes_do_the_work_that_they_say():
    probe = roofline.read_probe(2, 2**20)
    assert probe.work == 2**20
    assert len(probe.call()) == 2
    kinds = {"decode/1,8,4096,128/q1/float32": "read", "tiny/1,1,16,64/full/float32": "fma"}
    for name, kind in kinds.items():
        (case,) = select(all_cases(), [name])
        assert roofline.probe_for(case, 1).kind == kind


# --- what stands apart ----------------------------------------------------------------------------


def test_memory_is_not_risked(monkeypatch):
    monkeypatch.setattr(apart, "available_memory", lambda: 1000)
    asked = []

    def measured(method, seqlen, heads, head_dim):
        asked.append(method)
        raise apart.MeasurementFailed("no luck")

    monkeypatch.setattr(apart, "measure_apart", measured)
    found = list(apart.memory((16, 32)))
    assert asked == ["fused", "fused"]
    assert [entry["note"] for entry in found[:2]] == ["no luck", "no luck"]
    assert found[2]["needed"] == 3 * 8 * 16 * 16 * 4


def test_growth_is_measured_in_turns_and_counted_per_operation(monkeypatch):
    sizes = {2048: 64, 16384: 256}
    (like,) = select(all_cases(), ["prefill/1,12,64,64/full/float32"])
    monkeypatch.setattr(
        apart,
        "_full",
        lambda length: dataclasses.replace(like, seqlen_q=sizes[length], seqlen_k=sizes[length]),
    )

    class Asked:
        def ask(self, verb, *arguments):
            return getattr(workers.Station("fused", 2), verb)(*arguments)

    run = made.whole([])
    run.apart["growth"] = found = apart.growth(Asked(), 2, rounds=2)
    assert [entry["threads"] for entry in found["length"] + found["threads"]] == [2, 2, 1, 2]
    short, long = found["length"]
    assert long["flops"] == 16 * short["flops"]
    assert all(len(entry["rounds"]) == len(entry["machine"]) == 2 for entry in found["length"])
    each = [measure.fastest(entry["rounds"]) / entry["flops"] for entry in (short, long)]
    assert goals.growth_with_length(run).value == each[1] / each[0]
    assert goals.growth_with_threads(run).value > 0
    assert markdown.growth(run).count("\n") == 5


@pytest.mark.deep
def test_memory_is_measured_in_fresh_processes():
    found = list(apart.memory((256, 1024)))
    assert [entry["note"] for entry in found] == [None] * 4
    naive = {entry["seqlen"]: entry["bytes"] for entry in found if entry["method"] == "naive"}
    assert naive[1024] > 10 * naive[256] > 0


@pytest.mark.deep
def test_starting_up_is_measured_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(apart, "COLD", 1)
    times = apart.startup()
    assert {name: len(found) for name, found in times.items()} == {
        "import": 5,
        "cold": 1,
        "cached": 5,
    }
    assert min(times["cold"]) > max(times["cached"]) > min(times["import"]) > 0


def test_a_run_that_is_ended_leaves_what_it_has_measured(tmp_path, monkeypatch):
    done = []

    def compare(case, *_):
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return {"name": case.name}

    monkeypatch.setattr(run, "compare", compare)
    monkeypatch.setattr(run, "working", lambda *_: contextlib.nullcontext({}))
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run.main(case=["tiny"], peer=["fused"], json_file=path)
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == done
    assert list(tmp_path.iterdir()) == [path]


def test_as_a_script_it_names_its_cases():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/run.py"), "--list", "--case", "tiny"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    names = [line.split(": ")[0] for line in done.stdout.splitlines()]
    assert names == [f"tiny/1,1,16,64/full/{dtype}" for dtype in DTYPES]
