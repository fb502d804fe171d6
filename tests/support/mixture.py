"""A mixture of Gaussians in one dimension, whose best predictions are known, and runs of tables with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastdiff.solvers import StepTable

WEIGHT, MEAN, DEVIATION = np.array([0.3, 0.5, 0.2]), np.array([-0.7, 0.1, 0.8]), np.array([0.3, 0.2, 0.25])


def posterior_mean(x: np.ndarray, a: float, s: float) -> np.ndarray:
    """Return E[x_0 | x] for x = a x_0 + s eps and x_0 of the mixture."""
    variance = a * a * DEVIATION**2 + s * s
    distance = x[:, None] - a * MEAN
    log_density = np.log(WEIGHT) - 0.5 * np.log(variance) - distance**2 / (2 * variance)
    share = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return (share * (MEAN + a * DEVIATION**2 / variance * distance)).sum(axis=1)


def run(
    table: StepTable,
    network: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    draws: np.random.Generator | None = None,
    at: str = "t",
) -> np.ndarray:
    """Run a table with the network's output at its timestep, or at another column; without ``draws`` without noise."""
    m1 = m2 = m3 = xs = np.zeros_like(x)
    for row in table.rows:
        out = network(x, getattr(row, at))
        x0 = np.clip(row.kx * x + row.ko * out, -row.c, row.c)
        h = row.hx * x + row.ho * out + row.h0 * x0
        after = row.ax * x + row.ao * out + row.a0 * x0 + row.a1 * m1 + row.a2 * m2 + row.a3 * m3 + row.as_ * xs
        after = after if draws is None else after + row.s * draws.standard_normal(x.shape)
        xs = x if row.save else xs
        m1, m2, m3 = (h, m1, m2) if row.push else (m1, m2, m3)
        x = after
    return x


def runge_kutta(
    f: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray, start: float, end: float, n: int = 1000
) -> np.ndarray:
    """Integrate dx/ds = f(x, s) by the classical method in n steps."""
    h = (end - start) / n
    for i in range(n):
        s = start + i * h
        k1 = f(x, s)
        k2 = f(x + 0.5 * h * k1, s + 0.5 * h)
        k3 = f(x + 0.5 * h * k2, s + 0.5 * h)
        k4 = f(x + h * k3, s + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))
