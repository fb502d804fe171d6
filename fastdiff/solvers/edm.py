"""The continuous noise levels of EDM (Karras et al. 2022, arXiv:2206.00364): sigma itself, no discrete timesteps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.solvers.spacing import RHO, SIGMA_SPACINGS, spaced_sigmas
from fastdiff.solvers.table import is_number

STEPS = 18  # steps of a run that gives no number


@dataclasses.dataclass(frozen=True)
class EDMSchedule:
    """Noise levels sigma_max .. sigma_min of x = x_0 + sigma eps, for networks in EDM's preconditioning.

    The network is told c_noise = ln(sigma) / 4, times ``time_scale`` (diffusers' consistency models: 1000). Its
    variance-preserving state is x / sqrt(sigma_data^2 + sigma^2) = c_in x, so with y_0 = x_0 / sigma_data

        state = sqrt(abar) y_0 + sqrt(1 - abar) eps,     abar = sigma_data^2 / (sigma_data^2 + sigma^2)

    All solvers take it in place of a `NoiseSchedule`. Raises `ConfigError` naming the value and what is allowed.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = RHO
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not is_number(value) or not 0.0 < value < math.inf:
                raise ConfigError(f"{f.name}={value!r}: a positive number is needed")
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"sigma_min={self.sigma_min!r} must be less than sigma_max={self.sigma_max!r}")

    def time(self, sigma: float) -> float:
        """What the network is told of a sigma."""
        return self.time_scale * 0.25 * math.log(sigma)

    def sigma(self, time: float) -> float:
        """The sigma that the network is told as ``time``: the inverse of `time`."""
        return math.exp(4.0 * time / self.time_scale)

    def abar(self, time: float) -> float:
        """abar of the level that the network is told as ``time``."""
        return 1.0 / (1.0 + (self.sigma(time) / self.sigma_data) ** 2)

    def times(self, steps: int | None, spacing: str | Sequence[float]) -> list[float]:
        """The times of ``steps`` (18 where None) levels from sigma_max to sigma_min (eq. 5), or of a list of sigmas."""
        if isinstance(spacing, str):
            if spacing not in SIGMA_SPACINGS:
                raise InvalidArgument(
                    f"spacing={spacing!r}: an EDMSchedule has {', '.join(SIGMA_SPACINGS)}, or a list of sigmas"
                )
            n = STEPS if steps is None else steps
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 1_000_000:
                raise InvalidArgument(f"steps={steps!r}: a whole number from 1 to 1000000 is needed")
            return [self.time(s) for s in spaced_sigmas(spacing, n, self.sigma_max, self.sigma_min, self.rho).tolist()]
        sigmas = list(spacing)
        if not sigmas or (steps is not None and steps != len(sigmas)):
            raise InvalidArgument(f"steps={steps!r}, but spacing lists {len(sigmas)} sigmas; at least one is needed")
        for sigma in sigmas:
            if not is_number(sigma) or not 0.0 < sigma < math.inf:
                raise InvalidArgument(f"spacing: sigma {sigma!r} is not a positive number")
        for a, b in itertools.pairwise(sigmas):
            if a <= b:
                raise InvalidArgument(f"spacing: sigmas must fall, got {a!r} before {b!r}")
        return [self.time(float(sigma)) for sigma in sigmas]
