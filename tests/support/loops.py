"""The sampling loops of the original code bases, short and independent of fastdiff, with which ``compat=`` is compared.

They are written from the published arithmetic of openai/improved-diffusion and guided-diffusion (gaussian_diffusion.py,
respace.py), hojonathanho/diffusion (diffusion_utils_2.py) and ermongroup/ddim (functions/denoising.py,
runners/diffusion.py), in float64 where they round coefficients to float32. A loop takes the initial noise and that of
every row from ``noise`` [1 + rows, B, C, H, W], and returns the state after every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


class GaussianDiffusion:
    """The class of hojonathanho/diffusion, which OpenAI took over and extended by learned_range."""

    def __init__(self, betas: np.ndarray, mean_type: str, var_type: str, timestep_map: Sequence[float]):
        self.betas, self.mean_type, self.var_type, self.timestep_map = betas, mean_type, var_type, timestep_map
        alphas = 1.0 - betas
        self.abar = np.cumprod(alphas)
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.posterior_variance = betas * (1.0 - self.abar_prev) / (1.0 - self.abar)
        # "clipped because the posterior variance is 0 at the beginning of the diffusion chain"
        first = self.posterior_variance[1] if len(betas) > 1 else 1.0
        self.posterior_log_variance = np.log(np.append(first, self.posterior_variance[1:]))
        self.large_log_variance = np.log(np.append(first, betas[1:]))
        self.coef1 = betas * np.sqrt(self.abar_prev) / (1.0 - self.abar)
        self.coef2 = (1.0 - self.abar_prev) * np.sqrt(alphas) / (1.0 - self.abar)

    def p_mean_variance(self, denoise: Denoise, x: Tensor, i: int, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
        out = denoise(x, torch.full((len(x),), float(self.timestep_map[i]), dtype=torch.float64))
        if self.var_type == "learned_range":
            out, v = out.chunk(2, dim=1)
            share = (v + 1) / 2
            log_variance = share * math.log(self.betas[i]) + (1 - share) * self.posterior_log_variance[i]
        else:
            table = {"fixedlarge": self.large_log_variance, "fixedsmall": self.posterior_log_variance}
            log_variance = torch.tensor(table[self.var_type][i])
            out = out[:, : x.shape[1]]
        x0 = out
        if self.mean_type == "eps":
            x0 = math.sqrt(1.0 / self.abar[i]) * x - math.sqrt(1.0 / self.abar[i] - 1) * out
        x0 = x0.clamp(-1, 1) if clip else x0
        return self.coef1[i] * x0 + self.coef2[i] * x, log_variance, x0

    def p_sample_loop(self, denoise: Denoise, noise: Tensor, clip: bool = True) -> Tensor:
        x, states = noise[0], []
        for row, i in enumerate(reversed(range(len(self.betas)))):
            mean, log_variance, _ = self.p_mean_variance(denoise, x, i, clip)
            x = mean + (i != 0) * torch.exp(0.5 * log_variance) * noise[1 + row]
            states.append(x)
        return torch.stack(states)

    def ddim_sample_loop(self, denoise: Denoise, noise: Tensor, eta: float, clip: bool = True) -> Tensor:
        x, states = noise[0], []
        for row, i in enumerate(reversed(range(len(self.betas)))):
            x0 = self.p_mean_variance(denoise, x, i, clip)[2]
            eps = (math.sqrt(1.0 / self.abar[i]) * x - x0) / math.sqrt(1.0 / self.abar[i] - 1)
            a, b = self.abar[i], self.abar_prev[i]
            sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
            x = x0 * math.sqrt(b) + math.sqrt(max(1 - b - sigma**2, 0.0)) * eps + (i != 0) * sigma * noise[1 + row]
            states.append(x)
        return torch.stack(states)


def space_timesteps(T: int, respacing: str) -> list[int]:
    """Return OpenAI's timesteps of a respacing, rising; an empty one is every timestep."""
    if respacing.startswith("ddim"):
        wanted = int(respacing[4:])
        return next(list(range(0, T, i)) for i in range(1, T) if len(range(0, T, i)) == wanted)
    counts = [int(n) for n in respacing.split(",")] if respacing else [T]
    start, steps = 0, set()
    for i, count in enumerate(counts):
        size = T // len(counts) + (1 if i < T % len(counts) else 0)
        assert size >= count
        stride, at = 1.0 if count <= 1 else (size - 1) / (count - 1), 0.0
        for _ in range(count):
            steps.add(start + round(at))
            at += stride
        start += size
    return sorted(steps)


def spaced(betas: np.ndarray, use: Sequence[int], mean_type: str, var_type: str) -> GaussianDiffusion:
    """Return OpenAI's SpacedDiffusion, which computes new betas from the kept abar."""
    abar, last, new = np.cumprod(1.0 - betas), 1.0, []
    for i in use:
        new.append(1 - abar[i] / last)
        last = abar[i]
    return GaussianDiffusion(np.array(new), mean_type, var_type, use)


# ermongroup/ddim ------------------------------------------------------------------------------------------------------


def skips(T: int, kind: str, steps: int) -> list[int]:
    if kind == "uniform":
        return list(range(0, T, T // steps))
    return [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), steps) ** 2]


def compute_alpha(betas: np.ndarray, t: int) -> float:
    return float(np.cumprod(1.0 - np.append(0.0, betas))[t + 1])


def generalized_steps(denoise: Denoise, noise: Tensor, seq: Sequence[int], betas: np.ndarray, eta: float) -> Tensor:
    x, states = noise[0], []
    for row, (i, j) in enumerate(zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True)):
        at, following = compute_alpha(betas, i), compute_alpha(betas, j)
        et = denoise(x, torch.full((len(x),), float(i), dtype=torch.float64))
        x0 = (x - et * math.sqrt(1 - at)) / math.sqrt(at)
        c1 = eta * math.sqrt((1 - at / following) * (1 - following) / (1 - at))
        c2 = math.sqrt(max(1 - following - c1**2, 0.0))
        x = math.sqrt(following) * x0 + c1 * noise[1 + row] + c2 * et
        states.append(x)
    return torch.stack(states)


def ddpm_steps(denoise: Denoise, noise: Tensor, seq: Sequence[int], betas: np.ndarray) -> Tensor:
    x, states = noise[0], []
    for row, (i, j) in enumerate(zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True)):
        at, before = compute_alpha(betas, i), compute_alpha(betas, j)
        beta = 1 - at / before
        e = denoise(x, torch.full((len(x),), float(i), dtype=torch.float64))
        x0 = (math.sqrt(1 / at) * x - math.sqrt(1 / at - 1) * e).clamp(-1, 1)
        mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - at)
        x = mean + (i != 0) * math.sqrt(beta) * noise[1 + row]
        states.append(x)
    return torch.stack(states)
