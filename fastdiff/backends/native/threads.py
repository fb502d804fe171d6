"""How many threads the native engine runs: as many as there are processors for."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


def number() -> int:
    """Torch's number of threads, or the processors that this process may use where those are fewer.

    A member of the engine's team that does not run keeps all others waiting at the next barrier, so one thread too many
    costs more than its share.
    """
    limits: list[float] = [torch.get_num_threads()]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    limits += quotas()
    return max(1, math.ceil(min(limits)))


def quotas(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Processors' worth of time that the control groups of this process allow, of each group that has a limit.

    mounted: where the groups are; own: the file that names this process's, a line for each hierarchy. Of a container's
    path only the part that it sees exists.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = mounted / controllers / path.lstrip("/")
        while group != mounted.parent:
            found += _quota(group)
            group = group.parent
    return found


def _quota(group: Path) -> list[float]:
    """Of one group: from cpu.max "quota period" (version 2), or cpu.cfs_quota_us and cpu.cfs_period_us (version 1)."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return [int(quota) / int(period)] if int(quota) > 0 and int(period) > 0 else []
        except (OSError, ValueError):  # no such file; or "max", no limit
            continue
    return []
