"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), over any subset of the timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule, posterior
from fastdiff.solvers.prediction import check_prediction, x0_coefficients
from fastdiff.solvers.spacing import levels, timesteps
from fastdiff.solvers.table import Row, StepTable, check_clip

VARIANCES = ("posterior", "beta", "none", "learned_range")


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    variance: str = "posterior",
    spacing: str | Sequence[float] = "trailing",
    prediction: str = "epsilon",
    clip: float | None = 1.0,
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

    The last row adds no noise. Options are those of `ddim`. Raises `InvalidArgument` naming the value and what is
    allowed.
    """
    if variance not in VARIANCES:
        raise InvalidArgument(f"variance={variance!r} is unknown; allowed: {', '.join(VARIANCES)}")
    check_prediction(prediction)
    c = check_clip(clip)
    if steps is None and isinstance(spacing, str):
        steps = schedule.timesteps
    ts = timesteps(schedule, steps, spacing, steps_offset)
    rows = []
    for t, (abar, abar_next) in zip(ts, levels(schedule, ts, 1.0), strict=True):
        kx, ko = x0_coefficients(prediction, abar)
        c0, ct, var = posterior(abar, abar_next)
        beta = 1.0 - abar / abar_next
        s = sv = 0.0
        if var > 0.0 and variance == "posterior":
            s = math.sqrt(var)
        elif var > 0.0 and variance == "beta":
            s = math.sqrt(beta)
        elif var > 0.0 and variance == "learned_range":
            # sigma = exp((1+v)/4 log beta + (1-v)/4 log var) = (beta var)^(1/4) exp(v/4 log(beta/var))
            s, sv = (beta * var) ** 0.25, 0.25 * math.log(beta / var)
        rows.append(Row(t=t, abar=abar, abar_next=abar_next, kx=kx, ko=ko, c=c, ax=ct, a0=c0, s=s, sv=sv))
    return StepTable("ddpm", len(ts), tuple(rows))
