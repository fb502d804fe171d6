"""k-diffusion's DPM-Solver++ solvers of two evaluations a step: DPM++ SDE and DPM++ 2S ancestral.

In sigma, x = x_0 + sigma eps, a step of order 1 from sigma_s to sigma_t that keeps x_0 is

    x_t = sigma_t / sigma_s x_s + (1 - sigma_t / sigma_s) x_0
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdiff.checks import number
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.dpm2 import ancestral, finite, stage
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked
def dpmpp_2s_ancestral(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **common: Unpack[Common]
) -> StepTable:
    """Build the table of k-diffusion's sample_dpmpp_2s_ancestral: DPM-Solver++(2S) steps, each followed by fresh noise.

    With sigma_up and sigma_down of `dpm2_ancestral` and sigma_m = sqrt(sigma_s sigma_down), a step is two rows

        x_m = sigma_m / sigma_s x_s + (1 - sigma_m / sigma_s) x_0(x_s)            the first row, which saves x_s
        x_t = sigma_down / sigma_s x_s + (1 - sigma_down / sigma_s) x_0(x_m) + sigma_up z

    and a step to zero noise is x_0, the first row only, so n steps are 2 n - 1 rows.

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
    return dpmpp_2s_ancestral_table(Walk.of(schedule, steps, **common), number("eta", eta, 0, 1))


def dpmpp_2s_ancestral_table(walk: Walk, eta: float) -> StepTable:
    """Build the rows of `dpmpp_2s_ancestral` for the levels of a walk."""
    rows = []
    for i, level in enumerate(finite(walk, "dpmpp_2s_ancestral")):
        if level.abar_next == 1.0:
            rows.append(walk.row(i, x0=1.0))
            continue
        up, down = ancestral(level.sigma, level.sigma_next, eta)
        middle = stage(walk, level, math.sqrt(level.sigma * down))
        keep = middle.sigma / level.sigma
        first = walk.at(level._replace(abar_next=middle.abar))
        rows.append(first.row(0, x=middle.a / level.a * keep, x0=middle.a * (1.0 - keep), save=1.0))
        a, keep = level.a_next, down / level.sigma
        rows.append(walk.at(middle).row(0, xs=a / level.a * keep, x0=a * (1.0 - keep), z=a * up, stage=1.0))
    return walk.table("dpmpp_2s_ancestral", rows)


@checked
def dpmpp_sde(schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **common: Unpack[Common]) -> StepTable:
    """Build the table of k-diffusion's sample_dpmpp_sde, DPM-Solver++ of the SDE with a stage in the middle (r = 1/2).

    With sigma_m = sqrt(sigma_s sigma_t), and (up, down) of `dpm2_ancestral` from s to m and from s to t, a step is

        x_m = down_m / sigma_s x_s + (1 - down_m / sigma_s) x_0(x_s) + up_m z_m
        x_t = down_t / sigma_s x_s + (1 - down_t / sigma_s) x_0(x_m) + up_t (sqrt(q) z_m + sqrt(1 - q) z)

    z_m and the noise of the whole step are increments of one Brownian motion W in sigma, as in k-diffusion's tree:
    W(s) - W(m) is a part of W(s) - W(t), so q = (sigma_s - sigma_m) / (sigma_s - sigma_t). The second row finds z_m in
    its own input: z_m = (x_m - down_m / sigma_s x_s - (1 - down_m / sigma_s) m1) / up_m, with m1 the first row's x_0.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        eta: Share of fresh noise, 0 to 1; 1 is the reverse SDE, 0 the ODE's DPM-Solver++(2S).
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of two rows a step, one in a last step to zero noise.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule starts at zero SNR, where sigma is infinite.
    """
    return dpmpp_sde_table(Walk.of(schedule, steps, **common), number("eta", eta, 0, 1))


def dpmpp_sde_table(walk: Walk, eta: float) -> StepTable:
    """Build the rows of `dpmpp_sde` for the levels of a walk."""
    rows = []
    for i, level in enumerate(finite(walk, "dpmpp_sde")):
        if level.abar_next == 1.0:
            rows.append(walk.row(i, x0=1.0))
            continue
        middle = stage(walk, level, math.sqrt(level.sigma * level.sigma_next))
        up, down = ancestral(level.sigma, middle.sigma, eta)
        keep = down / level.sigma
        x, x0, z = middle.a / level.a * keep, middle.a * (1.0 - keep), middle.a * up
        first = walk.at(level._replace(abar_next=middle.abar))
        rows.append(first.row(0, x=x, x0=x0, z=z, keep="x0", save=1.0))
        up, down = ancestral(level.sigma, level.sigma_next, eta)
        a, keep = level.a_next, down / level.sigma
        span = level.sigma - level.sigma_next  # 0 where two levels differ by less than their roots' rounding
        q = min(1.0, max(0.0, (level.sigma - middle.sigma) / span)) if span > 0.0 else 0.5
        again = a * up * math.sqrt(q) / z if z > 0.0 else 0.0  # the factor of (x_m - x x_s - x0 m1), which is z z_m
        rows.append(
            walk.at(middle).row(
                0,
                x=again,
                xs=a / level.a * keep - again * x,
                x0=a * (1.0 - keep),
                m=(-again * x0,),
                z=a * up * math.sqrt(1.0 - q),
                stage=1.0,
            )
        )
    return walk.table("dpmpp_sde", rows)
