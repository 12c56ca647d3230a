"""What this machine is, what it has room for, and how much memory this process has held."""

import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


def binary_size(count: float) -> str:
    """Return a number of bytes for people: three digits at most.

    Examples
    --------
    >>> binary_size(800), binary_size(1.5 * 2**20), binary_size(3 * 2**30)
    ('800 B', '1.5 MiB', '3.0 GiB')
    """
    for unit, name in ((_GIB, "GiB"), (_MIB, "MiB"), (_KIB, "KiB")):
        if count >= unit:
            amount = count / unit
            return f"{amount:.1f} {name}" if amount < 9.95 else f"{amount:.0f} {name}"
    return f"{count:.0f} B"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name that the processor gives itself."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Return the bytes that this process may still allocate without harm, None if unknown."""
    limits = [_meminfo_available(), *_cgroup_headrooms()]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) * _KIB
    except OSError:
        pass
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    # No kernel that says what is available; half of all that there is will do.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_headrooms(
    proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes left under the limit of the process's cgroup (v2 or v1) and of each of its parents."""
    try:
        lines = (proc / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for candidate in (folder, *folder.parents):
            headroom = _headroom(candidate, *names)
            if headroom is not None:
                yield headroom
            if candidate == base:
                break


def _headroom(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    try:
        # "max" is no number and means no limit.
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    # The file cache counts as used and makes room when it is needed.
    return max(0, left + int(statistics.get(droppable, 0)))


def _from_status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * _KIB
    except OSError:
        pass
    return None


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has held so far, None if unknown.

    Linux's VmHWM before getrusage, which also remembers the process that this one was forked from.
    """
    peak = _from_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_memory() -> int | None:
    """Return the bytes of memory that this process holds now, None if unknown."""
    held = _from_status("VmRSS")
    if held is not None or os.name != "posix":
        return held
    import subprocess

    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    try:
        return int(subprocess.run(command, capture_output=True, text=True).stdout) * _KIB
    except (OSError, ValueError):
        return None


def peak_extra(call: Callable[[], object]) -> int | None:
    """Run a call and return the most bytes it held beyond those held before, None if unknown."""
    peak, held = peak_memory(), current_memory()
    if peak is None or held is None:
        call()
        return None
    # What was held at some time and given back would hide the call's own memory, so hold that much.
    # Pages of its own, because the allocator would serve it from memory that is held already.
    with mmap.mmap(-1, max(0, peak - held) + _MIB) as ballast:
        for page in range(0, len(ballast), mmap.PAGESIZE):
            ballast[page] = 1
        before = peak_memory()
        call()
        after = peak_memory()
    return None if before is None or after is None else after - before
