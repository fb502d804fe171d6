"""The tables of diffusers' schedulers of continuous noise levels: EDM and consistency models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastdiff.solvers.compat.multistep import dpm_table, order_of
from fastdiff.solvers.compat.sigmas import sigma_walk
from fastdiff.solvers.compat.source import Source
from fastdiff.solvers.consistency import consistency, consistency_table
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.spacing import SIGMA_SPACINGS, spaced_sigmas
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Walk

EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "v_prediction"}  # diffusers' names, and those of fastdiff


def _edm_walk(source: Source, bounds: dict[str, Any]) -> Walk:
    schedule = _edm_schedule(source)
    kind = source.one_of("sigma_schedule", "karras", SIGMA_SPACINGS)
    if kind == "karras":
        sigmas = spaced_sigmas(kind, source.steps, schedule.sigma_max, schedule.sigma_min, schedule.rho)
    else:  # unlike `spaced_sigmas`, from the smallest on: a run of one step has sigma_min
        ends = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        sigmas = np.exp(np.linspace(*ends, source.steps))[::-1]
    final = source.one_of("final_sigmas_type", "zero", ("zero", "sigma_min"))
    end = 0.0 if final == "zero" else sigmas[-1] if source.name == "EDMEulerScheduler" else schedule.sigma_min
    data = schedule.sigma_data
    prediction = EDM_PREDICTIONS[source.prediction(tuple(EDM_PREDICTIONS))]
    return sigma_walk(
        source,
        [schedule.time(s) for s in sigmas.tolist()],
        sigmas / data,
        float(end) / data,
        {**bounds, "c": bounds["c"] / data},
        prediction,
        init_scale=math.hypot(schedule.sigma_max, 1.0) / math.hypot(float(sigmas[0]), data),
        data_scale=data,
        output_scale=math.hypot(float(end) / data, 1.0),
        continuous=True,
    )


def _edm_schedule(source: Source, **more: float) -> EDMSchedule:
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    return EDMSchedule(**{name: source.config[name] for name in names if name in source.config}, **more)


def edm_euler(source: Source) -> StepTable:
    return euler_table(_edm_walk(source, {"c": math.inf}), "euler", 0.0)


def edm_dpm(source: Source) -> StepTable:
    if order_of(source) == 3 and source.get("algorithm_type", "") == "sde-dpmsolver++":
        raise source.refuse("algorithm_type", "diffusers fails with solver_order=3")
    return dpm_table(source, _edm_walk(source, source.bounds(None)))


def consistency_models(source: Source) -> StepTable:
    source.only(s_noise=1.0)
    train = source.get("num_train_timesteps", 40)
    clip = 1.0 if source.get("clip_denoised", True) else None
    schedule = _edm_schedule(source, time_scale=1000.0)
    if source.times is None:
        return consistency(schedule, source.steps, train_steps=train, clip=clip)
    # diffusers' timesteps count the noise levels from the largest one on, and the last of them comes first.
    return consistency_table(schedule, np.trunc(source.times[::-1]).astype(np.int64), train, clip)
