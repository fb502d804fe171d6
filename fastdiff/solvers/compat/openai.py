"""The loops of improved- and guided-diffusion (OpenAI): SpacedDiffusion, for the solvers ddpm and ddim.

These code bases recompute the betas from the kept abar, and take eps from the clipped x_0; both are what `ddpm` and
`ddim` do by default. Two things differ:

- Timesteps are those of ``space_timesteps``: "n" is n timesteps evenly spaced from T-1 to 0, rounded from a running
  sum; "ddimN" is N timesteps from 0 on with the smallest stride that gives so many; "a,b,c" are a, b and c timesteps
  in equal sections of the schedule.
- A run of one step evaluates the network at t = 0, although its input is pure noise.
"""

from __future__ import annotations

import itertools

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.compat.run import FROM_MODEL, CompatOptions
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import ddpm_table
from fastdiff.solvers.keys import value_of
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Walk


def openai_table(options: CompatOptions) -> StepTable:
    """Return the table of ``p_sample_loop`` (ddpm) or ``ddim_sample_loop`` (ddim)."""
    schedule = options.discrete()
    options.check_solver()
    prediction = options.one_of("prediction", options.prediction, ("epsilon", "sample"))
    clip = options.clip
    if clip == FROM_MODEL:
        clip = 1.0 if value_of(options.config, "clip_sample", True) else None
    walk = Walk.of(
        schedule,
        options.steps if options.spacing is not None else None,
        spacing=_respaced(options, schedule.timesteps),
        prediction=prediction,
        clip=options.one_of("clip", clip, (1.0, None)),  # clip_denoised
    )
    if options.solver == "ddim":
        return ddim_table(walk, options.eta, "clipped")
    return ddpm_table(walk, options.named_variance(("posterior", "beta", "learned_range")))


def _respaced(options: CompatOptions, T: int) -> list[float]:
    """Return ``space_timesteps(T, timestep_respacing)`` of those code bases, falling."""
    respacing = options.spacing
    if respacing is None:
        respacing = str(options.count(T))
    head, _, stride = respacing.partition("ddim") if isinstance(respacing, str) else ("?", "", "")
    counts = [stride] if not head else str(respacing).split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts):
        raise InvalidArgument(
            f"spacing={shown(options.spacing)}: with compat='openai' it is a timestep_respacing, as '250', 'ddim50', "
            "'10,20,30'"
        )
    numbers = [int(count) for count in counts]
    if not head:
        for k in range(1, T):
            if len(range(0, T, k)) == numbers[0]:
                return [float(t) for t in range(0, T, k)][::-1]
        raise InvalidArgument(f"spacing={shown(respacing)}: no whole stride visits {numbers[0]} of {T} timesteps")
    ts: list[int] = []
    sizes = [T // len(numbers) + (i < T % len(numbers)) for i in range(len(numbers))]
    for start, size, count in zip(itertools.accumulate(sizes, initial=0), sizes, numbers, strict=False):
        if count > size:
            raise InvalidArgument(f"spacing={shown(respacing)}: a section of {size} timesteps cannot give {count}")
        at = 0.0  # a running sum, so that it rounds as theirs does
        for _ in range(count):
            ts.append(start + round(at))
            at += (size - 1) / (count - 1) if count > 1 else 1.0
    if not ts:
        raise InvalidArgument(f"spacing={shown(respacing)} visits no timestep; at least one is needed")
    return [float(t) for t in reversed(ts)]
