"""The tables of diffusers' schedulers in timesteps: DDPM, DDIM and its inverse, PNDM, LCM and TCD."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import checks
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.compat.source import Source
from fastdiff.solvers.consistency import lcm_table, tcd_table
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import VARIANCE_TYPES, ddpm_table
from fastdiff.solvers.plms import plms_table
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Level, Walk


def ddpm(source: Source) -> StepTable:
    schedule = source.schedule()
    kind = source.get("variance_type", "fixed_small")
    if kind in ("learned", "fixed_large_log"):
        raise source.refuse("variance_type", f"supported are {', '.join(VARIANCE_TYPES)}, fixed_small_log")
    variance = VARIANCE_TYPES.get(kind, "posterior")  # as diffusers, for a name that it does not know
    t = source.timesteps(schedule.timesteps, "leading")
    walk = _discrete(source, schedule, t, [*t[1:], -1], 1.0, source.bounds(True))
    return ddpm_table(walk, variance, last_beta=bool(t[-1] > 0))


def ddim(source: Source) -> StepTable:
    schedule = source.schedule()
    t = source.timesteps(schedule.timesteps, "leading")
    final = 1.0 if source.get("set_alpha_to_one", True) else schedule.abar(0)
    walk = _discrete(source, schedule, t, t - schedule.timesteps // source.steps, final, source.bounds(True))
    return ddim_table(walk, source.eta, "clipped" if source.use_clipped else "output")


def pndm(source: Source) -> StepTable:
    if not source.get("skip_prk_steps", False):
        raise source.refuse("skip_prk_steps", "PNDM's Runge-Kutta start is not; skip_prk_steps=true is PLMS")
    schedule = source.schedule()
    t = source.timesteps(schedule.timesteps, "leading")
    if len(t) > 1:
        t = np.array([t[0], t[1], *t[1:]])  # the second timestep comes twice
    table = _plms_from(source, schedule, t)
    if source.start == 0:
        return table
    checks.whole("start", source.start, 0, len(table) - 1, of="the rows of the table")
    late = _plms_from(source, schedule, t[source.start :])
    before = [*table.rows[: source.start]]
    before[-1] = before[-1]._replace(abar_next=late.rows[0].abar)
    return dataclasses.replace(table, rows=(*before, *late.rows))


def _plms_from(source: Source, schedule: NoiseSchedule, t: NDArray[np.float64]) -> StepTable:
    """Return PLMS's table for diffusers' timesteps, of which the second repeats the first step from its end.

    A run that starts in the middle does so with other timesteps than it was meant for, and its steps then end one
    timestep early, as in diffusers.
    """
    stride = schedule.timesteps // source.steps
    prediction = source.prediction(("epsilon", "v_prediction"))
    final = 1.0 if source.get("set_alpha_to_one", False) else schedule.abar(0)
    own = np.array([t[0], *t[2:]])
    walk = _discrete(source, schedule, own, own - stride, final, {"c": math.inf})
    stage = None
    if len(t) > 1:
        start = t[1] + stride
        if start > schedule.timesteps - 1:
            raise source.fails(f"its second step starts from timestep {start:g}")
        at = schedule.abar(t[1])
        stage = Level(float(start), schedule.abar(start), at), Level(float(t[1]), at, at)
    return plms_table(walk, mix_outputs=prediction == "v_prediction", stage=stage)


def ddim_inverse(source: Source) -> StepTable:
    """Return the table of DDIM from less to more noise: x' = a_t x_0 + s_t eps, both predicted at the step's start."""
    schedule = source.schedule()
    T, n = schedule.timesteps, checks.whole("steps", source.steps, 1, schedule.timesteps, of="the schedule's timesteps")
    spacing = source.one_of("timestep_spacing", "leading", ("leading", "trailing"))
    if source.times is not None:
        t = source.times[::-1]
    elif spacing == "leading":
        t = np.arange(n) * (T // n) + source.get("steps_offset", 0)
    else:
        t = np.arange(T, 0, -T / n)[::-1].round() - 1
    if (source.times is None and len(t) != n) or t[0] < 0 or t[-1] > T - 1:
        raise source.fails(f"its timesteps {t[0]:g} .. {t[-1]:g} leave 0 .. {T - 1}")
    prediction, image = source.prediction(), 1.0 if source.get("set_alpha_to_one", True) else schedule.abar(0)
    starts = [schedule.abar(p) if p >= 0 else image for p in (t - T // n).tolist()]
    if prediction == "sample" and max(starts) == 1.0:
        raise source.refuse("set_alpha_to_one", "the image x_0 says nothing about eps where there is no noise")
    levels = tuple(Level(p, start, schedule.abar(p)) for p, start in zip(t.tolist(), starts, strict=True))
    walk = Walk(levels, prediction, compat=True, ascending=True, **source.bounds(True, thresholds=False))
    rows = []
    for i, level in enumerate(levels):
        ex, eo = eps_coefficients(prediction, level.abar)
        rows.append(walk.row(i, x=level.s_next * ex, out=level.s_next * eo, x0=level.a_next))
    return walk.table("ddim_inversion", rows)


def lcm(source: Source) -> StepTable:
    schedule = source.schedule()
    t = source.distilled(schedule.timesteps)
    walk = _discrete(source, schedule, t, [*t[1:], -1], 1.0, source.bounds(False))
    return lcm_table(walk, float(source.get("timestep_scaling", 10.0)))


def tcd(source: Source) -> StepTable:
    schedule = source.schedule()
    t = source.distilled(schedule.timesteps)
    walk = _discrete(source, schedule, t, [*t[1:], 0], 1.0, {"c": math.inf})
    return tcd_table(walk, source.eta, [schedule.abar(math.floor((1.0 - source.eta) * p)) for p in [*t[1:], 0]])


def _discrete(
    source: Source,
    schedule: NoiseSchedule,
    t: NDArray[np.float64],
    after: Sequence[float] | NDArray[np.float64],
    final: float,
    bounds: dict[str, Any],
) -> Walk:
    """Return a walk over whole timesteps ``t`` whose steps end at those of ``after``, or at ``final`` if negative."""
    ends = [final if p < 0 else schedule.abar(float(p)) for p in after]
    levels = tuple(Level(float(v), schedule.abar(float(v)), end) for v, end in zip(t, ends, strict=True))
    return Walk(levels, source.prediction(), compat=True, **bounds)
