"""Train, draw the loss, write some text."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from examples.char_lm import trigram
from examples.char_lm.generation import generate
from examples.char_lm.model import Shape
from examples.char_lm.picture import draw_losses
from examples.char_lm.text import Corpus, Tokens, spread, standard_library, windows
from examples.char_lm.training import Plan, Progress, evaluate, train

app = typer.Typer(add_completion=False)
DEFAULT, USUAL = Plan(), Shape()


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DEFAULT.steps,
    layers: Annotated[int, typer.Option(min=1)] = USUAL.layers,
    heads: Annotated[int, typer.Option(min=1)] = USUAL.heads,
    channels: Annotated[int, typer.Option(min=1, help="Multiple of the heads.")] = USUAL.channels,
    batch: Annotated[int, typer.Option(min=1, help="Pieces in a step.")] = DEFAULT.batch,
    length: Annotated[int, typer.Option(min=2, help="Characters in a piece.")] = DEFAULT.length,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULT.rate,
    seed: Annotated[int, typer.Option(min=0)] = DEFAULT.seed,
    validation: Annotated[int, typer.Option(min=1, help="Pieces to judge by at the end.")] = 800,
    prompt: Annotated[str, typer.Option(help="Beginning of the text to write.")] = "def ",
    characters: Annotated[int, typer.Option(min=0, help="Characters to write.")] = 600,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.7,
    backend: Annotated[str | None, typer.Option(help="Backend of the attention.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to draw the loss.")] = Path("char_lm.png"),
) -> None:
    """Train a character-level transformer on Python's standard library, in NumPy."""
    if channels % heads:
        raise typer.BadParameter("must be a multiple of --heads", param_hint="--channels")
    if not prompt:
        raise typer.BadParameter("must have a character at least", param_hint="--prompt")
    console = Console()
    corpus = standard_library()
    plan = Plan(steps, batch, length, rate, seed=seed, backend=backend)
    shape = Shape(layers, heads, channels)
    places = spread(corpus.validation, validation, length)
    judged = windows(corpus.validation, places, length)
    step = max(1, len(judged[0]) // 32)
    few = judged[0][::step], judged[1][::step]
    counted = trigram.trigram(corpus.training, len(corpus.alphabet))
    baseline = trigram.loss(counted, corpus.validation, places, length)
    console.print(
        f"{len(corpus.training):,} characters to learn from, {len(corpus.alphabet)} different ones;"
        f" a trigram model gets {baseline:.3f} nats per character."
    )

    last, losses, checks = learn(plan, shape, corpus, few, console)
    loss = evaluate(last.weights, shape, *judged, backend)
    console.print(
        f"{steps} steps in {last.seconds:.0f} s: {loss:.3f} nats per character on the same "
        f"{judged[0].size:,} characters, which {'beats' if loss < baseline else 'does NOT beat'} "
        "the trigram model."
    )
    try:
        draw_losses(picture, losses, checks, baseline)
        console.print(f"The loss is drawn in {picture}.")
    except ModuleNotFoundError as missing:
        console.print(f"No picture: {missing}; python -m pip install '.[examples]'", markup=False)
    console.print()
    start = corpus.encode(prompt)
    written = generate(
        last.weights, shape, start, characters, temperature=temperature, seed=seed,
        backend=backend,
    )  # fmt: skip
    console.out(corpus.decode(start), end="", highlight=False)
    for token in written:
        console.out(corpus.decode(np.array([token], np.uint8)), end="", highlight=False)
    console.print()
    if steps >= DEFAULT.steps and not loss < baseline:
        raise typer.Exit(1)


def learn(
    plan: Plan, shape: Shape, corpus: Corpus, few: tuple[Tokens, Tokens], console: Console
) -> tuple[Progress, list[float], dict[int, float]]:
    """Train beside a bar: where it ends, the loss of each step, and now and then that of `few`."""
    losses: list[float] = []
    checks: dict[int, float] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("training", total=plan.steps)
        for progress in train(plan, shape, corpus):
            losses.append(progress.loss)
            if progress.step % max(1, plan.steps // 20) == 0 or progress.step == plan.steps:
                checks[progress.step] = evaluate(progress.weights, shape, *few, plan.backend)
            recent = np.mean(losses[-20:])
            bar.update(task, advance=1, description=f"loss {recent:.3f}")
    return progress, losses, checks


if __name__ == "__main__":
    app()
