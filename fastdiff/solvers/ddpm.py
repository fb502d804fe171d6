"""DDPM's ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2), over any subset of the timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.checks import one_of
from fastdiff.schedule import NoiseSchedule, posterior
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Schedule, Walk

VARIANCES = ("posterior", "beta", "none", "learned_range")
# diffusers' variance_type, and the variance here
VARIANCE_TYPES = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned_range"}


@checked
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
    """Build the table of DDPM's ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2).

    A step from level abar_t to level abar_p, the level of the next row's timestep p (abar_p = 1 in the last row), draws
    from the posterior q(x_p | x_t, x_0). With alpha = abar_t / abar_p and beta = 1 - alpha (eq. 7)

        x_p = sqrt(abar_p) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_p) / (1 - abar_t) x_t + sigma z

        variance "posterior"       sigma^2 = beta (1 - abar_p) / (1 - abar_t)          (diffusers' fixed_small)
                 "beta"            sigma^2 = beta                                      (diffusers' fixed_large)
                                   of a `VESchedule` sigma_t^2 - sigma_p^2: the reverse diffusion predictor of Song et
                                   al. 2021 (arXiv:2011.13456, eq. 46), and "posterior" its ancestral one (eq. 47)
                 "none"            sigma = 0, the mean alone
                 "learned_range"   log sigma^2 = (1+v)/2 log beta + (1-v)/2 log posterior
                                   (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15), v from the network

    The last row adds no noise.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is every timestep (18 steps with an `EDMSchedule`).
        variance: "posterior", "beta", "none" or "learned_range".
        spacing: How the timesteps are chosen, see `Walk.of`.
        prediction: What the network predicts, see `Walk.of`.
        clip: Bound of |x_0|; None for none.
        threshold: Dynamic thresholding in place of ``clip``, see `Walk.of`.
        steps_offset: Added to every timestep of "leading" spacing.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    one_of("variance", variance, VARIANCES)
    if steps is None and isinstance(schedule, NoiseSchedule) and (spacing is None or isinstance(spacing, str)):
        steps = schedule.timesteps
    walk = Walk.of(
        schedule, steps, spacing=spacing, prediction=prediction, clip=clip, threshold=threshold,
        steps_offset=steps_offset,
    )  # fmt: skip
    return ddpm_table(walk, variance)


def ddpm_table(walk: Walk, variance: str, last_beta: bool = False) -> StepTable:
    """Build the rows of `ddpm` for the levels of a walk.

        x_p = c0 x_0 + ct x_t + sigma z                                                                    (eq. 7)

    With ``last_beta`` the last row adds noise too, as diffusers' scheduler does to finished images: of variance beta
    where ``variance`` is "beta", of variance 1e-20 where it is "posterior".
    """
    rows = []
    for i, level in enumerate(walk.levels):
        c0, ct, var = posterior(level.abar, level.abar_next)
        beta = 1.0 - level.abar / level.abar_next
        if walk.exploding:  # sigma_t^2 - sigma_p^2 of states x / a, as a variance of x_p
            beta *= level.abar_next / level.abar
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
