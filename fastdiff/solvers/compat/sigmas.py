"""Noise levels of diffusers' schedulers in sigma, computed in float32 as there, and walks over them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import ConfigError
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.compat.source import Source, beta_quantiles
from fastdiff.solvers.spacing import SIGMA_SPACINGS, spaced_sigmas
from fastdiff.solvers.walk import Level, Walk

if TYPE_CHECKING:
    import torch

ZERO_SNR = 2.0**-24  # abar that diffusers has in place of 0
PRECISION = "float32"  # of diffusers' noise levels


def training_betas(schedule: NoiseSchedule) -> torch.Tensor:
    """Return the betas of a schedule before any rescaling, computed in float32 by diffusers' operations."""
    import torch

    dtype = getattr(torch, PRECISION)
    start, end, T = schedule.beta_start, schedule.beta_end, schedule.timesteps
    if schedule.kind == "linear":
        return torch.linspace(start, end, T, dtype=dtype, device="cpu")
    if schedule.kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=dtype, device="cpu") ** 2
    # These come from float64.
    plain = dataclasses.replace(schedule, rescale_zero_terminal_snr=False)
    return torch.tensor(plain.variances, dtype=dtype, device="cpu")


def training_sigmas(schedule: NoiseSchedule) -> NDArray[np.floating[Any]]:
    """Return sigma of every timestep, rising, computed in float32 by the operations that diffusers uses.

    In float32 a cosine schedule's smallest sigma is off by 1.5e-3, and timesteps are rounded from these sigmas.
    """
    import torch

    betas = training_betas(schedule)
    abar = torch.cumprod(1.0 - betas, dim=0)
    if schedule.rescale_zero_terminal_snr:
        root = abar.sqrt()
        scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        squares = scaled**2
        abar = torch.cumprod(torch.cat([squares[:1], squares[1:] / squares[:-1]]), dim=0)
        abar[-1] = ZERO_SNR
    sigmas = (((1 - abar) / abar) ** 0.5).numpy()
    if not (np.isfinite(sigmas).all() and (sigmas > 0.0).all()):
        raise ConfigError("the betas are too extreme for float32, in which diffusers computes these noise levels")
    return sigmas


def times_of(sigmas: NDArray[np.float64], train: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the timesteps of sigmas, by interpolating log sigma; differences of neighbours are taken in float32."""
    logs, wanted = np.log(train), np.log(sigmas)
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(train) - 2)
    w = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0.0, 1.0)
    return (1.0 - w) * low + w * (low + 1)


def spaced_by_sigma(
    source: Source, between: NDArray[Any], train: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return (t, sigma) of a spacing by sigma from between[0] to between[-1]; None where there is no such key."""
    kinds = [kind for kind in (*SIGMA_SPACINGS, "beta") if source.get(f"use_{kind}_sigmas", False)]
    if source.lu:
        kinds.append("exponential")  # equal steps of log sigma
    if not kinds:
        return None
    if len(kinds) > 1:
        raise source.refuse(f"use_{kinds[-1]}_sigmas", "one spacing by sigma is")
    largest, smallest = source.get("sigma_max", float(between[0])), source.get("sigma_min", float(between[-1]))
    if kinds == ["beta"]:
        sigmas = smallest + beta_quantiles(1.0 - np.linspace(0.0, 1.0, source.steps)) * (largest - smallest)
    else:
        sigmas = spaced_sigmas(kinds[0], source.steps, largest, smallest)
    return times_of(sigmas, train), sigmas


def sigma_walk(
    source: Source,
    t: Sequence[float] | NDArray[np.float64],
    sigmas: NDArray[np.float64],
    final: float,
    bounds: dict[str, Any],
    prediction: str | None = None,
    **more: Any,
) -> Walk:
    """Return a walk over sigmas, whose last step ends at ``final``."""
    if not (np.diff(sigmas) < 0).all():
        raise source.fails(f"its noise levels for {source.steps} steps repeat")
    abar = [1.0 / (1.0 + s * s) for s in [*sigmas.tolist(), final]]
    levels = tuple(Level(float(v), a, b) for v, (a, b) in zip(t, itertools.pairwise(abar), strict=True))
    return Walk(levels, prediction or source.prediction(), compat=True, start=source.start, **bounds, **more)


def level_between(train: NDArray[Any], sigma: float) -> tuple[float, float]:
    """Return the timestep at a sigma between two levels, and abar there."""
    return float(times_of(np.array([sigma]), train)[0]), 1.0 / (1.0 + sigma * sigma)
