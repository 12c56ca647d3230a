"""Draw results and write the tables of the docs: ``python bench/plot.py bench/results/cpu.json``.

Each picture is drawn twice, for light and for dark pages, on no background of its own. The same
results give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import markdown  # noqa: E402
from bench.peers import OURS, PEERS  # noqa: E402
from bench.results import Entry, Results, read  # noqa: E402
from fusedattn.cli.machine import binary_size  # noqa: E402

PICTURES = ROOT / "docs/pictures"


class Theme(NamedTuple):
    """Colours on a light or a dark page."""

    text: str
    faint: str
    colours: dict[str, str]


THEMES = {
    "light": Theme(
        "#1f2328",
        "#d1d9e0",
        {
            OURS: "#0969da",
            "torch": "#cf4f0a",
            "onnxruntime": "#8250df",
            "jax": "#1a7f37",
            "numpy": "#6e7781",
        },
    ),
    "dark": Theme(
        "#e6edf3",
        "#3d444d",
        {
            OURS: "#58a6ff",
            "torch": "#f0883e",
            "onnxruntime": "#bc8cff",
            "jax": "#3fb950",
            "numpy": "#9198a1",
        },
    ),
}
MARKERS = {OURS: "o", "torch": "s", "onnxruntime": "D", "jax": "^", "numpy": "X"}

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fusedattn",  # else identifiers are random
    "svg.fonttype": "path",  # else it depends on the reader's fonts
    "font.family": "DejaVu Sans",  # which comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
}

Draw = Callable[[Results, Theme], Figure]


def _figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def _plain(axes: Axes, theme: Theme) -> None:
    """Colour everything that is no data, and keep it behind the data."""
    for spine in axes.spines.values():
        spine.set_color(theme.faint)
    axes.tick_params(which="both", color=theme.faint, labelcolor=theme.text)
    axes.grid(visible=True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.text)


def _legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        labelcolor=theme.text,
    )


def _measured(entries: Sequence[Entry], *, ours: bool) -> list[str]:
    """Peers with any time, in their order."""
    return [
        name
        for name in PEERS
        if (ours or name != OURS) and any(entry.measured(name) for entry in entries)
    ]


def _dots(
    axes: Axes,
    theme: Theme,
    entries: Sequence[Entry],
    peer: str,
    value: Callable[[Entry, str], float | None],
) -> None:
    """Draw one peer's value in the row of each case, the first on top."""
    found = {-i: value(entry, peer) for i, entry in enumerate(entries) if entry.measured(peer)}
    axes.plot(
        [x for x in found.values() if x is not None],
        [y for y, x in found.items() if x is not None],
        MARKERS[peer],
        color=theme.colours[peer],
        markersize=7,
        label=PEERS[peer].title,
    )


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks([-i for i in range(len(labels))], labels)
    axes.set_ylim(0.6 - max(1, len(labels)), 0.6)
    axes.tick_params(axis="y", length=0)


def _times(value: float, _: object = None) -> str:
    return f"{value:g}\N{MULTIPLICATION SIGN}"


def speed(results: Results, theme: Theme) -> Figure:
    """Time of the peers over ours, a row for each shape."""
    prefill = results.of("prefill", dtype="float32")
    figure, panels = _figure(9.0, 3.9, 2, sharex=True)
    for axes, variant in zip(panels, ("full", "causal"), strict=True):
        entries = [entry for entry in prefill if entry.variant == variant]
        for peer in _measured(prefill, ours=False):
            _dots(axes, theme, entries, peer, Entry.ratio)
        axes.axvline(1.0, color=theme.colours[OURS], linewidth=2.2, label=PEERS[OURS].title)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_times))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _rows(axes, [markdown.shape(entry) for entry in entries])
        axes.set_title(f"{variant}, float32", loc="left", color=theme.text)
        axes.set_xlabel("time, fusedattn = 1")
        _plain(axes, theme)
    panels[1].set_yticklabels([])
    _legend(figure, panels[0], theme)
    return figure


