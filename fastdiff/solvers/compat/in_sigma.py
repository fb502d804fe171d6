"""The tables of diffusers' schedulers whose samples are x_0 + sigma eps: Euler, Heun, LMS, DPM2 and DPM++ SDE."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.solvers.adams import lms_table
from fastdiff.solvers.compat.sigmas import level_between, sigma_walk, spaced_by_sigma, times_of, training_sigmas
from fastdiff.solvers.compat.source import Source
from fastdiff.solvers.dpm2 import dpm2_table
from fastdiff.solvers.dpmpp_stages import dpmpp_sde_table
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Walk


def _single(source: Source, bounds: dict[str, Any], final: bool) -> Walk:
    """Return the walk of the schedulers in sigma; ``final``: whether there is a final_sigmas_type."""
    schedule = source.schedule()
    train = training_sigmas(schedule)
    end = 0.0
    continuous = final and source.get("timestep_type", "discrete") == "continuous"
    continuous = continuous and source.prediction() == "v_prediction"
    if source.sigmas is not None:
        sigmas, end = source.sigmas[:-1], float(source.sigmas[-1])
        t = 0.25 * np.log(sigmas) if continuous else times_of(sigmas, train)
        return _single_walk(source, t, sigmas, end, bounds, train, continuous)
    t = source.timesteps(len(train), "linspace", whole=False)
    sigmas = np.interp(t, np.arange(len(train)), train)
    if final and source.one_of("final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min":
        end = float(train[0])
    if final and source.one_of("interpolation_type", "linear", ("linear", "log_linear")) == "log_linear":
        sigmas = np.exp(np.linspace(math.log(train[-1]), math.log(train[0]), source.steps + 1))
    respaced = spaced_by_sigma(source, sigmas, train)
    if respaced is not None:
        t, sigmas = respaced
        t = t.round() if source.name.startswith("KDPM2") and source.get("use_karras_sigmas", False) else t
    elif len(sigmas) > source.steps and not continuous:  # log_linear has one sigma more, at which the last step ends
        sigmas, end = sigmas[:-1], float(sigmas[-1])
    if continuous:
        t = 0.25 * np.log(sigmas)
    return _single_walk(source, t, sigmas, end, bounds, train, continuous)


def _single_walk(
    source: Source,
    t: NDArray[np.float64],
    sigmas: NDArray[np.float64],
    end: float,
    bounds: dict[str, Any],
    train: NDArray[Any],
    continuous: bool = False,
) -> Walk:
    """Return the walk of a scheduler in sigma over these timesteps and noise levels."""
    abar = 1.0 / (1.0 + float(sigmas[0]) ** 2)
    scale = 1.0 if source.get("timestep_spacing", "linspace") == "leading" else math.sqrt(1.0 - abar)
    return sigma_walk(
        source,
        t,
        sigmas,
        end,
        bounds,
        init_scale=scale,
        output_scale=math.hypot(end, 1.0),
        continuous=continuous,
        between=partial(level_between, train),
    )


def euler(source: Source) -> StepTable:
    if source.config.get("prediction_type") == "original_sample":
        source = dataclasses.replace(source, config={**source.config, "prediction_type": "sample"})
    return euler_table(_single(source, {"c": math.inf}, final=True), "euler", 0.0)


def euler_ancestral(source: Source) -> StepTable:
    source.prediction(("epsilon", "v_prediction"))
    # This scheduler ignores these keys, which another one may have left in the configuration.
    ignored = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    source = dataclasses.replace(source, config={k: v for k, v in source.config.items() if k not in ignored})
    return euler_table(_single(source, {"c": math.inf}, final=False), "euler_ancestral", 1.0)


def heun(source: Source) -> StepTable:
    return heun_table(_single(source, source.bounds(False, thresholds=False), final=False))


def lms(source: Source) -> StepTable:
    return lms_table(_single(source, {"c": math.inf}, final=False), 4)


def _two_stages(source: Source) -> Walk:
    source.prediction(("epsilon", "v_prediction"))
    return _single(source, {"c": math.inf}, final=False)


def dpm2(source: Source) -> StepTable:
    return dpm2_table(_two_stages(source), "dpm2", 0.0)


def dpm2_ancestral(source: Source) -> StepTable:
    return dpm2_table(_two_stages(source), "dpm2_ancestral", 1.0)


def dpm_sde(source: Source) -> StepTable:
    return dpmpp_sde_table(_two_stages(source), 1.0)
