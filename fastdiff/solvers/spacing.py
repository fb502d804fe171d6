"""Which timesteps a run visits: subsets of 0 .. T-1, falling, exactly as many as asked for."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Sequence

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule

log = logging.getLogger("fastdiff")

SPACINGS = ("trailing", "leading", "linspace", "quadratic")


def timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str | Sequence[float] = "trailing", steps_offset: int = 0
) -> list[float]:
    """The timesteps of ``steps`` rows, falling. With T = schedule.timesteps and i = 0 .. steps-1:

        trailing    round(T - i T/steps) - 1                     starts at T-1 (Lin et al. 2023, table 2)
        leading     (steps-1-i) (T div steps) + steps_offset     the DDIM default of diffusers and improved-diffusion
        linspace    round((steps-1-i) (T-1)/(steps-1))
        quadratic   floor(((steps-1-i) sqrt(0.8 T)/(steps-1))^2) (Song et al. 2021, appendix D.2), each raised to be
                    above the one after it

    or ``spacing`` is the list itself: falling numbers in [0, T-1], which may be fractional (``steps`` None or its
    length). One step always visits T-1: a network shown pure noise must be told so. "leading" can start far below T-1
    (501 of 1000 steps start at 500), which is logged as a warning.

    Raises `InvalidArgument` for steps outside 1 .. T and for lists that rise, repeat or leave the range.
    """
    T = schedule.timesteps
    if not isinstance(spacing, str):
        t = _listed(T, steps, spacing)
    elif spacing not in SPACINGS:
        raise InvalidArgument(f"spacing={spacing!r} is unknown; allowed: {', '.join(SPACINGS)}, or a list of timesteps")
    elif not _whole(steps) or not 1 <= steps <= T:  # type: ignore[operator]  # a whole number is no None
        raise InvalidArgument(f"steps={steps!r}: a whole number from 1 to {T}, the schedule's timesteps, is needed")
    else:
        t = _spaced(T, int(steps), spacing)  # type: ignore[arg-type]
    room = T - 1 - int(t[0]) if spacing == "leading" else 0
    return t
