"""What is made of results: statistics, goals, tables, pictures; no figure is typed by hand."""

import doctest
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import bench_results as made
import pytest

import fusedattn
from bench import goals, markdown, results
from bench.cases import all_cases, select
from bench.peers import PEERS

ROOT = Path(fusedattn.__file__).parents[1]


def goal(text):
    (found,) = (g for g in goals.GOALS if g.text == text)
    return found


@pytest.mark.parametrize("module", [markdown, results])
def test_examples_in_the_documentation_hold(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


# --- reading --------------------------------------------------------------------------------------


def test_statistics_come_from_the_raw_times():
    record = made.record(all_cases()[0])
    record["peers"]["fused"]["rounds"] = [[5.0, 3.0], [4.0]]
    record["peers"]["torch"]["rounds"] = [[9.0], [6.0, 7.0, 8.0, 20.0]]
    record["machine"] |= {"work": 10.0, "rounds": [[2.0, 0.5]]}
    record["flops"] = 30
    entry = results.Entry(record)
    assert (entry.best(), entry.median()) == (3.0, 4.0)
    assert entry.ratio("torch") == 2.0
    assert entry.ratio_of_medians("torch") == 2.0
    assert entry.machine_rate == 20.0
    assert entry.fraction() == 0.5
    assert entry.fraction("torch") == 0.25


def test_bytes_count_where_memory_is_the_limit():
    (case,) = select(all_cases(), ["decode/1,8,4096,128/q1/float32"])
    entry = results.Entry(made.record(case, share=0.8))
    assert entry.limit == "read"
    assert entry.fraction() == pytest.approx(0.8)


def test_what_was_not_measured_has_no_ratio():
    record = made.record(all_cases()[0])
    record["peers"]["jax"] |= {"note": "not on a Sunday", "rounds": []}
    del record["peers"]["torch"]
    entry = results.Entry(record)
    assert entry.ratio("jax") is entry.ratio("torch") is None
    assert (entry.note("jax"), entry.note("torch")) == ("not on a Sunday", None)


def test_results_are_read_as_they_were_written(tmp_path):
    run, path = made.whole(all_cases()[:3]), tmp_path / "folder" / "cpu.json"
    results.write(path, run.about, run.whole["cases"], run.apart)
    assert results.read(path).whole == run.whole
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        results.read(path)


# --- goals ----------------------------------------------------------------------------------------


def test_a_goal_takes_the_worst_of_its_cases():
    run = made.whole(share=0.85, slower=2.0)
    wanted = "prefill/1,8,8192,64/full/float32"
    for entry in run.entries:
        if entry.name == wanted:
            entry.record["peers"]["torch"]["rounds"] = [[1.2 * entry.best()]]
    found = goal("against torch, full").find(run)
    assert found.value == pytest.approx(1.2)
    assert found.where == wanted
    assert goal("against torch, causal").find(run).value == pytest.approx(2.0)
    mean = goal("against torch, geometric mean of both").find(run).value
    assert mean == pytest.approx((1.2 * 2.0**13) ** (1 / 14))


def test_a_goal_is_not_met_by_leaving_a_case_out():
    cases = [case for case in all_cases() if case.name != "prefill/1,8,8192,64/full/float32"]
    run = made.whole(cases)
    assert goal("against torch, full").find(run) is None
    assert goal("against torch, full").cells(run)[4] == "not measured"
    assert goal("against torch, causal").find(run) is not None


@pytest.mark.parametrize(
    ("share", "met"), [(0.81, "no"), (0.83, "yes"), (0.88, "yes, the aim"), (0.95, "yes, the aim")]
)
def test_a_goal_says_whether_it_is_met(share, met):
    found = goal("part of the FMA peak: full, D 64, S ≥ 512")
    assert found.cells(made.whole(share=share * 1.0001))[4] == met


def test_where_less_is_better_more_does_not_meet_the_goal():
    error = goal("rms error over torch's")
    assert error.met(1.0) == error.met(0.5) == "yes"
    assert error.met(1.001) == "no"
    memory = goal("extra memory a thread at (1,8,16384,64)")
    assert [memory.met(mib) for mib in (1.9, 2.0, 7.0, 9.0)] == [
        *("yes, the aim", "yes, the aim", "yes", "no")
    ]
    assert memory.find(made.whole()).value == 0.5


def test_starting_up_and_growth_are_goals_too():
    run = made.whole()
    assert goal("import beyond NumPy").find(run).value == 0.04
    assert goal("first call, from the cache").find(run).value == pytest.approx(0.6)
    assert goal("time per FLOP at S = 16384 over S = 2048").find(run).value == pytest.approx(1.04)
    threads = goal("two threads against one").find(run)
    assert threads.value == pytest.approx(1.9)
    assert "2.00" in threads.where
    run.apart.clear()
    assert goal("two threads against one").find(run) is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("part of the FMA peak: full, D 64, S ≥ 512", 3),
        ("part of the FMA peak: full, D 128, S ≥ 2048", 2),
        ("part of the FMA peak: causal, S ≥ 2048", 4),
        ("part of the FMA peak: (8,12,128,64) full", 1),
        ("against torch, full", 7),
        ("against torch, causal", 7),
        ("against torch, geometric mean of both", 14),
        ("against ONNX Runtime, full", 7),
        ("against ONNX Runtime, causal", 7),
        ("against torch, bfloat16, S ≥ 2048", 8),
        ("against torch, float16, S ≥ 2048", 8),
        ("against torch, a dense mask", 3),
        ("against torch, lengths", 3),
        ("against torch, a bias", 3),
        ("against torch, a window", 6),
        ("against torch, decode 32/8 heads, bfloat16", 4),
        ("against torch, decode 8/8 heads, float32", 4),
        ("decode, KV 32768: part of the streaming-read rate", 12),
        ("rms error over torch's", 87),
        ("a tiny call (1,1,16,64)", 1),
    ],
)
def test_a_goal_speaks_of_so_many_cases(monkeypatch, text, count):
    looked = []
    monkeypatch.setattr(
        goals, "_all", lambda _, wanted, __: looked.extend(filter(wanted, all_cases()))
    )
    assert goal(text).find(made.whole([])) is None
    assert len(looked) == count


