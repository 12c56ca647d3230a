"""What is installed and what the CPU kernels make of this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fusedattn
from fusedattn.cli.machine import binary_size, cpu_name

_PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes")


def facts() -> dict[str, str]:
    """Return lines by their names, in the order in which they are worth reading."""
    found = {"fusedattn": f"{fusedattn.__version__} in {Path(fusedattn.__file__).parent}"}
    found["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    found |= {name: _version(name) for name in _PACKAGES}
    found["system"] = f"{platform.system()} {platform.machine()}, {cpu_name()}"
    return found | _kernels() | {"threads": _threads()} | _cache()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    from fusedattn.cpu.tile import host_isa, tile_for

    isa, tile = host_isa(), tile_for("float32", "float32")
    return {
        "vector unit": f"{isa.name}, {isa.registers} registers",
        "matrix unit": "AMX, for float32, float16 and bfloat16" if isa.matrix else "none",
        "vector width": f"{isa.vector_bytes} bytes: {tile.width} float32",
        "register tile": f"{tile.rows} keys x {tile.vectors} vectors of queries",
        "score tile": f"{tile.lanes} queries x {tile.block_k} keys",
    }


def _threads() -> str:
    from fusedattn.cpu.threads import available_cpus

    variable = os.environ.get("FUSEDATTN_NUM_THREADS", "").strip()
    count = fusedattn.get_num_threads()
    if variable:
        return f"{count} (FUSEDATTN_NUM_THREADS={variable})"
    cpus, allowed = os.cpu_count() or 1, available_cpus()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    if allowed < affinity:
        return f"{count} (the cgroup's quota, of {affinity} CPUs)"
    if affinity < cpus:
        return f"{count} (the process's affinity, of {cpus} CPUs)"
    return f"{count} (all CPUs)"


def _cache() -> dict[str, str]:
    from fusedattn.cpu.cache import path_of
    from fusedattn.kernel_files import cache_dir

    folder = cache_dir()
    chosen = " (FUSEDATTN_CACHE_DIR)" if os.environ.get("FUSEDATTN_CACHE_DIR") else ""
    try:
        sizes = [path.stat().st_size for path in folder.glob("*.bin")]
    except OSError:
        sizes = []
    # The worker takes most of the time to compile; its file is named for source and versions.
    warm = path_of("worker", "").is_file()
    state = "warm" if warm else "cold: the first call compiles, which takes some seconds"
    access = "writable" if _writable(folder) else "not writable: every process compiles anew"
    return {
        "cache folder": f"{folder}{chosen}, {access}",
        "cache": f"{state}; {len(sizes)} files, {binary_size(sum(sizes))}",
    }


def _writable(folder: Path) -> bool:
    """Whether files can be made there; the folder itself may still have to be made."""
    for place in (folder, *folder.parents):
        if place.exists():
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False
