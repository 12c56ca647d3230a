"""What a check found: as an object, as a table, as JSON, and as code that can be run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedattn.testing.cases import Case
from fusedattn.testing.kernel import Kernel

if TYPE_CHECKING:
    from fusedattn.testing.laws import Law


@dataclass(frozen=True)
class Failure:
    """A broken law with its smallest example."""

    law: str
    message: str
    code: str
    case: Case


@dataclass(frozen=True)
class Outcome:
    """What became of one law.

    `status` is ``held``, ``failed``, ``not promised``, ``xfailed`` (failed as known) or ``xpassed``
    (known to fail, but did not).
    """

    law: str
    promise: str
    status: str
    examples: int
    seconds: float
    note: str = ""
    failure: Failure | None = None


@dataclass(frozen=True)
class Report:
    """Result of `check_attention`; prints as a table."""

    name: str
    seed: int
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether all laws hold, but for those known to fail, which must fail."""
        return all(o.status in ("held", "not promised", "xfailed") for o in self.outcomes)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The broken laws, without those known to fail."""
        return tuple(
            o.failure for o in self.outcomes if o.failure is not None and o.status == "failed"
        )

    def as_json(self) -> str:
        """Return the report for machines."""
        rows: list[dict[str, Any]] = []
        for o in self.outcomes:
            row: dict[str, Any] = {
                "law": o.law,
                "status": o.status,
                "examples": o.examples,
                "seconds": round(o.seconds, 3),
                "note": o.note,
            }
            if o.failure is not None:
                row |= {"message": o.failure.message, "code": o.failure.code}
            rows.append(row)
        whole = {"name": self.name, "ok": self.ok, "seed": self.seed, "laws": rows}
        return json.dumps(whole, indent=2)

    def __str__(self) -> str:
        table = _rich_table(self)
        text = table if table is not None else _plain_table(self)
        parts = [text.rstrip("\n")]
        parts += [f"\n{f.law}: {f.message}\n\n{f.code}" for f in self.failures]
        return "\n".join(parts)


def _plain_table(report: Report) -> str:
    width = max((len(o.law) for o in report.outcomes), default=0)
    lines = [f"{report.name} (seed {report.seed})"]
    for o in report.outcomes:
        note = o.note or (o.failure.message if o.failure else "")
        lines.append(
            f"{o.law:<{width}}  {o.status:<12}  {o.examples:>5}  {o.seconds:>6.1f} s  {note}"
        )
    return "\n".join(lines)


def _rich_table(report: Report) -> str | None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    colours = {"held": "green", "failed": "red", "xpassed": "red", "xfailed": "yellow"}
    table = Table(title=f"{report.name} (seed {report.seed})")
    for heading in ("law", "status", "calls", "s", "note"):
        table.add_column(heading, justify="right" if heading in ("calls", "s") else "left")
    for o in report.outcomes:
        note = o.note or (o.failure.message if o.failure else "")
        table.add_row(
            Text(o.law),
            Text(o.status, colours.get(o.status, "dim")),
            str(o.examples) if o.examples else "",
            f"{o.seconds:.1f}" if o.examples else "",
            Text(note),
        )
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=terminal, width=None if terminal else 140)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def runnable(law: Law, kernel: Kernel, case: Case) -> str:
    """Return a program that shows the failure of a law on one call."""
    check = law.check
    module = check.__module__.rsplit(".", 1)[-1]
    lines = ["from numpy import inf, nan", "import ml_dtypes", "import numpy as np", ""]
    lines += ["from fusedattn import make_block_mask"]
    lines += ["from fusedattn.testing import Case, Kernel, functions, laws, unpack"]
    options = [f"supports=frozenset({sorted(kernel.supports)!r})", f"dtypes={kernel.dtypes!r}"]
    for name in ("fn", "gradient", "set_threads"):
        function = getattr(kernel, name)
        if function is not None:
            lines.append(_import_of(function, name))
            options.append(name if name == "fn" else f"{name}={name}")
    options.sort(key=lambda option: option != "fn")
    options += [f"{n}=True" for n in ("returns_lse", "bitwise") if getattr(kernel, n)]
    if not kernel.deterministic:
        options.append("deterministic=False")
    return "\n".join(
        [
            *lines,
            "",
            f"kernel = Kernel({', '.join(options)})",
            f"case = {case.code()}",
            f"laws.{module}.{check.__name__}(kernel, case)",
            "",
        ]
    )


def _import_of(function: Any, alias: str) -> str:
    source = getattr(function, "source", None)
    if source is not None:
        return f"{source}\n{alias} = adapted.{alias}"
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return f"{alias} = ...  # {module or ''}.{name or type(function).__name__}: put it here"
    return f"from {module} import {name} as {alias}"
