"""The sampler: images as a pure function of (seed, index), held to float64 runs written out here; faults; bad input."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import logging
import math
import random
import re
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from fastdiff import solvers
from fastdiff.core import noise
from fastdiff.core.state import State
from fastdiff.errors import (
    BackendError,
    CallbackError,
    Cancelled,
    CheckpointError,
    ConfigError,
    FastdiffError,
    InvalidArgument,
    NumericsError,
)
from fastdiff.sampler import Event, Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.unet import UNet, UNetConfig
from tests.support.unets import TINY, TINY_CLASSES, diffusers_twin, random_unet

T = 100
SCHEDULE = NoiseSchedule("linear", T, beta_end=0.1)  # abar falls to 0.006, as for 1000 steps of the usual one
SHAPE = (3, 8, 8)
CLASSES, NULL = 4, 4
TINY_LEARNED = dataclasses.replace(TINY, out_channels=6)
TINY_DROPOUT = dataclasses.replace(TINY, dropout=0.5)


def sampler_of(config: UNetConfig = TINY, **options: Any) -> Sampler:
    return Sampler(random_unet(config), SCHEDULE, **{"backend": "eager"} | options)


class Probe(nn.Module):
    """A plain network, x -> x / 2, that keeps the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), t.clone(), None if class_labels is None else class_labels.clone()))
        return self.scale * x


# Runs written out -----------------------------------------------------------------------------------------------------


