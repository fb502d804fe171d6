"""Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.checks import one_of
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import posterior
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Schedule, Walk


@checked
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
    """Build the table of DDIM (Song et al. 2021, arXiv:2010.02502), deterministic or with noise.

    A step from level abar_t to level abar_p, the level of the next row's timestep p, is (eqs. 12 and 16)

        x_p   = sqrt(abar_p) x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z
        sigma = eta sqrt((1 - abar_p) / (1 - abar_t)) sqrt(1 - abar_t / abar_p)

    with x_0 and eps as the network predicts them, and z ~ N(0, I).

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        eta: Share of the noise: 0 is deterministic; 1 over all timesteps is DDPM with the posterior variance.
        spacing: How the timesteps are chosen, see `Walk.of`.
        prediction: What the network predicts, see `Walk.of`.
        clip: Bound of |x_0|; None for none.
        threshold: Dynamic thresholding in place of ``clip``, see `Walk.of`.
        eps_from: What eps is where x_0 was clipped: "clipped" takes the eps that goes with the clipped x_0, so that
            x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps still holds (OpenAI's code bases); "output" keeps what the
            network predicts (diffusers' default).
        steps_offset: Added to every timestep of "leading" spacing.
        set_alpha_to_one: Whether the last step ends at the data, abar = 1; False ends at abar_0, as in latent
            diffusion.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(
        schedule, steps, spacing=spacing, prediction=prediction, clip=clip, threshold=threshold,
        steps_offset=steps_offset, final="zero" if set_alpha_to_one else "sigma_min",
    )  # fmt: skip
    return ddim_table(walk, eta, eps_from)


def ddim_table(walk: Walk, eta: float, eps_from: str) -> StepTable:
    """Build the rows of `ddim` for the levels of a walk.

        x_p = a_p x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z,    sigma^2 = eta^2 var           (eq. 12)

    where a_p = sqrt(abar_p), and var is the variance of the posterior q(x_p | x_t, x_0): sigma is that of eq. 16.
    """
    one_of("eps_from", eps_from, ("clipped", "output"))
    rows = []
    for i, level in enumerate(walk.levels):
        _, ct, var = posterior(level.abar, level.abar_next)
        sigma = eta * math.sqrt(var)
        # 1 - abar_p = var + ct^2 (1 - abar_t), so this is 1 - abar_p - sigma^2. Computed as written, that difference
        # cancels near 0, and its root would be off by 1e-8.
        squared = (1.0 - eta * eta) * var + ct**2 * (1.0 - level.abar)
        if squared < 0.0:
            raise InvalidArgument(
                f"eta={eta!r}: more noise than the level at timestep {level.t:g} holds; eta=1 is always possible"
            )
        direction = math.sqrt(squared)
        # x_p = a_p x_0 + direction eps + sigma z, as coefficients of x, out and x_0
        if eps_from == "clipped":  # eps = (x - a x_0) / s
            x, out, x0 = direction / level.s, 0.0, level.a_next - direction * level.a / level.s
        else:
            ex, eo = eps_coefficients(walk.prediction, level.abar)
            x, out, x0 = direction * ex, direction * eo, level.a_next
        rows.append(walk.row(i, x=x, out=out, x0=x0, z=sigma))
    return walk.table("ddim", rows)
