"""What the library wants to reach, and whether it does: computed from results, never typed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.cases import Case, all_cases
from bench.measure import fastest
from bench.results import Entry, Results, geometric_mean

MIB = 2**20


class Found(NamedTuple):
    """A value, and the case that it comes from."""

    value: float
    where: str = ""


class Goal(NamedTuple):
    """A number to reach: at least that (or at most, if less is better), and what to aim for."""

    text: str
    least: float
    aim: float | None
    style: str  # how numbers are written, for `str.format`
    find: Callable[[Results], Found | None]  # None: not all of it was measured
    less_is_better: bool = False

    def met(self, value: float) -> str:
        """Return "no", "yes" or, for the aim too, "yes, the aim"."""
        if self.aim is not None and self._reaches(value, self.aim):
            return "yes, the aim"
        return "yes" if self._reaches(value, self.least) else "no"

    def cells(self, results: Results) -> list[str]:
        """Return goal, at least, aim, reached, met and worst case, for a table."""
        found = self.find(results)
        least = ("≤ " if self.less_is_better else "") + self.style.format(self.least)
        aim = "" if self.aim is None else self.style.format(self.aim)
        if found is None:
            return [self.text, least, aim, "", "not measured", ""]
        reached = self.style.format(found.value)
        return [self.text, least, aim, reached, self.met(found.value), found.where]

    def _reaches(self, value: float, mark: float) -> bool:
        return value <= mark if self.less_is_better else value >= mark


Wanted = Callable[[Case], bool]
Metric = Callable[[Entry], float | None]


def _all(results: Results, wanted: Wanted, metric: Metric) -> list[tuple[float, str]] | None:
    """Return the metric of every wanted case, or None if one of them was not measured."""
    entries = {entry.name: entry for entry in results.entries}
    found = []
    for case in filter(wanted, all_cases()):
        value = metric(entries[case.name]) if case.name in entries else None
        if value is None:
            return None
        found.append((value, case.name))
    return found


def lowest(wanted: Wanted, metric: Metric) -> Callable[[Results], Found | None]:
    """Look for the worst of all wanted cases."""

    def find(results: Results) -> Found | None:
        found = _all(results, wanted, metric)
        return Found(*min(found)) if found else None

    return find


def highest(wanted: Wanted, metric: Metric) -> Callable[[Results], Found | None]:
    """Look for the worst where less is better."""

    def find(results: Results) -> Found | None:
        found = _all(results, wanted, metric)
        return Found(*max(found)) if found else None

    return find


def mean(wanted: Wanted, metric: Metric) -> Callable[[Results], Found | None]:
    """Look for the geometric mean."""

    def find(results: Results) -> Found | None:
        found = _all(results, wanted, metric)
        return Found(geometric_mean(value for value, _ in found)) if found else None

    return find


def prefill(dtype: str = "float32", least: int = 0, **equal: Any) -> Wanted:
    """Choose prefill cases by dtype, length and fields."""
    return lambda case: (
        case.group == "prefill"
        and case.dtype == dtype
        and least <= case.seqlen_q
        and all(getattr(case, name) == value for name, value in equal.items())
    )


def backward(**equal: Any) -> Wanted:
    """Choose gradients by fields."""
    return lambda case: (
        case.group == "backward" and all(getattr(case, name) == x for name, x in equal.items())
    )


def decode(heads: int, dtype: str) -> Wanted:
    """Choose decodes of one text."""
    return lambda case: (
        case.group == "decode" and case.batch == 1 and (case.heads, case.dtype) == (heads, dtype)
    )


def long_decode(case: Case) -> bool:
    return case.group == "decode" and case.seqlen_k == 32768


def masked(kind: str) -> Wanted:
    """Choose windows, or one variant of the masks."""
    return lambda case: kind in (case.group, case.variant) and case.group in ("window", "mask")


def against(peer: str) -> Metric:
    return lambda entry: entry.ratio(peer)


def fraction(entry: Entry) -> float | None:
    return entry.fraction()


def rms_ratio(entry: Entry) -> float | None:
    ours, torch = entry.rms(), entry.rms("torch")
    return None if ours is None or not torch else ours / torch


def microseconds(entry: Entry) -> float | None:
    return entry.best() * 1e6 if entry.measured("fused") else None


def startup(name: str) -> Callable[[Results], Found | None]:
    """Look for the median of the fresh processes."""

    def find(results: Results) -> Found | None:
        times = results.apart.get("startup", {}).get(name)
        return Found(statistics.median(times)) if times else None

    return find


def memory_per_thread(results: Results) -> Found | None:
    for entry in results.apart.get("memory", []):
        if (entry["method"], entry["seqlen"]) == ("fused", 16384) and entry["bytes"] is not None:
            return Found(entry["bytes"] / MIB / results.about["threads"])
    return None


def growth_with_length(results: Results) -> Found | None:
    """Time per operation at the greater length over that at the smaller."""
    pair = results.apart.get("growth", {}).get("length", [])
    if len(pair) != 2:
        return None
    short, long = (fastest(entry["rounds"]) / entry["flops"] for entry in pair)
    return Found(long / short)


def growth_with_threads(results: Results) -> Found | None:
    """Time with one thread over that with two; beside it what two threads add to the FMA rate."""
    pair = results.apart.get("growth", {}).get("threads", [])
    if [entry["threads"] for entry in pair] != [1, 2]:
        return None
    one, two = (fastest(entry["rounds"]) for entry in pair)
    rates = [entry["work"] / fastest(entry["machine"]) for entry in pair]
    return Found(one / two, f"the machine's own multiply-adds: {rates[1] / rates[0]:.2f}")


_FULL: dict[str, Any] = {"causal": False}
_CAUSAL: dict[str, Any] = {"causal": True}
_TORCH, _ONNX = against("torch"), against("onnxruntime")


def _part_of_peak() -> list[Goal]:
    full_64, full_128 = _FULL | {"head_dim": 64}, _FULL | {"head_dim": 128}
    rows = [
        ("full, D 64, S ≥ 512", 0.82, 0.88, prefill(least=512, **full_64)),
        ("full, D 128, S ≥ 2048", 0.84, 0.90, prefill(least=2048, **full_128)),
        ("causal, S ≥ 2048", 0.78, 0.84, prefill(least=2048, **_CAUSAL)),
        ("(8,12,128,64) full", 0.72, 0.80, prefill(batch=8, **_FULL)),
        ("gradients, full, D 64", 0.78, 0.84, backward(batch=1, **full_64)),
        ("gradients, full, D 128", 0.76, 0.84, backward(batch=1, **full_128)),
    ]
    return [
        Goal(f"part of the FMA peak: {text}", least, aim, "{:.2f}", lowest(wanted, fraction))
        for text, least, aim, wanted in rows
    ]


def _against_peers() -> list[Goal]:
    rows = [
        ("torch, full", 1.15, 1.25, prefill(**_FULL), _TORCH),
        ("torch, causal", 1.25, 1.45, prefill(**_CAUSAL), _TORCH),
        ("torch, gradients, full", 1.15, None, backward(**_FULL), _TORCH),
        ("torch, gradients, causal", 1.35, None, backward(**_CAUSAL), _TORCH),
        ("ONNX Runtime, full", 1.05, 1.15, prefill(**_FULL), _ONNX),
        ("ONNX Runtime, causal", 1.15, 1.4, prefill(**_CAUSAL), _ONNX),
        ("torch, bfloat16, S ≥ 2048", 1.15, 1.3, prefill("bfloat16", 2048), _TORCH),
        ("torch, float16, S ≥ 2048", 1.6, 2.0, prefill("float16", 2048), _TORCH),
        ("torch, a dense mask", 1.5, 3.0, masked("dense"), _TORCH),
        ("torch, lengths", 1.5, 3.0, masked("lengths"), _TORCH),
        ("torch, a bias", 1.5, 3.0, masked("bias"), _TORCH),
        ("torch, a window", 1.5, 3.0, masked("window"), _TORCH),
        ("torch, decode 32/8 heads, float32", 6.0, 8.0, decode(32, "float32"), _TORCH),
        ("torch, decode 32/8 heads, bfloat16", 20.0, 30.0, decode(32, "bfloat16"), _TORCH),
        ("torch, decode 32/8 heads, float16", 35.0, 50.0, decode(32, "float16"), _TORCH),
        ("torch, decode 8/8 heads, float32", 1.5, 2.0, decode(8, "float32"), _TORCH),
    ]
    goals = [
        Goal(f"against {text}", least, aim, "{:.2f}", lowest(wanted, metric))
        for text, least, aim, wanted, metric in rows
    ]
    everything = mean(prefill(), _TORCH)
    goals.insert(2, Goal("against torch, geometric mean of both", 1.45, 1.6, "{:.2f}", everything))
    return goals


def _others() -> list[Goal]:
    share = lowest(long_decode, fraction)
    no_worse = highest(lambda case: case.group not in ("length", "backward"), rms_ratio)
    tiny = lowest(lambda case: case.name == "tiny/1,1,16,64/full/float32", microseconds)
    less = True
    return [
        Goal("decode, KV 32768: part of the streaming-read rate", 0.75, 0.90, "{:.2f}", share),
        Goal("rms error over torch's", 1.0, None, "{:.3f}", no_worse, less),
        Goal("a tiny call (1,1,16,64)", 12, 6, "{:.1f} µs", tiny, less),
        Goal("import beyond NumPy", 0.1, 0.05, "{:.3f} s", startup("import"), less),
        Goal("first call, cold", 2.5, 1.5, "{:.2f} s", startup("cold"), less),
        Goal("first call, from the cache", 0.9, 0.6, "{:.2f} s", startup("cached"), less),
        Goal(
            "extra memory a thread at (1,8,16384,64)", 8, 2, "{:.1f} MiB", memory_per_thread, less
        ),
        Goal(
            "time per FLOP at S = 16384 over S = 2048",
            1.1,
            None,
            "{:.2f}",
            growth_with_length,
            less,
        ),
        Goal("two threads against one", 1.85, None, "{:.2f}", growth_with_threads),
    ]


GOALS = [*_part_of_peak(), *_against_peers(), *_others()]
