"""The speed of the points, and of diffusers' loop for comparison.

Speeds are not taken from drawing the images, which may go on for hours beside other work and be interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdiff.bench.timing import in_turn, spread
from fastdiff.errors import InvalidArgument
from fastdiff.evaluation.trilemma.grid import Planned
from fastdiff.sampler import Sampler

STEPS = (4, 12)  # steps of the calls that are timed
ROUNDS = 5
NOISE = 0.1  # a spread of the rounds above which the machine was too noisy


@dataclasses.dataclass(frozen=True)
class Speed:
    """The seconds of a call of ``batch`` images, a + b rows."""

    batch: int
    a: float
    b: float
    spread: float  # the interquartile range of the rounds relative to their median

    def images_per_s(self, rows: int) -> float:
        """Compute the speed of calls with ``rows`` rows."""
        return self.batch / (self.a + self.b * rows)


def speeds(sampler: Sampler, points: Sequence[Planned], batch: int) -> dict[str, Speed]:
    """Time calls of `Sampler.sample` of one batch for each setting, in 4 and in 12 steps, all taking turns.

        seconds(rows) = a + b rows,     through the medians of the rounds

    a is the cost of a call besides the network: its table, labels and noise. Rows cost the same in calls of any length,
    so the line also gives the speed of longer and shorter runs.
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
        if per_row <= 0:  # if there is one length only, or the machine was too noisy
            per_row = statistics.median(long) / many
        once = max(statistics.median(long) - per_row * many, 0.0)
        result[key] = Speed(batch, once, per_row, max(spread(short), spread(long)))
    return result


def peer(sampler: Sampler, batches: Sequence[int] = (16, 64), steps: int = 4) -> dict[str, Any]:
    """Time diffusers' `UNet2DModel` and `DDPMScheduler` in the loop of their pipeline, with labels.

    A few steps are timed, at each batch and in both memory formats, in turn; the fastest is scaled to all timesteps.
    Weights are random, which takes the same time. Options that diffusers lacks are left out of its network, which makes
    it faster: a class that joins the image becomes a class embedding. (`fastdiff.bench.peers.diffusers_twin` refuses
    such networks, as it has to give the same output.)
    """
    diffusers: Any = need_diffusers()
    network_class: Any = diffusers.UNet2DModel
    config: Any = sampler.unet.config
    own = config.to_dict()
    given = _accepted(network_class, own)
    left_out = sorted(name for name in own.keys() - given.keys() if own[name] is not None)
    classes = config.num_class_embeds
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = network_class(**given).eval().to(sampler.device)
        last = network_class(**given).eval().to(sampler.device)
    last.to(memory_format=torch.channels_last)
    scheduler: Any = diffusers.DDPMScheduler(**_accepted(diffusers.DDPMScheduler, sampler.scheduler_config))
    timesteps = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(timesteps)

    def loop(network: Any, batch: int) -> Callable[[], Any]:
        generator = torch.Generator(sampler.device).manual_seed(0)
        shape = (batch, config.in_channels, *(sampler.info.size or (32, 32)))
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device=sampler.device)
        labels = None if classes is None else torch.arange(batch, dtype=torch.int64, device=sampler.device) % classes

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
    """Import diffusers; `InvalidArgument` says how to install it."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as e:
        raise InvalidArgument("--peer needs diffusers: pip install 'fastdiff[diffusers]'") from e


def _accepted(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that a class of diffusers accepts."""
    accepted = inspect.signature(cls.__init__).parameters
    return {k: v for k, v in config.items() if k in accepted and not k.startswith("_")}
