"""Which timesteps a run visits: subsets of 0 .. T-1, falling, exactly as many as asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule

log = logging.getLogger("fastdiff")

SPACINGS = ("trailing", "leading", "linspace", "quadratic")


def timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str | Sequence[float] = "trailing", steps_offset: int = 0
) -> list[float]:
    """The timesteps of ``steps`` rows, falling. With T = schedule.timesteps and i = 0 .. steps-1 (rising t):

        trailing    round(T - (steps-1-i) T/steps) - 1         always starts a run at T-1 (Lin et al. 2023, table 2)
        leading     i (T div steps) + steps_offset              diffusers' and improved-diffusion's DDIM default
        linspace    round(i (T-1)/(steps-1))
        quadratic   floor((i sqrt(0.8 T)/(steps-1))^2), then each raised to be above the one before (Song et al. 2021, appendix D.2)

    or ``spacing`` is the list itself: falling numbers in [0, T-1], which may be fractional (``steps`` None or its length).
    One step always visits T-1: a network shown pure noise must be told so. "leading" can start far below T-1 (501 of
    1000 steps start at 500), which is logged as a warning.

    Raises `InvalidArgument` for steps outside 1 .. T and for lists that rise, repeat or leave the range.
    """
    T = schedule.timesteps
    if not isinstance(spacing, str):
        return _explicit(T, steps, spacing)
    if spacing not in SPACINGS:
        raise InvalidArgument(f"spacing={spacing!r} is unknown; allowed: {', '.join(SPACINGS)}, or a list of timesteps")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise InvalidArgument(f"steps={steps!r}: a whole number from 1 to {T}, the schedule's timesteps, is needed")
    if steps_offset and spacing != "leading":
        raise InvalidArgument(f"steps_offset={steps_offset!r} goes with spacing='leading', not {spacing!r}")
    n = int(steps)
    if n == 1:
        return [float(T - 1)]
    i = np.arange(n)
    if spacing == "trailing":
        t = np.round(T + np.arange(n) * (-T / n))[::-1] - 1
    elif spacing == "leading":
        t = i * (T // n) + steps_offset
        if not 0 <= steps_offset <= T - 1 - t[-1] + steps_offset:
            raise InvalidArgument(f"steps_offset={steps_offset!r}: 0 to {T - 1 - (n - 1) * (T // n)} is possible with {n} steps")
        if t[-1] < 0.8 * T:
            log.warning("leading spacing with %d steps starts at t=%d of %d, not at pure noise; 'trailing' does", n, t[-1], T)
    elif spacing == "linspace":
        t = np.round(np.linspace(0, T - 1, n))
    else:
        t = np.floor(np.linspace(0, math.sqrt(0.8 * T), n) ** 2)
        t = np.maximum.accumulate(t - i) + i
    return [float(v) for v in t[::-1]]


def _explicit(T: int, steps: int | None, spacing: Sequence[float]) -> list[float]:
    try:
        t = [float(v) for v in spacing]
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"spacing={spacing!r}: a list of timesteps holds numbers only") from e
    if not t or (steps is not None and steps != len(t)):
        raise InvalidArgument(f"spacing lists {len(t)} timesteps but steps={steps!r}; leave steps out or make them agree")
    bad = [v for v in t if not 0 <= v <= T - 1]
    if bad:
        raise InvalidArgument(f"spacing: timestep {bad[0]!r} is outside 0 .. {T - 1}")
    for a, b in zip(t, t[1:], strict=False):
        if a <= b:
            raise InvalidArgument(f"spacing: timesteps must fall, got {a!r} before {b!r}")
    return t
