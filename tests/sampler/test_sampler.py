"""Images of the sampler: compared with runs by hand in float64, the same in any batch, labels, guidance, noise."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.core import noise
from fastdiff.errors import (
    FastdiffError,
    InvalidArgument,
    NumericsError,
)
from fastdiff.sampler import Event, Sampler
from fastdiff.schedule import NoiseSchedule
from tests.sampler.by_hand import (
    NULL,
    SCHEDULE,
    SHAPE,
    TINY_LEARNED,
    Probe,
    T,
    assert_close,
    by_hand,
    check,
    initial,
    philox,
    sampler_of,
    trailing,
)
from tests.support.unets import TINY_CLASSES


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
    """Network that returns NaN for images labelled 3, at one timestep."""

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
