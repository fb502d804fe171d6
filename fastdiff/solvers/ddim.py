"""Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule, posterior
from fastdiff.solvers.prediction import check_prediction, eps_coefficients, x0_coefficients
from fastdiff.solvers.spacing import levels, timesteps
from fastdiff.solvers.table import Row, StepTable, check_clip, is_number


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    spacing: str | Sequence[float] = "trailing",
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    eps_from: str = "clipped",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """DDIM as a table. Between levels abar_t and abar_p, p being the next row's timestep:

        sigma = eta sqrt((1 - abar_p) / (1 - abar_t)) sqrt(1 - abar_t / abar_p)         (eq. 16)
        x_p   = sqrt(abar_p) x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z             (eq. 12)

    steps
        How many rows; None: 50, or every timestep of a schedule that has fewer.
    eta
        0: deterministic; 1 over all steps: DDPM with the posterior variance.
    spacing
        "trailing", "leading", "linspace", "quadratic", or a falling list of timesteps (then ``steps`` may be None).
    prediction
        What the network says: "epsilon", "sample" or "v_prediction".
    clip
        Bound of |x_0|; None for none.
    eps_from
        After clipping, eps is taken from the clipped x_0 ("clipped", so that x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t)
        eps still holds; OpenAI's code bases) or stays what the network said ("output", diffusers' default).
    steps_offset
        Added to every timestep of "leading" spacing.
    set_alpha_to_one
        The last row goes to abar = 1, the data; False: to abar_0 (latent diffusion), of whose noise eta adds a share.

    Raises `InvalidArgument` naming the value and what is allowed.
    """
    check_prediction(prediction)
    c = check_clip(clip)
    if not is_number(eta) or not 0.0 <= eta < math.inf:
        raise InvalidArgument(f"eta={eta!r}: 0 or a positive number is needed")
    if eps_from not in ("clipped", "output"):
        raise InvalidArgument(f"eps_from={eps_from!r} is unknown; allowed: clipped, output")
    if steps is None and isinstance(spacing, str):
        steps = min(50, schedule.timesteps)
    eta = float(eta)
    ts = timesteps(schedule, steps, spacing, steps_offset)
    final = 1.0 if set_alpha_to_one else float(schedule.alphas_cumprod[0])
    rows = []
    for t, (abar, abar_next) in zip(ts, levels(schedule, ts, final), strict=True):
        kx, ko = x0_coefficients(prediction, abar)
        _, ct, var = posterior(abar, abar_next)
        sigma = eta * math.sqrt(var)
        # 1 - abar_p - sigma^2 without its cancellation, which the root would turn into 1e-8.
        squared = (1.0 - eta**2) * var + ct**2 * (1.0 - abar)
        if squared < 0.0:
            raise InvalidArgument(
                f"eta={eta!r}: more noise than the level at timestep {t:g} holds; eta=1 is always possible"
            )
        direction = math.sqrt(squared)
        if eps_from == "clipped":
            a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
            ax, ao, a0 = direction / s, 0.0, math.sqrt(abar_next) - direction * a / s
        else:
            ex, eo = eps_coefficients(prediction, abar)
            ax, ao, a0 = direction * ex, direction * eo, math.sqrt(abar_next)
        rows.append(Row(t=t, abar=abar, abar_next=abar_next, kx=kx, ko=ko, c=c, ax=ax, ao=ao, a0=a0, s=sigma))
    return StepTable("ddim", len(ts), tuple(rows))
