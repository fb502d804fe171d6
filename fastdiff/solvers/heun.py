"""Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1, deterministic)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Level, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


def heun(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Heun's second-order method for dx/dsigma = eps, x = x_0 + sigma eps:

        x_e = x_s + (sigma_t - sigma_s) eps_s                         one row, which saves x_s
        x_t = x_s + (sigma_t - sigma_s) (eps_s + eps_e) / 2           one row, a stage, told the next timestep
            = (x_s + x_e + (sigma_t - sigma_s) eps_e) / 2

    A step to zero noise has the first row only, so n steps are 2 n - 1 rows. Options: `Walk.of`. Raises
    `InvalidArgument` for a schedule that starts at zero SNR, where sigma is infinite.
    """
    return heun_table(Walk.of(schedule, steps, **common))


def heun_table(walk: Walk) -> StepTable:
    """The table over a walk."""
    if walk.levels[0].abar == 0.0:
        raise InvalidArgument("heun cannot start at zero SNR, where sigma is infinite; ddim, euler and dpmpp_2m can")
    rows = []
    last = len(walk) - 1
    for i, level in enumerate(walk.levels):
        # The first row's level is s, the second's t; the state x = a (x_0 + sigma eps) goes from a_s to a_t.
        two = level.abar_next < 1.0
        rows.append(walk.row(i, x0=level.a_next, eps=level.s_next, save=float(two)))
        if two:
            end = walk.levels[i + 1].t if i < last else walk.last_time
            stage = Level(end, level.abar_next, level.abar_next)
            half = 0.5 * level.a_next * (level.sigma_next - level.sigma)
            rows.append(walk.at(stage).row(0, x=0.5, xs=0.5 * level.a_next / level.a, eps=half, stage=1.0))
    return walk.table("heun", rows)
