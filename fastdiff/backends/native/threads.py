"""The number of threads of the native engine: as many as there are processors for it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fastdiff.core import process
from fastdiff.memory import MOUNTED, OWN, control_groups


def number() -> int:
    """Return torch's number of threads, or the number of processors this process may use if that is lower.

    A thread that is not running keeps all others waiting at the next barrier, so one thread too many slows them all.
    """
    limits: list[float] = [process.torch_threads()]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    limits += quotas()
    return max(1, math.ceil(min(limits)))


def quotas(mounted: Path = MOUNTED, own: Path = OWN) -> list[float]:
    """Return the processor quotas of this process's control groups, in processors, one for each group with a limit."""
    return [quota for group in control_groups("cpu", mounted, own) for quota in _quota(group)]


def _quota(group: Path) -> list[float]:
    """Return one group's quota, if any.

    cgroup version 2 has it in cpu.max as "quota period", version 1 in cpu.cfs_quota_us and cpu.cfs_period_us.
    """
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return [int(quota) / int(period)] if int(quota) > 0 and int(period) > 0 else []
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return []
