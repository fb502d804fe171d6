"""Few-step samplers of distilled networks: consistency models (Song et al. 2023), latent consistency (Luo et al. 2023).

Each row goes to an image and back to the next level with fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.spacing import spaced_sigmas
from fastdiff.solvers.table import Row, StepTable, check_clip, is_number
from fastdiff.solvers.walk import Walk


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
    """Latent consistency models' multi-step sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3), by default of 4
    steps. With tau = ``timestep_scaling`` t and sigma_data = 1/2,

        f   = c_skip x + c_out x_0,     c_skip = sigma_data^2 / (tau^2 + sigma_data^2)
                                        c_out  = tau / sqrt(tau^2 + sigma_data^2)
        x_p = a_p f + s_p z;   f itself at the end

    spacing
        A list of timesteps; None: every (original_steps / steps)-th of the ``original_steps`` that the network was
        distilled at, from T-1 down.

    prediction, clip and threshold are those of `Walk.of`; clip is None by default. Raises `InvalidArgument`.
    """
    if isinstance(schedule, EDMSchedule):
        raise InvalidArgument("lcm needs a discrete NoiseSchedule; consistency runs an EDMSchedule")
    if spacing is None or isinstance(spacing, str):
        if spacing is not None:
            raise InvalidArgument(f"spacing={spacing!r}: lcm has its own spacing (None), or takes a list of timesteps")
        original = min(50, schedule.timesteps) if original_steps is None else original_steps
        spacing, steps = lcm_timesteps(schedule.timesteps, 4 if steps is None else steps, original), None
    if not is_number(timestep_scaling) or not 0.0 < timestep_scaling < math.inf:
        raise InvalidArgument(f"timestep_scaling={timestep_scaling!r}: a positive number is needed")
    walk = Walk.of(schedule, steps, spacing=spacing, prediction=prediction, clip=clip, threshold=threshold)
    return lcm_table(walk, timestep_scaling)


def lcm_timesteps(T: int, steps: int, original_steps: int) -> list[float]:
    """The timesteps floor(i original_steps / steps), i = 0 .. steps-1, of T/original_steps k - 1 from the top."""
    for name, value, most in (("original_steps", original_steps, T), ("steps", steps, original_steps)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
            raise InvalidArgument(f"{name}={value!r}: a whole number from 1 to {most} is needed")
    origin = (np.arange(1, original_steps + 1) * (T // original_steps) - 1)[::-1]
    chosen = np.floor(np.linspace(0, original_steps, num=steps, endpoint=False)).astype(np.int64)
    return [float(t) for t in origin[chosen]]


def lcm_table(walk: Walk, timestep_scaling: float) -> StepTable:
    """The table over a walk."""
    rows = []
    for i, level in enumerate(walk.levels):
        tau = level.t * timestep_scaling
        skip, out = 0.25 / (tau * tau + 0.25), tau / math.sqrt(tau * tau + 0.25)
        rows.append(walk.row(i, x=level.a_next * skip, x0=level.a_next * out, z=level.s_next))
    return walk.table("lcm", rows)


def consistency(
    schedule: EDMSchedule | None = None,
    steps: int | None = None,
    *,
    train_steps: int = 40,
    clip: float | None = 1.0,
) -> StepTable:
    """Consistency models' multi-step sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1), by default one. With
    sigma_0 = ``schedule.sigma_min`` and the boundary condition of appendix C,

        f   = c_skip x + c_out F,    c_skip = sigma_data^2 / ((sigma - sigma_0)^2 + sigma_data^2)
                                     c_out  = (sigma - sigma_0) sigma_data / sqrt(sigma^2 + sigma_data^2)
        x_p = clip(f) + sqrt(sigma_p^2 - sigma_0^2) z;   clip(f) itself at the end

    The levels are those of ``train_steps`` in Karras' spacing, as far apart as ``steps`` allow. Raises
    `InvalidArgument`.
    """
    schedule = EDMSchedule(time_scale=1000.0) if schedule is None else schedule
    if not isinstance(schedule, EDMSchedule):
        raise InvalidArgument(f"consistency needs an EDMSchedule, not a {type(schedule).__name__}")
    n = 1 if steps is None else steps
    for name, value, least, most in (("train_steps", train_steps, 2, 100_000), ("steps", n, 1, train_steps)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
            raise InvalidArgument(f"{name}={value!r}: a whole number from {least} to {most} is needed")
    data, lowest = schedule.sigma_data, schedule.sigma_min
    every = spaced_sigmas("karras", train_steps, schedule.sigma_max, lowest, schedule.rho)
    sigmas = every[np.arange(n) * (train_steps // n)].tolist()
    c = check_clip(clip) / data
    rows = []
    for i, sigma in enumerate(sigmas):
        # The state is y = x / root, and x0 of the table f / data.
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
