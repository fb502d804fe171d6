"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), over any subset of the timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule, posterior
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Schedule, Walk

VARIANCES = ("posterior", "beta", "none", "learned_range")
# diffusers' variance_type, and the variance here
VARIANCE_TYPES = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned_range"}


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "posterior",
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    clip: float | None = 1.0,
    threshold: float | tuple[float, float] | None = None,
    steps_offset: int = 0,
) -> StepTable:
    """DDPM ancestral sampling as a table; ``steps`` None visits every timestep. Between levels abar_t and abar_p (p the
    next row's timestep, abar_p = 1 at the end), with alpha = abar_t / abar_p and beta = 1 - alpha:

        x_p = sqrt(abar_p) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_p) / (1 - abar_t) x_t + sigma z      (eq. 7)

        variance "posterior"       sigma^2 = beta (1 - abar_p) / (1 - abar_t)                (diffusers' fixed_small)
                 "beta"            sigma^2 = beta                                            (fixed_large)
                 "none"            sigma = 0, the mean alone
                 "learned_range"   log sigma^2 = (1+v)/2 log beta + (1-v)/2 log posterior    (Nichol & Dhariwal 2021,
                                                                                              eq. 15)

    The last row adds no noise. The other options are those of all solvers (`Walk.of`). Raises `InvalidArgument` naming
    the value and what is allowed.
    """
    if variance not in VARIANCES:
        raise InvalidArgument(f"variance={variance!r} is unknown; allowed: {', '.join(VARIANCES)}")
    if steps is None and isinstance(schedule, NoiseSchedule) and (spacing is None or isinstance(spacing, str)):
        steps = schedule.timesteps
    walk = Walk.of(
        schedule,
        steps,
        spacing=spacing,
        prediction=prediction,
        clip=clip,
        threshold=threshold,
        steps_offset=steps_offset,
    )
    return ddpm_table(walk, variance)


def ddpm_table(walk: Walk, variance: str, last_beta: bool = False) -> StepTable:
    """The table of `ddpm` over a walk.

    last_beta: the last row's noise is that of ``variance`` with the true beta too, where the posterior's is 0 or 1e-20:
    diffusers' noise on finished images (`fastdiff.solvers.compat`).
    """
    rows = []
    for i, level in enumerate(walk.levels):
        c0, ct, var = posterior(level.abar, level.abar_next)
        beta = 1.0 - level.abar / level.abar_next
        if last_beta and i == len(walk) - 1:
            var = max(var, 1e-20)
        s = sv = 0.0
        if var > 0.0 and variance == "posterior":
            s = math.sqrt(var)
        elif var > 0.0 and variance == "beta":
            s = math.sqrt(beta)
        elif var > 0.0 and variance == "learned_range":
            # sigma = exp((1+v)/4 log beta + (1-v)/4 log var) = (beta var)^(1/4) exp(v/4 log(beta/var))
            s, sv = (beta * var) ** 0.25, 0.25 * math.log(beta / var)
        rows.append(walk.row(i, x=ct, x0=c0, z=s, sv=sv))
    return walk.table("ddpm", rows)
