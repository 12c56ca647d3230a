"""The commands and their options. What a command needs is loaded when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Commands that end with one line and status 130 when they are interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort):
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="Exact fused attention for NumPy people.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    seqlen: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length to measure; repeat it for more. [1024, 4096, 16384]"),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 1,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dim.")] = 64,
) -> None:
    """Measure memory, time and error beside naive NumPy attention; under a minute on two cores."""
    from fusedattn.cli.demo import run
    from fusedattn.cli.measure import MeasurementFailed

    try:
        run(Console(), seqlen or [1024, 4096, 16384], heads, head_dim)
    except MeasurementFailed as failure:
        raise _stop(f"a measurement failed: {failure}", status=1) from None


@app.command()
def info() -> None:
    """Print versions, vector unit, threads and the cache of compiled kernels."""
    from rich.table import Table
    from rich.text import Text

    from fusedattn.cli.info import facts

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    try:
        for name, value in facts().items():
            table.add_row(Text(name, "bold"), Text(value))
    except ValueError as error:  # FUSEDATTN_NUM_THREADS=many
        raise _stop(str(error)) from None
    Console().print(table)


@app.command()
def explain(
    q: Annotated[str, typer.Argument(metavar="Q", help="Shape of q: BATCH,HEADS,SEQLEN,DIM.")],
    k: Annotated[
        str | None, typer.Argument(metavar="[K]", help="Shape of k; q's if left out.")
    ] = None,
    v: Annotated[
        str | None, typer.Argument(metavar="[V]", help="Shape of v; k's if left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    scale: Annotated[float | None, typer.Option(help="Factor of the scores.")] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Hide the keys after the query.")
    ] = False,
    window_size: Annotated[
        str | None, typer.Option(metavar="LEFT,RIGHT", help="Sliding window; an open side is none.")
    ] = None,
    q_offset: Annotated[int | None, typer.Option(help="Key position of the first query.")] = None,
    seqused_q: Annotated[int | None, typer.Option(help="How many queries count.")] = None,
    seqused_k: Annotated[int | None, typer.Option(help="How many keys count.")] = None,
    mask: Annotated[str | None, typer.Option(metavar="SHAPE", help="A bool mask.")] = None,
    bias: Annotated[str | None, typer.Option(metavar="SHAPE", help="A bias of q's dtype.")] = None,
    alibi_slopes: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="ALiBi slopes, HEADS or BATCH,HEADS.")
    ] = None,
    softcap: Annotated[float | None, typer.Option(help="Cap of the scores.")] = None,
    sinks: Annotated[
        str | None, typer.Option(metavar="HEADS", help="A sink for each head.")
    ] = None,
    dropout_p: Annotated[float, typer.Option(help="Probability of dropping a weight.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Needed with dropout.")] = None,
    layout: Annotated[str, typer.Option(help="bhsd or bshd.")] = "bhsd",
    return_lse: Annotated[bool, typer.Option("--return-lse", help="Return the lse too.")] = False,
    out_dtype: Annotated[str | None, typer.Option(help="dtype of the output; q's.")] = None,
    backend: Annotated[str | None, typer.Option(help="The one to ask; any if left out.")] = None,
) -> None:
    """Say what attention() would run for these shapes and options, and why. Nothing is computed.

    For example: python -m fusedattn explain 1,32,4096,128 1,8,4096,128 --causal
    """
    import fusedattn
    from fusedattn.cli import explain as arguments

    operands = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    try:
        element = arguments.dtype(dtype)
        q_shape = arguments.shape(q)
        k_shape = arguments.shape(k) if k else q_shape
        v_shape = arguments.shape(v) if v else k_shape
        arrays = [arguments.stand_in(each, element) for each in (q_shape, k_shape, v_shape)]
        options: dict[str, Any] = {
            name: arguments.stand_in(arguments.shape(text), bool if name == "mask" else element)
            for name, text in operands.items()
            if text is not None
        }
        answer = fusedattn.explain(
            *arrays,
            **options,
            scale=scale,
            causal=causal,
            window_size=None if window_size is None else arguments.window(window_size),
            q_offset=q_offset,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            softcap=softcap,
            dropout_p=dropout_p,
            seed=seed,
            layout=layout,
            return_lse=return_lse,
            out_dtype=None if out_dtype is None else arguments.dtype(out_dtype),
            backend=backend,
        )
    except (TypeError, ValueError) as error:
        raise _stop(str(error)) from None
    typer.echo(str(answer))
    if answer.backend is None:
        raise typer.Exit(1)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def check(context: typer.Context) -> None:
    """Hold an attention function of your own to the laws of attention; see check --help."""
    try:
        from fusedattn.testing.cli import check as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fusedattn":
            raise
        needed = f"check needs the package {error.name}"
        raise _stop(f"{needed}: python -m pip install 'fusedattn[testing]'") from None
    _pass_on(command, "check", context)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Time attention beside other libraries, from a checkout; see bench --help."""
    import importlib
    import sys
    from pathlib import Path

    import fusedattn

    root = Path(fusedattn.__file__).parents[1]
    if not (root / "bench/run.py").is_file():
        raise _stop(
            "bench needs a checkout of the repository: run python -m fusedattn bench in its folder"
        )
    sys.path.insert(0, str(root))
    try:
        command = importlib.import_module("bench.run").main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("fusedattn", "bench"):
            raise
        needed = f"bench needs the package {error.name}"
        raise _stop(f"{needed}: python -m pip install '.[bench]'") from None
    _pass_on(command, "bench", context)


def _pass_on(command: Callable[..., None], name: str, context: typer.Context) -> NoReturn:
    """Run a command that has options of its own."""
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(command)
    status = inner(
        args=context.args, prog_name=f"python -m fusedattn {name}", standalone_mode=False
    )
    raise typer.Exit(status or 0)


def _stop(message: str, status: int = 2) -> typer.Exit:
    """Print a line about what is wrong; return what to raise."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(status)
