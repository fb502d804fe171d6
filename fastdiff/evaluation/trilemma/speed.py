"""How fast the points are, and diffusers' loop beside them.

Never timed while images are drawn: that may go on for hours beside other work, be interrupted and resumed, so its clock
says nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastdiff.bench.machine import processor
from fastdiff.errors import InvalidArgument
from fastdiff.evaluation.trilemma.grid import Planned
from fastdiff.sampler import Sampler

STEPS = (4, 12)  # of the calls that are timed
ROUNDS = 5
NOISE = 0.1  # a larger spread of the rounds is a warning


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of a call of one batch, a + b rows; spread: of the rounds, the middle half's width over the median."""

    batch: int
    a: float
    b: float
    spread: float

    def images_per_s(self, rows: int) -> float:
        return self.batch / (self.a + self.b * rows)


def speeds(sampler: Sampler, points: Sequence[Planned], batch: int) -> dict[str, Speed]:
    """Of each setting, whole calls of `Sampler.sample` of one batch in 4 and in 12 steps, all taking turns.

        seconds(rows) = a + b rows,     through the medians of the rounds

    a is what a call costs besides the network: its table, labels and noise. Rows cost the same in calls of any length,
    so the line gives the longer points' speed, and that of the points of two rows.
    """
    ways: dict[tuple[str, int], Callable[[], Any]] = {}
    rows: dict[tuple[str, int], int] = {}
    timesteps = getattr(sampler.schedule, "timesteps", max(STEPS))
    lengths = tuple(min(steps, timesteps) for steps in STEPS)
    for point in points:
        for steps in lengths:
            options = {**point.options, "steps": steps}
            classes = sampler.info.classes
            labels = None if classes is None else [i % classes for i in range(batch)]

            def call(options: dict[str, Any] = options, labels: list[int] | None = labels) -> Any:
                return sampler.sample(batch, labels=labels, batch_size=batch, **options)

            if (point.key, steps) not in ways:
                ways[point.key, steps] = call
                request = sampler.request(1, **{**options, "labels": labels and labels[0]})
                rows[point.key, steps] = len(request.table)
    seconds = in_turn(ways, ROUNDS)
    result = {}
    for key in dict.fromkeys(point.key for point in points):
        short, long = (seconds[key, steps] for steps in lengths)
        few, many = (rows[key, steps] for steps in lengths)
        per_row = (statistics.median(long) - statistics.median(short)) / max(many - few, 1)
        if per_row <= 0:  # one length only, or a machine too noisy for a difference
            per_row = statistics.median(long) / many
        once = max(statistics.median(long) - per_row * many, 0.0)
        spread = max(_spread(times) for times in (short, long))
        result[key] = Speed(batch, once, per_row, spread)
    return result


def _spread(seconds: Sequence[float]) -> float:
    quarter, median, three_quarters = np.quantile(seconds, (0.25, 0.5, 0.75))
    return float((three_quarters - quarter) / median)


def in_turn(ways: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each in every round, after one call of each that is not timed."""
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    for round_, (name, run) in itertools.product(range(rounds + 1), ways.items()):
        started = time.perf_counter()
        run()
        if round_:
            seconds[name].append(time.perf_counter() - started)
    return seconds


def peer(sampler: Sampler, batches: Sequence[int] = (16, 64), steps: int = 4) -> dict[str, Any]:
    """diffusers' `UNet2DModel` and `DDPMScheduler` in the loop of their pipeline, all timesteps, with labels.

    A few steps of it are timed, at each batch and in both memory formats, in turn; the fastest is scaled to all
    timesteps. Weights are random, which costs the same. What diffusers does not have is left out of its network, to its
    advantage: a class that joins the image becomes a class embedding.

    Raises `InvalidArgument` where diffusers is missing.
    """
    diffusers: Any = need_diffusers()
    network_class: Any = diffusers.UNet2DModel
    config: Any = sampler.unet.config
    own = config.to_dict()
    heard = inspect.signature(network_class.__init__).parameters
    left_out = sorted(name for name in own if name not in heard and own[name] is not None)
    classes = config.num_class_embeds
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = network_class(**{k: v for k, v in own.items() if k in heard}).eval().to(sampler.device)
        last = network_class(**{k: v for k, v in own.items() if k in heard}).eval().to(sampler.device)
    last.to(memory_format=torch.channels_last)
    scheduler: Any = diffusers.DDPMScheduler(**_scheduler(sampler, diffusers.DDPMScheduler))
    timesteps = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(timesteps)

    def loop(network: Any, batch: int) -> Callable[[], Any]:
        generator = torch.Generator(sampler.device).manual_seed(0)
        x = torch.randn(batch, config.in_channels, *(sampler.info.size or (32, 32)), generator=generator)
        labels = None if classes is None else torch.arange(batch) % classes

        @torch.no_grad()
        def run() -> Any:
            sample = x
            for t in scheduler.timesteps[:steps]:
                out = network(sample, t, class_labels=labels).sample
                sample = scheduler.step(out, t, sample, generator=generator).prev_sample
            return sample

        return run

    ways = {
        (batch, name): loop(network, batch)
        for batch in batches
        for name, network in (("contiguous", unet), ("channels_last", last))
    }
    seconds = {way: statistics.median(times) / steps for way, times in in_turn(ways, ROUNDS).items()}
    images_per_s = {way: way[0] / (s * timesteps) for way, s in seconds.items()}
    batch, memory_format = max(images_per_s, key=lambda way: images_per_s[way])
    return {
        "loop": f"diffusers {importlib.metadata.version('diffusers')}: UNet2DModel, DDPMScheduler, {timesteps} steps",
        "timed_steps": steps,
        "left_out_of_its_network": left_out,
        "batch": batch,
        "memory_format": memory_format,
        "seconds_per_step": seconds[batch, memory_format],
        "images_per_s": images_per_s[batch, memory_format],
        "all_images_per_s": {f"{name}, batch {b}": v for (b, name), v in images_per_s.items()},
    }


def need_diffusers() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError as e:
        raise InvalidArgument("--peer needs diffusers: pip install 'fastdiff[diffusers]'") from e


def _scheduler(sampler: Sampler, scheduler: Any) -> dict[str, Any]:
    """The model's scheduler configuration, as far as diffusers' DDPMScheduler has it."""
    heard = inspect.signature(scheduler.__init__).parameters
    return {k: v for k, v in sampler.scheduler_config.items() if k in heard and not k.startswith("_")}


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    from fastdiff.backends.native import extension

    engine = extension()
    versions = {name: importlib.metadata.version(name) for name in ("fastdiff", "torch") if _installed(name)}
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": affinity,
        "threads": torch.get_num_threads(),
        "isas": engine.isas() if engine is not None else [],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