# --- tables ---------------------------------------------------------------------------------------


def test_every_marker_in_the_docs_names_a_block_and_every_block_is_shown():
    shown = []
    for document in markdown.DOCUMENTS:
        text = document.read_text()
        names = re.findall(r"<!-- bench: (.*?) -->", text)
        assert text.count("<!-- end of bench -->") == len(names)
        shown += names
    assert sorted(shown) == sorted(markdown.BLOCKS)


def test_the_figures_in_the_docs_are_those_of_the_results():
    path = ROOT / "bench/results/cpu.json"
    run = results.read(path) if path.exists() else None
    for document in markdown.DOCUMENTS:
        text = document.read_text()
        assert markdown.filled(text, run) == text, f"python bench/plot.py {path.relative_to(ROOT)}"
        if run is not None:
            for picture in re.findall(r'(?:src|srcset)="([^"]+)"', text):
                assert (document.parent / picture).exists(), picture


def test_blocks_are_written_anew_and_nothing_else_is():
    text = "a\n<!-- bench: goals -->\nstale\n<!-- end of bench -->\nb | c\n"
    once = markdown.filled(text, made.whole())
    assert once.startswith("a\n<!-- bench: goals -->\n\n| goal | at least |")
    assert once.endswith("|\n\n<!-- end of bench -->\nb | c\n")
    assert markdown.filled(once, made.whole()) == once
    assert "stale" not in once
    assert markdown.filled(once, None).count("*Not measured yet.*") == 1
    with pytest.raises(KeyError):
        markdown.filled(text.replace("goals", "nonsense"), made.whole())


@pytest.mark.parametrize("name", markdown.BLOCKS)
def test_every_table_has_as_many_cells_in_each_row(name):
    run = made.whole()
    run.entries[0].record["peers"]["fused"] |= {"note": "wrong: something", "rounds": []}
    run.entries[1].record["peers"]["jax"] |= {"note": "it rains", "rounds": []}
    text = markdown.BLOCKS[name](run)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) <= 1
    assert text.strip()
    if name == "prefill":
        assert "wrong: something" in text
        assert "- JAX: it rains ((1,8,512,64) float32)" in text
        assert "| 2.00 (2.00) |" in text


def test_tables_say_so_where_nothing_was_measured():
    run = made.whole(select(all_cases(), ["tiny"]))
    run.apart.clear()
    for name in ("prefill", "masks", "decode", "memory", "startup", "growth"):
        assert markdown.BLOCKS[name](run) == markdown.NOT_MEASURED


def test_where_it_was_measured_is_told():
    run = made.whole()
    told = markdown.circumstances(run)
    assert "commit `0123456789ab`, 2026-01-01, 2 rounds" in told
    assert "multiply-adds 100 to 100 GFLOP/s" in told
    assert "numpy 2.4.0" in told
    assert "torch" not in told
    run.about["dirty"] = True
    assert "with changes that were not committed" in markdown.circumstances(run)


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_drawn_for_light_and_dark_pages_and_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    run = made.whole(slower=3.0)
    first = plot.draw(run, tmp_path / "first")
    second = plot.draw(run, tmp_path / "second")
    assert {path.name for path in first} == {
        f"{name}-{shade}.svg" for name in markdown.PICTURES for shade in ("light", "dark")
    }
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        root = ElementTree.parse(one).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        name, shade = one.stem.split("-")
        text = one.read_text()
        assert markdown.PICTURES[name] in text
        assert plot.THEMES[shade].colours["fused"] in text


def test_pictures_of_a_part_of_the_cases_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    run = made.whole(select(all_cases(), ["prefill/1,8,512,64/full/float32"]))
    run.apart.clear()
    for entry in run.entries:
        entry.record["peers"] = {"fused": entry.record["peers"]["fused"]}
    assert len(plot.draw(run, tmp_path)) == 2 * len(markdown.PICTURES)


def test_every_peer_has_a_colour_and_a_marker():
    pytest.importorskip("matplotlib")
    from bench import plot

    assert set(PEERS) == set(plot.MARKERS)
    assert all(set(theme.colours) == set(PEERS) for theme in plot.THEMES.values())
    assert set(plot.DRAWN) == set(markdown.PICTURES)
