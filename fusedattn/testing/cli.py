"""``python -m fusedattn check``: judge an attention function from the command line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fusedattn.testing.adapters import ADAPTERS, Adapted
from fusedattn.testing.check import check_attention


def check(
    target: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="what to judge")],
    adapter: Annotated[
        str, typer.Option(help=f"how it is called: {', '.join(ADAPTERS)}")
    ] = "numpy",
    supports: Annotated[
        str | None,
        typer.Option(help="keywords and capabilities, with commas; the adapter's by default"),
    ] = None,
    dtypes: Annotated[str, typer.Option(help="types of q, k and v, with commas")] = "float32",
    examples: Annotated[int, typer.Option(min=1, help="calls drawn for each law")] = 100,
    seed: Annotated[int | None, typer.Option(help="seed of all draws")] = None,
    laws: Annotated[str | None, typer.Option(help="laws to try, with commas; all")] = None,
    xfail: Annotated[Path | None, typer.Option(help="file of laws known to fail")] = None,
    returns_lse: Annotated[bool, typer.Option(help="it always returns (out, lse)")] = False,
    bitwise: Annotated[bool, typer.Option(help="neighbours and strides change no bit")] = False,
    deterministic: Annotated[bool, typer.Option(help="the same call gives the same bits")] = True,
    json: Annotated[Path | None, typer.Option(help="write the report here as JSON")] = None,
) -> None:
    """Hold an attention function to the laws of attention; exit status 0 only if all hold."""
    try:
        adapted = adapt(target, adapter)
        chosen = adapted.supports if supports is None else frozenset(_listed(supports))
        with _progress_bar() as bar:
            task = bar.add_task("", total=None)

            def progress(law: str, done: int, total: int) -> None:
                bar.update(task, description=law, completed=done, total=total)

            report = check_attention(
                adapted.fn,
                supports=chosen,
                dtypes=_listed(dtypes),
                returns_lse=returns_lse,
                bitwise=bitwise,
                deterministic=deterministic,
                domain=adapted.domain,
                max_examples=examples,
                seed=seed,
                laws=None if laws is None else _listed(laws),
                xfail=xfail,
                progress=progress,
            )
    except (TypeError, ValueError, ImportError, AttributeError, OSError) as error:
        raise _stop(error) from None
    typer.echo(str(report))
    try:
        if json is not None:
            json.write_text(report.as_json() + "\n")
    except OSError as error:
        raise _stop(error) from None
    raise typer.Exit(0 if report.ok else 1)


def _stop(error: Exception) -> typer.Exit:
    """Print what is wrong; return what to raise."""
    Console(stderr=True).print(f"check: {error}", style="red", markup=False)
    return typer.Exit(2)


def adapt(target: str, adapter: str) -> Adapted:
    """Import ``MODULE:FUNCTION`` and wrap it to be called like `fusedattn.attention`."""
    module, _, path = target.partition(":")
    if not module or not path:
        raise ValueError(f"expected MODULE:FUNCTION, got {target!r}")
    if adapter not in ADAPTERS:
        raise ValueError(f"there is no adapter {adapter!r}; there are {', '.join(ADAPTERS)}")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return ADAPTERS[adapter](found)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description:36}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
