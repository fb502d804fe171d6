"""The `Source` of a table of diffusers: a scheduler's configuration and the arguments of ``set_timesteps``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import checks
from fastdiff.checks import shown
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.consistency import lcm_timesteps
from fastdiff.solvers.keys import value_of

TIMESTEP_SPACINGS = ("trailing", "leading", "linspace")
EXPONENTIAL = {"HeunDiscreteScheduler": "exp"}  # schedulers that have this beta_schedule, whose betas are all equal


@dataclasses.dataclass(frozen=True)
class Source:
    """A scheduler's configuration, and the arguments of `from_config` besides."""

    name: str  # of the scheduler's class
    config: Mapping[str, Any]
    steps: int
    given: NoiseSchedule | None  # in place of the configuration's
    eta: float
    use_clipped: bool
    times: NDArray[np.float64] | None = None  # in place of those of the spacing
    sigmas: NDArray[np.float64] | None = None  # noise levels in place of those of the spacing, with the last step's end
    start: int = 0  # the row at which the run starts
    strength: float = 1.0
    mu: float | None = None  # of a flow's dynamic shift

    def get(self, key: str, default: Any) -> Any:
        """Return a key's value; None counts as absent."""
        return value_of(self.config, key, default)

    @property
    def lu(self) -> bool:
        """Whether the noise levels are those of use_lu_lambdas, which DPMSolverMultistepScheduler alone has."""
        return self.name == "DPMSolverMultistepScheduler" and bool(self.get("use_lu_lambdas", False))

    def refuse(self, key: str, why: str) -> ConfigError:
        """Return the error that refuses a key's value."""
        return ConfigError(f"{self.name}: {key}={shown(self.config.get(key))} is not supported: {why}")

    def only(self, **defaults: Any) -> None:
        """Check keys of which one value is supported, which for most is diffusers' default."""
        for key, default in defaults.items():
            if value_of(self.config, key, default) != default:
                raise self.refuse(key, f"only {default!r} is")

    def one_of(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """Return a key's value if it is one of ``allowed``."""
        value = self.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"supported are {', '.join(allowed)}")
        return value

    def fails(self, why: str) -> ConfigError:
        """Return the error for a number of steps with which diffusers itself fails."""
        return ConfigError(f"{self.name}: {why}; another number of steps than {self.steps} works")

    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule."""
        return noise_schedule({**self.config, "_class_name": self.name}) if self.given is None else self.given

    def prediction(self, allowed: Sequence[str] = PREDICTIONS) -> str:
        """Return what the network predicts."""
        return self.one_of("prediction_type", "epsilon", allowed)

    def bounds(self, clips: bool | None, thresholds: bool = True) -> dict[str, Any]:
        """Return c and threshold of the walk; ``clips`` is clip_sample's default, None where there is no such key."""
        if thresholds and self.get("thresholding", False):
            largest = float(self.get("sample_max_value", 1.0))
            if largest < 1.0:  # the quantile, at least 1, is then bounded by this number, so that it always is this one
                return {"c": 1.0, "x0_gain": 1.0 / largest}
            # A share of 0, the smallest element, is a share so small that it is rounded away.
            return {"c": 1.0, "threshold": (max(1e-30, float(self.get("dynamic_thresholding_ratio", 0.995))), largest)}
        if clips is not None and self.get("clip_sample", clips):
            return {"c": float(self.get("clip_sample_range", 1.0))}
        return {"c": math.inf}

    def timesteps(
        self, T: int, default: str, *, whole: bool = True, skip_last: bool = False, top: int | None = None
    ) -> NDArray[np.float64]:
        """Return the timesteps of ``set_timesteps``; ``default`` is the scheduler's default of timestep_spacing.

        ``whole``: "linspace" is rounded to integers. ``skip_last``: one timestep more is computed, and the last, 0,
        dropped. ``top``: number of timesteps that "linspace" and "trailing" spread over, by default all T.
        """
        n = checks.whole("steps", self.steps, 1, T, of="the schedule's timesteps")
        if self.times is not None:
            if self.times[0] > T - 1:
                raise InvalidArgument(f"timesteps[0]={self.times[0]:g}: the schedule's timesteps end at {T - 1}")
            return np.trunc(self.times) if whole else self.times
        top = T if top is None else top
        spacing = self.one_of("timestep_spacing", default, TIMESTEP_SPACINGS)
        m = n + 1 if skip_last else n
        if spacing == "linspace":
            t = np.linspace(0, top - 1, m)[::-1]
            t = t.round() if whole else t
        elif spacing == "leading":
            t = (np.arange(m) * (top // m))[::-1] + self.get("steps_offset", 0)
        else:
            t = np.arange(top, 0, -T / n).round() - 1
            if len(t) > n:
                raise self.fails(f"its 'trailing' timesteps for {n} steps end in a stray t = -1")
        t = t[:n].astype(np.float64)
        if t[0] > T - 1 or t[-1] < 0 or len(t) < n:
            raise self.fails(f"its timesteps {t[0]:g} .. {t[-1]:g} leave 0 .. {T - 1}")
        return t

    def distilled(self, T: int) -> NDArray[np.float64]:
        """Return the timesteps of LCMScheduler and TCDScheduler."""
        if self.times is not None:
            return self.timesteps(T, "leading")
        return np.array(lcm_timesteps(T, self.steps, self.get("original_inference_steps", 50), self.strength))


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule of a configuration whose scheduler is not in `WITHOUT_SCHEDULE`."""
    name = str(config.get("_class_name"))
    options = DEFAULTS.get(name, {})
    betas = {**options, **config}
    if "rescale_betas_zero_snr" not in options:
        betas.pop("rescale_betas_zero_snr", None)
    exponential = name in EXPONENTIAL and betas.get("beta_schedule") == EXPONENTIAL[name]
    if betas.get("trained_betas") is None and exponential:
        T = checks.whole("num_train_timesteps", value_of(betas, "num_train_timesteps", 1000), 1, error=ConfigError)
        # abar(u) = e^-12u, as betas_for_alpha_bar has it
        betas["trained_betas"] = [min(1.0 - math.exp(-12.0 / T), 0.999)] * T
    return NoiseSchedule.from_scheduler_config(betas)


def beta_quantiles(shares: NDArray[np.float64], a: float = 0.6) -> NDArray[np.float64]:
    """Return the quantiles of the distribution Beta(a, a), as in "Beta Sampling is All You Need" (arXiv:2407.12173).

    Up to 1/2 the share below x is x^a / B(a, a) sum_n (1 - a)_n x^n / (n! (a + n)), whose terms fall by a half, and the
    distribution is symmetric. Bisection finds y = x^a.
    """
    n = np.arange(60)
    terms = np.cumprod(np.concatenate([[1.0], (n[:-1] + 1.0 - a) / (n[:-1] + 1.0)])) / (a + n)
    scale = math.gamma(a) ** 2 / math.gamma(2.0 * a)
    wanted = np.minimum(shares, 1.0 - shares)
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5**a)
    for _ in range(60):
        y = 0.5 * (low + high)
        below = y * (terms * (y[:, None] ** (1.0 / a)) ** n).sum(axis=1) / scale < wanted
        low, high = np.where(below, y, low), np.where(below, high, y)
    x = np.where(wanted > 0.0, (0.5 * (low + high)) ** (1.0 / a), 0.0)
    return np.where(shares <= 0.5, x, 1.0 - x)
