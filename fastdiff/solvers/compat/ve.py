"""The table of diffusers' ScoreSdeVeScheduler, and its noise levels.

Samples are x_0 + sigma eps, of images in [0, 1], and the network predicts the score. A step of the predictor (Song et
al. 2021, arXiv:2011.13456, appendix E: reverse diffusion, eq. 46) is

    x' = x + (sigma_i^2 - sigma_j^2) score + sqrt(sigma_i^2 - sigma_j^2) z

In diffusers the two levels are looked up by the time times N - 1, cut to a whole number, so that in long runs they are
not those of the network's timestep. The table's last step adds no noise: diffusers' pipeline draws the mean. That
pipeline's noise is around 0, which is black.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastdiff import checks
from fastdiff.errors import ConfigError
from fastdiff.schedule import MAX_TIMESTEPS
from fastdiff.solvers.compat import sigmas as sigma_levels
from fastdiff.solvers.compat.source import Source
from fastdiff.solvers.keys import value_of
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.ve import LARGEST, SMALLEST, VESchedule

if TYPE_CHECKING:
    import torch

NAME = "ScoreSdeVeScheduler"
DATA = 2.0  # a difference of images in [-1, 1] per one of images in [0, 1]


def ve_times(steps: int, eps: float) -> torch.Tensor:
    """Return the times 1 to ``eps`` of ``set_timesteps``, which are not the network's timesteps."""
    import torch

    return torch.linspace(1, eps, steps, dtype=getattr(torch, sigma_levels.PRECISION), device="cpu")


def ve_sigmas(times: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
    """Return the noise levels at times, which are the network's timesteps."""
    import torch

    return torch.stack([smallest * (largest / smallest) ** t for t in times])


def discrete_sigmas(steps: int, smallest: float, largest: float) -> torch.Tensor:
    """Return the rising levels that a step's change is looked up in."""
    import torch

    dtype = getattr(torch, sigma_levels.PRECISION)
    return torch.exp(torch.linspace(math.log(smallest), math.log(largest), steps, dtype=dtype, device="cpu"))


def sigma_ends(smallest: Any, largest: Any, error: checks.Error = ConfigError) -> tuple[float, float]:
    """Return the lowest and the highest noise level, as numbers that float32 holds with their squares."""
    low = checks.number("sigma_min", smallest, SMALLEST / DATA, LARGEST / DATA, error=error)
    high = checks.number("sigma_max", largest, SMALLEST / DATA, LARGEST / DATA, error=error)
    if low >= high:
        raise error(f"sigma_min={low!r} must be less than sigma_max={high!r}")
    return low, high


def ve_schedule(config: Mapping[str, Any]) -> VESchedule:
    """Return the schedule of a ScoreSdeVeScheduler's networks, with the levels for images in [-1, 1]."""
    return VESchedule(
        DATA * value_of(config, "sigma_min", 0.01), DATA * value_of(config, "sigma_max", 1348.0),
        value_of(config, "num_train_timesteps", 2000),
    )  # fmt: skip


def ve_config(schedule: VESchedule) -> dict[str, Any]:
    """Return the configuration from which `ve_schedule` reads a schedule; the corrector is left out."""
    return {
        "_class_name": NAME, "sigma_min": schedule.sigma_min / DATA, "sigma_max": schedule.sigma_max / DATA,
        "num_train_timesteps": schedule.timesteps, "correct_steps": 0,
    }  # fmt: skip


def score_sde_ve(source: Source) -> StepTable:
    """Return the table of ScoreSdeVeScheduler's predictor."""
    if source.get("correct_steps", 1):
        raise source.refuse(
            "correct_steps",
            "the step of the Langevin corrector depends on the norms of all scores of a batch, so that no table has "
            "it; 0 is the predictor alone, and fastdiff.Scheduler has both as step_pred and step_correct",
        )
    n = checks.whole("steps", source.steps, 1, MAX_TIMESTEPS)
    smallest, largest = sigma_ends(source.get("sigma_min", 0.01), source.get("sigma_max", 1348.0))
    eps = checks.number("sampling_eps", source.get("sampling_eps", 1e-5), above=0, high=1, error=ConfigError)
    times = ve_times(n, eps)
    index = (times * (n - 1)).long().tolist()
    levels, network = discrete_sigmas(n, smallest, largest).tolist(), ve_sigmas(times, smallest, largest).tolist()
    abar = [*(1.0 / (1.0 + s * s) for s in network), 1.0]
    rows = []
    for i, (t, k) in enumerate(zip(network, index, strict=True)):
        change = levels[k] ** 2 - (levels[k - 1] ** 2 if k else 0.0)
        noise = math.sqrt(change) if i < n - 1 else 0.0
        rows.append(Row(t, abar[i], abar[i + 1], kx=1.0, ko=t * t, ax=1.0, ao=change, s=noise))
    return StepTable("ddpm", n, tuple(rows), init_scale=largest, exploding=True)
