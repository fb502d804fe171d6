"""The sampling loops of k-diffusion (sampling.py), written from their published arithmetic, as references.

The state x is x_0 + sigma eps, and ``model(x, sigma)`` returns the denoised image. ``noise()`` draws standard normals,
one for every evaluation as the rows of a `StepTable` have them, whether it is used or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def get_ancestral_step(sigma: float, sigma_to: float, eta: float) -> tuple[float, float]:
    up = min(sigma_to, eta * (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def sample_dpm_2_ancestral(model: Model, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    """Run DPM-Solver-2, which is deterministic with eta = 0."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        d = (x - model(x, sigma)) / sigma
        noise()
        if down == 0:
            x = x + d * (down - sigma)
            continue
        middle = math.exp(0.5 * (math.log(sigma) + math.log(down)))
        x_2 = x + d * (middle - sigma)
        d_2 = (x_2 - model(x_2, middle)) / middle
        x = x + d_2 * (down - sigma) + noise() * up
    return x


def sample_dpmpp_2s_ancestral(model: Model, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = model(x, sigma)
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        noise()
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
            continue
        t, t_next = -math.log(sigma), -math.log(down)
        h = t_next - t
        s = t + 0.5 * h
        x_2 = math.exp(t - s) * x - math.expm1(-h * 0.5) * denoised
        denoised_2 = model(x_2, math.exp(-s))
        x = math.exp(t - t_next) * x - math.expm1(-h) * denoised_2 + noise() * up
    return x


def sample_dpmpp_sde(model: Model, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Tensor:
    """Run DPM++ SDE with r = 1/2; increments of one Brownian motion W(sigma) stand in for its tree."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = model(x, sigma)
        w_1 = noise()
        if sigma_next == 0:
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
            continue
        t, t_next = -math.log(sigma), -math.log(sigma_next)
        s = t + 0.5 * (t_next - t)
        down, up = get_ancestral_step(sigma, math.exp(-s), eta)
        x_2 = down / sigma * x - math.expm1(t + math.log(down)) * denoised + w_1 * up
        denoised_2 = model(x_2, math.exp(-s))
        first, second = sigma - math.exp(-s), math.exp(-s) - sigma_next
        increment = math.sqrt(first) * w_1 + math.sqrt(second) * noise()
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        x = down / sigma * x - math.expm1(t + math.log(down)) * denoised_2 + increment / math.sqrt(first + second) * up
    return x


def sample_dpmpp_3m_sde(model: Model, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0) -> Tensor:
    denoised_1 = denoised_2 = None
    h_1 = h_2 = 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised, z = model(x, sigma), noise()
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if denoised_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif denoised_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        x = x + z * sigma_next * math.sqrt(-math.expm1(-2 * h * eta))
        denoised_1, denoised_2 = denoised, denoised_1
        h_1, h_2 = h, h_1
    return x
