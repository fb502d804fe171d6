"""Continuous noise levels sigma, without discrete timesteps, as in EDM (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fastdiff.checks import number, shown, whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.solvers.spacing import RHO, SIGMA_SPACINGS, listed_sigmas, spaced_sigmas

STEPS = 18  # steps of a run that gives no number
MAX_STEPS = 1_000_000
# Limits far beyond any real network's, within which the arithmetic of float64 is exact enough.
LARGEST, LARGEST_RHO = 1e9, 1000.0


@dataclasses.dataclass(frozen=True)
class EDMSchedule:
    """Noise levels sigma_max .. sigma_min of x = x_0 + sigma eps, for networks with EDM's preconditioning.

    All solvers take an `EDMSchedule` in place of a `NoiseSchedule`. The network's timestep is c_noise = ln(sigma) / 4
    times ``time_scale``. A table's state is variance-preserving: x / sqrt(sigma_data^2 + sigma^2) = c_in x, so that

        state = sqrt(abar) x_0 / sigma_data + sqrt(1 - abar) eps,     abar = sigma_data^2 / (sigma_data^2 + sigma^2)

    Attributes:
        sigma_min: Lowest noise level, above 0.
        sigma_max: Highest noise level, above ``sigma_min``.
        sigma_data: Standard deviation of the data.
        rho: Exponent of Karras' spacing.
        time_scale: Factor of the network's timestep; 1000 for diffusers' consistency models.

    Raises:
        ConfigError: If a value is no positive number, or sigma_min is not below sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = RHO
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = number(f.name, getattr(self, f.name), above=0, need="a positive number", error=ConfigError)
            low, high = (0.1, LARGEST_RHO) if f.name == "rho" else (1.0 / LARGEST, LARGEST)
            object.__setattr__(self, f.name, number(f.name, value, low, high, error=ConfigError))
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"sigma_min={self.sigma_min!r} must be less than sigma_max={self.sigma_max!r}")

    def time(self, sigma: float) -> float:
        """Compute the network's timestep at a noise level: time_scale ln(sigma) / 4.

        Args:
            sigma: The noise level, above 0.

        Returns:
            The timestep, which may be negative.
        """
        sigma = number("sigma", sigma, above=0, need="a positive number")
        return self.time_scale * 0.25 * math.log(sigma)

    def sigma(self, time: float) -> float:
        """Compute the noise level at a timestep of the network, the inverse of `time`.

        Args:
            time: The network's timestep.

        Returns:
            sigma.
        """
        exponent = 4.0 * number("time", time) / self.time_scale
        if abs(exponent) > 700.0:  # e^710 overflows
            raise InvalidArgument(f"time={shown(time)}: a timestep whose sigma is neither 0 nor infinite is needed")
        return math.exp(exponent)

    def abar(self, time: float) -> float:
        """Compute abar = sigma_data^2 / (sigma_data^2 + sigma^2) at a timestep of the network.

        Args:
            time: The network's timestep.

        Returns:
            abar, between 0 and 1.
        """
        ratio = self.sigma(time) / self.sigma_data
        return 1.0 / (1.0 + ratio * ratio)  # not ratio ** 2, which raises where this is infinite

    def times(self, steps: int | None, spacing: str | Sequence[float]) -> list[float]:
        """Return the network's timesteps of a run.

        Args:
            steps: Number of levels from sigma_max to sigma_min; None is 18, or the length of a list.
            spacing: "karras" (eq. 5), "exponential", or a falling list of sigmas.

        Returns:
            One timestep for each level, falling.

        Raises:
            InvalidArgument: If ``steps`` is out of range, or the spacing is unknown or does not fall.
        """
        if isinstance(spacing, str):
            if spacing not in SIGMA_SPACINGS:
                raise InvalidArgument(
                    f"spacing={shown(spacing)}: an EDMSchedule has {', '.join(SIGMA_SPACINGS)}, or a list of sigmas"
                )
            n = whole("steps", STEPS if steps is None else steps, 1, MAX_STEPS)
            return [self.time(s) for s in spaced_sigmas(spacing, n, self.sigma_max, self.sigma_min, self.rho).tolist()]
        sigmas = listed_sigmas(steps, spacing, lambda sigma: sigma > 0.0, "is not a positive number")
        return [self.time(sigma) for sigma in sigmas]
