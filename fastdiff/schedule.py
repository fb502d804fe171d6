"""Noise schedules and the forward process, in float64 (Ho et al. 2020, arXiv:2006.11239, section 2).

    q(x_t | x_0)          = N(sqrt(abar_t) x_0, (1 - abar_t) I)                   eq. 4
    q(x_{t-1} | x_t, x_0) = N(mu_t(x_t, x_0), betatilde_t I)                      eqs. 6, 7

with alpha_t = 1 - beta_t and abar_t = prod_{s <= t} alpha_s. Timesteps count from 0, as is usual in code: abar_0 is one
step away from the data, and the data itself (abar = 1) has no index.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.checks import boolean, is_number, items, shown, whole
from fastdiff.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("linear", "scaled_linear", "cosine", "sigmoid", "custom")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
MAX_TIMESTEPS = 1_000_000
# diffusers' beta_schedule, and the kind here
DIFFUSERS_KINDS = {
    "linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule beta_0 .. beta_{T-1}; immutable, hashable, compared by value.

    The kinds are

        "linear":         beta from ``beta_start`` to ``beta_end`` in equal steps (Ho et al. 2020).
        "scaled_linear":  sqrt(beta) from sqrt(beta_start) to sqrt(beta_end) in equal steps (latent diffusion).
        "cosine":         abar(u) = cos^2((u + 0.008) / 1.008 * pi/2), beta capped at 0.999 (Nichol & Dhariwal 2021).
        "sigmoid":        beta = beta_start + (beta_end - beta_start) * sigmoid(u), u from -6 to 6 (GeoDiff; diffusers).
        "custom":         ``betas`` as given.

    Attributes:
        kind: One of the kinds above.
        timesteps: T, 1 to 1,000,000; for "custom" it is the length of ``betas``.
        beta_start: First beta of "linear", "scaled_linear" and "sigmoid", in (0, 1).
        beta_end: Last beta of these, at least ``beta_start``.
        betas: The betas of "custom", each in (0, 1); None for the other kinds.
        rescale_zero_terminal_snr: Whether sqrt(abar) is shifted and scaled so that abar_{T-1} = 0 (Lin et al. 2023,
            arXiv:2305.08891, algorithm 1).

    Raises:
        ConfigError: If a value is out of range, or the schedule's abar does not fall strictly.
    """

    kind: str = "linear"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] | None = None
    rescale_zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ConfigError(f"schedule kind {shown(self.kind)} is unknown; allowed: {', '.join(KINDS)}")
        if (self.kind == "custom") != (self.betas is not None):
            given = "given" if self.betas is not None else "None"
            raise ConfigError(f"kind={self.kind!r} with betas={given}: betas go with kind='custom', and only with it")
        if self.betas is not None:
            listed = items("betas", self.betas, MAX_TIMESTEPS, need="a list of numbers", error=ConfigError)
            betas = tuple(_number(f"betas[{i}]", b) for i, b in enumerate(listed))
            for i, beta in enumerate(betas):
                if not 0.0 < beta < 1.0:
                    raise ConfigError(f"betas[{i}]={beta!r}: every beta must lie in (0, 1)")
            object.__setattr__(self, "betas", betas)
            object.__setattr__(self, "timesteps", len(betas))
        T = whole("timesteps", self.timesteps, 1, MAX_TIMESTEPS, error=ConfigError)
        object.__setattr__(self, "timesteps", T)
        start, end = _number("beta_start", self.beta_start), _number("beta_end", self.beta_end)
        if not 0.0 < start <= end < 1.0:
            raise ConfigError(f"beta_start={start!r}, beta_end={end!r}: 0 < beta_start <= beta_end < 1 is needed")
        object.__setattr__(self, "beta_start", start)
        object.__setattr__(self, "beta_end", end)
        rescale = boolean("rescale_zero_terminal_snr", self.rescale_zero_terminal_snr, error=ConfigError)
        object.__setattr__(self, "rescale_zero_terminal_snr", rescale)
        if self.rescale_zero_terminal_snr and T < 2:
            raise ConfigError("rescale_zero_terminal_snr=True needs at least 2 timesteps")
        self.alphas_cumprod  # noqa: B018  an impossible schedule is refused here, not at its first use

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles call the constructor, because a copied cache of alphas_cumprod would be writable.
        return type(self), tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | NDArray[np.float64]) -> NoiseSchedule:
        """Build a custom schedule from its abar, with beta_t = 1 - abar_t / abar_{t-1}.

        Args:
            alphas_cumprod: abar_0 .. abar_{T-1}, strictly falling, in (0, 1).

        Returns:
            The schedule.

        Raises:
            ConfigError: If abar does not fall strictly, or leaves (0, 1).
        """
        listed = items("alphas_cumprod", alphas_cumprod, MAX_TIMESTEPS, need="a list of numbers", error=ConfigError)
        abar = [_number(f"alphas_cumprod[{i}]", a) for i, a in enumerate(listed)]
        pairs = list(itertools.pairwise([1.0, *abar]))
        for i, (before, a) in enumerate(pairs):
            if not 0.0 < a < before:
                raise ConfigError(
                    f"alphas_cumprod[{i}]={a!r}: it must lie above 0 and below {before!r}, the one before"
                )
        return cls(kind="custom", betas=tuple(1.0 - a / before for before, a in pairs))

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the noise schedule of a diffusers ``scheduler_config.json``.

        Args:
            config: The configuration; an absent key has diffusers' default.

        Returns:
            The schedule.

        Raises:
            ConfigError: If a value is not supported; the message names its key.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"a scheduler configuration is an object with keys, not {type(config).__name__}")
        common = {
            "beta_start": config.get("beta_start", 1e-4),
            "beta_end": config.get("beta_end", 0.02),
            "rescale_zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        }
        if config.get("trained_betas") is not None:
            return cls(kind="custom", betas=config["trained_betas"], **common)
        name = config.get("beta_schedule", "linear")
        if not isinstance(name, str) or name not in DIFFUSERS_KINDS:
            raise ConfigError(f"beta_schedule={shown(name)} is not supported; allowed: {', '.join(DIFFUSERS_KINDS)}")
        return cls(kind=DIFFUSERS_KINDS[name], timesteps=config.get("num_train_timesteps", 1000), **common)

    def to_scheduler_config(self) -> dict[str, Any]:
        """Write the schedule as keys of a diffusers ``scheduler_config.json``; `from_scheduler_config` reads them.

        Returns:
            The keys and their values.
        """
        names = {kind: name for name, kind in DIFFUSERS_KINDS.items()}
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": names.get(self.kind, "linear"),
            "trained_betas": None if self.betas is None else list(self.betas),
            "rescale_betas_zero_snr": self.rescale_zero_terminal_snr,
        }

    @functools.cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """abar_t, float64 [T], read-only, strictly falling."""
        return _alphas_cumprod(self)

    @property
    def alphas(self) -> NDArray[np.float64]:
        """alpha_t = abar_t / abar_{t-1}, float64 [T]."""
        return self.alphas_cumprod / np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @property
    def variances(self) -> NDArray[np.float64]:
        """beta_t = 1 - alpha_t, float64 [T] (after any rescaling)."""
        return 1.0 - self.alphas

    @property
    def snr(self) -> NDArray[np.float64]:
        """Signal-to-noise ratio abar_t / (1 - abar_t), float64 [T] (Kingma et al. 2021)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def abar(self, t: float) -> float:
        """Return abar at a timestep; between integers log abar is interpolated.

        Args:
            t: Timestep in [0, T-1], or -1 for the data.

        Returns:
            abar_t; 1 for the data.

        Raises:
            InvalidArgument: If t is out of range.
        """
        if is_number(t) and t == -1:
            return 1.0
        if not is_number(t) or not 0 <= t <= self.timesteps - 1:
            raise InvalidArgument(f"timestep {shown(t)} is outside 0 .. {self.timesteps - 1}")
        low = math.floor(t)
        if low == t:
            return float(self.alphas_cumprod[low])
        w = t - low
        a, b = self.alphas_cumprod[low], self.alphas_cumprod[low + 1]
        return float(a ** (1 - w) * b**w)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw from the forward process q(x_t | x_0) (Ho et al. 2020, eq. 4):

            x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise

        The coefficients are computed in float64 and rounded to float32 (not for float64 data). In half precision abar_t
        would round to 1 for the first timesteps, and no noise would be added.

        Args:
            x0: Images [B, ...] of a floating-point dtype.
            noise: Noise ~ N(0, I) of x0's shape and dtype.
            t: int32 or int64 [B], 0 to T-1.

        Returns:
            x_t, of x0's shape and dtype.

        Raises:
            InvalidArgument: If shapes or dtypes differ, or a timestep is out of range.
        """
        import torch

        for name, value in (("x0", x0), ("noise", noise), ("t", t)):
            if not isinstance(value, torch.Tensor):
                raise InvalidArgument(f"{name} is a {type(value).__name__}; a tensor is needed")
        if not x0.is_floating_point() or x0.dtype != noise.dtype or x0.shape != noise.shape:
            raise InvalidArgument(
                f"x0 ({x0.dtype} {tuple(x0.shape)}) and noise ({noise.dtype} {tuple(noise.shape)}) must have "
                "one shape and one floating-point dtype"
            )
        if t.shape != x0.shape[:1]:
            raise InvalidArgument(f"t {tuple(t.shape)} must hold one timestep for each image of x0 {tuple(x0.shape)}")
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        a, s = self.signal_and_noise(t.to(x0.device), x0.ndim, dtype)
        return (a * x0 + s * noise).to(x0.dtype)

    def signal_and_noise(self, t: Tensor, ndim: int, dtype: Any) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t) for a batch of timesteps.

        Args:
            t: int32 or int64 [B]. Its range is checked on the CPU only, where that needs no synchronisation.
            ndim: Number of dimensions of the result.
            dtype: dtype of the result.

        Returns:
            Two tensors [B, 1, ...] on t's device.

        Raises:
            InvalidArgument: If t is of another shape or dtype, or out of range.
        """
        import torch

        if t.dtype not in (torch.int32, torch.int64) or t.ndim != 1:
            raise InvalidArgument(f"t must be an int64 or int32 tensor [B], got {t.dtype} {tuple(t.shape)}")
        if t.device.type == "cpu":
            bad = t[(t < 0) | (t >= self.timesteps)]
            if len(bad):
                raise InvalidArgument(f"timestep {int(bad[0])} is outside 0 .. {self.timesteps - 1}")
        table = np.stack([np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)])
        table_t = torch.from_numpy(table).to(device=t.device, dtype=dtype)
        a, s = table_t[:, t].reshape(2, -1, *[1] * (ndim - 1))
        return a, s

    def posterior(self, t: int, t_prev: int) -> tuple[float, float, float]:
        """Return the coefficients of the posterior q(x_{t_prev} | x_t, x_0) = N(c0 x_0 + ct x_t, var I).

        With alpha = abar_t / abar_prev and beta = 1 - alpha (Ho et al. 2020, eq. 7, for any t_prev < t)

            c0  = sqrt(abar_prev) beta / (1 - abar_t)
            ct  = sqrt(alpha) (1 - abar_prev) / (1 - abar_t)
            var = beta (1 - abar_prev) / (1 - abar_t)

        Args:
            t: Timestep of x_t, 0 to T-1.
            t_prev: An earlier timestep; -1 is the data.

        Returns:
            (c0, ct, var).

        Raises:
            InvalidArgument: If not -1 <= t_prev < t.
        """
        if not (is_number(t) and is_number(t_prev) and -1 <= t_prev < t):
            raise InvalidArgument(f"t_prev={shown(t_prev)} must be less than t={shown(t)}, and at least -1")
        return posterior(self.abar(t), self.abar(t_prev))


def posterior(abar: float, abar_prev: float) -> tuple[float, float, float]:
    """Return (c0, ct, var) of the posterior between two noise levels; `NoiseSchedule.posterior` has the formulas."""
    alpha = abar / abar_prev
    beta = 1.0 - alpha
    c0 = math.sqrt(abar_prev) * beta / (1.0 - abar)
    ct = math.sqrt(alpha) * (1.0 - abar_prev) / (1.0 - abar)
    var = beta * (1.0 - abar_prev) / (1.0 - abar)
    return c0, ct, var


def _number(key: str, value: Any) -> float:
    """Return a real number as a float; infinite ones and NaN are refused by the bounds that the caller checks."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(f"{key}={shown(value)}: a number is needed")
    try:
        return float(value)
    except OverflowError as e:  # an integer beyond the range of float
        raise ConfigError(f"{key}={shown(value)}: it is too large") from e


