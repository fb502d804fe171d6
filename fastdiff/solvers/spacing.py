"""Choice of the timesteps that a run visits: a falling subset of [0, T-1], of exactly the number asked for.

Spacings by sigma = sqrt((1 - abar) / abar), the noise-to-signal ratio, visit the fractional timesteps at which the
interpolated schedule has these sigmas.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.checks import Error, is_number, is_whole, items, one_of, shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import MAX_TIMESTEPS, NoiseSchedule

log = logging.getLogger("fastdiff")

SIGMA_SPACINGS = ("karras", "exponential")
SPACINGS = ("trailing", "leading", "linspace", "quadratic")
RHO = 7.0  # Karras et al. 2022, table 1


def check_spacing(name: str, value: Any, *, error: Error = InvalidArgument) -> str | list[Any]:
    """Return a spacing's name as it is, or its timesteps as a list; what they are is not checked."""
    if isinstance(value, str):
        return value
    need = f"allowed are {', '.join((*SPACINGS, *SIGMA_SPACINGS))}, or a list"
    if not isinstance(value, Iterable):
        raise error(f"{name}={shown(value)}: {need}")
    return items(name, value, MAX_TIMESTEPS, need="a name or a list of numbers", error=error)


def timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str | Sequence[float] = "trailing", steps_offset: int = 0
) -> list[float]:
    """Choose the timesteps of a run: ``steps`` of the schedule's T, falling.

    With i = 0 .. steps-1, the spacings are

        trailing    round(T - i T/steps) - 1                      starts at T-1 (Lin et al. 2023, table 2)
        leading     (steps-1-i) (T div steps) + steps_offset      the DDIM default of diffusers and improved-diffusion
        linspace    round((steps-1-i) (T-1)/(steps-1))            (Lin et al. 2023, table 2)
        quadratic   floor(((steps-1-i) sqrt(0.8 T)/(steps-1))^2)  (Song et al. 2021, appendix D.2); where a timestep
                    would repeat it is raised above the one after it
        karras      sigma = (sigma_T^(1/7) + i/(steps-1) (sigma_0^(1/7) - sigma_T^(1/7)))^7
                                                                  (Karras et al. 2022, arXiv:2206.00364, eq. 5)
        exponential sigma = sigma_T (sigma_0 / sigma_T)^(i/(steps-1)), equal steps of log-SNR

    with sigma_T, sigma_0 of timesteps T-1 and 0. A run of one step always visits T-1, the level of its input, which is
    pure noise. "leading" can start far below T-1 (501 of 1000 steps start at 500), which is logged as a warning.

    Args:
        schedule: The schedule, of T timesteps.
        steps: Number of timesteps, 1 to T; with a list None or its length.
        spacing: One of the names above, or a falling list of numbers in [0, T-1], which may be fractional.
        steps_offset: Added to every timestep of "leading" spacing.

    Returns:
        The timesteps; those of "karras" and "exponential" are fractional.

    Raises:
        InvalidArgument: If ``steps`` is out of range, the spacing is unknown, or a list rises, repeats a timestep or
            leaves the range.
    """
    T = _discrete(schedule).timesteps
    if isinstance(spacing, str):
        one_of("spacing", spacing, (*SPACINGS, *SIGMA_SPACINGS), but="a list of timesteps")
    if not (is_whole(steps_offset) and steps_offset == 0) and not (isinstance(spacing, str) and spacing == "leading"):
        raise InvalidArgument(f"steps_offset={shown(steps_offset)} goes with spacing='leading', not {shown(spacing)}")
    if not isinstance(spacing, str):
        return _listed(T, steps, spacing)
    n = whole("steps", steps, 1, T, of="the schedule's timesteps")
    stride, k = T // n, np.arange(n)
    if spacing == "leading":
        room = T - 1 - (n - 1) * stride
        if not is_whole(steps_offset) or not 0 <= steps_offset <= room:
            raise InvalidArgument(f"steps_offset={shown(steps_offset)}: 0 to {room} is possible with {n} steps")
    if n == 1:
        return [float(T - 1)]
    if spacing == "trailing":
        # This is diffusers' own expression, so that halves round as they do there. It can have one entry too many.
        t = np.round(np.arange(T, 0, -T / n))[:n] - 1
    elif spacing == "leading":
        t = k[::-1] * stride + steps_offset
        if t[0] < 0.8 * T:
            log.warning(
                "leading spacing with %d steps starts at t=%d of %d, not at pure noise; 'trailing' does", n, t[0], T
            )
    elif spacing == "linspace":
        t = np.round(np.linspace(0, T - 1, n))[::-1]
    elif spacing in SIGMA_SPACINGS:
        return sigma_timesteps(schedule, spaced_sigmas(spacing, n, *_sigma_range(schedule)))
    else:
        t = np.floor(np.linspace(0, math.sqrt(0.8 * T), n) ** 2)
        t = (np.maximum.accumulate(t - k) + k)[::-1]
    return [float(v) for v in t]


def spaced_sigmas(spacing: str, n: int, largest: float, smallest: float, rho: float = RHO) -> NDArray[np.float64]:
    """Return n falling sigmas from the largest to the smallest, by Karras' spacing with ``rho`` or "exponential"."""
    ramp = np.linspace(0.0, 1.0, n)
    if spacing == "exponential":
        return np.exp(math.log(largest) + ramp * (math.log(smallest) - math.log(largest)))
    start, end = largest ** (1 / rho), smallest ** (1 / rho)
    return (start + ramp * (end - start)) ** rho


