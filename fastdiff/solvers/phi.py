"""The phi functions of exponential integrators (Hochbruck & Ostermann 2010), computed without cancellation."""

from __future__ import annotations

import math


def phi(k: int, z: float) -> float:
    """Compute phi_k(z) = (phi_{k-1}(z) - 1/(k-1)!) / z = sum_j z^j / (j + k)!, with phi_0(z) = e^z; phi_k(-inf) = 0."""
    if abs(z) < 1.0:
        return sum(z**j / math.factorial(j + k) for j in range(20))
    if math.isinf(z) and z < 0:
        return 0.0
    value = math.exp(z)
    for j in range(1, k + 1):
        value = (value - 1.0 / math.factorial(j - 1)) / z
    return value
