"""Noise levels of flow matching, or rectified flow (Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023).

The process leads from noise to data on straight lines, and is not variance-preserving:

    x = (1 - sigma) x_0 + sigma eps,    0 <= sigma <= 1,    dx/dsigma = v = eps - x_0

With abar = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2) it is a variance-preserving state a x_0 + s eps, a = sqrt(abar)
and s = sqrt(1 - abar), times `state_scale` = 1 / (a + s). So every solver that is written for variance-preserving
states runs a flow network: `Walk.table` rewrites its rows for states of the flow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdiff.checks import number, shown, whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import MAX_TIMESTEPS
from fastdiff.solvers.spacing import SIGMA_SPACINGS, listed_sigmas, spaced_sigmas

STEPS = 28  # steps of a run that gives no number
SPACINGS = ("trailing", "linspace", *SIGMA_SPACINGS)
PREDICTIONS = ("flow_prediction", "epsilon", "sample")  # what a network of a flow can predict


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of a flow-matching network, x = (1 - sigma) x_0 + sigma eps, which usually predicts eps - x_0.

    Solvers take a `FlowSchedule` in place of a `NoiseSchedule`. A table's states are x itself, which the network reads,
    and the network's timestep is sigma times ``timesteps``.

    Attributes:
        shift: Moves the levels of a spacing towards noise, sigma -> shift sigma / (1 + (shift - 1) sigma), as large
            images need (Esser et al. 2024, arXiv:2403.03206, eq. 23). 1 leaves them.
        timesteps: The network's timestep at sigma = 1.

    Raises:
        ConfigError: If a value is out of range.
    """

    shift: float = 1.0
    timesteps: int = 1000

    def __post_init__(self) -> None:
        shift = number("shift", self.shift, above=0, need="a positive number", error=ConfigError)
        object.__setattr__(self, "shift", number("shift", shift, 1e-6, 1e6, error=ConfigError))
        object.__setattr__(self, "timesteps", whole("timesteps", self.timesteps, 1, MAX_TIMESTEPS, error=ConfigError))

    def time(self, sigma: float) -> float:
        """Compute the network's timestep at a noise level: sigma times ``timesteps``.

        Args:
            sigma: The noise level, 0 to 1.

        Returns:
            The timestep.
        """
        return number("sigma", sigma, 0, 1) * self.timesteps

    def sigma(self, time: float) -> float:
        """Compute the noise level at a timestep of the network, the inverse of `time`.

        Args:
            time: The network's timestep, 0 to ``timesteps``.

        Returns:
            sigma.
        """
        return number("time", time, 0, self.timesteps) / self.timesteps

    def abar(self, time: float) -> float:
        """Compute abar = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2) at a timestep of the network.

        Args:
            time: The network's timestep, 0 to ``timesteps``.

        Returns:
            abar, from 0 to 1.
        """
        return abar_of(self.sigma(time))

    def times(self, steps: int | None, spacing: str | Sequence[float] = "trailing") -> list[float]:
        """Return the network's timesteps of a run, from pure noise.

        Args:
            steps: Number of levels; None is 28, or the length of a list.
            spacing: "trailing", sigma = 1 - i / steps, i = 0 .. steps - 1; "linspace", equal steps from 1 to
                1 / timesteps; "karras" or "exponential", between the same ends; or a falling list of sigmas. ``shift``
                applies to all but a list.

        Returns:
            One timestep for each level, falling.

        Raises:
            InvalidArgument: If ``steps`` is out of range, or the spacing is unknown or does not fall.
        """
        if not isinstance(spacing, str):
            what = "of a FlowSchedule lies above 0, at most at 1"
            return [self.time(s) for s in listed_sigmas(steps, spacing, lambda sigma: 0.0 < sigma <= 1.0, what)]
        if spacing not in SPACINGS:
            raise InvalidArgument(
                f"spacing={shown(spacing)}: a FlowSchedule has {', '.join(SPACINGS)}, or a list of sigmas"
            )
        n = whole("steps", min(STEPS, self.timesteps) if steps is None else steps, 1, self.timesteps, of="timesteps")
        lowest = 1.0 / self.timesteps
        if spacing in SIGMA_SPACINGS:
            sigmas = spaced_sigmas(spacing, n, 1.0, float(shifted(np.array([lowest]), self.shift)[0]))
        else:
            plain = 1.0 - np.arange(n) / n if spacing == "trailing" else np.linspace(1.0, lowest, n)
            sigmas = shifted(plain, self.shift)
        return [self.time(min(float(s), 1.0)) for s in sigmas]  # a power can end a rounding error above 1


def shifted(sigmas: Any, shift: float) -> Any:
    """Return noise levels of a flow, an array or a tensor, after a shift; see `FlowSchedule`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def abar_of(sigma: float) -> float:
    """Return abar of the variance-preserving state that is a flow's state at a noise level, up to its scale."""
    return (1.0 - sigma) ** 2 / ((1.0 - sigma) ** 2 + sigma**2)


def state_scale(abar: float) -> float:
    """Return the factor from a variance-preserving state to a flow's state of the same signal-to-noise ratio."""
    return 1.0 / (math.sqrt(abar) + math.sqrt(1.0 - abar))