def listed_sigmas(
    steps: int | None, spacing: Sequence[float], fits: Callable[[float], bool], otherwise: str
) -> list[float]:
    """Return a falling list of noise levels as floats, each of which ``fits``; an error says ``otherwise`` of one."""
    sigmas = list(check_spacing("spacing", spacing))
    if not sigmas or (steps is not None and not (is_whole(steps) and steps == len(sigmas))):
        raise InvalidArgument(f"steps={shown(steps)}, but spacing lists {len(sigmas)} sigmas (at least 1)")
    for sigma in sigmas:
        if not is_number(sigma) or not fits(sigma):
            raise InvalidArgument(f"spacing: sigma {shown(sigma)} {otherwise}")
    for a, b in itertools.pairwise(sigmas):
        if a <= b:
            raise InvalidArgument(f"spacing: sigmas must fall, got {a!r} before {b!r}")
    return [float(sigma) for sigma in sigmas]


def sigma_timesteps(schedule: NoiseSchedule, sigmas: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Compute the timesteps at which the schedule has these noise levels sigma = sqrt((1 - abar) / abar).

    This inverts `NoiseSchedule.abar`, and gives a spacing by sigma:

        ddim(schedule, spacing=sigma_timesteps(schedule, [80.0, 20.0, 3.0, 0.2]))

    Args:
        schedule: The schedule.
        sigmas: Noise levels between the schedule's lowest and highest.

    Returns:
        One timestep for each sigma, which may be fractional.

    Raises:
        InvalidArgument: If the schedule does not have a sigma.
    """
    largest, smallest = _sigma_range(schedule, finite=False)
    wanted = []
    for sigma in items("sigmas", sigmas, MAX_TIMESTEPS, need="a list of numbers"):
        # A power or an exponential can put an end of the range a rounding error outside it.
        if not is_number(sigma) or not smallest * (1 - 1e-9) <= sigma <= largest * (1 + 1e-9):
            raise InvalidArgument(f"sigma {shown(sigma)} is not a number from {smallest:g} to {largest:g}, as it has")
        wanted.append(-math.log1p(sigma * sigma))
    abar = schedule.alphas_cumprod
    known = abar[abar > 0.0]
    # log abar = -log(1 + sigma^2) is linear between integer timesteps.
    t = np.interp(wanted, np.log(known[::-1]), np.arange(len(known))[::-1])
    return [float(round(v)) if abs(v - round(v)) < 1e-9 else float(v) for v in t]  # integers without rounding error


def nearest_timestep(schedule: NoiseSchedule, sigma: float) -> float:
    """Return the timestep at which the schedule has ``sigma``, or the end of its range that is nearest."""
    largest, smallest = _sigma_range(schedule, finite=False)
    return sigma_timesteps(schedule, [min(max(sigma, smallest), largest)])[0]


def _discrete(schedule: Any) -> NoiseSchedule:
    """Return the schedule, which must be one of discrete timesteps."""
    if not isinstance(schedule, NoiseSchedule):
        raise InvalidArgument(f"schedule={shown(schedule)}: a NoiseSchedule is needed")
    return schedule


def _sigma_range(schedule: NoiseSchedule, finite: bool = True) -> tuple[float, float]:
    """Return the largest and the smallest sigma; if ``finite``, refuse a schedule whose largest is infinite."""
    first, last = (float(_discrete(schedule).alphas_cumprod[i]) for i in (0, -1))
    if last == 0.0:
        if finite:
            raise InvalidArgument(
                "a schedule of zero terminal SNR starts at infinite sigma; spacings of sigma "
                f"({', '.join(SIGMA_SPACINGS)}) need a finite one"
            )
        last = float(schedule.alphas_cumprod[-2])
    return math.sqrt((1.0 - last) / last), math.sqrt((1.0 - first) / first)


def _listed(T: int, steps: int | None, spacing: Sequence[float]) -> list[float]:
    """Return a list of timesteps as floats, after checking it."""
    t = list(check_spacing("spacing", spacing))
    if not t:
        raise InvalidArgument("spacing lists no timesteps; at least one is needed")
    if steps is not None and not (is_whole(steps) and steps == len(t)):
        raise InvalidArgument(f"steps={shown(steps)}, but spacing lists {len(t)} timesteps; steps can be left out")
    for v in t:
        if not is_number(v) or not 0 <= v <= T - 1:
            raise InvalidArgument(f"spacing: timestep {shown(v)} is not a number from 0 to {T - 1}")
    for a, b in itertools.pairwise(t):
        if a <= b:
            raise InvalidArgument(f"spacing: timesteps must fall, got {a!r} before {b!r}")
    return [float(v) for v in t]


def levels(schedule: NoiseSchedule, ts: Sequence[float], last: float) -> list[tuple[float, float]]:
    """Return (abar, abar_next) of every row: a row ends where the next one starts, the last one at ``last``."""
    abar = [schedule.abar(t) for t in ts]
    for i in range(1, len(ts)):
        if not abar[i - 1] < abar[i]:
            raise InvalidArgument(f"spacing: timesteps {ts[i - 1]!r} and {ts[i]!r} have the same noise level")
    return list(zip(abar, [*abar[1:], last], strict=True))
