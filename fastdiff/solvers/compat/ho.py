"""The loops of the original DDPM (hojonathanho/diffusion) and of its port ermongroup/ddim, for ddpm and ddim.

DDPM over all its timesteps is the original code; DDIM, and DDPM with fewer steps, are those of the port. Over all
timesteps it is `fastdiff.solvers.ddpm` with the variance that the model names. The port differs:

- "uniform" visits 0, k, 2k, ... with k = T // steps, which can be more steps than were asked for, and starts below T-1.
- "quad" visits (i sqrt(0.8 T) / (steps-1))^2 cut to integers, so that t = 0 can come several times, to no effect.
- DDIM does not clip x_0. DDPM with fewer steps has the variance beta ("fixedlarge"), whatever the model's.
- A run of one step evaluates the network at t = 0.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from fastdiff.solvers.compat.run import FROM_MODEL, CompatOptions
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import ddpm_table
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Level, Walk


def ho_table(options: CompatOptions) -> StepTable:
    """Return the table of the original DDPM, or of ermongroup/ddim."""
    schedule = options.discrete()
    T = schedule.timesteps
    options.check_solver()
    kind = options.one_of("spacing", "uniform" if options.spacing is None else options.spacing, ("uniform", "quad"))
    n = options.count(T)
    whole = options.solver == "ddpm" and kind == "uniform" and n == T
    options.one_of("prediction", options.prediction, ("epsilon", "sample") if whole else ("epsilon",))
    c = 1.0 if options.solver == "ddpm" else None
    options.one_of("clip", options.clip, (FROM_MODEL, c))
    if kind == "uniform":
        ts = list(range(0, T, T // n))
    else:
        ts = [int(t) for t in np.linspace(0.0, math.sqrt(T * 0.8), n) ** 2]
    abar = [1.0, *(schedule.abar(t) for t in ts)]
    levels = [Level(float(t), *pair[::-1]) for t, pair in zip(ts, itertools.pairwise(abar), strict=True)]
    walk = Walk(tuple(levels[::-1]), options.prediction, c=math.inf if c is None else c, compat=True)
    if options.solver == "ddim":
        return ddim_table(walk, options.eta, "output")
    if whole:
        return ddpm_table(walk, options.named_variance(("posterior", "beta")))
    return ddpm_table(walk, options.one_of("variance", options.variance or "beta", ("beta",)))
