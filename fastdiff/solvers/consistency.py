"""Few-step samplers of distilled networks: consistency models (Song et al. 2023), latent ones, and trajectory ones.

Each row predicts the image, and adds fresh noise up to the next level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastdiff.checks import number, shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.spacing import spaced_sigmas
from fastdiff.solvers.table import Row, StepTable, check_clip
from fastdiff.solvers.walk import Walk

TCD_ETA = 0.3  # eta of a run of `tcd` that gives none, as in its authors' code


@checked
def lcm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    original_steps: int | None = None,
    timestep_scaling: float = 10.0,
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    clip: float | None = None,
    threshold: float | tuple[float, float] | None = None,
) -> StepTable:
    """Build the table of latent consistency models' multi-step sampling (Luo et al. 2023, arXiv:2310.04378, alg. 3).

    With tau = ``timestep_scaling`` t and sigma_data = 1/2

        f   = c_skip x + c_out x_0,     c_skip = sigma_data^2 / (tau^2 + sigma_data^2)
                                        c_out  = tau / sqrt(tau^2 + sigma_data^2)
        x_p = a_p f + s_p z             and f itself at the end

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 4.
        original_steps: Number of timesteps, evenly spaced, at which the network was distilled; None is 50, or every
            timestep of a schedule that has fewer.
        timestep_scaling: Factor of t in tau, above 0.
        spacing: A falling list of timesteps; None takes every (original_steps / steps)-th of the ``original_steps``,
            from T-1 down.
        prediction: What the network predicts, see `Walk.of`.
        clip: Bound of |x_0|; None for none.
        threshold: Dynamic thresholding in place of ``clip``, see `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = _distilled("lcm", schedule, steps, original_steps, spacing, prediction, clip, threshold)
    return lcm_table(walk, timestep_scaling)


def _distilled(
    name: str,
    schedule: NoiseSchedule,
    steps: int | None,
    original_steps: int | None,
    spacing: str | Sequence[float] | None,
    prediction: str | None,
    clip: float | None,
    threshold: float | tuple[float, float] | None,
) -> Walk:
    """Return the walk of `lcm` and `tcd`, whose options these are."""
    if not isinstance(schedule, NoiseSchedule):
        raise InvalidArgument(
            f"{name} needs a discrete NoiseSchedule, not a {type(schedule).__name__}; consistency runs an EDMSchedule"
        )
    if spacing is None or isinstance(spacing, str):
        if spacing is not None:
            raise InvalidArgument(
                f"spacing={shown(spacing)}: {name} has its own spacing (None), or takes a list of timesteps"
            )
        original = min(50, schedule.timesteps) if original_steps is None else original_steps
        spacing, steps = lcm_timesteps(schedule.timesteps, 4 if steps is None else steps, original), None
    return Walk.of(schedule, steps, spacing=spacing, prediction=prediction, clip=clip, threshold=threshold)


def lcm_timesteps(T: int, steps: int, original_steps: int, strength: float = 1.0) -> list[float]:
    """Return LCM's timesteps: entries floor(i n / steps) of the lower n of T // original_steps k - 1, from the top.

    n is the share ``strength`` of ``original_steps``.
    """
    whole("original_steps", original_steps, 1, T)
    n = int(original_steps * strength)
    if n < 1:
        raise InvalidArgument(f"strength={strength:g} of {original_steps} timesteps leaves none")
    whole("steps", steps, 1, n, of="original_steps times strength" if strength < 1.0 else "")
    origin = (np.arange(1, n + 1) * (T // original_steps) - 1)[::-1]
    chosen = np.floor(np.linspace(0, n, num=steps, endpoint=False)).astype(np.int64)
    return [float(t) for t in origin[chosen]]


def lcm_table(walk: Walk, timestep_scaling: float) -> StepTable:
    """Build the rows of `lcm` for the levels of a walk."""
    rows = []
    for i, level in enumerate(walk.levels):
        tau = level.t * timestep_scaling
        skip, out = 0.25 / (tau * tau + 0.25), tau / math.sqrt(tau * tau + 0.25)
        rows.append(walk.row(i, x=level.a_next * skip, x0=level.a_next * out, z=level.s_next))
    return walk.table("lcm", rows)


@checked
def tcd(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = TCD_ETA,
    original_steps: int | None = None,
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    clip: float | None = None,
    threshold: float | tuple[float, float] | None = None,
) -> StepTable:
    """Build the table of trajectory consistency distillation's sampling (Zheng et al. 2024, arXiv:2402.19159, alg. 4).

    A step from t to p goes down to s = floor((1 - eta) p) by DDIM and adds noise up to p (strategic stochastic
    sampling; eta is the paper's gamma):

        x_s = a_s x_0 + s_s eps
        x_p = a_p / a_s x_s + sqrt(1 - abar_p / abar_s) z          and x_0 at the end

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 4.
        eta: Share of fresh noise, 0 to 1.
        original_steps: Number of timesteps, evenly spaced, at which the network was distilled; None is 50, or every
            timestep of a schedule that has fewer.
        spacing: A falling list of timesteps; None takes those of `lcm`.
        prediction: What the network predicts, see `Walk.of`.
        clip: Bound of |x_0|; None for none.
        threshold: Dynamic thresholding in place of ``clip``, see `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = _distilled("tcd", schedule, steps, original_steps, spacing, prediction, clip, threshold)
    number("eta", eta, 0, 1)
    # Nothing lies below the level at which the last step ends.
    lower = [schedule.abar(math.floor((1.0 - eta) * level.t)) for level in walk.levels[1:]]
    return tcd_table(walk, eta, [*lower, 1.0])


