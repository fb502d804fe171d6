"""Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithms 1, deterministic, and 2, with churn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.churn import churned
from fastdiff.solvers.flow import state_scale
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Level, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked
def heun(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float | Sequence[float] = 0.0,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of Heun's second-order method (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    For dx/dsigma = eps with x = x_0 + sigma eps, a step from sigma_s to sigma_t is two rows:

        x_e = x_s + (sigma_t - sigma_s) eps_s                         the first row, which saves x_s
        x_t = x_s + (sigma_t - sigma_s) (eps_s + eps_e) / 2           the second, a stage at the next timestep
            = (x_s + x_e + (sigma_t - sigma_s) eps_e) / 2

    A step to zero noise is the first row only, so n steps are 2 n - 1 rows. With a `FlowSchedule` it is the same for
    dx/dsigma = v with x = (1 - sigma) x_0 + sigma eps and v = eps - x_0, and may start at sigma = 1, pure noise.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        churn: S_churn of the paper's algorithm 2, or (S_churn, S_tmin, S_tmax, S_noise): before a step at a level from
            S_tmin to S_tmax, noise of standard deviation S_noise raises it by the factor 1 + min(S_churn / steps,
            sqrt(2) - 1). 0 adds none.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of two rows a step, one in a last step to zero noise.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule starts at zero SNR, where sigma is infinite.
    """
    return heun_table(churned(Walk.of(schedule, steps, **common), churn))


def heun_table(walk: Walk) -> StepTable:
    """Build the rows of `heun` for the levels of a walk."""
    if walk.levels[0].abar == 0.0 and not walk.flow:
        raise InvalidArgument("heun cannot start at zero SNR, where sigma is infinite; ddim, euler and dpmpp_2m can")
    rows = []
    for i, level in enumerate(walk.levels):
        # The states are variance-preserving, a (x_0 + sigma eps): the first row reads one at level s, the second at t.
        two = level.abar_next < 1.0
        keep = ("velocity" if walk.flow else "eps") if two and walk.compat else None
        rows.append(walk.row(i, x0=level.a_next, eps=level.s_next, save=float(two), keep=keep))
        if two:
            stage = Level(walk.end(i), level.abar_next, level.abar_next)
            if walk.flow:
                rows.append(_flow_stage(walk, level, stage))
                continue
            half = 0.5 * level.a_next * (level.sigma_next - level.sigma)
            if walk.compat:  # as written first, so that a caller who edits x_e changes eps_e alone, as in diffusers
                second = walk.at(stage).row(0, xs=level.a_next / level.a, eps=half, m=(half,), stage=1.0)
            else:
                second = walk.at(stage).row(0, x=0.5, xs=0.5 * level.a_next / level.a, eps=half, stage=1.0)
            rows.append(second)
        rows[-1] = walk.continued(i, rows[-1])
    return walk.table("heun", rows)


def _flow_stage(walk: Walk, level: Level, stage: Level) -> Row:
    """Return the second row of a step of a flow, x_t = (x_s + x_e + (sigma_t - sigma_s) v_e) / 2, v_e = eps_e - x_0.

    The flow's states are variance-preserving ones times `state_scale`, and its sigma is s times this scale.
    """
    before, after = state_scale(level.abar), state_scale(level.abar_next)
    half = 0.5 * (level.s_next - level.s * before / after)
    xs = 0.5 * before / after
    if walk.compat:  # with m1 = v_s, so that a caller who edits x_e changes v_e alone, as in diffusers
        return walk.at(stage).row(0, xs=2.0 * xs, eps=half, x0=-half, m=(half,), stage=1.0)
    return walk.at(stage).row(0, x=0.5, xs=xs, eps=half, x0=-half, stage=1.0)
