"""Whole sampling jobs: the seconds of n images in DDIM steps, by fastdiff's `Sampler` and by diffusers' own loop.

A network without classes is also run as a pipeline: diffusers' DDIMPipeline as it is, in channels_last, and accelerated
by `fastdiff.accelerate`. diffusers has no pipeline for networks with classes, so there the loop is the one that users
write: UNet2DModel and DDIMScheduler, with a label for each image. All take turns in one process.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastdiff.bench import machine, networks
from fastdiff.bench.inputs import Workload, import_all
from fastdiff.bench.networks import Model
from fastdiff.bench.peers import diffusers_twin, joining, without_class_image
from fastdiff.bench.run import Say
from fastdiff.errors import InvalidArgument
from fastdiff.integrations import pipelines
from fastdiff.sampler import Sampler
from fastdiff.sampler.options import NetworkInfo
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet


def whole_job(model: str, n: int, steps: int, rounds: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure a job: ``n`` images in ``steps`` DDIM steps, medians over rounds.

    There is no warm-up round, as the first call is part of what a user waits for. "job" of the result holds the seconds
    of each way and "ratio", diffusers' time over fastdiff's (that of the accelerated pipeline, if there is one). With
    pipelines it also holds "first", the seconds of the first accelerated call with `accelerate` itself, and "psnr", in
    dB, of the two pipelines' images.
    """
    import_all(("diffusers",))
    loaded = networks.load(model)
    if not isinstance(loaded.unet, UNet):
        raise InvalidArgument(f"--job {model}: it reads text; its steps are measured without --job")
    if loaded.schedule is None:
        raise InvalidArgument(f"--job {model}: it has no scheduler_config.json, so its schedule is unknown")
    if not isinstance(loaded.schedule, NoiseSchedule):
        raise InvalidArgument(f"--job {model}: diffusers has no loop for EDM networks' UNet2DModel to measure by")
    classes = NetworkInfo.of(loaded.unet, None).classes
    labels = None if classes is None else [i % classes for i in range(n)]
    sampler = Sampler(loaded.unet, loaded.schedule, prediction=loaded.prediction)
    jobs: dict[str, Callable[[], Any]] = {
        sampler.backend: lambda: sampler.sample(n, steps=steps, labels=labels, batch_size=n)
    }
    result: dict[str, Any] = {"model": model, "machine": machine.header(), "images": n, "steps": steps, "job": {}}
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    first = images = None
    if labels is None:
        plain, last, fast = (_pipeline(loaded, f) for f in (contiguous, channels_last, contiguous))
        started = time.perf_counter()
        images = _draw(pipelines.accelerate(fast), n, steps)
        first = time.perf_counter() - started
        jobs["accelerated"] = lambda: _draw(fast, n, steps)
        jobs["diffusers"] = lambda: _draw(plain, n, steps)
        jobs["diffusers, channels_last"] = lambda: _draw(last, n, steps)
    else:
        jobs["diffusers"] = _loop(loaded, labels, steps, contiguous)
        jobs["diffusers, channels_last"] = _loop(loaded, labels, steps, channels_last)
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    error = 0.0
    for i in range(rounds):
        for job, run in jobs.items():
            say(f"round {i + 1} of {rounds}: {job}")
            started = time.perf_counter()
            drawn = run()
            seconds[job].append(time.perf_counter() - started)
            if job == "diffusers" and images is not None:
                error = float(((drawn - images) ** 2).mean())
    medians = {job: round(statistics.median(values), 2) for job, values in seconds.items()}
    untouched = statistics.median(seconds["diffusers"])
    ours = "accelerated" if "accelerated" in seconds else sampler.backend
    result["job"] = medians | {"ratio": round(untouched / statistics.median(seconds[ours]), 2)}
    if first is not None:
        result["job"] |= {
            "first": round(first, 2),
            "ratio, first call": round(untouched / first, 2),
            "psnr": round(-10 * math.log10(max(error, 1e-20)), 1),
        }
    return result


def job_text(result: dict[str, Any]) -> str:
    """Format the result of `whole_job` as lines."""
    lines = [f"{result['model']}: {result['images']} images, {result['steps']} DDIM steps, seconds"]
    return "\n".join([*lines, *(f"  {name:26}{value:8.2f}" for name, value in result["job"].items())])


def _twin(loaded: Model, memory_format: torch.memory_format) -> Any:
    return diffusers_twin(without_class_image(copy.deepcopy(loaded.unet))).to(memory_format=memory_format)


def _scheduler(loaded: Model) -> Any:
    from diffusers import DDIMScheduler

    assert isinstance(loaded.schedule, NoiseSchedule)
    return DDIMScheduler.from_config(
        {**loaded.schedule.to_scheduler_config(), "prediction_type": loaded.prediction, **loaded.scheduler_config}
    )


def _pipeline(loaded: Model, memory_format: torch.memory_format) -> Any:
    from diffusers import DDIMPipeline

    pipeline: Any = DDIMPipeline(unet=_twin(loaded, memory_format), scheduler=_scheduler(loaded))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, n: int, steps: int) -> Any:
    return pipeline(n, torch.Generator("cpu").manual_seed(0), num_inference_steps=steps, output_type="np").images


def _loop(loaded: Model, labels: list[int], steps: int, memory_format: torch.memory_format) -> Callable[[], Any]:
    twin, scheduler = _twin(loaded, memory_format), _scheduler(loaded)
    workload = dataclasses.replace(
        Workload.of(loaded, len(labels)), label=torch.tensor(labels, dtype=torch.int64, device="cpu")
    )
    join = joining(loaded.unet, workload)
    classes = None if loaded.unet.class_encoder is not None else workload.label

    @torch.no_grad()
    def run() -> Any:
        x = torch.randn(
            workload.x.shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
        )
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            out = twin(join(x).contiguous(memory_format=memory_format), t, class_labels=classes).sample
            x = scheduler.step(out, t, x).prev_sample
        return x

    return run