def trailing(steps: int) -> list[int]:
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def leading(steps: int) -> list[int]:
    return [i * (T // steps) for i in reversed(range(steps))]


def philox(seed: int, indices: range, row: int, stream: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    index = torch.tensor(indices)
    return noise.normal(torch.full_like(index, noise.as_int64(seed)), index, torch.full_like(index, row), stream, shape)


def initial(seed: int, indices: range, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return philox(seed, indices, 0, noise.INITIAL, shape)


@torch.no_grad()
def by_hand(
    unet: nn.Module,
    x: Tensor,
    timesteps: list[int],
    *,
    dtype: torch.dtype = torch.float64,
    schedule: NoiseSchedule = SCHEDULE,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    eps_from: str = "clipped",
    eta: float = 0.0,
    variance: str | None = None,
    labels: list[int] | None = None,
    guidance: float | list[float] | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    z: Callable[[int], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(x, x0) after every row of DDIM or, with a ``variance``, of DDPM: the papers' formulas, line by line."""
    unet = copy.deepcopy(unet).to(dtype).eval()
    x = x.to(dtype)
    B, C = x.shape[:2]
    levels = [float(schedule.alphas_cumprod[t]) for t in timesteps] + [1.0]
    rows = []

    def network(t: int, label: Tensor | None) -> Tensor:
        times = torch.full((B,), float(t), dtype=dtype)
        out = unet(x, times) if label is None else unet(x, times, label)
        return out if isinstance(out, Tensor) else out.sample

    for i, t in enumerate(timesteps):
        abar, abar_p = levels[i], levels[i + 1]
        a, s = math.sqrt(abar), math.sqrt(1 - abar)
        out = network(t, None if labels is None else torch.tensor(labels))
        out, v = (out[:, :C], out[:, C:]) if out.shape[1] == 2 * C else (out, None)
        if guidance is not None and interval[0] <= i / len(timesteps) and (i + 1) / len(timesteps) <= interval[1]:
            w = torch.tensor(guidance, dtype=dtype).expand(B).view(-1, 1, 1, 1)
            u = network(t, torch.full((B,), NULL))[:, :C]
            guided = u + w * (out - u)
            ratio = out.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
            out = rescale * guided * ratio.view(-1, 1, 1, 1) + (1 - rescale) * guided
        if prediction == "epsilon":
            x0, eps = (x - s * out) / a, out
        elif prediction == "sample":
            x0, eps = out, (x - a * out) / s
        else:
            x0, eps = a * x - s * out, a * out + s * x
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        if eps_from == "clipped":
            eps = (x - a * x0) / s
        alpha, beta = abar / abar_p, 1 - abar / abar_p
        posterior = beta * (1 - abar_p) / (1 - abar)
        if variance is None:
            sigma = eta * math.sqrt(posterior)
            x = math.sqrt(abar_p) * x0 + math.sqrt(1 - abar_p - sigma**2) * eps
            log_variance = 2 * math.log(sigma) if sigma else None
        else:
            x = math.sqrt(abar_p) * beta / (1 - abar) * x0 + math.sqrt(alpha) * (1 - abar_p) / (1 - abar) * x
            log_variance = None
            if abar_p < 1 and variance != "none":
                log_variance = math.log(beta if variance == "beta" else posterior)
                if variance == "learned_range":
                    log_variance = (1 + v) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior)
        if log_variance is not None:
            x = x + torch.exp(torch.as_tensor(log_variance, dtype=dtype) / 2) * z(i).to(dtype)
        rows.append((x, x0))
    return rows


# Sums in another order, and Winograd's, are chosen by batch and processor: AVX2 takes a little more than twice.
ROUNDED = 3


def assert_close(images: Tensor, run: Callable[[torch.dtype], Tensor]) -> None:
    """No further from the run in float64 than `ROUNDED` times what the same run in float32 is, and rounding of the
    result.
    """
    exact = run(torch.float64)
    reference_error = float((run(torch.float32) - exact).abs().max())
    tolerance = ROUNDED * (reference_error + 2.0**-22)
    assert tolerance < 1e-3, "a test that would pass wrong images"
    assert exact.std() > 0.1
    assert images.dtype == torch.float32
    assert images.shape == exact.shape
    assert (images - exact).abs().max() <= tolerance


def check(sampler: Sampler, indices: range, seed: int, hand: dict[str, Any], **options: Any) -> Tensor:
    """Sample images, and compare them with a run by hand; gives the images."""
    x = initial(seed, indices)
    out = sampler.sample(len(indices), seed=seed, start_index=indices.start, **options)

    @functools.cache
    def run(dtype: torch.dtype) -> Tensor:
        return by_hand(sampler.unet, x, **hand, dtype=dtype, z=lambda row: philox(seed, indices, row, noise.UPDATE))[
            -1
        ][0]

    assert_close(out.images, run)
    return out.images


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [1.0, 0.5, None])
def test_ddim_by_hand(prediction: str, clip: float | None) -> None:
    sampler = sampler_of(prediction=prediction)
    hand = {"timesteps": trailing(5), "prediction": prediction, "clip": clip}
    images = check(sampler, range(3), 7, hand, steps=5, clip=clip)
    if clip is not None:
        assert images.abs().max() <= clip


@pytest.mark.parametrize("options", [{"eta": 0.7}, {"solver": "ddpm"}, {"solver": "ddpm", "variance": "beta"}])
def test_stochastic_runs_by_hand(options: dict[str, Any]) -> None:
    hand = {"timesteps": trailing(6), "eta": options.get("eta", 0.0)}
    if "solver" in options:
        hand["variance"] = options.get("variance", "posterior")
    check(sampler_of(), range(2, 5), 2**63 + 5, hand, steps=6, **options)


def test_learned_variance_by_hand() -> None:
    sampler = sampler_of(TINY_LEARNED)
    timesteps = trailing(6)
    learned = check(
        sampler, range(3), 1, {"timesteps": timesteps, "variance": "learned_range"},
        solver="ddpm", variance="learned_range", steps=6,
    )  # fmt: skip
    fixed = check(sampler, range(3), 1, {"timesteps": timesteps, "variance": "posterior"}, solver="ddpm", steps=6)
    assert (learned - fixed).abs().max() > 0.01
    check(sampler, range(3), 1, {"timesteps": timesteps}, steps=6)  # ddim ignores the variance


def test_other_sizes_by_hand() -> None:
    sampler = sampler_of()
    out = sampler.sample(2, steps=4, seed=5, size=(4, 12))
    x = initial(5, range(2), (3, 4, 12))
    assert_close(out.images, lambda dtype: by_hand(sampler.unet, x, trailing(4), dtype=dtype)[-1][0])


def test_defaults() -> None:
    sampler = Sampler(Probe(), SCHEDULE, shape=SHAPE)
    out = sampler.sample(1)
    assert out.table == solvers.ddim(SCHEDULE, 50, clip=1.0, spacing="trailing")
    assert (out.seed, out.start_index, out.nfe, out.labels) == (0, 0, 50, None)
    assert [float(t) for _, t, _ in sampler.unet.calls] == trailing(50)
    assert sampler.sample(1, solver="ddpm").table == solvers.ddpm(SCHEDULE, T)
    assert Sampler(Probe(), shape=SHAPE).schedule == NoiseSchedule("linear", 1000)


# One image, whatever the batch ----------------------------------------------------------------------------------------


def test_initial_noise_has_the_same_bits_in_any_slot() -> None:
    def first(n: int, start: int, batch_size: int | None = None) -> Tensor:
        probe = Probe()
        sampler = Sampler(probe, SCHEDULE, shape=SHAPE)
        sampler.sample(n, steps=1, seed=11, start_index=start, batch_size=batch_size)
        return torch.cat([x for x, _, _ in probe.calls])[:n]

    everything = first(64, 0)
    assert torch.equal(everything, initial(11, range(64)))
    assert torch.equal(first(1, 37), everything[37:38])
    assert torch.equal(first(8, 30), everything[30:38])
    assert torch.equal(first(7, 34, 3), everything[34:41])
    assert torch.equal(first(64, 0, 10), everything)


@pytest.mark.parametrize("options", [{}, {"solver": "ddpm"}], ids=["ddim", "ddpm"])
def test_an_image_is_the_same_in_any_batch(options: dict[str, Any]) -> None:
    sampler = sampler_of()
    timesteps = trailing(4)

    @functools.cache
    def run(dtype: torch.dtype) -> Tensor:
        x = initial(3, range(64))
        z = functools.partial(philox, 3, range(64), stream=noise.UPDATE)
        variance = "posterior" if options else None
        return by_hand(sampler.unet, x, timesteps, dtype=dtype, variance=variance, z=lambda row: z(row=row))[-1][0]

    everything = sampler.sample(64, steps=4, seed=3, **options).images
    assert_close(everything, run)
    assert len({tuple(image.flatten().tolist()) for image in everything}) == 64
    for n, start, batch_size in [(1, 0, None), (1, 63, None), (8, 20, None), (5, 33, 2), (64, 0, 48)]:
        part = sampler.sample(n, steps=4, seed=3, start_index=start, batch_size=batch_size, **options)
        assert part.start_index == start

        def run_part(dtype: torch.dtype, start: int = start, n: int = n) -> Tensor:
            return run(dtype)[start : start + n]

        assert_close(part.images, run_part)


def test_two_halves_are_the_whole() -> None:
    sampler = sampler_of()
    x = initial(9, range(16))

    @functools.cache
    def run(dtype: torch.dtype) -> Tensor:
        return by_hand(sampler.unet, x, trailing(4), dtype=dtype)[-1][0]

    halves = [sampler.sample(8, steps=4, seed=9, start_index=start).images for start in (0, 8)]
    assert_close(torch.cat(halves), run)
    for batch_size in (1, 3, 5, 16, 100):
        assert_close(sampler.sample(16, steps=4, seed=9, batch_size=batch_size).images, run)
    other = sampler.sample(16, steps=4, seed=10).images
    assert (other - halves[0][0]).flatten(1).abs().amax(dim=1).min() > 0.1


def test_a_short_last_chunk_is_padded() -> None:
    probe = Probe()
    sampler = Sampler(probe, SCHEDULE, shape=SHAPE)
    out = sampler.sample(5, solver="ddpm", steps=2, batch_size=3, labels=[3, 1, 4, 1, 5], seed=2)
    assert [len(x) for x, _, _ in probe.calls] == [3, 3, 3, 3]  # so that no batch size is prepared for it
    assert [label.tolist() for _, _, label in probe.calls[::2]] == [[3, 1, 4], [1, 5, 3]]
    x = initial(2, range(5))
    run = functools.partial(
        by_hand, probe, x, trailing(2), variance="posterior", z=lambda row: philox(2, range(5), row, noise.UPDATE)
    )
    assert_close(out.images, lambda dtype: run(dtype=dtype)[-1][0])


def test_large_seeds_and_indices() -> None:
    probe = Probe()
    sampler = Sampler(probe, SCHEDULE, shape=SHAPE)
    seed, start = 2**64 - 1, 2**63 - 2
    out = sampler.sample(2, seed=seed, start_index=start, steps=1)
    assert (out.seed, out.start_index) == (seed, start)
    assert torch.equal(probe.calls[0][0], initial(seed, range(start, start + 2)))


def test_numpy_numbers_are_numbers() -> None:
    sampler = sampler_of(TINY_CLASSES)
    plain = sampler.sample(
        3, steps=2, seed=4, start_index=5, batch_size=2, size=8, labels=[1, 0, 3], guidance=[2.0, 1.0, 0.5],
        guidance_interval=(0.0, 1.0), eta=0.5,
    )  # fmt: skip
    numpy = sampler.sample(
        np.int64(3), steps=np.int32(2), seed=np.uint64(4), start_index=np.int64(5), batch_size=np.int64(2),
        size=np.int64(8), labels=np.array([1, 0, 3], dtype=np.uint64), guidance=np.array([2.0, 1.0, 0.5]),
        guidance_interval=np.array([0.0, 1.0]), eta=np.float32(0.5),
    )  # fmt: skip
    assert torch.equal(plain.images, numpy.images)
    assert (numpy.seed, numpy.start_index) == (4, 5)


def test_no_seed_draws_one_that_repeats_the_run() -> None:
    sampler = sampler_of()
    first, second = (sampler.sample(2, steps=2, seed=None) for _ in range(2))
    assert first.seed != second.seed
    assert not torch.equal(first.images, second.images)
    assert torch.equal(sampler.sample(2, steps=2, seed=first.seed).images, first.images)


# Labels and guidance --------------------------------------------------------------------------------------------------


def test_guidance_of_one_is_off() -> None:
    sampler = sampler_of(TINY_CLASSES)
    sizes = []
    sampler.unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    labels = [0, 1, 2]
    off = sampler.sample(3, steps=3, labels=labels)
    one = sampler.sample(3, steps=3, labels=labels, guidance=1.0, guidance_rescale=0.7)
    each = sampler.sample(3, steps=3, labels=labels, guidance=[1.0] * 3)
    assert torch.equal(off.images, one.images)
    assert torch.equal(off.images, each.images)
    assert sizes == [3] * 9
    assert off.nfe == one.nfe == each.nfe == 3


def test_labels_and_guidance_are_each_images_own() -> None:
    labels, guidance = [0, 1, 2, 3, 0], [1.0, 2.0, 4.0, 0.0, -0.5]
    sampler = sampler_of(TINY_CLASSES)
    hand = {"timesteps": trailing(5), "labels": labels, "guidance": guidance}
    images = check(sampler, range(5), 3, hand, steps=5, labels=labels, guidance=guidance)
    chunks = sampler.sample(5, steps=5, seed=3, labels=torch.tensor(labels), guidance=guidance, batch_size=2)
    assert chunks.nfe == 10
    assert chunks.labels.tolist() == labels
    assert (chunks.images - images).abs().max() < 1e-3
    unguided = check(sampler, range(5), 3, {"timesteps": trailing(5), "labels": labels}, steps=5, labels=labels)
    assert (unguided - images)[1:].flatten(1).abs().amax(dim=1).min() > 0.01
    assert (unguided - images)[0].abs().max() < 1e-4


def test_one_label_is_for_all() -> None:
    sampler = sampler_of(TINY_CLASSES)
    one, each = (sampler.sample(3, steps=3, labels=labels) for labels in (2, [2, 2, 2]))
    assert torch.equal(one.images, each.images)
    assert one.labels.tolist() == [2, 2, 2]
    assert not torch.equal(one.images, sampler.sample(3, steps=3, labels=1).images)


def test_no_labels_mean_the_null_class() -> None:
    sampler = sampler_of(TINY_CLASSES)
    hand = {"timesteps": trailing(3), "labels": [NULL] * 2}
    check(sampler, range(2), 0, hand, steps=3)
    assert sampler.sample(2, steps=3).labels.tolist() == [NULL] * 2


def test_guidance_interval() -> None:
    sampler = sampler_of(TINY_CLASSES)
    sizes = []
    hook = sampler.unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    out = sampler.sample(2, steps=5, labels=1, guidance=3.0, guidance_interval=(0.2, 0.6))
    hook.remove()
    assert sizes == [2, 4, 4, 2, 2]
    assert out.nfe == 7
    hand = {"timesteps": trailing(5), "labels": [1, 1], "guidance": 3.0, "interval": (0.2, 0.6)}
    check(sampler, range(2), 0, hand, steps=5, labels=1, guidance=3.0, guidance_interval=(0.2, 0.6))


def test_guidance_rescale() -> None:
    sampler = sampler_of(TINY_CLASSES)
    labels, guidance = [0, 3, 2], [5.0, 1.0, 8.0]
    hand = {"timesteps": trailing(4), "labels": labels, "guidance": guidance, "rescale": 0.7}
    rescaled = check(
        sampler, range(3), 6, hand, steps=4, labels=labels, guidance=guidance, guidance_rescale=0.7
    )  # fmt: skip
    plain = sampler.sample(3, steps=4, seed=6, labels=labels, guidance=guidance).images
    different = (rescaled - plain).flatten(1).abs().amax(dim=1)
    assert different[0] > 0.01
    assert different[2] > 0.01
    assert different[1] == 0.0


def test_guidance_of_a_network_with_learned_variance() -> None:
    sampler = sampler_of(dataclasses.replace(TINY_CLASSES, out_channels=6))
    labels = [1, 2]
    hand = {"timesteps": trailing(4), "labels": labels, "guidance": 2.5, "variance": "learned_range"}
    options = {"solver": "ddpm", "variance": "learned_range", "steps": 4, "labels": labels, "guidance": 2.5}
    check(sampler, range(2), 8, hand, **options)


# Noise from outside ---------------------------------------------------------------------------------------------------


def test_noise_as_a_tensor() -> None:
    sampler = sampler_of()
    x = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(5)).requires_grad_()
    kept = x.detach().clone()
    events: list[Event] = []
    out = sampler.sample(3, steps=3, noise=x, batch_size=2, callback=events.append)
    assert torch.equal(x, kept)
    assert not any(tensor.requires_grad for e in events for tensor in (e.x, e.x0))
    assert_close(out.images, lambda dtype: by_hand(sampler.unet, kept, trailing(3), dtype=dtype)[-1][0])
    # The update's noise stays Philox's.
    out = sampler.sample(3, solver="ddpm", steps=3, noise=kept.double(), seed=4)
    run = functools.partial(
        by_hand, sampler.unet, kept, trailing(3), variance="posterior",
        z=lambda row: philox(4, range(3), row, noise.UPDATE),
    )  # fmt: skip
    assert_close(out.images, lambda dtype: run(dtype=dtype)[-1][0])


def test_noise_as_a_function() -> None:
    sampler = sampler_of()
    calls = []

    def draw(row: int | None, indices: range) -> Tensor:
        calls.append((row, indices))
        generators = [torch.Generator().manual_seed(1000 * i + (0 if row is None else row + 1)) for i in indices]
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

    out = sampler.sample(3, solver="ddpm", steps=3, noise=draw, start_index=10, batch_size=2)
    chunks = (range(10, 12), range(12, 13))
    assert calls == [(row, chunk) for chunk in chunks for row in (None, 0, 1)]  # the last row adds no noise
    whole = range(10, 13)
    x = draw(None, whole)
    run = functools.partial(
        by_hand, sampler.unet, x, trailing(3), variance="posterior", z=lambda row: draw(row, whole)
    )  # fmt: skip
    assert_close(out.images, lambda dtype: run(dtype=dtype)[-1][0])
    for wrong, got in [(np.zeros((1, *SHAPE)), "ndarray"), (torch.zeros(2, *SHAPE), "(2, 3, 8, 8)")]:
        with pytest.raises(InvalidArgument, match=re.escape(f"(1, 3, 8, 8), got {got}")):
            sampler.sample(1, steps=1, noise=lambda row, indices, wrong=wrong: wrong)


# Callbacks, streams, cancelling ---------------------------------------------------------------------------------------


def test_callback_sees_every_row() -> None:
    sampler = sampler_of()
    events: list[Event] = []
    out = sampler.sample(3, steps=4, seed=6, callback=events.append)
    assert [(e.row, e.rows, e.indices) for e in events] == [(row, 4, range(3)) for row in range(4)]
    x = initial(6, range(3))
    for event in events:

        @functools.cache
        def run(dtype: torch.dtype, row: int = event.row) -> tuple[Tensor, Tensor]:
            return by_hand(sampler.unet, x, trailing(4), dtype=dtype)[row]

        assert_close(event.x, lambda dtype, run=run: run(dtype)[0])
        assert_close(event.x0, lambda dtype, run=run: run(dtype)[1])
    assert torch.equal(events[-1].x, out.images)
    assert torch.equal(out.images, sampler.sample(3, steps=4, seed=6).images)


def test_what_a_callback_writes_into_its_event_is_not_read() -> None:
    sampler = sampler_of()

    def scribble(event: Event) -> None:
        event.x.fill_(math.nan)
        event.x0.fill_(math.nan)

    clean = sampler.sample(3, steps=3, batch_size=2).images
    event_less = sampler.sample(3, steps=3, batch_size=2, callback=scribble).images
    # The last event's x is a copy too.
    assert torch.equal(clean, event_less)


def test_an_error_in_a_callback_names_the_row() -> None:
    sampler = sampler_of()

    def fail(event: Event) -> None:
        if event.row == 2:
            raise KeyError("lost")

    with pytest.raises(CallbackError, match=r"KeyError at row 2 of 4: 'lost'") as caught:
        sampler.sample(2, steps=4, callback=fail)
    assert isinstance(caught.value.__cause__, KeyError)
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_a_callback_may_use_the_sampler() -> None:
    sampler = sampler_of()
    inner = []
    outer = sampler.sample(2, steps=2, callback=lambda _: inner.append(sampler.sample(1, steps=2, seed=5).images))
    assert torch.equal(outer.images, sampler.sample(2, steps=2).images)
    assert len(inner) == 2
    assert torch.equal(inner[0], inner[1])


def test_stream_gives_what_callbacks_get() -> None:
    sampler = sampler_of()
    events: list[Event] = []
    out = sampler.sample(5, steps=3, batch_size=2, start_index=4, callback=events.append)
    stream = list(sampler.stream(5, steps=3, batch_size=2, start_index=4))
    chunks = (range(4, 6), range(6, 8), range(8, 9))
    assert [(e.row, e.rows, e.indices) for e in stream] == [(r, 3, c) for c in chunks for r in range(3)]
    for a, b in zip(events, stream, strict=True):
        assert (a.row, a.indices) == (b.row, b.indices)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x0, b.x0)
    assert torch.equal(torch.cat([e.x for e in stream if e.row == 2]), out.images)


@pytest.mark.parametrize(("every", "rows"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (100, [4])])
def test_stream_every(every: int, rows: list[int]) -> None:
    sampler = sampler_of()
    events = list(sampler.stream(1, steps=5, every=every))
    assert [e.row for e in events] == rows
    assert torch.equal(events[-1].x, sampler.sample(1, steps=5).images)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[State]]:
    """Weak references to the states of all runs, as they start."""
    references = []
    create = State.create

    def recorded(*arguments: Any, **options: Any) -> State:
        state = create(*arguments, **options)
        references.append(weakref.ref(state))
        return state

    monkeypatch.setattr(State, "create", recorded)
    return references


def test_leaving_a_stream_frees_everything(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()
    for event in sampler.stream(2, steps=4):
        assert states[0]() is not None
        if event.row == 1:
            break
    assert states[0]() is None
    stream = sampler.stream(2, steps=4)
    next(stream)
    stream.close()
    assert states[1]() is None
    assert list(stream) == []
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_an_error_frees_everything(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()

    def fail(event: Event) -> None:
        raise OSError

    with pytest.raises(CallbackError) as caught:
        sampler.sample(2, steps=4, callback=fail)
    assert caught.value.__traceback__ is not None  # alive, with all its frames
    assert states[0]() is None


def test_nothing_of_a_run_stays(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()
    sampler.sample(3, steps=2, batch_size=2)
    assert [reference() for reference in states] == [None, None]


def test_cancel_from_another_thread() -> None:
    sampler = sampler_of()

    def cancel(event: Event) -> None:
        if event.row == 1 and event.indices.start == 2:
            thread = threading.Thread(target=sampler.cancel)
            thread.start()
            thread.join()

    with pytest.raises(Cancelled, match="2 of 6"):
        sampler.sample(6, steps=4, batch_size=2, callback=cancel)
    rows = []
    for event in sampler.stream(6, steps=4, batch_size=2):
        rows.append((event.indices.start, event.row))
        cancel(event)
    assert rows == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1)]
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_cancel_without_a_run_does_nothing() -> None:
    sampler = sampler_of()
    sampler.cancel()
    assert len(sampler.sample(1, steps=1).images) == 1


def run_in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start ``work``; the list gets its result, or the exception it raised."""
    results: list[object] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, results


def test_close_ends_running_calls() -> None:
    probe = Probe()
    sampler = Sampler(probe, SCHEDULE, shape=SHAPE)
    running = threading.Event()

    def slowly(event: Event) -> None:
        running.set()
        time.sleep(0.005)

    thread, results = run_in_thread(lambda: sampler.sample(1, steps=100, callback=slowly))
    assert running.wait(60)
    sampler.close()
    thread.join(60)
    assert isinstance(results[0], Cancelled)
    assert len(probe.calls) < 100
    for call in (sampler.sample, sampler.stream):
        with pytest.raises(InvalidArgument, match="closed"):
            call(1)
    sampler.close()


def copies(kind: type[nn.Module]) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_close_frees_what_was_prepared() -> None:
    class Mine(Probe):
        pass

    unet = Mine()
    with Sampler(unet, SCHEDULE, shape=SHAPE, dtype="float64") as sampler:
        for n in (1, 2, 3):
            sampler.sample(n, steps=1)
        assert copies(Mine) == 2  # one copy in float64, whatever the batch sizes
        stream = sampler.stream(2, steps=3)
        next(stream)
    assert list(stream) == []
    del stream
    assert copies(Mine) == 1
    assert not sampler._runners.prepared


def test_a_closed_sampler_prepares_nothing() -> None:
    sampler = Sampler(Probe(), SCHEDULE, shape=SHAPE, dtype="float64")
    late = sampler.stream(1, steps=1)
    with pytest.raises(Cancelled, match="1 of 2"):
        sampler.sample(2, steps=1, batch_size=1, callback=lambda _: sampler.close())
    assert list(late) == []
    assert not sampler._runners.prepared
    assert sampler._runners.converted is None


def test_several_threads_share_a_sampler() -> None:
    sampler = sampler_of(TINY_CLASSES)
    jobs = [
        {"seed": 1, "steps": 6},
        {"seed": 2, "steps": 5, "labels": 1, "guidance": 2.0},
        {"seed": 3, "steps": 4, "solver": "ddpm", "labels": [0, 1, 2], "batch_size": 2},
        {"seed": 4, "steps": 7, "labels": [3, 2, 1], "guidance": [1.0, 3.0, 2.0]},
    ]
    alone = [sampler.sample(3, **job).images for job in jobs]
    barrier = threading.Barrier(len(jobs))
    turns = []

    def work(i: int) -> Tensor:
        barrier.wait(60)
        return sampler.sample(3, **jobs[i], callback=lambda _: turns.append(i)).images

    threads = [run_in_thread(functools.partial(work, i)) for i in range(len(jobs))]
    for thread, _ in threads:
        thread.join(120)
    for (_, results), expected in zip(threads, alone, strict=True):
        assert torch.equal(results[0], expected)
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    assert changes >= len(jobs), "the runs did not interleave"


def test_progress_is_a_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    sampler = sampler_of()
    quiet = sampler.sample(3, steps=2, batch_size=2)
    assert capsys.readouterr() == ("", "")
    shown = sampler.sample(3, steps=2, batch_size=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert torch.equal(quiet.images, shown.images)
    with pytest.raises(CallbackError):
        sampler.sample(1, steps=2, progress=True, callback=lambda _: 1 // 0)
    for event in sampler.stream(1, steps=2, progress=True):
        assert event.row == 0
        break


# The network is the caller's ------------------------------------------------------------------------------------------


def test_the_network_is_not_changed() -> None:
    unet = random_unet(TINY_DROPOUT).train()
    unet.mid_block.resnets[0].eval()
    unet.conv_in.weight.requires_grad_(False)
    modes = {name: module.training for name, module in unet.named_modules()}
    gradients = {name: (p.requires_grad, p.grad) for name, p in unet.named_parameters()}
    weights = {name: w.clone() for name, w in unet.state_dict().items()}
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, _: seen.append(any(m.training for m in module.modules())))
    for dtype in (None, "float64"):
        sampler = Sampler(unet, SCHEDULE, backend="eager", dtype=dtype)
        out = sampler.sample(2, solver="ddpm", steps=3, callback=lambda _: None)
        next(sampler.stream(2, steps=3))
        assert {name: module.training for name, module in unet.named_modules()} == modes
        evaluating = Sampler(copy.deepcopy(unet).eval(), SCHEDULE, backend="eager", dtype=dtype)
        assert torch.equal(out.images, evaluating.sample(2, solver="ddpm", steps=3).images)
    hook.remove()
    assert not any(seen), "dropout was on"
    assert {name: (p.requires_grad, p.grad) for name, p in unet.named_parameters()} == gradients
    assert all(torch.equal(w, weights[name]) for name, w in unet.state_dict().items())
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_an_error_in_the_network_leaves_it_as_it_was() -> None:
    unet = random_unet(TINY).train()
    sampler = Sampler(unet, SCHEDULE, backend="eager")

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    hook = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        sampler.sample(1, steps=2)
    hook.remove()
    assert all(module.training for module in unet.modules())
    assert len(sampler.sample(1, steps=2).images) == 1


def adamw(fused: bool) -> Callable[[UNet], None]:
    def change(unet: UNet) -> None:
        optimizer = torch.optim.AdamW(unet.parameters(), lr=0.05, fused=fused)
        for p in unet.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()

    return change


@torch.no_grad()
def in_place(unet: UNet) -> None:
    unet.conv_in.weight.mul_(1.5)


def through_data(unet: UNet) -> None:
    unet.conv_in.weight.data.mul_(1.5)


def another_tensor(unet: UNet) -> None:
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.detach() * 1.5)


def loaded(unet: UNet) -> None:
    unet.load_state_dict(random_unet(TINY, seed=5).state_dict())


def another_module(unet: UNet) -> None:
    unet.conv_out = nn.Sequential(unet.conv_out, nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "change", [in_place, through_data, another_tensor, loaded, another_module, adamw(False), adamw(True)],
    ids=["in place", "data", "another tensor", "loaded", "another module", "adamw", "fused adamw"],
)  # fmt: skip
def test_present_weights_are_used(dtype: str | None, change: Callable[[UNet], None]) -> None:
    unet = random_unet(TINY).train()
    sampler = Sampler(unet, SCHEDULE, backend="eager", dtype=dtype)
    before = sampler.sample(1, steps=2).images
    change(unet)
    after = sampler.sample(1, steps=2).images
    assert (after - before).abs().max() > 0.01
    fresh = Sampler(copy.deepcopy(unet).eval(), SCHEDULE, backend="eager", dtype=dtype)
    assert torch.equal(after, fresh.sample(1, steps=2).images)


def test_a_network_converted_later() -> None:
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE)
    expected = sampler.sample(1, steps=2).images
    unet.double()
    assert torch.equal(sampler.sample(1, steps=2).images, expected)  # float32, as when the sampler was made
    unet.float()
    in_place(unet)
    assert torch.equal(sampler.sample(1, steps=2).images, Sampler(unet, SCHEDULE).sample(1, steps=2).images)


def test_inference_mode() -> None:
    sampler = sampler_of(dtype="float64")
    with torch.inference_mode():
        inside = sampler.sample(1, steps=2).images
    in_place(sampler.unet)
    outside = sampler.sample(1, steps=2).images
    with torch.inference_mode():
        again = sampler.sample(1, steps=2).images
    assert not torch.equal(inside, outside)
    assert torch.equal(outside, again)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.1), (torch.float16, 0.01), ("float64", 1e-5)])
def test_dtypes(dtype: str | torch.dtype, error: float) -> None:
    sampler = sampler_of(dtype=dtype)
    x = initial(0, range(2))
    exact = by_hand(sampler.unet, x, trailing(4))[-1][0]
    images = sampler.sample(2, steps=4).images
    assert images.dtype == torch.float32
    distance = float((images - exact).pow(2).mean().sqrt())
    assert distance <= error
    assert distance > 0
    assert next(sampler.unet.parameters()).dtype == torch.float32


def global_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("fastdiff").level),
    }


def test_no_global_state_is_changed(tmp_path: Path) -> None:
    global_state()
    before = global_state()
    unet = random_unet(TINY_CLASSES)
    with Sampler(unet, SCHEDULE, dtype="bfloat16") as sampler:
        out = sampler.sample(2, solver="ddpm", steps=2, seed=None, labels=1, guidance=2.0, progress=True)
        for _ in sampler.stream(2, steps=2):
            assert global_state() == before
        out.save(tmp_path / "a.png")
        with pytest.raises(InvalidArgument):
            sampler.sample(0)
    assert global_state() == before
    with torch.no_grad():
        list(sampler_of().stream(1, steps=2))
        assert not torch.is_grad_enabled()


# Numerics -------------------------------------------------------------------------------------------------------------


def test_a_nan_names_its_image_and_leaves_the_others() -> None:
    sampler = sampler_of()
    x = initial(0, range(6))
    clean = sampler.sample(6, steps=3, noise=x, start_index=40, batch_size=4)
    x[2, 1, 3, 3] = math.nan
    with pytest.raises(NumericsError, match=r"1 of 6 .*float32 \(index 42\)") as caught:
        sampler.sample(6, steps=3, noise=x, start_index=40, batch_size=4)
    error = caught.value
    assert isinstance(error, FastdiffError)
    assert error.images == (42,)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(error.output.images[others], clean.images[others])
    assert not torch.isfinite(error.output.images[2]).all()
    assert error.output.start_index == 40
    error.output.to_pil()


class Poison(Probe):
    """Says NaN of images labelled 3, at one timestep."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out = super().forward(x, t, class_labels)
        return torch.where(((class_labels == 3) & (t == 49)).view(-1, 1, 1, 1), math.nan, out)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_nan_mid_run_stays_in_its_image(clip: float | None) -> None:
    sampler = Sampler(Poison(), SCHEDULE, shape=SHAPE)
    clean = sampler.sample(4, solver="ddpm", steps=4, labels=[0, 1, 1, 0], clip=clip).images
    with pytest.raises(NumericsError) as caught:
        sampler.sample(4, solver="ddpm", steps=4, labels=[0, 3, 1, 3], clip=clip)
    assert caught.value.images == (1, 3)
    assert torch.equal(caught.value.output.images[[0, 2]], clean[[0, 2]])


# Networks -------------------------------------------------------------------------------------------------------------


def test_a_network_of_diffusers() -> None:
    config = dataclasses.replace(TINY, num_class_embeds=5)
    unet = random_unet(config)
    twin = diffusers_twin(unet).train()
    sampler = Sampler(twin, SCHEDULE)
    assert (sampler.info.channels, sampler.info.size, sampler.info.classes) == (3, (8, 8), 5)
    out = sampler.sample(3, steps=4, labels=[0, 4, 2])
    x = initial(0, range(3))
    assert_close(
        out.images, lambda dtype: by_hand(unet, x, trailing(4), labels=[0, 4, 2], dtype=dtype)[-1][0]
    )  # fmt: skip
    assert twin.training
    with pytest.raises(InvalidArgument, match="labels from 0 to 4"):
        sampler.sample(3, steps=4)
    with pytest.raises(InvalidArgument, match="null_label"):
        sampler.sample(3, steps=4, labels=1, guidance=2.0)


def test_a_plain_module() -> None:
    class Wrapped(Probe):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
            return types.SimpleNamespace(sample=super().forward(x, t, class_labels))

    for probe in (Probe(), Wrapped()):
        sampler = Sampler(probe, SCHEDULE, shape=(1, 5, 7))
        out = sampler.sample(2, steps=3, labels=[12, 7])
        assert [call[2].tolist() for call in probe.calls] == [[12, 7]] * 3
        x = initial(0, range(2), (1, 5, 7))
        assert_close(out.images, lambda dtype, x=x: by_hand(Probe(), x, trailing(3), dtype=dtype)[-1][0])
        sampler.sample(1, steps=1, size=(2, 3))
        assert probe.calls[-1][0].shape == (1, 1, 2, 3)
        assert probe.calls[-1][2] is None


def test_a_plain_module_with_the_wrong_output() -> None:
    class Gray(Probe):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t)[:, :1]

    with pytest.raises(InvalidArgument, match="gave 1 channels; 3 are needed"):
        Sampler(Gray(), SCHEDULE, shape=SHAPE).sample(1, steps=1)


def save_pipeline(path: Path, scheduler: Any, config: UNetConfig = TINY) -> DDPMPipeline | DDIMPipeline:
    kind = DDPMPipeline if isinstance(scheduler, DDPMScheduler) else DDIMPipeline
    pipeline = kind(diffusers_twin(random_unet(config)), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return pipeline


COSINE = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("scheduler", "ddim", "ddpm"),
    [
        (
            DDPMScheduler(**COSINE, prediction_type="v_prediction", clip_sample=False, variance_type="fixed_large",
                          timestep_spacing="leading", steps_offset=1),
            {"prediction": "v_prediction", "clip": None, "spacing": "leading", "steps_offset": 1},
            {"prediction": "v_prediction", "clip": None, "spacing": "leading", "steps_offset": 1, "variance": "beta"},
        ),
        (
            DDPMScheduler(**COSINE, prediction_type="sample", clip_sample_range=2.5,
                          timestep_spacing="linspace", steps_offset=1),
            {"prediction": "sample", "clip": 2.5, "spacing": "linspace"},
            {"prediction": "sample", "clip": 2.5, "spacing": "linspace"},
        ),
        (
            DDIMScheduler(**COSINE, set_alpha_to_one=False, timestep_spacing="trailing"),
            {"set_alpha_to_one": False},
            {},
        ),
        (
            DDPMScheduler(**COSINE, variance_type="learned_range"),
            {"spacing": "leading"},
            {"spacing": "leading", "variance": "learned_range"},
        ),
    ],
    ids=["v", "sample", "ddim", "learned"],
)  # fmt: skip
def test_scheduler_configurations_of_diffusers(
    tmp_path: Path, scheduler: Any, ddim: dict[str, Any], ddpm: dict[str, Any]
) -> None:
    learned = scheduler.config.get("variance_type") == "learned_range"
    save_pipeline(tmp_path, scheduler, TINY_LEARNED if learned else TINY)
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    schedule = NoiseSchedule("cosine", T)
    assert sampler.schedule == schedule
    assert sampler.sample(1, steps=10).table == solvers.ddim(schedule, 10, **ddim)
    assert sampler.sample(1, solver="ddpm", steps=10).table == solvers.ddpm(schedule, 10, **ddpm)
    # What the call says counts more.
    own = sampler.sample(1, steps=10, clip=0.75, spacing="quadratic").table
    assert {row.c for row in own.rows} == {0.75}
    assert own.timesteps == tuple(solvers.timesteps(schedule, 10, "quadratic"))
    if learned:
        plain = sampler.sample(1, solver="ddpm", steps=10, variance="posterior").table
        assert not plain.learned_variance


def test_scheduler_configurations_that_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "threshold", DDPMScheduler(num_train_timesteps=T, thresholding=True))
    dynamic = Sampler.from_pretrained(tmp_path / "threshold").sample(1, solver="ddpm", steps=2).table
    assert dynamic == solvers.ddpm(NoiseSchedule(timesteps=T), 2, spacing="leading", threshold=(0.995, 1.0))
    save_pipeline(tmp_path / "log", DDPMScheduler(num_train_timesteps=T, variance_type="fixed_small_log"))
    sampler = Sampler.from_pretrained(tmp_path / "log")
    with pytest.raises(InvalidArgument, match=r"fixed_small_log.*give variance="):
        sampler.sample(1, solver="ddpm", steps=2)
    sampler.sample(1, solver="ddpm", steps=2, variance="posterior")
    with pytest.raises(CheckpointError, match="nowhere"):
        Sampler.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"clip_sample": False}, {}),
        ({"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
        ({"clip_sample": True, "prediction_type": "sample"}, {"use_clipped_model_output": True}),
        ({"clip_sample": True}, {"use_clipped_model_output": True}),
    ],
)
def test_whole_ddim_pipelines_of_diffusers(tmp_path: Path, options: dict[str, Any], call: dict[str, Any]) -> None:
    """The pipeline's pictures from the folder that it saved, with the options left alone."""
    pipeline = save_pipeline(tmp_path, DDIMScheduler(num_train_timesteps=T, beta_end=0.1, **options))
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    compare_with_ddim_pipeline(pipeline, sampler, options, call, steps=10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eps_of_the_output_is_diffusers_default(tmp_path: Path, prediction: str) -> None:
    """With clipping diffusers keeps the network's eps; a table can say so."""
    options = {"clip_sample": True, "prediction_type": prediction}
    pipeline = save_pipeline(tmp_path, DDIMScheduler(num_train_timesteps=T, beta_end=0.1, **options))
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    table = solvers.ddim(
        sampler.schedule, 10, spacing="leading", prediction=prediction, eps_from="output"
    )  # fmt: skip
    compare_with_ddim_pipeline(pipeline, sampler, options, {}, solver=table)


def compare_with_ddim_pipeline(
    pipeline: DDIMPipeline, sampler: Sampler, options: dict[str, Any], call: dict[str, Any], **run: Any
) -> None:
    shape = (3, *SHAPE)
    expected = pipeline(
        3, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np", **call
    ).images  # fmt: skip
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = sampler.sample(3, noise=x, **run)
    exact = by_hand(
        sampler.unet,
        x,
        trailing(10) if "timestep_spacing" in options else leading(10),
        schedule=sampler.schedule,
        prediction=options.get("prediction_type", "epsilon"),
        clip=1.0 if options["clip_sample"] else None,
        eps_from="clipped" if call else "output",
    )[-1][0]

    def picture(images: Tensor) -> np.ndarray:
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    reference_error = np.abs(expected - picture(exact)).max()
    assert reference_error < 1e-3
    assert np.abs(picture(out.images) - picture(exact)).max() <= ROUNDED * (reference_error + 2.0**-22)
    assert picture(exact).std() > 0.05


def test_whole_ddpm_pipelines_of_diffusers(tmp_path: Path) -> None:
    """Ancestral sampling with the numbers of one torch generator, in the pipeline's order."""
    pipeline = save_pipeline(tmp_path, DDPMScheduler(num_train_timesteps=T, beta_end=0.1, variance_type="fixed_large"))
    expected = pipeline(3, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []

    def draw(row: int | None, indices: range) -> Tensor:
        drawn.append(torch.randn((len(indices), *SHAPE), generator=generator))
        return drawn[-1]

    sampler = Sampler.from_pretrained(tmp_path, device="cpu")
    out = sampler.sample(3, solver="ddpm", steps=10, noise=draw)
    exact = by_hand(
        sampler.unet, drawn[0], leading(10), schedule=sampler.schedule, variance="beta",
        z=lambda row: drawn[1 + row],
    )[-1][0]  # fmt: skip
    exact_picture = (exact / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    picture = (out.images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    reference_error = np.abs(expected - exact_picture).max()
    assert reference_error < 1e-3
    assert np.abs(picture - exact_picture).max() <= ROUNDED * (reference_error + 2.0**-22)


def test_the_built_in_model() -> None:
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu")
    info = sampler.info
    assert (info.channels, info.size, info.classes, info.null_label) == (1, (32, 32), 10, 10)
    assert sampler.prediction == "v_prediction"
    assert sampler.schedule == NoiseSchedule("cosine")
    out = sampler.sample(2, steps=2, labels=[0, 9], guidance=[1.0, 2.0])
    assert out.images.shape == (2, 1, 32, 32)
    assert out.images.abs().max() <= 1.0
    assert out.nfe == 4


# What comes out -------------------------------------------------------------------------------------------------------


def test_saving(tmp_path: Path) -> None:
    sampler = sampler_of(TINY_CLASSES)
    out = sampler.sample(5, steps=2, seed=2**64 - 1, start_index=98, labels=[3, 1, 0, 2, 3])
    bytes_ = ((out.images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    out.save(tmp_path / "deep" / "grid.png", columns=5)
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (5 * 10 + 2, 12))
        assert np.array_equal(np.asarray(picture)[2:10, 12:20], bytes_[1])

    out.save(str(tmp_path / "images.npz"))
    with np.load(tmp_path / "images.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"images", "seed", "indices", "labels"}
        assert np.array_equal(arrays["images"], bytes_)
        assert arrays["seed"].item() == 2**64 - 1
        assert arrays["indices"].tolist() == [98, 99, 100, 101, 102]
        assert arrays["labels"].tolist() == [3, 1, 0, 2, 3]

    out.save(tmp_path / "folder")
    files = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert files == ["000098.png", "000099.png", "000100.png", "000101.png", "000102.png"]
    with Image.open(tmp_path / "folder" / "000101.png") as picture:
        assert np.array_equal(np.asarray(picture), bytes_[3])

    with pytest.raises(InvalidArgument, match=r"images\.tiff2: unknown suffix; allowed: \.png, .*\.npz"):
        out.save(tmp_path / "images.tiff2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder", "images.npz"]


def test_saving_one_image_or_none_of_its_labels(tmp_path: Path) -> None:
    out = sampler_of().sample(1, steps=1)
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".PNG"):
        out.save(tmp_path / f"one{suffix}")
        with Image.open(tmp_path / f"one{suffix}") as picture:
            assert picture.size == (8, 8), "one image is saved as it is"
    out.save(tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"images", "seed", "indices"}


def test_output_as_pictures() -> None:
    out = sampler_of().sample(5, steps=1)
    assert [(p.mode, p.size) for p in out.to_pil()] == [("RGB", (8, 8))] * 5
    assert out.grid().size == (3 * 10 + 2, 2 * 10 + 2)
    assert out.grid(columns=5).size == (5 * 10 + 2, 10 + 2)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sampler], Sampler]:
    """Makes a sampler whose network must not be called, and forbids noise."""

    def heavy(*_: Any, **__: Any) -> None:
        raise AssertionError("something heavy ran before the arguments were checked")

    def forbid(sampler: Sampler) -> Sampler:
        sampler.unet.register_forward_pre_hook(heavy)
        return sampler

    monkeypatch.setattr(noise, "normal", heavy)
    return forbid


def refused(call: Callable[..., object], options: dict[str, Any], needles: tuple[str, ...]) -> None:
    options = dict(options)
    with pytest.raises(FastdiffError) as caught:
        call(options.pop("n", 3), **options)
    message = str(caught.value)
    assert all(needle in message for needle in needles), message
    assert "\n" not in message
    assert len(message) < 300


NAN = math.nan
BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *[({"n": n}, (f"n={n!r}", "at least 1")) for n in (0, -1, 1.5, True, "4", None, NAN)],
    ({"n": 10**15}, ("1000000000000000", "GiB", "fewer")),
    *[
        ({"size": size}, (f"size={size!r}", "at least 1"))
        for size in (0, -32, (8, -8), "x", (8, 8, 8), 8.0, True, (8,))
    ],
    ({"size": 33}, ("33x33", "multiples of the network's stride, 2")),
    ({"size": (8, 33)}, ("8x33", "multiples")),
    ({"size": (100000, 10000)}, ("100000x10000", "GiB")),
    *[({"seed": seed}, (str(seed), "2^64 - 1")) for seed in (-1, 2**64, 1.5, "1", True)],
    *[({"start_index": i}, (f"start_index={i!r}", "from 0")) for i in (-1, 1.5, True, "0", 2**63)],
    *[({"batch_size": b}, (f"batch_size={b!r}", "at least 1")) for b in (0, -1, 1.5, True, "8")],
    *[({"steps": s}, (f"steps={s!r}", "from 1 to 100")) for s in (0, -1, 101, 2.5, True, "5")],
    *[({"solver": s}, (f"solver={s!r}", "ddim, ddpm")) for s in ("euler9", None, 7, "DDIM")],
    *[({"eta": e}, (f"eta={e!r}", "0 or a positive number")) for e in (-1, NAN, "x", True, None)],
    ({"eta": 9.0, "steps": 5}, ("eta=9.0", "eta=1 is always possible")),
    ({"eta": 0.5, "solver": "ddpm"}, ("eta=0.5", "ddim")),
    ({"variance": "beta"}, ("variance='beta'", "ddpm")),
    ({"variance": "large", "solver": "ddpm"}, ("variance='large'", "posterior, beta, none, learned_range")),
    ({"variance": "learned_range", "solver": "ddpm"}, ("learned_range", "6 output channels", "has 3")),
    ({"spacing": "log"}, ("spacing='log'", "trailing, leading, linspace, quadratic")),
    *[({"spacing": s}, ("fall",)) for s in ([5, 5], [1, 2])],
    ({"spacing": [500, 2]}, ("500", "99")),
    ({"spacing": [9, 2], "steps": 3}, ("3", "2")),
    *[({"clip": c}, (f"clip={c!r}", "positive number")) for c in (0, -1.0, NAN, "x", True)],
    *[({"guidance": g}, (f"guidance={g!r}", "finite")) for g in (NAN, math.inf, None)],
    *[({"guidance": g}, (f"guidance={g!r}", "one number, or 3")) for g in ("x", [1.0, 2.0], [[1.0]] * 3)],
    ({"guidance": 2.0}, ("guidance=2.0", "null_label")),
    *[
        ({"guidance_interval": i}, (f"guidance_interval={i!r}", "from 0 to 1"))
        for i in ((0.5,), "ab", None, 3, (0, 0.5, 1), ("a", 1))
    ],
    *[
        ({"guidance_interval": i}, ("guidance_interval", str(i[0]), str(i[1]), "0 <= start <= end <= 1"))
        for i in ((0.9, 0.1), (-1.0, 1.0), (0.5, 2.0), (NAN, 1.0), (0.5, NAN))
    ],
    *[({"guidance_rescale": r}, (f"guidance_rescale={r!r}", "0 to 1")) for r in (-0.1, 1.1, NAN, True, "x", None)],
    ({"noise": torch.zeros(2, *SHAPE)}, ("(2, 3, 8, 8)", "(3, 3, 8, 8)")),
    ({"noise": torch.zeros(3, 3, 8, 4)}, ("(3, 3, 8, 4)", "(3, 3, 8, 8)")),
    ({"noise": np.zeros((3, *SHAPE))}, ("ndarray", "(3, 3, 8, 8)")),
    ({"noise": 7}, ("int", "(3, 3, 8, 8)")),
    *[({"labels": label}, ("no classes",)) for label in (0, [0, 0, 0])],
]
TABLE = solvers.ddim(SCHEDULE, 4)
BAD += [
    ({"solver": TABLE, name: value}, (f"{name}={value!r}", "StepTable"))
    for name, value in {"steps": 5, "eta": 0.5, "variance": "beta", "spacing": "leading", "clip": None}.items()
]


@pytest.mark.parametrize(("options", "needles"), BAD, ids=lambda value: str(value)[:60])
def test_bad_arguments(
    nothing_runs: Callable[[Sampler], Sampler], options: dict[str, Any], needles: tuple[str, ...]
) -> None:
    sampler = nothing_runs(sampler_of())
    refused(sampler.sample, options, needles)
    refused(sampler.stream, options, needles)


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        *[({"labels": label}, (f"label {label} ", "0 to 3")) for label in (-1, 4, 99, 2**40)],
        ({"labels": [0, 1, 7]}, ("label 7 ", "0 to 3")),
        ({"labels": [0, 1]}, ("(2,)", "3 of them")),
        ({"labels": [[0, 1, 2]]}, ("(1, 3)", "3 of them")),
        ({"labels": []}, ("(0,)", "3 of them")),
        *[({"labels": label}, ("float", "whole number")) for label in ([0.5, 1, 2], torch.zeros(3))],
        *[({"labels": label}, ("bool", "whole number")) for label in (True, [True, False, True])],
        *[({"labels": label}, (f"labels={label!r}", "whole number")) for label in ("x", ["a"] * 3, {}, [None] * 3)],
        ({"labels": [1j, 1, 1]}, ("complex", "whole number")),
        ({"labels": 2**70}, (f"labels={2**70}", "whole number")),
        ({"guidance": 2.0}, ("guidance=2.0", "labels")),
        ({"guidance": [1.0, 1.0, 2.0]}, ("labels",)),
        ({"guidance": [2.0, NAN, 1.0], "labels": 1}, ("finite",)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_labels(
    nothing_runs: Callable[[Sampler], Sampler], options: dict[str, Any], needles: tuple[str, ...]
) -> None:
    sampler = nothing_runs(sampler_of(TINY_CLASSES))
    refused(sampler.sample, options, needles)
    refused(sampler.stream, options, needles)


def test_labels_are_needed_where_no_class_is_null(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    sampler = nothing_runs(sampler_of(dataclasses.replace(TINY, num_class_embeds=5)))
    refused(sampler.sample, {}, ("class-conditional", "0 to 4"))
    refused(sampler.sample, {"labels": 5}, ("label 5 ", "0 to 4"))
    refused(sampler.sample, {"labels": 1, "guidance": 2.0}, ("null_label",))


def test_a_table_of_learned_variance_needs_the_network(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    table = solvers.ddpm(SCHEDULE, 4, variance="learned_range")
    refused(nothing_runs(sampler_of()).sample, {"solver": table}, ("learned_range", "6 output channels"))


def test_a_network_without_a_size_needs_one(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    config = dataclasses.replace(TINY, sample_size=None)
    refused(nothing_runs(sampler_of(config)).sample, {}, ("sample_size", "size="))


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        *[({"every": every}, (f"every={every!r}", "at least 1")) for every in (0, -1, 1.5, True, None)],
        ({"callback": print}, ("callback", "allowed: batch_size, clip")),
        ({"stepz": 4}, ("stepz", "steps")),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_stream_options(options: dict[str, Any], needles: tuple[str, ...]) -> None:
    refused(sampler_of().stream, options, needles)  # at the call, before the first event is asked for


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ({"prediction": "noise"}, ("prediction='noise'", "epsilon, sample, v_prediction")),
        ({"backend": "tensorrt"}, ("backend='tensorrt'", "auto, eager, compiled")),
        ({"determinism": "yes"}, ("determinism='yes'", "seed, bitwise")),
        ({"dtype": "float8"}, ("dtype='float8'", "float32, bfloat16, float16, float64")),
        ({"dtype": torch.int64}, ("torch.int64", "float32")),
        ({"device": "toaster"}, ("device='toaster'",)),
        ({"schedule": "cosine"}, ("schedule='cosine'", "NoiseSchedule")),
        ({"unet": "fashion-mnist"}, ("unet='fashion-mnist'", "from_pretrained")),
        *[
            ({"unet": Probe(), "shape": shape}, (f"shape={shape!r}", "(channels, height, width)"))
            for shape in ((3, 8), (0, 8, 8), [3, 8, 8], (3, 8, 8.0), (3, True, 8), 8)
        ],
        ({"unet": Probe()}, ("shape=(channels, height, width)",)),
        *[
            ({"backend": backend, "determinism": "bitwise"}, (repr(backend), "bitwise", "'seed'"))
            for backend in ("eager", "compiled")
        ],
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_samplers(options: dict[str, Any], needles: tuple[str, ...]) -> None:
    options = {"unet": random_unet(TINY), "schedule": SCHEDULE} | options
    refused(lambda _, **options: Sampler(options.pop("unet"), options.pop("schedule"), **options), options, needles)


def test_bitwise_is_refused_by_what_cannot_promise_it() -> None:
    with pytest.raises(BackendError, match="depend on the batch"):
        Sampler(Probe(), SCHEDULE, shape=SHAPE, determinism="bitwise")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="device='cuda'"):
        sampler_of(device="cuda")
    random_unet(TINY).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="device='cuda'"):
        Sampler.from_pretrained(tmp_path, device="cuda")


def test_class_embeddings_that_no_label_feeds_are_refused() -> None:
    config = dataclasses.replace(TINY, class_embed_type="timestep")
    with pytest.raises(ConfigError, match="class_embed_type='timestep'"):
        sampler_of(config)


def test_a_sampler_works_after_bad_input() -> None:
    sampler = sampler_of()
    with pytest.raises(InvalidArgument):
        sampler.sample(0)
    with pytest.raises(InvalidArgument):
        sampler.sample(1, steps=2, noise=lambda row, indices: None)
    assert torch.equal(sampler.sample(2, steps=2).images, sampler_of().sample(2, steps=2).images)


def test_a_table_as_solver() -> None:
    sampler = sampler_of()
    out = sampler.sample(2, solver=TABLE, seed=3)
    assert out.table is TABLE
    assert isinstance(out.table, StepTable)
    assert torch.equal(out.images, sampler.sample(2, steps=4, seed=3).images)
    assert torch.equal(out.images, sampler.sample(2, solver=TABLE, steps=4, seed=3).images)
