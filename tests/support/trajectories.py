"""Whole runs of a table and of diffusers' schedulers on the same noise, and the moments of a Gaussian after a run.

A run works as in the sampler: a `StepTable` in a `TableBank`, a `State` whose noise is given, and
`fastdiff.core.update.update` after every evaluation of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from fastdiff.core.state import State, TableBank
from fastdiff.core.update import update
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable

Denoise = Callable[[Tensor, Tensor], Tensor]

SCHEDULES = {
    "linear": NoiseSchedule(),
    "cosine": NoiseSchedule("cosine"),
    "zero_snr": NoiseSchedule(rescale_zero_terminal_snr=True),
}
T = 1000
SHAPE = (2, 3, 3)


def alphas_cumprod(name: str) -> Tensor:
    """Return abar of a schedule in `SCHEDULES`, float64 [T], computed without fastdiff."""
    if name == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    else:
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    if name == "zero_snr":
        betas = rescale_zero_terminal_snr(betas)
    return torch.cumprod(1 - betas, 0)


def denoiser(prediction: str, schedule: str = "linear", learned: bool = False) -> Denoise:
    """Return a fixed smooth network that predicts x_0 = 1.5 tanh(w x + 0.4 sin(t/90 + channel)), w by channel.

    It leaves [-1, 1], so that clipping matters at every noise level. With ``learned`` its output has a second half v,
    which leaves [-1, 1] too.
    """
    table = alphas_cumprod(schedule)

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t.double().reshape(-1, 1, 1, 1)
        low = t.long().clamp(max=T - 1)
        abar = torch.lerp(table[low], table[(low + 1).clamp(max=T - 1)], t - low)
        a, s, t = abar.sqrt().to(x.dtype), (1 - abar).sqrt().to(x.dtype), t.to(x.dtype)
        channel = torch.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, 1, 1)
        x0 = 1.5 * torch.tanh((0.8 + 0.3 * channel) * x + 0.4 * torch.sin(t / 90 + channel))
        eps = (x - a * x0) / s
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[prediction]
        return torch.cat([out, 1.2 * torch.cos(2 * x + t / 200 - channel)], dim=1) if learned else out

    return network


def draw_noise(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Draw the initial noise and that of every row, [1 + rows, 1, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1 + rows, 1, *SHAPE), generator=generator, dtype=torch.float64).to(dtype)


def run(tables: Sequence[StepTable], denoise: Denoise, noise: Tensor) -> Tensor:
    """Return the states after every row, [rows, B, C, H, W]; image b runs tables[b], and all share the noise."""
    B = len(tables)
    scale = torch.tensor([table.init_scale for table in tables], dtype=noise.dtype).reshape(-1, 1, 1, 1)
    state = State.create(
        noise[0] * scale,
        TableBank(tables, torch.device("cpu"), noise.dtype),
        table=range(B),
        noise=lambda row: noise[1 + row].expand(B, *SHAPE),
    )
    states = []
    while not state.done:
        state.out = denoise(state.x, state.column("t"))
        update(state)
        states.append(state.x)
    return torch.stack(states)


# diffusers ------------------------------------------------------------------------------------------------------------


class _Gap(int):
    """A number of steps n for which T // n is the gap t - t_prev itself."""

    def __rfloordiv__(self, other: int) -> int:
        return int(self)


class PairedDDIM(DDIMScheduler):
    """DDIMScheduler with one correction: t_prev is the next entry of ``timesteps``, not t - T // steps."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, **options: object) -> object:
        following = [*self.timesteps.tolist(), -1]
        gap = timestep - following[following.index(timestep) + 1]
        self.num_inference_steps = _Gap(gap)
        return super().step(model_output, timestep, sample, **options)


def to_float64(scheduler: DDIMScheduler | DDPMScheduler, schedule: str = "linear") -> None:
    """Replace the scheduler's float32 tensors by the same in float64."""
    abar = alphas_cumprod(schedule)
    scheduler.alphas_cumprod = abar
    scheduler.alphas = abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    scheduler.betas = 1 - scheduler.alphas
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = scheduler.one if scheduler.config.set_alpha_to_one else abar[0]


