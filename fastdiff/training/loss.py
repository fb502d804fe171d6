"""The objectives of training: DDPM's (Ho et al. 2020, eq. 14) with min-SNR weighting, and that of flow matching."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.flow import FlowSchedule, shifted

FLOW_SIGMAS = ("logit_normal", "uniform")


def target(prediction: str, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Return what the network should predict from x_t = a x_0 + s noise, a = sqrt(abar_t), s = sqrt(1 - abar_t).

    epsilon: noise        sample: x_0        v_prediction: a noise - s x_0        (Salimans & Ho 2022, arXiv:2202.00512)
    flow_prediction: noise - x_0, where a = 1 - s                                 (Liu et al. 2023, arXiv:2209.03003)
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "flow_prediction":
        return noise - x0
    return a * noise - s * x0


def loss_weights(schedule: NoiseSchedule, prediction: str, min_snr_gamma: float | None) -> Tensor:
    """Compute the weight w_t of the squared error at every timestep t, float32 [T]: min-SNR weighting.

        epsilon: min(SNR, gamma) / SNR      sample: min(SNR, gamma)      v_prediction: min(SNR, gamma) / (SNR + 1)

    (Hang et al. 2023, arXiv:2303.09556, section 3.4). Without gamma, w_t = 1: the simple loss of Ho et al. for the
    prediction at hand. At SNR = 0 (schedules of zero terminal SNR) the weight for epsilon is 1, its limit.
    """
    snr = torch.from_numpy(schedule.snr.copy())
    if min_snr_gamma is None:
        return torch.ones_like(snr, dtype=torch.float32)
    clipped = snr.clamp(max=min_snr_gamma)
    if prediction == "epsilon":
        return torch.where(snr > 0, clipped / snr, 1.0).float()
    return (clipped if prediction == "sample" else clipped / (snr + 1)).float()


class Diffusion:
    """The process of a `NoiseSchedule`: whole timesteps, all of the same probability."""

    def __init__(self, schedule: NoiseSchedule, prediction: str, min_snr_gamma: float | None, device: torch.device):
        self.schedule = schedule
        self._weights = loss_weights(schedule, prediction, min_snr_gamma).to(device)

    def times(self, w: Tensor) -> Tensor:
        """Return the network's timesteps for random words w, int64 below 2^32: t = floor(w T / 2^32), int64."""
        return w * self.schedule.timesteps >> 32

    def levels(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Return a and s of x_t = a x_0 + s noise at timesteps, float32 [B, 1, ...]."""
        return self.schedule.signal_and_noise(t, ndim, torch.float32)

    def weights(self, t: Tensor) -> Tensor:
        """Return the weights of the squared errors at timesteps, float32 [B]."""
        return self._weights[t]


class Flow:
    """The process of a `FlowSchedule`, x = (1 - sigma) x_0 + sigma noise, with random levels 0 < sigma < 1.

    With u ~ Uniform(0, 1), levels before the shift are (Esser et al. 2024, arXiv:2403.03206, section 3.1)

        "uniform":       sigma = u                                           (rectified flow, Liu et al. 2023)
        "logit_normal":  logit(sigma) ~ N(0, 1), sigma = 1 / (1 + exp(-Phi^-1(u)))               (eq. 19, m = 0, s = 1)

    and the schedule's shift moves them, sigma -> shift sigma / (1 + (shift - 1) sigma) (eq. 23), as it does those of
    sampling. The errors of the velocity have equal weights: the density of the levels is the weighting.
    """

    def __init__(self, schedule: FlowSchedule, sigmas: str | None):
        self.schedule = schedule
        self.uniform = sigmas == "uniform"

    def times(self, w: Tensor) -> Tensor:
        """Return the network's timesteps for random words w, int64 below 2^32: sigma times T, float32."""
        u = (w.double() + 0.5) / 2.0**32
        sigma = u if self.uniform else torch.sigmoid(torch.special.ndtri(u))
        return (shifted(sigma, self.schedule.shift) * self.schedule.timesteps).float()

    def levels(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Return 1 - sigma and sigma at timesteps, float32 [B, 1, ...]."""
        sigma = (t.double() / self.schedule.timesteps).reshape(-1, *[1] * (ndim - 1))
        return (1.0 - sigma).float(), sigma.float()

    def weights(self, t: Tensor) -> Tensor:
        """Return the weights of the squared errors at timesteps, which are 1, float32 [B]."""
        return torch.ones_like(t, dtype=torch.float32)
