"""Euler's method in sigma and its ancestral form (Karras et al. 2022, arXiv:2206.00364; Song et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdiff.checks import number
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.churn import churned
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked
def euler(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float | Sequence[float] = 0.0,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of Euler's method in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1, first order only).

    For dx/dsigma = eps with x = x_0 + sigma eps, a step from sigma_s to sigma_t is

        x_t = x_s + (sigma_t - sigma_s) eps = x_0 + sigma_t eps

    In variance-preserving states, x / sqrt(1 + sigma^2), this is a_t x_0 + s_t eps: DDIM with eta = 0. So it is with a
    `FlowSchedule`, where it is Euler's method for dx/dsigma = v = eps - x_0, the usual sampler of rectified flow.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        churn: S_churn of the paper's algorithm 2, or (S_churn, S_tmin, S_tmax, S_noise): before a step at a level from
            S_tmin to S_tmax, noise of standard deviation S_noise raises it by the factor 1 + min(S_churn / steps,
            sqrt(2) - 1). 0 adds none.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    return euler_table(churned(Walk.of(schedule, steps, **common), churn), "euler", 0.0)


@checked
def euler_ancestral(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **common: Unpack[Common]
) -> StepTable:
    """Build the table of Euler's method with fresh noise in every step (k-diffusion's sample_euler_ancestral).

    A step goes down to less noise than the next level has, and adds the rest:

        sigma_up = eta sigma_t sqrt(1 - sigma_t^2 / sigma_s^2),  sigma_down = sqrt(sigma_t^2 - sigma_up^2)
        x_t = x_s + (sigma_down - sigma_s) eps + sigma_up z

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        eta: Share of fresh noise, 0 to 1; 1 draws from the posterior between the levels, as DDPM does.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    return euler_table(Walk.of(schedule, steps, **common), "euler_ancestral", number("eta", eta, 0, 1))


def euler_table(walk: Walk, name: str, eta: float) -> StepTable:
    """Build the rows of `euler_ancestral` for the levels of a walk; ``eta`` = 0 is `euler`.

    x_t = a_t (x_0 + sigma_down eps + sigma_up z)          a_t sigma_up is ``up``, a_t sigma_down is ``down``
    """
    rows = []
    for i, level in enumerate(walk.levels):
        up = eta * level.s_next * math.sqrt(max(0.0, 1.0 - (level.sigma_next / level.sigma) ** 2))
        down = math.sqrt(level.s_next**2 - up**2)
        rows.append(walk.continued(i, walk.row(i, x0=level.a_next, eps=down, z=up)))
    return walk.table(name, rows)
