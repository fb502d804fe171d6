"""Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import posterior
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import StepTable, is_number
from fastdiff.solvers.walk import Schedule, Walk


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    clip: float | None = 1.0,
    threshold: float | tuple[float, float] | None = None,
    eps_from: str = "clipped",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """DDIM as a table. Between levels abar_t and abar_p, p being the next row's timestep:

        sigma = eta sqrt((1 - abar_p) / (1 - abar_t)) sqrt(1 - abar_t / abar_p)         (eq. 16)
        x_p   = sqrt(abar_p) x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z             (eq. 12)

    eta
        0: deterministic; 1 over all steps: DDPM with the posterior variance.
    eps_from
        After clipping, eps is taken from the clipped x_0 ("clipped", so that x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t)
        eps still holds; OpenAI's code bases) or stays what the network said ("output", diffusers' default).
    set_alpha_to_one
        The last row goes to abar = 1, the data; False: to abar_0 (latent diffusion), of whose noise eta adds a share.

    The other options are those of all solvers (`Walk.of`). Raises `InvalidArgument` naming the value and what is
    allowed.
    """
    walk = Walk.of(
        schedule,
        steps,
        spacing=spacing,
        prediction=prediction,
        clip=clip,
        threshold=threshold,
        steps_offset=steps_offset,
        final="zero" if set_alpha_to_one else "sigma_min",
    )
    return ddim_table(walk, eta, eps_from)


def ddim_table(walk: Walk, eta: float, eps_from: str) -> StepTable:
    """The table of `ddim` over a walk."""
    if not is_number(eta) or not 0.0 <= eta < math.inf:
        raise InvalidArgument(f"eta={eta!r}: 0 or a positive number is needed")
    if eps_from not in ("clipped", "output"):
        raise InvalidArgument(f"eps_from={eps_from!r} is unknown; allowed: clipped, output")
    eta = float(eta)
    rows = []
    for i, level in enumerate(walk.levels):
        _, ct, var = posterior(level.abar, level.abar_next)
        sigma = eta * math.sqrt(var)
        # 1 - abar_p - sigma^2 without its cancellation, which the root would turn into 1e-8.
        squared = (1.0 - eta**2) * var + ct**2 * (1.0 - level.abar)
        if squared < 0.0:
            raise InvalidArgument(
                f"eta={eta!r}: more noise than the level at timestep {level.t:g} holds; eta=1 is always possible"
            )
        direction = math.sqrt(squared)
        if eps_from == "clipped":
            x, out, x0 = direction / level.s, 0.0, level.a_next - direction * level.a / level.s
        else:
            ex, eo = eps_coefficients(walk.prediction, level.abar)
            x, out, x0 = direction * ex, direction * eo, level.a_next
        rows.append(walk.row(i, x=x, out=out, x0=x0, z=sigma))
    return walk.table("ddim", rows)
