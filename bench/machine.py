"""Where and with what something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fusedattn
from bench.peers import PEERS
from fusedattn.cli.machine import available_memory, cpu_name
from fusedattn.cpu.tile import host_isa

ROOT = Path(__file__).resolve().parents[1]


def describe(threads: int) -> dict[str, Any]:
    """Return versions, commit, machine and threads."""
    packages = {"numpy", "numba", "llvmlite", *(peer.package for peer in PEERS.values())}
    packages.discard("fusedattn")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        # What was measured is the commit and no more, or something else that nobody can look up.
        "dirty": _dirty(),
        "machine": {
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "vector_unit": host_isa().name + (" and AMX" if host_isa().matrix else ""),
            "memory": available_memory(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "fusedattn": fusedattn.__version__,
            **{name: _installed(name) for name in sorted(packages)},
        },
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dirty() -> bool | None:
    # Results and what is drawn from them may differ: they are not what is measured.
    changed = _git("status", "--porcelain", "--", "fusedattn", "bench/*.py", "pyproject.toml")
    return None if changed is None else bool(changed)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
