"""The training objective against the formulas of the papers, written out in float64 with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.training.loss import loss_weights, target

LINEAR = NoiseSchedule()
COSINE = NoiseSchedule("cosine", 100)
ZERO_TERMINAL = NoiseSchedule("scaled_linear", 50, rescale_zero_terminal_snr=True)
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO_TERMINAL], ids=["linear", "cosine", "zero"])


def signal_and_noise(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    abar = schedule.alphas_cumprod
    return np.sqrt(abar), np.sqrt(1 - abar)


def test_abar_is_that_of_the_papers() -> None:
    """The other tests rely on abar_t = prod (1 - beta_s) with beta from 1e-4 to 0.02 (Ho et al., section 4)."""
    assert LINEAR.alphas_cumprod == pytest.approx(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rel=1e-12)
    assert ZERO_TERMINAL.alphas_cumprod[-1] == 0


@SCHEDULES
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target(schedule: NoiseSchedule, prediction: str) -> None:
    """At every timestep x_t and the target are those of the papers, and together they determine x_0 and the noise."""
    rng = np.random.default_rng(0)
    t = np.arange(schedule.timesteps)
    x0, noise = rng.normal(size=(2, len(t), 3, 2, 2))
    a64, s64 = (c[:, None, None, None] for c in signal_and_noise(schedule))
    a, s = schedule.signal_and_noise(torch.from_numpy(t), 4, torch.float32)
    x_t = (a * torch.from_numpy(x0).float() + s * torch.from_numpy(noise).float()).numpy()
    got = target(prediction, torch.from_numpy(x0).float(), torch.from_numpy(noise).float(), a, s).numpy()

    assert x_t == pytest.approx(a64 * x0 + s64 * noise, abs=1e-6)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": a64 * noise - s64 * x0}[prediction]
    assert got == pytest.approx(expected, abs=1e-6)
    if prediction == "v_prediction":  # Salimans & Ho 2022, appendix D
        assert a64 * x_t - s64 * got == pytest.approx(x0, abs=1e-6)
        assert s64 * x_t + a64 * got == pytest.approx(noise, abs=1e-6)


@SCHEDULES
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(schedule: NoiseSchedule, prediction: str, gamma: float) -> None:
    """Hang et al. 2023, section 3.4: w_t = min(SNR, gamma) for x_0, / SNR for the noise, / (SNR + 1) for v."""
    abar = schedule.alphas_cumprod
    expected = np.empty(len(abar))
    for t in range(len(abar)):
        snr = abar[t] / (1 - abar[t])
        if prediction == "sample":
            expected[t] = min(snr, gamma)
        elif prediction == "epsilon":
            expected[t] = min(snr, gamma) / snr if snr > 0 else 1.0
        else:
            expected[t] = min(snr, gamma) / (snr + 1)
    weights = loss_weights(schedule, prediction, gamma)
    assert weights.dtype == torch.float32
    assert weights.numpy() == pytest.approx(expected, rel=1e-6, abs=0)
    if prediction == "epsilon":  # clipped at the clean end only
        assert weights[0] < 1 if schedule.snr[0] > gamma else weights[0] == 1
        assert weights[-1] == 1


@SCHEDULES
def test_min_snr_is_one_loss_on_x0(schedule: NoiseSchedule) -> None:
    """The three weights agree: an error of x_0 costs the same, whatever the network predicts."""
    a, s = signal_and_noise(schedule)
    rows = a > 0  # at zero SNR x_t does not depend on x_0
    a, s = a[rows], s[rows]
    costs = {"epsilon": (a / s) ** 2, "sample": np.ones_like(a), "v_prediction": s**-2.0}  # error^2 per x_0 error^2
    x0_loss = [loss_weights(schedule, p, 5.0).double().numpy()[rows] * costs[p] for p in PREDICTIONS]
    assert x0_loss[0] == pytest.approx(x0_loss[1], rel=1e-5)
    assert x0_loss[2] == pytest.approx(x0_loss[1], rel=1e-5)


@SCHEDULES
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_gamma_every_timestep_weighs_one(schedule: NoiseSchedule, prediction: str) -> None:
    assert torch.equal(loss_weights(schedule, prediction, None), torch.ones(schedule.timesteps))


def test_zero_snr() -> None:
    """At zero SNR x_t is the noise, so predicting the noise keeps its weight, and x_0 and v get none."""
    last = {p: float(loss_weights(ZERO_TERMINAL, p, 5.0)[-1]) for p in PREDICTIONS}
    assert last == {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0}
