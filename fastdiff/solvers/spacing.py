"""Which timesteps a run visits: subsets of 0 .. T-1, falling, exactly as many as asked for."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.table import is_number

log = logging.getLogger("fastdiff")

SPACINGS = ("trailing", "leading", "linspace", "quadratic")


def timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str | Sequence[float] = "trailing", steps_offset: int = 0
) -> list[float]:
    """The timesteps of ``steps`` rows, falling. With T = schedule.timesteps and i = 0 .. steps-1:

        trailing    round(T - i T/steps) - 1                      starts at T-1 (Lin et al. 2023, table 2)
        leading     (steps-1-i) (T div steps) + steps_offset      the DDIM default of diffusers and improved-diffusion
        linspace    round((steps-1-i) (T-1)/(steps-1))            (Lin et al. 2023, table 2)
        quadratic   floor(((steps-1-i) sqrt(0.8 T)/(steps-1))^2)  (Song et al. 2021, appendix D.2), raised where it
                    would repeat, to be above the timestep after it

    or ``spacing`` is the list itself: falling numbers in [0, T-1], which may be fractional (``steps`` None or its
    length). One step always visits T-1: a network shown pure noise must be told so. "leading" can start far below T-1
    (501 of 1000 steps start at 500), which is logged as a warning.

    Raises `InvalidArgument` for steps outside 1 .. T and for lists that rise, repeat or leave the range.
    """
    T = schedule.timesteps
    if isinstance(spacing, str) and spacing not in SPACINGS:
        raise InvalidArgument(f"spacing={spacing!r} is unknown; allowed: {', '.join(SPACINGS)}, or a list of timesteps")
    if steps_offset != 0 and not (isinstance(spacing, str) and spacing == "leading"):
        raise InvalidArgument(f"steps_offset={steps_offset!r} goes with spacing='leading', not {spacing!r}")
    if not isinstance(spacing, str):
        return _listed(T, steps, spacing)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise InvalidArgument(f"steps={steps!r}: a whole number from 1 to {T}, the schedule's timesteps, is needed")
    n = int(steps)
    stride, k = T // n, np.arange(n)
    if spacing == "leading":
        room = T - 1 - (n - 1) * stride
        whole = isinstance(steps_offset, (int, np.integer)) and not isinstance(steps_offset, bool)
        if not whole or not 0 <= steps_offset <= room:
            raise InvalidArgument(f"steps_offset={steps_offset!r}: 0 to {room} is possible with {n} steps")
    if n == 1:
        return [float(T - 1)]
    if spacing == "trailing":
        # diffusers' own expression, so that halves round as they do there; it can have one entry too many.
        t = np.round(np.arange(T, 0, -T / n))[:n] - 1
    elif spacing == "leading":
        t = k[::-1] * stride + steps_offset
        if t[0] < 0.8 * T:
            log.warning(
                "leading spacing with %d steps starts at t=%d of %d, not at pure noise; 'trailing' does", n, t[0], T
            )
    elif spacing == "linspace":
        t = np.round(np.linspace(0, T - 1, n))[::-1]
    else:
        t = np.floor(np.linspace(0, math.sqrt(0.8 * T), n) ** 2)
        t = (np.maximum.accumulate(t - k) + k)[::-1]
    return [float(v) for v in t]


def _listed(T: int, steps: int | None, spacing: Sequence[float]) -> list[float]:
    try:
        t = list(spacing.tolist() if hasattr(spacing, "tolist") else spacing)
    except TypeError as e:
        raise InvalidArgument(f"spacing={spacing!r}: allowed are {', '.join(SPACINGS)}, or a list of timesteps") from e
    if not t:
        raise InvalidArgument("spacing lists no timesteps; at least one is needed")
    if steps is not None and (isinstance(steps, bool) or steps != len(t)):
        raise InvalidArgument(f"steps={steps!r}, but spacing lists {len(t)} timesteps; steps can be left out")
    for v in t:
        if not is_number(v) or not 0 <= v <= T - 1:
            raise InvalidArgument(f"spacing: timestep {v!r} is not a number from 0 to {T - 1}")
    for a, b in itertools.pairwise(t):
        if a <= b:
            raise InvalidArgument(f"spacing: timesteps must fall, got {a!r} before {b!r}")
    return [float(v) for v in t]


def levels(schedule: NoiseSchedule, ts: Sequence[float], last: float) -> list[tuple[float, float]]:
    """(abar, abar_next) of every row: each row ends where the next one starts, the final one at ``last``."""
    abar = [schedule.abar(t) for t in ts]
    for i in range(1, len(ts)):
        if not abar[i - 1] < abar[i]:
            raise InvalidArgument(f"spacing: timesteps {ts[i - 1]!r} and {ts[i]!r} have the same noise level")
    return list(zip(abar, [*abar[1:], last], strict=True))
