"""Measures the time of a call on the device, and of whole jobs that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .run import Run


def microseconds(run: Run, function: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of a call whose operands are not in the L2 cache, measured by CUDA events."""
    import torch

    if run.dry:
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e6
    function()
    flushed = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        flushed.zero_()
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e3


def in_graph(run: Run, launches: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Return the time of launches, one after the other, as a part of a CUDA graph.

    As in a step, their operands are in the L2 cache if they fit, and no time of the host is measured.
    """
    import torch

    def run_all() -> None:
        for launch in launches:
            launch()

    if run.dry:
        started = time.perf_counter()
        run_all()
        return (time.perf_counter() - started) * 1e6
    run_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run_all()
    times = []
    for _ in range(5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / repeats)
    return statistics.median(times)


def seconds(run: Run, jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the wall times of every job, in rounds in which all jobs take turns."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            run.synchronize()
            started = time.perf_counter()
            job()
            run.synchronize()
            taken[name].append(time.perf_counter() - started)
    return taken