def tcd_table(walk: Walk, eta: float, lower: Sequence[float]) -> StepTable:
    """Build the rows of `tcd` for the levels of a walk; ``lower`` is abar at timestep s of every step."""
    rows = []
    for i, (level, abar) in enumerate(zip(walk.levels, lower, strict=True)):
        z = math.sqrt(max(0.0, 1.0 - level.abar_next / abar)) if eta > 0.0 else 0.0
        eps = level.a_next * math.sqrt((1.0 - abar) / abar)
        rows.append(walk.row(i, x0=level.a_next, eps=eps, z=z))
    return walk.table("tcd", rows)


@checked
def consistency(
    schedule: EDMSchedule | None = None,
    steps: int | None = None,
    *,
    train_steps: int = 40,
    clip: float | None = 1.0,
) -> StepTable:
    """Build the table of consistency models' multi-step sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1).

    With sigma_0 = ``schedule.sigma_min`` and the boundary condition of the paper's appendix C

        f   = c_skip x + c_out F,    c_skip = sigma_data^2 / ((sigma - sigma_0)^2 + sigma_data^2)
                                     c_out  = (sigma - sigma_0) sigma_data / sqrt(sigma^2 + sigma_data^2)
        x_p = clip(f) + sqrt(sigma_p^2 - sigma_0^2) z          and clip(f) itself at the end

    Args:
        schedule: Noise levels that the network was trained with; None is ``EDMSchedule(time_scale=1000.0)``.
        steps: Number of steps, 1 to ``train_steps``; None is 1. Their levels are evenly spread over ``train_steps``.
        train_steps: Number of noise levels, in Karras' spacing, at which the network was trained; 2 to 100000.
        clip: Bound of |f|; None for none.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule is no `EDMSchedule`.
    """
    schedule = EDMSchedule(time_scale=1000.0) if schedule is None else schedule
    if not isinstance(schedule, EDMSchedule):
        raise InvalidArgument(f"consistency needs an EDMSchedule, not a {type(schedule).__name__}")
    whole("train_steps", train_steps, 2, 100_000)
    n = whole("steps", 1 if steps is None else steps, 1, train_steps)
    return consistency_table(schedule, np.arange(n) * (train_steps // n), train_steps, clip)


def consistency_table(
    schedule: EDMSchedule, chosen: NDArray[np.int64], train_steps: int, clip: float | None
) -> StepTable:
    """Build the rows of `consistency` at the noise levels whose numbers, rising from 0 for the largest, are chosen."""
    whole("timesteps[0]", int(chosen[-1]), 0, train_steps - 1)
    n = len(chosen)
    data, lowest = schedule.sigma_data, schedule.sigma_min
    every = spaced_sigmas("karras", train_steps, schedule.sigma_max, lowest, schedule.rho)
    sigmas = every[chosen].tolist()
    c = check_clip("clip", clip) / data
    rows = []
    for i, sigma in enumerate(sigmas):
        # The table's state is x / root, and its x0 is f / data.
        root, last = math.hypot(sigma, data), i == n - 1
        skip = data**2 / ((sigma - lowest) ** 2 + data**2)
        t = schedule.time(sigma)
        k = {"t": t, "abar": schedule.abar(t), "kx": skip * root / data, "ko": (sigma - lowest) / root, "c": c}
        if last:
            rows.append(Row(**k, abar_next=1.0, a0=data))
            continue
        after = sigmas[i + 1]
        scale = 1.0 / math.hypot(after, data)
        noise = scale * math.sqrt(after**2 - lowest**2)
        rows.append(Row(**k, abar_next=schedule.abar(schedule.time(after)), a0=scale * data, s=noise))
    start = math.sqrt(1.0 - rows[0].abar)
    return StepTable("consistency", n, tuple(rows), start, continuous=True, data_scale=data)
