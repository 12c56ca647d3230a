"""Tables of docs/performance-gpu.md from what bench/gpu.py wrote.

python -m bench.gpu_markdown bench/results/gpu-h200.json
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.markdown import NOTHING, ROOT, filled, table

DOCUMENT = ROOT / "docs/performance-gpu.md"

Found = dict[str, Any]


def ceilings(found: Found) -> str:
    """What the GPU does at most, measured in the same run."""
    rates = found["ceilings"]
    return (
        f"In that run a bfloat16 product of 8192 x 8192 matrices ran at {rates['bf16_tflops']:.0f} "
        f"TFLOP/s, and a copy moved {rates['copy_tb_s']:.2f} TB/s."
    )


def _results(found: Found, dtype: str) -> Iterator[tuple[str, str, Found]]:
    for result in found["results"]:
        if result["dtype"] == dtype:
            shape = ", ".join(map(str, result["shape"]))
            yield shape, "causal" if result["causal"] else "full", result


def _rate(result: Found, name: str) -> str:
    rate = result["tflops"].get(name)
    return NOTHING if rate is None else f"{rate:.0f}"


def prefill(found: Found) -> str:
    """Half types, beside cuDNN and FlashAttention-2."""
    product = found["ceilings"]["bf16_tflops"]
    rows = []
    for shape, kind, result in _results(found, "torch.bfloat16"):
        ours, cudnn = (result["tflops"].get(name) for name in ("fusedattn", "cudnn"))
        rates = [_rate(result, name) for name in ("fusedattn", "cudnn", "flash2")]
        ratio = NOTHING if cudnn is None else f"{ours / cudnn:.2f}"
        rows.append([shape, kind, *rates, ratio, f"{ours / product:.2f}"])
    headings = ["batch, heads, KV heads, seqlen, head_dim", "", "fusedattn", "cuDNN"]
    headings += ["FlashAttention-2", "ratio", "of the product"]
    return table(headings, rows, left=2)


def features(found: Found) -> str:
    """One feature at a time."""
    rates = found["features"]
    return table(list(rates), [[f"{rate:.0f}" for rate in rates.values()]], left=0)


def blocks(found: Found) -> str:
    """Block masks."""
    whole = found["blocks"]["no mask"]["milliseconds"]
    rows = [
        [
            name,
            f"{one['kept']:.2f}",
            f"{one['milliseconds']:.2f}",
            f"{one['milliseconds'] / whole:.2f}",
        ]
        for name, one in found["blocks"].items()
    ]
    return table(["mask", "blocks kept", "ms", "of no mask"], rows)


def decode(found: Found) -> str:
    """Few queries."""
    rows = []
    for result in found["decode"]:
        times = [
            f"{statistics.median(result['milliseconds'][name]) * 1e3:.0f}"
            if name in result["milliseconds"]
            else NOTHING
            for name in ("fusedattn", "cudnn", "flash2")
        ]
        rate, share = (result[kind]["fusedattn"] for kind in ("tb_s", "share_of_copy"))
        shape = ", ".join(map(str, result["shape"]))
        rows.append([shape, f"{rate:.2f}", f"{share:.2f}", *times])
    headings = ["shape", "TB/s", "share", "fusedattn, µs", "cuDNN, µs", "FlashAttention-2, µs"]
    return table(headings, rows)


def float32(found: Found) -> str:
    """Exact float32, beside torch's memory-efficient kernel."""
    rows = []
    for shape, kind, result in _results(found, "torch.float32"):
        errors = [
            f"{result['errors'][name]:.1e}" if name in result["errors"] else NOTHING
            for name in ("fusedattn", "efficient")
        ]
        rates = [_rate(result, name) for name in ("fusedattn", "efficient")]
        rows.append([shape, kind, *rates, *errors])
    headings = ["batch, heads, KV heads, seqlen, head_dim", "", "fusedattn", "torch"]
    return table([*headings, "error", "torch's"], rows, left=2)


def host(found: Found) -> str:
    """Time of the host for one call."""
    return table(["call", "µs"], [[name, f"{time:.1f}"] for name, time in found["host"].items()])


BLOCKS: dict[str, Callable[[Found], str]] = {
    function.__name__: function
    for function in (ceilings, prefill, features, blocks, decode, float32, host)
}


def main(
    file: Annotated[Path, typer.Argument(exists=True, help="What bench/gpu.py --json wrote.")],
) -> None:
    """Write the tables between the markers of docs/performance-gpu.md."""
    found = json.loads(file.read_text())
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), found, BLOCKS))
    typer.echo(DOCUMENT.relative_to(ROOT))


if __name__ == "__main__":
    typer.run(main)
