"""Measure how long the command line takes to answer; half a second of CPU time for ``fastdiff --help`` is the limit.

pytest benchmarks/ --benchmark-json=startup.json
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

LIMIT_S = 0.5


def _help() -> float:
    """Return the CPU seconds, user and system, of one ``fastdiff --help`` in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fastdiff", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help(benchmark: Any) -> None:
    cpu = []
    benchmark.pedantic(lambda: cpu.append(_help()), rounds=10, warmup_rounds=1)
    median = sorted(cpu)[len(cpu) // 2]
    benchmark.extra_info |= {"cpu_s_median": round(median, 3), "limit_s": LIMIT_S}
    print(f"fastdiff --help: {median:.3f} s of CPU, {median / LIMIT_S:.2f} of the limit")
