"""Runs of DDIM and DDPM written out line by line, with which the tests of the sampler compare its images."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.core import noise
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConfig
from tests.support.unets import TINY, random_unet

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
    """Return (x, x0) after every row of DDIM or, with a ``variance``, of DDPM: the papers' formulas, line by line."""
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


# The batch and the processor decide the order of sums and the use of Winograd: with AVX2 it is a little more than 2.
ROUNDED = 3


def assert_close(images: Tensor, run: Callable[[torch.dtype], Tensor]) -> None:
    """Compare images with the run in float64: `ROUNDED` times the error of the same run in float32 is allowed, plus
    rounding of the result.
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
    """Sample images, compare them with a run by hand, and return them."""
    x = initial(seed, indices)
    out = sampler.sample(len(indices), seed=seed, start_index=indices.start, **options)

    @functools.cache
    def run(dtype: torch.dtype) -> Tensor:
        return by_hand(sampler.unet, x, **hand, dtype=dtype, z=lambda row: philox(seed, indices, row, noise.UPDATE))[
            -1
        ][0]

    assert_close(out.images, run)
    return out.images
