"""Stochastic churn: noise that is added before a step (Karras et al. 2022, arXiv:2206.00364, algorithm 2)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastdiff.checks import Error, items, number, shown
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.walk import Level, Walk, forward

MOST = math.sqrt(2.0) - 1.0


class Churn(NamedTuple):
    """Options of the paper's algorithm 2, by their names there."""

    churn: float = 0.0  # S_churn
    lowest: float = 0.0  # S_tmin and S_tmax: the levels sigma between which noise is added
    highest: float = math.inf
    noise: float = 1.0  # S_noise, the standard deviation of what is added


def check_churn(name: str, value: Any, *, error: Error = InvalidArgument) -> Churn:
    """Return churn as (S_churn, S_tmin, S_tmax, S_noise); a number alone is S_churn."""
    if isinstance(value, Churn):
        return value
    needed = f"{name}={shown(value)}: S_churn, 0 or a positive number, or (S_churn, S_tmin, S_tmax, S_noise) is needed"
    try:
        listed = [value] if isinstance(value, (int, float)) else items(name, value, 4)
        if len(listed) not in (1, 4):
            raise error(needed)
        limits = [v if v == math.inf and i == 2 else number(name, v, 0) for i, v in enumerate(listed)]
    except (InvalidArgument, TypeError) as e:
        raise error(needed) from e
    return Churn(*limits)


def churned(walk: Walk, given: Churn | float | Sequence[float]) -> Walk:
    """Return the walk whose steps start at the levels to which noise leads.

        sigma_hat = (1 + gamma) sigma,    gamma = min(S_churn / N, sqrt(2) - 1) where S_tmin <= sigma <= S_tmax

    A schedule of discrete timesteps has no level above its highest, and sigma_hat is then that one, as the authors'
    ``round_sigma`` has it.
    """
    churn = check_churn("churn", given)
    if churn.churn == 0.0 or walk.between is None:
        return walk
    if walk.flow:
        raise InvalidArgument(f"churn={churn.churn:g} is for noise that is added to data, not for a FlowSchedule")
    gamma = min(churn.churn / len(walk), MOST)
    levels = []
    for level in walk.levels:
        if level.abar > 0.0 and churn.lowest <= level.sigma * walk.data_scale <= churn.highest:
            t, abar = walk.between(level.sigma * (1.0 + gamma))
            level = Level(t, abar, level.abar_next) if abar < level.abar else level
        levels.append(level)
    before, first = walk.levels[0].abar, levels[0].abar
    x, z = forward(before, first, churn.noise)
    times = [level.t for level in levels]
    return dataclasses.replace(
        walk,
        levels=tuple(levels),
        ends=(*(level.t for level in walk.levels[1:]), walk.last_time),
        init_scale=math.hypot(x * walk.init_scale / walk.scale(before), z) * walk.scale(first),
        ascending=any(b >= a for a, b in itertools.pairwise(times)),
        added=churn.noise,
    )
