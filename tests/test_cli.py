"""The command line: what it prints, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import fusedattn
from fusedattn.cli import demo, machine
from fusedattn.cli.app import app
from fusedattn.cli.measure import MeasurementFailed, Sample

ROOT = Path(fusedattn.__file__).parents[1]
MIB = 2**20

# As `python -m fusedattn`, with the interrupt handler that a shell's background jobs lack.
START = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('fusedattn', run_name='__main__', alter_sys=True)"
)


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def start(*arguments, before="", **environment):
    """A process of its own, whose output is no terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", before + START, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Threads of BLAS that spin on a busy machine would take most of the time.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment,
    )


def run(*arguments, before="", **environment):
    process = start(*arguments, before=before, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def sample(peak=MIB, seconds=1.0, error=1e-7, rows=16384):
    return Sample(peak, seconds, error, rows)


def plain(text):
    return " ".join(text.split())


# --- without its extra ------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_it_says_in_one_line_how_to_get_them(package):
    status, out, err = run("demo", before=f"import sys; sys.modules[{package!r}] = None; ")
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "python -m pip install 'fusedattn[cli]'" in err


def test_check_without_its_packages_says_in_one_line_how_to_get_them():
    status, out, err = run(
        "check", "numpy:dot", before="import sys; sys.modules['hypothesis'] = None; "
    )
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "python -m pip install 'fusedattn[testing]'" in err


def test_help_names_every_command_and_loads_no_compiler():
    code = (
        "import sys; from typer.testing import CliRunner; from fusedattn.cli.app import app; "
        "print(CliRunner().invoke(app, ['--help']).output, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    text, modules = done.stdout.rsplit("\n", 2)[0], done.stdout.split()
    for command in ("demo", "info", "explain", "check", "bench"):
        assert f" {command} " in text
    assert not {"numba", "hypothesis"} & set(modules)


# --- explain ----------------------------------------------------------------------------------


def test_explain_says_what_the_function_says():
    done = invoke("explain", "1,8,128,64", "1,4,256,64", "--causal", "--window-size", "100,none")
    q, k = np.zeros((1, 8, 128, 64), np.float32), np.zeros((1, 4, 256, 64), np.float32)
    answer = fusedattn.explain(q, k, k, causal=True, window_size=(100, None))
    assert done.exit_code == 0
    assert done.output == f"{answer}\n"


def test_explain_takes_every_option_of_attention():
    import inspect

    names = set(inspect.signature(fusedattn.attention).parameters)
    names -= {"q", "k", "v", "out", "stream"}
    names -= {"score_mod", "score_mod_aux", "block_mask"}  # functions are written in Python
    text = invoke("explain", "--help").output
    assert names == {name for name in names if f"--{name.replace('_', '-')} " in text}


def test_explain_passes_every_option_on():
    options = {
        "--dtype": "bfloat16", "--scale": "-0.5", "--q-offset": "3", "--seqused-q": "5",
        "--seqused-k": "7", "--mask": "10,1", "--bias": "4,10,20", "--alibi-slopes": "4",
        "--softcap": "30", "--sinks": "4", "--dropout-p": "0.25", "--seed": "9",
        "--layout": "bshd", "--out-dtype": "float32", "--backend": "blocked",
    }  # fmt: skip
    arguments = [word for pair in options.items() for word in pair]
    done = invoke("explain", "2,10,4,8", "2,20,2,8", "2,20,2,16", "--return-lse", *arguments)
    assert done.exit_code == 0, done.output
    text = plain(done.output)
    assert "runs on blocked" in text
    assert "q (2, 4, 10, 8), k (2, 2, 20, 8), v (2, 2, 20, 16), bfloat16" in text
    assert "out float32" in text
    shown = ("scale -0.5", "softcap 30", "dropout_p 0.25", "mask", "bias", "alibi_slopes", "sinks")
    assert [word for word in shown if word not in text] == []


def test_explain_needs_no_memory_for_large_shapes():
    done = invoke("explain", "64,64,1000000,128")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1,8,x,64"], "'1,8,x,64' is no shape"),
        (["1,8"], "q must have at least 3 axes"),
        (["1,8,9,64", "1,3,9,64"], "the heads of q must be a multiple of k's (3)"),
        (["1,8,9,64", "--dtype", "int8"], "'int8' is no storage type"),
        (["1,8,9,64", "--window-size", "128"], "'128' is no window"),
        (["1,8,9,64", "--window-size=-1,-1"], "window_size[0] must be None (open)"),
        (["1,8,9,64", "--dropout-p", "0.1"], "seed must be an int"),
        (["1,8,9,64", "--softcap", "0"], "softcap must be None (off) or a number > 0"),
        (["1,8,9,64", "--mask", "8,9"], "mask must broadcast to"),
        (["1,8,9,64", "--layout", "sbhd"], "layout must be 'bhsd' or 'bshd'"),
        (["1,8,9,64", "--backend", "gpu"], "backend must be None or one of"),
        (["1,8," + "9" * 30 + ",64"], "too large for any machine"),
        (["1,8," + "9" * 11 + ",64"], "seqlen must be at most 2**30"),
    ],
)
def test_explain_refuses_bad_input_in_one_line(arguments, message):
    done = invoke("explain", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_explain_fails_where_the_backend_asked_for_cannot(monkeypatch):
    blocked = fusedattn.dispatch.load("blocked")
    monkeypatch.setattr(type(blocked), "unsupported", lambda self, problem: ["no time today"])
    done = invoke("explain", "1,8,9,64", "--backend", "blocked")
    assert done.exit_code == 1
    assert "blocked: no time today" in done.stdout
    assert invoke("explain", "1,8,9,64").exit_code == 0


# --- info -------------------------------------------------------------------------------------


def test_info_names_versions_threads_and_a_cold_then_warm_cache(tmp_path):
    folder = tmp_path / "kernels"
    environment = {
        "FUSEDATTN_CACHE_DIR": str(folder),
        "FUSEDATTN_NUM_THREADS": "3",
        "COLUMNS": "300",
    }
    status, out, err = run("info", **environment)
    assert (status, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["numpy"].strip() == np.__version__
    assert lines["fusedattn"].startswith(fusedattn.__version__)
    assert lines["threads"].strip() == "3 (FUSEDATTN_NUM_THREADS=3)"
    assert f"{folder} (FUSEDATTN_CACHE_DIR), writable" in out
    assert "cold" in lines["cache"] or "cold" in out
    assert not folder.exists(), "asking must not write"

    run("explain", "1,1,1,1", before="import fusedattn; fusedattn.warmup(); ", **environment)
    assert "warm; " in run("info", **environment)[1]


def test_info_says_when_the_cache_cannot_be_written(tmp_path):
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    _, out, _ = run("info", FUSEDATTN_CACHE_DIR=str(obstacle / "kernels"), COLUMNS="300")
    assert "not writable" in out


def test_info_refuses_a_number_of_threads_that_is_none():
    status, out, err = run("info", FUSEDATTN_NUM_THREADS="many")
    assert (status, out) == (2, "")
    assert "FUSEDATTN_NUM_THREADS must be an integer" in err
    assert "but is 'many'" in err


# --- demo -------------------------------------------------------------------------------------


def test_demo_measures_and_concludes():
    status, out, err = run("demo", "--seqlen", "64", "--seqlen", "512", "--heads", "2")
    assert (status, err) == (0, "")
    assert "Backend: cpu" in out
    assert "With 512 queries and keys, fused attention needed" in plain(out)
    assert out.rstrip().endswith("from the float64 reference.")


def test_demo_fits_narrow_terminals_and_plain_ascii():
    status, out, err = run("demo", "--seqlen", "64", COLUMNS="32", PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 32
    assert "naive memory" in out


def test_an_interrupt_ends_the_demo_with_one_line():
    process = start("demo", "--seqlen", "6000", "--heads", "4")
    head = [process.stdout.readline() for _ in range(4)]
    assert "Kernels ready" in head[-1]
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "Interrupted."


def test_naive_is_not_run_where_it_would_not_fit(monkeypatch):
    monkeypatch.setattr(demo, "available_memory", lambda: 3 * 4 * 100**2)
    asked = []

    def measure(method, seqlen, heads, head_dim):
        asked.append((method, seqlen))
        return sample()

    rows = [demo.compare(seqlen, 1, 64, measure) for seqlen in (50, 100)]
    assert asked == [("fused", 50), ("naive", 50), ("fused", 100)]
    assert "(117 KiB)" in demo.cells(rows[1])
    assert "would have needed 117 KiB and was not run" in demo.conclusion(rows)


def test_naive_that_ends_without_a_result_is_reported(monkeypatch):
    monkeypatch.setattr(demo, "available_memory", lambda: None)

    def measure(method, seqlen, heads, head_dim):
        if method == "naive":
            raise MeasurementFailed("killed by signal 9")
        return sample(rows=seqlen)

    row = demo.compare(100, 1, 64, measure)
    notes = [str(part) for part in demo.report([row], Console(width=80))]
    assert "killed by signal 9" in "".join(notes)


@pytest.mark.parametrize("seconds", [0.25, 4.0])
def test_the_conclusion_follows_the_numbers(seconds):
    naive = sample(peak=300 * MIB, seconds=seconds)
    row = demo.Row(16384, sample(peak=2 * MIB, error=2e-7), naive, "", 0)
    said = demo.conclusion([row])
    assert "2.0 MiB of working memory and 1.00 s" in said
    assert "300 MiB (150 times as much)" in said
    assert f"({seconds:.1f} times as long)" in said
    assert "further than 2.0e-07" in said


def test_the_conclusion_does_without_memory_where_none_is_measured():
    row = demo.Row(64, sample(peak=None), sample(peak=None, seconds=2.0), "", 0)
    said = demo.conclusion([row])
    assert "memory" not in said
    assert "2.00 s (2.0 times as long)" in said


# --- the machine ------------------------------------------------------------------------------


@pytest.mark.skipif(machine.current_memory() is None, reason="the system does not say")
def test_peak_extra_counts_one_call_whatever_was_held_before():
    large = np.ones(200 * MIB, np.uint8)
    small = [bytes(10_000) for _ in range(3000)]  # the allocator keeps some of their memory
    kept = small[::100]
    del large, small
    peak = machine.peak_extra(lambda: np.ones(50 * MIB, np.uint8).sum())
    assert 49 * MIB <= peak <= 60 * MIB
    assert machine.peak_extra(lambda: None) <= MIB
    del kept


def test_memory_limits_of_the_cgroup_and_its_parents_count(tmp_path):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/a/b\n7:cpu,memory:/c\n3:pids:/\n")

    def group(path, limit, usage, droppable, version):
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {droppable}\n")

    group("a/b", "max", 10, 0, 2)
    group("a", 1000, 400, 50, 2)
    group("memory/c", 5000, 6000, 100, 1)
    assert sorted(machine._cgroup_headrooms(proc, root)) == [0, 650]
    assert list(machine._cgroup_headrooms(tmp_path / "absent", root)) == []


def test_check_judges_a_function():
    done = invoke("check", "fusedattn:attention", "--examples", "2", "--laws", "finite_in")
    assert done.exit_code == 0, done.output
    assert invoke("check", "--no-such-option").exit_code == 2


# --- bench ------------------------------------------------------------------------------------


def test_bench_runs_from_a_checkout():
    done = invoke("bench", "--list", "--case", "decode/*mixed*/float16")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("decode/32,32-8,mixed,128/q1/float16: Llama 3 8B")
    assert "--rounds" in invoke("bench", "--help").output


def test_bench_measures_writes_and_reports(tmp_path):
    file = tmp_path / "results.json"
    arguments = ("--case", "tiny/*/float32", "--peer", "numpy", "--rounds", "2", "--threads", "1")
    status, out, err = run("bench", *arguments, "--json", str(file))
    assert (status, err) == (0, "")
    assert "tiny/1,1,16,64/full/float32" in out
    assert "naive NumPy" in out
    found = json.loads(file.read_text())
    assert found["about"]["threads"] == 1
    assert {"commit", "dirty", "machine", "versions"} <= set(found["about"])
    (case,) = found["cases"]
    assert {name: len(peer["rounds"]) for name, peer in case["peers"].items()} == {
        "fused": 2,
        "numpy": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--case", "nothing like it"), "no case has such a name"), (("--peer", "abacus"), "abacus")],
)
def test_bench_refuses_what_it_does_not_know(arguments, message):
    done = invoke("bench", *arguments)
    assert done.exit_code == 2
    assert message in plain(done.output)


def test_bench_says_that_it_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(fusedattn, "__file__", str(tmp_path / "fusedattn/__init__.py"))
    done = invoke("bench", "--quick")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "bench needs a checkout of the repository" in done.stderr
    assert done.stderr.count("\n") == 1
