"""DPM-Solver of orders 2 and 3 over any noise levels, and the control of its steps by their error.

Lu et al. 2022, arXiv:2206.00927, algorithms 1, 2 and section 3.3, in the form of k-diffusion's sample_dpm_adaptive.
"""

from __future__ import annotations

import dataclasses
import math

from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Level, Walk

R1 = 1.0 / 3.0  # where in log sigma the second evaluation is, and the third of order 3 is at twice as far


def dpm_table(walk: Walk, order: int) -> StepTable:
    """Build the table of DPM-Solver of order 2 or 3, whose step has as many rows; a step to zero noise has one."""
    rows = [row for i in range(len(walk)) for row in _step(walk, i, order)]
    return walk.table("dpm_adaptive", rows)


def _step(walk: Walk, i: int, order: int) -> list[Row]:
    """Return the rows of step i, from sigma_s to sigma_t = e^-h sigma_s.

    sigma_k = e^(-r_k h) sigma_s                                    x_k is at sigma_k
    x_1 = x_s + (sigma_1 - sigma_s) eps_s
    x_t = x_s + (sigma_t - sigma_s) eps_s - sigma_t / (2 r_1) (e^h - 1) (eps_1 - eps_s)                    (order 2)
    x_2 = x_s + (sigma_2 - sigma_s) eps_s - sigma_2 r_2 / r_1 ((e^(r_2 h) - 1) / (r_2 h) - 1) (eps_1 - eps_s)
    x_t = x_s + (sigma_t - sigma_s) eps_s - sigma_t / r_2 ((e^h - 1) / h - 1) (eps_2 - eps_s)              (order 3)
    """
    level = walk.levels[i]
    if level.abar_next == 1.0:
        return [walk.row(i, x0=1.0)]
    h = level.log_sigma - level.log_sigma_next
    shares: tuple[float, ...] = (0.5,) if order == 2 else (R1, 2.0 * R1)
    assert walk.between is not None
    stages = [walk.between(level.sigma * math.exp(-r * h)) for r in shares]
    inside = [Level(t, abar, abar) for t, abar in stages]
    first = level._replace(abar_next=inside[0].abar)
    rows = [walk.at(first).row(0, x0=first.a_next, eps=first.s_next, save=1.0, keep="eps")]
    targets = [*inside[1:], Level(0.0, level.abar_next, level.abar_next)]
    for k, (stage, target) in enumerate(zip(inside, targets, strict=True)):
        if order == 2:
            slope = -math.expm1(h) * target.sigma / (2.0 * shares[0])
        elif k == 0:
            slope = -target.sigma * 2.0 * (shares[1] * h) * phi(2, shares[1] * h)
        else:
            slope = -target.sigma / shares[1] * h * phi(2, h)
        straight = target.sigma - level.sigma
        rows.append(
            walk.at(stage).row(
                0, xs=target.a / level.a, m=(target.a * (straight - slope),), eps=target.a * slope,
                stage=1.0, abar_next=target.abar,
            )
        )  # fmt: skip
    return rows


@dataclasses.dataclass
class StepSize:
    """The size h of a step in log sigma, changed after every trial (k-diffusion's PIDStepSizeController as I alone)."""

    h: float
    order: int
    safety: float = 0.81

    def accepts(self, error: float) -> bool:
        """Say whether a step of this error counts, and choose the size of the next trial.

        h <- h f,    f = 1 + atan(error^(-1 / order) - 1);    a step counts where f is at least ``safety``
        """
        factor = 1.0 + math.atan((1.0 / (error + 1e-8)) ** (1.0 / self.order) - 1.0)
        self.h *= factor
        return factor >= self.safety
