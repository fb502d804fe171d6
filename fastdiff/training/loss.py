"""The training objective of DDPM (Ho et al. 2020, eq. 14) for the three predictions, with min-SNR weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.schedule import NoiseSchedule


def target(prediction: str, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Return what the network should predict from x_t = a x_0 + s noise, a = sqrt(abar_t), s = sqrt(1 - abar_t).

    epsilon: noise        sample: x_0        v_prediction: a noise - s x_0        (Salimans & Ho 2022, arXiv:2202.00512)
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
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