def run_diffusers(
    scheduler: DDIMScheduler | DDPMScheduler, denoise: Denoise, noise: Tensor, **options: object
) -> Tensor:
    """Return the states after every entry of scheduler.timesteps, [rows, 1, C, H, W]."""
    x = noise[0]
    states = []
    original = scheduling_ddpm.randn_tensor
    try:
        for z, t in zip(noise[1:], scheduler.timesteps.tolist(), strict=False):
            out = denoise(x, torch.tensor([float(t)]))
            if isinstance(scheduler, DDIMScheduler):
                x = scheduler.step(out, t, x, variance_noise=z, **options).prev_sample
            else:
                scheduling_ddpm.randn_tensor = lambda *_, z=z, **__: z
                x = scheduler.step(out, t, x).prev_sample
            states.append(x)
    finally:
        scheduling_ddpm.randn_tensor = original
    return torch.stack(states)


# Gaussian targets -----------------------------------------------------------------------------------------------------


def gaussian_moments(
    table: StepTable, mu: np.ndarray, var: np.ndarray, prediction: str, v: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance [K] of a table's samples for data N(mu, diag(var)) and the exact network.

    The run starts at the data's own marginal at the first row's level, N(a mu, a^2 var + s^2), a = sqrt(abar), s =
    sqrt(1 - abar). The exact network predicts the posterior mean,

        E[x_0 | x] = mu + a var / (a^2 var + s^2) (x - a mu)

    so every row is affine in y = (x, m1, m2, m3, xs), y' = M y + b + (S z, 0, 0, 0, 0), and the moments of y follow
    exactly. A row's x is at level row.abar. ``v`` is the network's output for a learned variance. c must be infinite.
    """
    mu, var = np.atleast_1d(np.asarray(mu, np.float64)), np.atleast_1d(np.asarray(var, np.float64))
    K = len(mu)
    x, m1, m2, m3, xs = np.eye(5)
    first = table.rows[0].abar
    mean, covariance = np.zeros((K, 5)), np.zeros((K, 5, 5))
    mean[:, 0] = math.sqrt(first) * mu
    covariance[:, 0, 0] = first * var + 1 - first
    for row in table.rows:
        assert math.isinf(row.c), "clipping is not affine"
        a, s = math.sqrt(row.abar), math.sqrt(1 - row.abar)
        gain = a * var / (a * a * var + s * s)
        # Affine maps of y as [K, 5 + 1] matrices: five coefficients and a constant.
        X = np.broadcast_to([*x, 0.0], (K, 6))
        one = np.broadcast_to([0.0] * 5 + [1.0], (K, 6))
        best = gain[:, None] * X + ((1 - a * gain) * mu)[:, None] * one
        eps = (X - a * best) / s
        out = {"epsilon": eps, "sample": best, "v_prediction": a * eps - s * best}[prediction]
        x0 = row.kx * X + row.ko * out
        h = row.hx * X + row.ho * out + row.h0 * x0
        history = row.a1 * m1 + row.a2 * m2 + row.a3 * m3 + row.as_ * xs
        new = row.ax * X + row.ao * out + row.a0 * x0 + np.append(history, 0.0)
        kept = [h, m1, m2] if row.push else [m1, m2, m3]
        saved = x if row.save else xs
        rows = [np.broadcast_to(k if k.shape[-1] == 6 else np.append(k, 0.0), (K, 6)) for k in (new, *kept, saved)]
        M, b = np.stack(rows, axis=1)[..., :5], np.stack(rows, axis=1)[..., 5]
        mean = (M @ mean[..., None])[..., 0] + b
        covariance = M @ covariance @ M.transpose(0, 2, 1)
        covariance[:, 0, 0] += (row.s * math.exp(row.sv * v)) ** 2
    return mean[:, 0], covariance[:, 0, 0]
