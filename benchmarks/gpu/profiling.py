"""The part `profile`: the time of every launch of a replayed step, beside its prediction."""

from __future__ import annotations

import functools
from typing import Any

from . import lists, model
from .jobs import backend_job
from .networks import tiny, unet_of
from .run import Failure, Run

JOBS = [("cifar10-32", 1), ("cifar10-32", 256)]
MOST_ROWS = 40  # of a table in gpu.md; the journal has all of them


def profile(run: Run) -> dict[str, Any]:
    """Measure each kernel of one replay by torch.profiler, in the order of the list of launches.

    A launch whose time is far off its prediction, when the others are not, is the first to look at. In a dry run there
    is no profile, so that predictions stand alone.
    """
    result: dict[str, Any] = {}
    failed = []
    for network, images in [("", 2)] if run.dry else JOBS:
        name = f"{network} B={images}".strip()
        outcome = run.item(name, functools.partial(rows_of, run, network, images))
        if "error" in outcome:
            failed.append(f"{name}: {outcome['error']}")
            continue
        rows = outcome["result"]
        result[f"{name}, by operation"] = model.summary(rows)
        off = sorted(rows, key=lambda row: -abs(row.get("measured_us", row["predicted_us"]) - row["predicted_us"]))
        result[f"{name}, the launches that are farthest off"] = off[:MOST_ROWS]
    if failed:
        raise Failure("; ".join(failed), result)
    return result


def times(ranges: list[tuple[float, float]]) -> list[float]:
    """Return the time of each kernel since the one before it ended, for which it may have waited before."""
    ends = [float("-inf"), *(end for _, end in ranges)]
    return [end - max(start, before) for (start, end), before in zip(ranges, ends, strict=False)]


def rows_of(run: Run, network: str, images: int) -> list[dict[str, Any]]:
    import torch

    from fastdiff import NoiseSchedule, solvers
    from fastdiff.bench.networks import PUBLISHED
    from fastdiff.kernels.launch import device_of

    config = PUBLISHED[f"ddpm-{network}"] if network else tiny()
    if run.dry:
        return model.predicted(lists.step(config, images, torch.bfloat16), model.Rates())
    card = torch.cuda.get_device_properties(0)
    launches = lists.step(config, images, torch.bfloat16, device=device_of(torch.empty(0, device=run.device)))
    table = solvers.ddim(NoiseSchedule(), 3)
    job = backend_job(run, "triton", unet_of(config, torch.bfloat16, run.device), table, images)
    job()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        job()
        torch.cuda.synchronize()
    kernels = [e for e in recorded.events() if "Memcpy" not in e.name and "Memset" not in e.name]
    kernels.sort(key=lambda e: e.time_range.start)
    steps = [i for i, e in enumerate(kernels) if e.name == "_update"]
    one = kernels[steps[0] + 1 : steps[1] + 1] if len(steps) > 1 else kernels  # the second of the three steps
    measured = times([(e.time_range.start, e.time_range.end) for e in one])
    if len(measured) != len(launches):
        names = [e.name for e in one]
        raise RuntimeError(f"a step has {len(measured)} kernels, not {len(launches)}: {names}")
    return model.predicted(launches, model.Rates(processors=card.multi_processor_count), measured)