def peak(results: Results, theme: Theme) -> Figure:
    """Part of what the machine can do: prefill on the left, decode on the right."""
    figure, panels = _figure(9.0, 4.6, 2)
    kinds = {"prefill": "prefill: of the FMA peak", "decode": "decode: of the read rate"}
    for axes, (group, title) in zip(panels, kinds.items(), strict=True):
        entries = results.of(group, dtype="float32")
        for peer in ("torch", "onnxruntime", OURS):
            _dots(axes, theme, entries, peer, Entry.fraction)
        axes.axvline(1.0, color=theme.text, linewidth=1.2)
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        names = [f"{markdown.shape(entry)} {entry.variant}" for entry in entries]
        _rows(axes, names)
        axes.set_title(title, loc="left", color=theme.text)
        _plain(axes, theme)
    _legend(figure, panels[0], theme)
    return figure


def _by_length(results: Results) -> list[Entry]:
    """Heads of 64, eight of them, full, by length."""
    entries = [*results.of("prefill", dtype="float32"), *results.of("length", dtype="float32")]
    wanted = [
        entry
        for entry in entries
        if entry.variant == "full" and entry.shape == f"1,8,{entry.record['seqlen_k']},64"
    ]
    return sorted(wanted, key=lambda entry: entry.record["seqlen_k"])


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [f"{n}" for n in lengths])
    axes.set_xlabel("seqlen, for queries and keys: (1,8,seqlen,64), float32")


def time(results: Results, theme: Theme) -> Figure:
    """Time of a call against the length."""
    entries = _by_length(results)
    figure, (axes,) = _figure(6.4, 4.0)
    for peer in _measured(entries, ours=True):
        found = [entry for entry in entries if entry.measured(peer)]
        axes.plot(
            [entry.record["seqlen_k"] for entry in found],
            [entry.best(peer) for entry in found],
            MARKERS[peer] + "-",
            color=theme.colours[peer],
            linewidth=2.2 if peer == OURS else 1.4,
            label=PEERS[peer].title,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:g}"))
    axes.set_ylabel("milliseconds")
    _length_axis(axes, [entry.record["seqlen_k"] for entry in entries])
    _plain(axes, theme)
    _legend(figure, axes, theme)
    return figure


def memory(results: Results, theme: Theme) -> Figure:
    """Memory beyond inputs and output against the length."""
    entries = results.apart.get("memory", [])
    figure, (axes,) = _figure(6.4, 4.0)
    for method, peer in (("fused", OURS), ("naive", "numpy")):
        for key, filled in (("bytes", True), ("needed", False)):
            found = [e for e in entries if e["method"] == method and e.get(key) is not None]
            if not found:
                continue
            axes.plot(
                [entry["seqlen"] for entry in found],
                [entry[key] for entry in found],
                MARKERS[peer] + ("-" if filled else ""),
                color=theme.colours[peer],
                markerfacecolor=theme.colours[peer] if filled else "none",
                linewidth=2.2 if peer == OURS else 1.4,
                label=PEERS[peer].title + ("" if filled else ", computed: it did not fit"),
            )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_size(value)))
    axes.set_ylabel("memory beyond inputs and output")
    _length_axis(axes, sorted({entry["seqlen"] for entry in entries}))
    _plain(axes, theme)
    _legend(figure, axes, theme)
    return figure


DRAWN: dict[str, Draw] = {"speed": speed, "peak": peak, "time": time, "memory": memory}


def draw(results: Results, folder: Path = PICTURES) -> list[Path]:
    """Draw every picture for light and dark pages."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in DRAWN.items():
            for shade, theme in THEMES.items():
                written.append(folder / f"{name}-{shade}.svg")
                metadata = {"Title": markdown.PICTURES[name], "Date": None, "Creator": None}
                figure(results, theme).savefig(written[-1], metadata=metadata)
    return written


def main(
    file: Annotated[Path, typer.Argument(exists=True, help="What bench/run.py --json wrote.")],
) -> None:
    """Draw the pictures, and write the tables between the markers of README and docs."""
    results = read(file)
    for path in draw(results):
        typer.echo(path.relative_to(ROOT))
    markdown.write(results)
    for path in markdown.DOCUMENTS:
        typer.echo(path.relative_to(ROOT))


if __name__ == "__main__":
    typer.run(main)
