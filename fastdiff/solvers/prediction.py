"""Conversion of a network's output ``out`` to x_0 and to the noise eps, as coefficients of x_t and out.

With x_t = a x_0 + s eps, a = sqrt(abar_t), s = sqrt(1 - abar_t) (Ho et al. 2020, eq. 4):

    epsilon        out = eps              x_0 = (x_t - s out) / a      eps = out
    sample         out = x_0              x_0 = out                    eps = (x_t - a out) / s
    v_prediction   out = a eps - s x_0    x_0 = a x_t - s out          eps = s x_t + a out        (Salimans & Ho 2022)
    edm            out = s x_0 - a eps    x_0 = a x_t + s out          eps = s x_t - a out        (Karras et al. 2022)
    flow_prediction  out = eps - x_0      x_0 = (x_t - s out) / (a + s)    eps = (x_t + a out) / (a + s)
    score          out = -a / s eps       x_0 = x_t / a + (s / a)^2 out    eps = -s / a out       (Song et al. 2021)

"edm" is the F of Karras et al.'s preconditioning (arXiv:2206.00364, eq. 7). With y = x / sigma_data and
x_t = y / sqrt(1 + (sigma / sigma_data)^2), their network input c_in x is x_t, and their denoiser
D = c_skip x + c_out F is sigma_data (a x_t + s F): v-prediction with the other sign.

"flow_prediction" is the velocity of flow matching, whose own states are x_t / (a + s) (`fastdiff.solvers.flow`).
"score" is the gradient of the logarithm of the density of the variance-exploding states x_t / a, whose sigma is s / a
(`fastdiff.solvers.ve`).
"""

from __future__ import annotations

import math

from fastdiff import schedule
from fastdiff.checks import one_of
from fastdiff.errors import InvalidArgument

PREDICTIONS = (*schedule.PREDICTIONS, "edm", "flow_prediction", "score")


def check_prediction(prediction: str) -> None:
    """Raise `InvalidArgument` if ``prediction`` is unknown."""
    one_of("prediction", prediction, PREDICTIONS)


def x0_coefficients(prediction: str, abar: float) -> tuple[float, float]:
    """Return (kx, ko) with x_0 = kx x_t + ko out at the level ``abar``."""
    a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
    if prediction in ("epsilon", "score"):
        if a == 0.0:
            raise InvalidArgument(
                f"prediction={prediction!r} says nothing about x_0 at zero SNR (abar = 0); "
                "networks of 'sample' or 'v_prediction' can start there"
            )
        return 1.0 / a, -s / a if prediction == "epsilon" else (s / a) ** 2
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return 1.0 / (a + s), -s / (a + s)
    return a, s if prediction == "edm" else -s


def eps_coefficients(prediction: str, abar: float) -> tuple[float, float]:
    """Return (ex, eo) with eps = ex x_t + eo out at the level ``abar``."""
    a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "score":
        return 0.0, -s / a
    if prediction == "sample":
        return 1.0 / s, -a / s
    if prediction == "flow_prediction":
        return 1.0 / (a + s), a / (a + s)
    return s, -a if prediction == "edm" else a