def _betas(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """Compute beta_0 .. beta_{T-1} by the formulas in `NoiseSchedule`, before any rescaling."""
    T, start, end = schedule.timesteps, schedule.beta_start, schedule.beta_end
    if schedule.betas is not None:
        return np.asarray(schedule.betas, dtype=np.float64)
    if schedule.kind == "linear":
        return np.linspace(start, end, T)
    if schedule.kind == "scaled_linear":
        return np.square(np.linspace(math.sqrt(start), math.sqrt(end), T))
    if schedule.kind == "sigmoid":
        return start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, T)))
    u = np.arange(T + 1) / T
    abar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - abar[1:] / abar[:-1], 0.999)


def _alphas_cumprod(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """Compute abar_0 .. abar_{T-1}, read-only; refuse a schedule whose abar does not fall strictly."""
    abar = np.cumprod(1.0 - _betas(schedule), dtype=np.float64)
    last = abar[-1]
    if schedule.rescale_zero_terminal_snr and last < abar[0]:
        # Lin et al. 2023, algorithm 1: sqrt(abar) is shifted to end at 0 and scaled to keep its first entry.
        root = np.sqrt(abar)
        abar = np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))
    # A beta below rounding leaves abar unchanged, and many large ones drive it to 0.
    if not (abar[0] < 1.0 and np.all(np.diff(abar) < 0.0) and last > 0.0):
        raise ConfigError(
            f"{schedule.kind} schedule of {schedule.timesteps} timesteps: alphas_cumprod must fall strictly from below "
            f"1 to above 0, but goes from {abar[0]} to {last}; the betas are too {'small' if last > 0.5 else 'large'}"
        )
    abar.setflags(write=False)
    return abar
