"""Euler's method in sigma and its ancestral form (Karras et al. 2022, arXiv:2206.00364; Song et al. 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import StepTable, is_number
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


def euler(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Euler's method for dx/dsigma = eps, x = x_0 + sigma eps (Karras et al. 2022, algorithm 1 without its correction):

        x_t = x_s + (sigma_t - sigma_s) eps = x_0 + sigma_t eps

    In variance-preserving states, x / sqrt(1 + sigma^2), that is DDIM with eta = 0: a_t x_0 + s_t eps. Options:
    `Walk.of`.
    """
    return euler_table(Walk.of(schedule, steps, **common), "euler", 0.0)


def euler_ancestral(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **common: Unpack[Common]
) -> StepTable:
    """Euler's method down to less noise than the next level has, and fresh noise for the rest:

        sigma_up = eta sigma_t sqrt(1 - sigma_t^2 / sigma_s^2),  sigma_down = sqrt(sigma_t^2 - sigma_up^2)
        x_t = x_s + (sigma_down - sigma_s) eps + sigma_up z

    eta = 1 draws from the posterior between the levels, as DDPM does. Options: `Walk.of`.
    """
    if not is_number(eta) or not 0.0 <= eta <= 1.0:
        raise InvalidArgument(f"eta={eta!r}: a number from 0 to 1 is needed")
    return euler_table(Walk.of(schedule, steps, **common), "euler_ancestral", float(eta))


def euler_table(walk: Walk, name: str, eta: float) -> StepTable:
    """The table over a walk; eta is the share of fresh noise."""
    rows = []
    for i, level in enumerate(walk.levels):
        up = eta * level.s_next * math.sqrt(max(0.0, 1.0 - (level.sigma_next / level.sigma) ** 2))
        down = math.sqrt(level.s_next**2 - up**2)
        rows.append(walk.row(i, x0=level.a_next, eps=down, z=up))
    return walk.table(name, rows)
