"""DPM-Solver-2 in sigma and its ancestral form, as k-diffusion has them (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdiff.checks import number
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Level, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked
def dpm2(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Build the table of k-diffusion's sample_dpm_2, the midpoint rule for dx/dsigma = eps, x = x_0 + sigma eps.

    A step from sigma_s to sigma_t is two rows, with sigma_m = sqrt(sigma_s sigma_t):

        x_m = x_s + (sigma_m - sigma_s) eps_s                         the first row, which saves x_s
        x_t = x_s + (sigma_t - sigma_s) eps_m                         the second, a stage at the timestep of sigma_m

    A step to zero noise is Euler's step, the first row only, so n steps are 2 n - 1 rows.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of two rows a step, one in a last step to zero noise.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule starts at zero SNR, where sigma is infinite.
    """
    return dpm2_table(Walk.of(schedule, steps, **common), "dpm2", 0.0)


@checked
def dpm2_ancestral(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **common: Unpack[Common]
) -> StepTable:
    """Build the table of k-diffusion's sample_dpm_2_ancestral: `dpm2` with fresh noise in every step.

    A step goes down to less noise than the next level has, and adds the rest:

        sigma_up = eta sigma_t sqrt(1 - sigma_t^2 / sigma_s^2),  sigma_down = sqrt(sigma_t^2 - sigma_up^2)
        x_m = x_s + (sigma_m - sigma_s) eps_s                         with sigma_m = sqrt(sigma_s sigma_down)
        x_t = x_s + (sigma_down - sigma_s) eps_m + sigma_up z

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        eta: Share of fresh noise, 0 to 1.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of two rows a step, one in a last step to zero noise.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule starts at zero SNR, where sigma is infinite.
    """
    return dpm2_table(Walk.of(schedule, steps, **common), "dpm2_ancestral", number("eta", eta, 0, 1))


def dpm2_table(walk: Walk, name: str, eta: float) -> StepTable:
    """Build the rows of `dpm2_ancestral` for the levels of a walk; ``eta`` = 0 is `dpm2`."""
    rows = []
    for i, level in enumerate(finite(walk, name)):
        if level.abar_next == 1.0:
            rows.append(walk.row(i, x0=1.0))
            continue
        up, down = ancestral(level.sigma, level.sigma_next, eta)
        middle = stage(walk, level, math.sqrt(level.sigma * down))
        to_middle = level._replace(abar_next=middle.abar)
        rows.append(walk.at(to_middle).row(0, x0=middle.a, eps=middle.s, save=1.0))
        xs, eps = level.a_next / level.a, level.a_next * (down - level.sigma)
        rows.append(walk.at(middle).row(0, xs=xs, eps=eps, z=level.a_next * up, stage=1.0))
    return walk.table(name, rows)


def finite(walk: Walk, name: str) -> tuple[Level, ...]:
    """Return the levels of a walk that starts at finite sigma; `InvalidArgument` names the solver otherwise."""
    if walk.levels[0].abar == 0.0:
        raise InvalidArgument(f"{name} cannot start at zero SNR, where sigma is infinite; ddim, euler and dpmpp_2m can")
    return walk.levels


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return (sigma_up, sigma_down) of an ancestral step; `dpm2_ancestral` has the formula."""
    up = eta * sigma_next * math.sqrt(max(0.0, 1.0 - (sigma_next / sigma) ** 2))
    return up, math.sqrt(sigma_next**2 - up**2)


def stage(walk: Walk, level: Level, sigma: float) -> Level:
    """Return the level of a second evaluation, at ``sigma`` between the ends of a step; it goes to the step's end."""
    assert walk.between is not None
    return Level(*walk.between(sigma), level.abar_next)
