"""The loss as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_losses(
    path: Path, losses: Sequence[float], checks: Mapping[int, float], baseline: float
) -> None:
    """Draw the loss of each step, those on held-out text, and the trigram model's; see `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.7, alpha=0.6, label="training batch")
    axes.plot(list(checks), list(checks.values()), marker="o", label="validation")
    axes.axhline(baseline, color="gray", linestyle="--", label="trigram, validation")
    axes.set(xlabel="step", ylabel="nats per character", title="Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=120)
