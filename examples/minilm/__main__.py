"""Print how near sentences are to each other."""

from enum import StrEnum
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from examples.minilm.files import INSTALL, load_model, tokenize
from examples.minilm.model import embed_packed, embed_padded
from examples.minilm.sentences import PARAPHRASES

PROMISED = 1e-5
app = typer.Typer(add_completion=False)


class Arrangement(StrEnum):
    """How the sentences lie in memory."""

    padded = "padded"
    packed = "packed"


class Backend(StrEnum):
    """Who computes the attention."""

    cpu = "cpu"
    blocked = "blocked"
    reference = "reference"


@app.command()
def main(
    sentences: Annotated[
        list[str] | None, typer.Argument(help="Two or more; by default pairs of paraphrases.")
    ] = None,
    arrangement: Annotated[
        Arrangement, typer.Option(help="A padded rectangle, or packed at their own lengths.")
    ] = Arrangement.packed,
    backend: Annotated[Backend, typer.Option(help="Backend of the attention.")] = Backend.cpu,
) -> None:
    """Embed sentences with all-MiniLM-L6-v2 in NumPy and print their cosine similarities."""
    console = Console()
    if sentences and len(sentences) < 2:
        raise typer.BadParameter("give two or more", param_hint="sentences")
    chosen = sentences or [sentence for pair in PARAPHRASES for sentence in pair]
    try:
        tokens = tokenize(chosen)
        model, exact_model = load_model(np.float32), load_model(np.float64)
    except ModuleNotFoundError as missing:
        console.print(f"{missing}: {INSTALL}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    embed = embed_packed if arrangement is Arrangement.packed else embed_padded
    vectors = embed(model, tokens, backend=backend.value)
    exact = embed(exact_model, tokens, backend="reference")

    similarity = vectors @ vectors.T
    separated = True
    if sentences:
        console.print(matrix(sentences, similarity))
    else:
        near, far = near_and_far(similarity)
        console.print(pairs(near, far))
        separated = bool(near.min() > far.max())
        console.print(
            f"Every paraphrase is {'nearer' if separated else 'NOT nearer'} than every stranger: "
            f"at least {near.min():.3f} against at most {far.max():.3f}."
        )
    console.print(work(tokens, arrangement))
    difference = float(np.abs(vectors - exact).max())
    console.print(
        f"Largest difference to the float64 reference: {difference:.1e} (promised: {PROMISED:.0e})."
    )
    # Written so that NaN fails.
    if not (difference <= PROMISED and separated):
        raise typer.Exit(1)


def near_and_far(similarity: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Return for each pair its own similarity and that of its nearest stranger."""
    count = len(similarity) // 2
    blocks = similarity.reshape(count, 2, count, 2)
    near = np.einsum("iaia->i", blocks[:, :1, :, 1:])
    strangers = np.where(np.eye(count, dtype=bool), -np.inf, blocks.max(axis=(1, 3)))
    return near, strangers.max(axis=1)


def pairs(near: NDArray[np.float32], far: NDArray[np.float32]) -> Table:
    """One row for each pair of paraphrases."""
    table = Table(title="cosine similarity", show_lines=True)
    table.add_column("paraphrases")
    table.add_column("to each other", justify="right")
    table.add_column("to the nearest stranger", justify="right")
    for (first, second), ours, theirs in zip(PARAPHRASES, near, far, strict=True):
        table.add_row(f"{first}\n{second}", f"{ours:.3f}", f"{theirs:.3f}")
    return table


def matrix(sentences: list[str], similarity: NDArray[np.float32]) -> Table:
    """Every sentence with every other."""
    table = Table("", "sentence", *(str(i + 1) for i in range(len(sentences))))
    for index, (sentence, row) in enumerate(zip(sentences, similarity, strict=True)):
        table.add_row(str(index + 1), sentence, *(f"{value:.3f}" for value in row))
    return table


def work(tokens: list[list[int]], arrangement: Arrangement) -> str:
    """Say how many rows each layer computed."""
    lengths = [len(sentence) for sentence in tokens]
    rectangle = len(lengths) * max(lengths)
    rows = sum(lengths) if arrangement is Arrangement.packed else rectangle
    return (
        f"{len(lengths)} sentences of {min(lengths)} to {max(lengths)} tokens, {arrangement.value}:"
        f" each layer computed {rows} rows, {rows - sum(lengths)} of them padding."
    )


if __name__ == "__main__":
    app()
