"""PLMS: PNDM (Liu et al. 2022, arXiv:2202.09778) without its Runge-Kutta start, as in latent diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Level, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Weights of Adams-Bashforth over equal steps, for eps, m1, m2, m3, by order (eq. 12)
WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@checked
def plms(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Build the table of PNDM's pseudo linear multi-step method, without its Runge-Kutta start.

    A step is DDIM's with e, a combination of the last values of eps, in place of eps:

        e    = (55 eps - 59 m1 + 37 m2 - 9 m3) / 24                                          (eq. 12)
        x_t  = a_t / a_s x_s + a_t (sigma_t - sigma_s) e,     sigma = sqrt(1 - abar) / a      (eq. 11)

    and lower orders at the start. A step to zero noise is of order 1, e = eps: the weights, which suppose equal steps
    of the timestep, extrapolate too far there. The first step is improved Euler: a second row, a stage at the second
    timestep, starts from the saved x again with the mean of both values of eps.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of n + 1 rows for n >= 2 steps.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule starts at zero SNR, where sigma is infinite.
    """
    return plms_table(Walk.of(schedule, steps, **common))


def plms_table(walk: Walk, mix_outputs: bool = False, stage: tuple[Level, Level] | None = None) -> StepTable:
    """Build the rows of `plms` for the levels of a walk, or of diffusers' variant of it.

    With ``mix_outputs`` the history holds the network's outputs, whose combination is converted to eps at the present
    state, as in diffusers with v-prediction. ``stage`` has the level at which the second row starts from the saved x,
    and the one at which it evaluates the network, where diffusers takes others than the walk's first and second.
    """
    if walk.levels[0].abar == 0.0:
        raise InvalidArgument("plms cannot start at zero SNR, where sigma is infinite; ddim, euler and dpmpp_2m can")
    if stage is None and len(walk) > 1:
        there = walk.levels[1]
        stage = walk.levels[0], Level(there.t, there.abar, there.abar)
    rows = []
    for i, level in enumerate(walk.levels):
        # The stage does not push its eps, so in the second step m1 is the first row's.
        order = 1 if level.abar_next == 1.0 and not walk.compat else min(i + 1, 4)
        rows.append(_row(walk, i, level, WEIGHTS[order], mix_outputs, save=float(i == 0 and stage is not None)))
        if i == 0 and stage is not None:
            rows.append(_stage(walk, *stage, mix_outputs))
    return walk.table("plms", rows)


def _transfer(level: Level) -> tuple[float, float]:
    """Return DDIM's step as coefficients of x and eps: x_t = a_t / a_s x + a_t (sigma_t - sigma_s) eps."""
    return level.a_next / level.a, level.a_next * (level.sigma_next - level.sigma)


def _row(walk: Walk, i: int, level: Level, weights: tuple[float, ...], mix_outputs: bool, save: float) -> Row:
    x, e = _transfer(level)
    if not mix_outputs:
        return walk.row(i, x=x, eps=e * weights[0], m=[e * w for w in weights[1:]], keep="eps", save=save)
    ex, eo = eps_coefficients(walk.prediction, level.abar)
    mixed = [e * eo * w for w in weights]
    return walk.row(i, x=x + e * ex, out=mixed[0], m=mixed[1:], keep="out", save=save)


def _stage(walk: Walk, start: Level, there: Level, mix_outputs: bool) -> Row:
    """Return the row that repeats the first step from the saved x, with the mean of both values of eps."""
    x, e = _transfer(start)
    if not mix_outputs:
        return walk.at(there).row(0, xs=x, eps=0.5 * e, m=[0.5 * e], stage=1.0)
    ex, eo = eps_coefficients(walk.prediction, start.abar)
    return walk.at(there).row(0, xs=x + e * ex, out=0.5 * e * eo, m=[0.5 * e * eo], stage=1.0)
