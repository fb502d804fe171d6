"""The tables of diffusers' DPM-Solver++, UniPC and DEIS, whose samples are variance-preserving."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from fastdiff import checks
from fastdiff.errors import ConfigError
from fastdiff.solvers.adams import deis_table
from fastdiff.solvers.arguments import check_order
from fastdiff.solvers.compat.flow import flow_multistep
from fastdiff.solvers.compat.sigmas import sigma_walk, spaced_by_sigma, training_sigmas
from fastdiff.solvers.compat.source import TIMESTEP_SPACINGS, Source
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.singlestep import singlestep_table
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.unipc import unipc_table
from fastdiff.solvers.walk import Level, Walk


def _multistep(source: Source, final: str | None, floor: bool, bounds: dict[str, Any]) -> Walk:
    """Return the walk of DPMSolverMultistep, UniPC and DEIS, which compute one timestep more and drop t = 0.

    ``final`` is the default of final_sigmas_type; None where the scheduler does not have it and ends as at "sigma_min".
    ``floor``: at "sigma_min" a spacing by sigma ends at its own last sigma, instead of that of timestep 0.
    """
    schedule = source.schedule()
    train = training_sigmas(schedule)
    if source.get("use_flow_sigmas", False):
        return flow_multistep(source, train, final, bounds)
    source.only(use_dynamic_shifting=False, shift_terminal=None)
    single = source.name == "DPMSolverSinglestepScheduler"  # which has no other timesteps than "linspace"
    dpm = single or source.name == "DPMSolverMultistepScheduler"
    if single:
        source = dataclasses.replace(source, config={**source.config, "timestep_spacing": "linspace"})
    lowest = source.get("lambda_min_clipped", -math.inf) if dpm else -math.inf
    top = len(train) - int(np.searchsorted(-np.log(train)[::-1], lowest))
    t = source.timesteps(len(train), "linspace", skip_last=True, top=top)
    respaced = spaced_by_sigma(source, train[::-1], train)
    sigmas = np.interp(t, np.arange(len(train)), train)
    end = train[0]
    if respaced is not None:
        t, sigmas = respaced
        # diffusers rounds Karras' timesteps, and cuts all of them to int64.
        cosine = dpm and not single and source.config.get("beta_schedule") == "squaredcos_cap_v2"
        t = np.floor(t.round() if (source.lu or source.get("use_karras_sigmas", False)) and not cosine else t)
        end = sigmas[-1] if floor else end
    if final is not None and source.one_of("final_sigmas_type", final, ("zero", "sigma_min")) == "zero":
        end = 0.0
    return sigma_walk(source, t, sigmas, float(end), bounds)


def order_of(source: Source, default: int = 2) -> int:
    return check_order(source.get("solver_order", default), 3, name=f"{source.name}: solver_order", error=ConfigError)


def dpm(source: Source) -> StepTable:
    return dpm_table(source, _multistep(source, final="zero", floor=False, bounds=source.bounds(None)))


def dpm_inverse(source: Source) -> StepTable:
    """Return the table of DPM-Solver++ over rising levels, from that of the first timestep to the noisiest one."""
    source.only(use_flow_sigmas=False)
    if source.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
        raise source.refuse("algorithm_type", "diffusers' noise is then NaN, as the SDE has no inverse")
    train = training_sigmas(source.schedule())
    T, n = len(train), checks.whole("steps", source.steps, 1, len(train), of="the schedule's timesteps")
    top = T - int(np.searchsorted(-np.log(train)[::-1], source.get("lambda_min_clipped", -math.inf)))
    spacing = source.one_of("timestep_spacing", "linspace", TIMESTEP_SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, top - 1, n + 1).round()[:-1]
    elif spacing == "leading":
        t = np.arange(n) * float(top // (n + 1)) + source.get("steps_offset", 0)
    else:
        t = np.arange(top, 0, -T / n).round()[::-1] - 1
    respaced = spaced_by_sigma(source, train, train)
    if respaced is None:
        sigmas, end = np.interp(t, np.arange(T), train), float(train[top - 1])
    else:
        t, sigmas = respaced
        t, end = t.round() if source.get("use_karras_sigmas", False) else t, float(sigmas[-1])
    t = np.floor(np.unique(t))  # so that rounding to a timestep twice cuts the run short, as in diffusers
    ends = [*sigmas.tolist(), end][: len(t) + 1]
    if t[0] < 0 or t[-1] > T - 1 or not (np.diff(ends[:-1]) > 0).all():
        raise source.fails(f"its noise levels for {n} steps repeat, or leave the schedule")
    if len(t) > 1 and t[0] == t[1]:  # its run begins at the second of them
        raise source.fails(f"its first timestep {t[0]:g} for {n} steps comes twice, so that the run leaves its levels")
    abar = [1.0 / (1.0 + s * s) for s in ends]
    levels = tuple(Level(float(p), a, b) for p, (a, b) in zip(t, itertools.pairwise(abar), strict=True))
    walk = Walk(
        levels, source.prediction(), compat=True, ascending=True, start=source.start, **source.bounds(None)
    )  # fmt: skip
    return dpm_table(source, walk)


def dpm_table(source: Source, walk: Walk) -> StepTable:
    algorithm = source.one_of("algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis"))
    solver_type = source.get("solver_type", "midpoint")
    order, sde = order_of(source), algorithm == "sde-dpmsolver++"
    return dpmpp_table(
        walk,
        ("dpmpp_1", "dpmpp_2m", "dpmpp_3m")[order - 1] + ("_sde" if sde else ""),
        order,
        "midpoint" if solver_type in ("logrho", "bh1", "bh2") else solver_type,
        source.get("lower_order_final", True),
        source.get("euler_at_final", False),
        sde,
        authors=True,
        sign=True,
    )


def unipc(source: Source) -> StepTable:
    source.only(predict_x0=True, solver_p=None)
    walk = _multistep(source, final="zero", floor=True, bounds=source.bounds(None))
    order, lower = order_of(source), source.get("lower_order_final", True)
    if not lower and order > 1 and walk.levels[-1].abar_next == 1.0:
        raise source.refuse("lower_order_final", "diffusers' last step to sigma = 0 is then NaN")
    solver_type = source.get("solver_type", "bh2")
    solver_type = "bh2" if solver_type in ("midpoint", "heun", "logrho") else solver_type
    return unipc_table(walk, order, solver_type, source.get("disable_corrector", ()), lower)


def deis(source: Source) -> StepTable:
    walk = _multistep(source, final=None, floor=True, bounds=source.bounds(None))
    return deis_table(walk, order_of(source), source.get("lower_order_final", True))


def dpm_singlestep(source: Source) -> StepTable:
    source.one_of("algorithm_type", "dpmsolver++", ("dpmsolver++", "deis"))
    walk = _multistep(source, final="zero", floor=False, bounds=source.bounds(None))
    order, n = order_of(source), source.steps
    lower = source.get("lower_order_final", False) or n % order > 0 or walk.levels[-1].abar_next == 1.0
    orders = [i % order + 1 for i in range(n)]
    if lower and order == 3:
        orders = [*orders[: n - n % 3 - (0 if n % 3 else 3)], *{0: (1, 2, 1), 1: (1,), 2: (1, 2)}[n % 3]]
    elif lower and order == 2:
        orders[-1] = 1
    if walk.levels[-1].abar_next == 1.0:
        orders[-1] = 1
    for i in range(source.start, n):  # a run that starts within a group has no earlier values of x_0
        orders[i] = min(orders[i], i - source.start + 1)
    kind = source.get("solver_type", "midpoint")
    return singlestep_table(walk, f"dpmpp_{order}s", orders, "midpoint" if kind in ("logrho", "bh1", "bh2") else kind)
