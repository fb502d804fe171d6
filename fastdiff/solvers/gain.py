"""Amplification of a step table: how large a state becomes where every input is noise of unit size.

A table of degenerate noise levels can multiply the network's output, and with it every rounding error, by any factor;
the images are then finite and meaningless. Each row is linear in its inputs, so the variances follow from the table
alone, before any run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastdiff.solvers.table import Row

# A state of this many units makes float32's rounding, 2^-24 of it, as large as the image. Tables of usual schedules
# stay below 3e5, which a cosine schedule of 4000 timesteps reaches without clipping: it begins at 1/a = 8e4.
LARGEST = 2.0**24


def amplification(rows: Sequence[Row], init_scale: float) -> float:
    """Return the largest standard deviation of x over the rows, where the outputs are white noise of unit size.

    With C the covariance of (x, xs, m1, m2, m3), a row is C <- A C A' + B B', B the coefficients of its independent
    inputs: the network's output, x_0 and noise. x_0 is either the combination of x and output that the network predicts
    or, as its bound c allows no more, an input of size c; the smaller result counts.
    """
    gain = _gain(rows, init_scale, bounded=False)
    if gain > LARGEST and all(math.isfinite(row.c) for row in rows):
        gain = min(gain, _gain(rows, init_scale, bounded=True))
    return gain


def _gain(rows: Sequence[Row], init_scale: float, bounded: bool) -> float:
    if not any(row.push or row.save for row in rows):
        return _gain_of_x(rows, init_scale, bounded)
    C = np.zeros((5, 5))
    C[0, 0] = init_scale**2
    most = C[0, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        for row in rows:
            x, out, x0, z = _inputs(row, row.ax, row.ao, row.a0, bounded)
            A = np.eye(5)
            A[0] = (x, row.as_, row.a1, row.a2, row.a3)
            B = np.zeros((5, 3))
            B[0] = (out, x0, z)
            if row.save:
                A[1] = (1.0, 0.0, 0.0, 0.0, 0.0)
            if row.push:
                hx, B[2, 0], B[2, 1], _ = _inputs(row, row.hx, row.ho, row.h0, bounded)
                A[2:] = ((hx, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0, 0.0))
            C = A @ C @ A.T + B @ B.T
            most = max(most, float(C[0, 0])) if math.isfinite(C[0, 0]) else math.inf
            if most > 1e30:
                break
    return math.sqrt(most)


def _gain_of_x(rows: Sequence[Row], init_scale: float, bounded: bool) -> float:
    """Return the same for a table without history, where x alone has a variance."""
    variance = most = init_scale * init_scale
    for row in rows:
        x, out, x0, z = _inputs(row, row.ax, row.ao, row.a0, bounded)
        variance = x * x * variance + out * out + x0 * x0 + z * z
        most = max(most, variance)
    return math.sqrt(most) if most < math.inf else math.inf  # NaN too is no finite gain


def _inputs(row: Row, x: float, out: float, x0: float, bounded: bool) -> tuple[float, float, float, float]:
    """Return the coefficients of x, the output, x_0 as an input of its own, and noise, in x x + out out + x0 x_0."""
    noise = row.s * math.exp(min(abs(row.sv), 700.0))
    if bounded:
        return x, out, x0 * row.c, noise
    return x + x0 * row.kx, out + x0 * row.ko, 0.0, noise
