"""PLMS: PNDM (Liu et al. 2022, arXiv:2202.09778) without its Runge-Kutta start, as latent diffusion runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Level, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Adams-Bashforth over equal steps, of eps, m1, m2, m3 (eq. 12)
WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plms(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """PNDM's pseudo linear multi-step method, without its Runge-Kutta start. With e the combination of the last eps,

        e    = (55 eps - 59 m1 + 37 m2 - 9 m3) / 24                                          (eq. 12)
        x_t  = phi(x_s, e, s, t): DDIM's step with e for eps                                  (eq. 11)

    and lower orders at the start. The first step is improved Euler: a second row, a stage at the second timestep, goes
    from the saved x again with the mean of both eps. So n >= 2 steps are n + 1 rows. Options: `Walk.of`. The weights
    suppose equal steps of the timestep. Raises `InvalidArgument` for a schedule that starts at zero SNR.
    """
    return plms_table(Walk.of(schedule, steps, **common))


def plms_table(walk: Walk, mix_outputs: bool = False, stage: Level | None = None) -> StepTable:
    """The table over a walk.

    mix_outputs: the history holds what the network said, and the combination is converted to eps at the present state
    (diffusers with v-prediction); stage: the level at which the second row is, and from which it starts there.
    """
    if walk.levels[0].abar == 0.0:
        raise InvalidArgument("plms cannot start at zero SNR, where sigma is infinite; ddim, euler and dpmpp_2m can")
    rows = []
    for i, level in enumerate(walk.levels):
        # Two steps in, the first eps and the stage's are m1 and eps: the stage's own is not kept.
        order = min(i + 1, 4)
        rows.append(_row(walk, i, level, WEIGHTS[order], mix_outputs, save=float(i == 0 and len(walk) > 1)))
        if i == 0 and len(walk) > 1:
            rows.append(_stage(walk, level if stage is None else stage, mix_outputs))
    return walk.table("plms", rows)


def _transfer(level: Level) -> tuple[float, float]:
    """DDIM's step as coefficients of x and eps: x_t = a_t / a_s x + a_t (sigma_t - sigma_s) eps."""
    return level.a_next / level.a, level.a_next * (level.sigma_next - level.sigma)


def _row(walk: Walk, i: int, level: Level, weights: tuple[float, ...], mix_outputs: bool, save: float) -> Row:
    x, e = _transfer(level)
    if not mix_outputs:
        return walk.row(i, x=x, eps=e * weights[0], m=[e * w for w in weights[1:]], keep="eps", save=save)
    ex, eo = eps_coefficients(walk.prediction, level.abar)
    mixed = [e * eo * w for w in weights]
    return walk.row(i, x=x + e * ex, out=mixed[0], m=mixed[1:], keep="out", save=save)


def _stage(walk: Walk, start: Level, mix_outputs: bool) -> Row:
    """From the saved x again, with the mean of the first eps (m1) and the one at the end of the first step."""
    x, e = _transfer(start)
    there = Level(walk.levels[1].t, walk.levels[1].abar, walk.levels[1].abar)
    if not mix_outputs:
        return walk.at(there).row(0, xs=x, eps=0.5 * e, m=[0.5 * e], stage=1.0)
    ex, eo = eps_coefficients(walk.prediction, start.abar)
    return walk.at(there).row(0, xs=x + e * ex, out=0.5 * e * eo, m=[0.5 * e * eo], stage=1.0)
