"""Noise levels of the variance-exploding process (Song & Ermon 2019; Song et al. 2021, arXiv:2011.13456, section 3.4).

The process adds noise to the data and scales nothing:

    x = x_0 + sigma eps,    sigma_min <= sigma <= sigma_max

With abar = 1 / (1 + sigma^2) it is a variance-preserving state a x_0 + s eps, a = sqrt(abar) and s = sqrt(1 - abar),
divided by a. So every solver that is written for variance-preserving states runs such a network: `Walk.table` rewrites
its rows, as it does for flows. The network reads x itself, and predicts the score, -eps / sigma.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastdiff.checks import number, shown, whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import MAX_TIMESTEPS
from fastdiff.solvers.spacing import SIGMA_SPACINGS, listed_sigmas, spaced_sigmas

PREDICTIONS = ("score", "epsilon", "sample")  # what a network of this process can predict
# Limits within which the states and the squares of the levels are exact enough in float32.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class VESchedule:
    """Noise levels of a variance-exploding network, x = x_0 + sigma eps, which usually predicts the score -eps / sigma.

    Solvers take a `VESchedule` in place of a `NoiseSchedule`. A table's states are x itself, which the network reads,
    and the network's timestep is sigma.

    Attributes:
        sigma_min: Lowest noise level, above 0, for images in [-1, 1].
        sigma_max: Highest noise level, above ``sigma_min``: about the largest distance of two images.
        timesteps: Number of levels of the training, and the most steps of a run.

    Raises:
        ConfigError: If a value is out of range.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    timesteps: int = 1000

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max"):
            value = number(name, getattr(self, name), above=0, need="a positive number", error=ConfigError)
            object.__setattr__(self, name, number(name, value, SMALLEST, LARGEST, error=ConfigError))
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"sigma_min={self.sigma_min!r} must be less than sigma_max={self.sigma_max!r}")
        object.__setattr__(self, "timesteps", whole("timesteps", self.timesteps, 1, MAX_TIMESTEPS, error=ConfigError))

    def time(self, sigma: float) -> float:
        """Compute the network's timestep at a noise level, which is the level itself.

        Args:
            sigma: The noise level, above 0.

        Returns:
            The timestep.
        """
        return number("sigma", sigma, above=0, need="a positive number")

    def sigma(self, time: float) -> float:
        """Compute the noise level at a timestep of the network, the inverse of `time`.

        Args:
            time: The network's timestep, above 0.

        Returns:
            sigma.
        """
        return number("time", time, above=0, need="a positive number")

    def abar(self, time: float) -> float:
        """Compute abar = 1 / (1 + sigma^2) at a timestep of the network.

        Args:
            time: The network's timestep, above 0.

        Returns:
            abar, between 0 and 1.
        """
        sigma = self.sigma(time)
        return 1.0 / (1.0 + sigma * sigma)

    def times(self, steps: int | None, spacing: str | Sequence[float] = "exponential") -> list[float]:
        """Return the network's timesteps of a run.

        Args:
            steps: Number of levels from sigma_max to sigma_min; None is 50, or the length of a list.
            spacing: "exponential", equal steps of log sigma, as in the training; "karras"; or a falling list of sigmas.

        Returns:
            One timestep for each level, falling.

        Raises:
            InvalidArgument: If ``steps`` is out of range, or the spacing is unknown or does not fall.
        """
        if isinstance(spacing, str):
            if spacing not in SIGMA_SPACINGS:
                raise InvalidArgument(
                    f"spacing={shown(spacing)}: a VESchedule has {', '.join(SIGMA_SPACINGS)}, or a list of sigmas"
                )
            n = min(50, self.timesteps) if steps is None else steps
            n = whole("steps", n, 1, self.timesteps, of="timesteps")
            return [float(s) for s in spaced_sigmas(spacing, n, self.sigma_max, self.sigma_min)]
        what = f"of a VESchedule is not in {SMALLEST:g} to {LARGEST:g}"
        return listed_sigmas(steps, spacing, lambda sigma: SMALLEST <= sigma <= LARGEST, what)
