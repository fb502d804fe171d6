"""The memory that this process can still take: the machine's, its control groups' and its own limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MOUNTED, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, use, and the key of memory.stat for cached files, which are dropped when memory is needed.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # cgroup version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def free() -> int | None:
    """Return the bytes that this process can still take; None where the system does not say.

    It is the least of what the machine, each control group of the process, and ``ulimit -v`` leave.
    """
    known = [*_machine(), *group_limits(), *_own()]
    return max(min(known), 0) if known else None


def control_groups(controller: str, mounted: Path = MOUNTED, own: Path = OWN) -> Iterator[Path]:
    """Yield the folders of this process's control groups that have a controller, each one's parents after it.

    The file ``own`` names the groups, one line per hierarchy. In a container, only part of a path exists.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = mounted / controllers / path.lstrip("/")
        while group != mounted.parent:
            yield group
            group = group.parent


def group_limits(mounted: Path = MOUNTED, own: Path = OWN) -> Iterator[int]:
    """Yield what each control group of this process with a limit leaves, in bytes."""
    for group in control_groups("memory", mounted, own):
        for limit, use, cached in _GROUP_FILES:
            try:
                most = int((group / limit).read_text())
                used = int((group / use).read_text())
                used -= _numbers(group / "memory.stat").get(cached, 0)
            except (OSError, ValueError):  # no such file, or "max": no limit
                continue
            yield most - used


def _machine() -> Iterator[int]:
    kib = _numbers(Path("/proc/meminfo"))
    if "MemAvailable:" in kib:
        yield 1024 * (kib["MemAvailable:"] + kib.get("SwapFree:", 0))
        return
    try:
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # this system does not have the names
        return


def _own() -> Iterator[int]:
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return


def _numbers(path: Path) -> dict[str, int]:
    """Read the first number of each line of a file of the kernel, by the line's first word; {} without the file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
