"""The step table that a call's options ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastdiff.checks import is_whole, shown
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.options import TABLE, Options
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat import CompatOptions, compat_table
from fastdiff.solvers.keys import clips, value_of
from fastdiff.solvers.paths import late_start, looks_back, starting_at
from fastdiff.solvers.registry import OPTIONS, SOLVERS, Solver
from fastdiff.solvers.walk import Schedule

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def step_table(o: Options, schedule: Schedule, prediction: str, scheduler_config: Mapping[str, Any]) -> StepTable:
    """Return the table that the options ask for; the model's scheduler configuration decides what they leave open.

    `fastdiff.sampler.choice.resolve` must have replaced solver="auto" and quality= before. Raises `InvalidArgument`
    for a wrong option, and `ConfigError` if compat="diffusers" does not support the scheduler configuration.
    """
    if isinstance(o.solver, StepTable):
        return _given_table(o, o.solver)
    solver = SOLVERS[o.solver]
    for option, instead in OPTIONS.items():
        value = getattr(o, option)
        if value != DEFAULTS[option] and option not in solver.options:
            owners = " or ".join(repr(name) for name, other in SOLVERS.items() if option in other.options)
            raise InvalidArgument(f"{option}={shown(value)} belongs to solver {owners}, not {o.solver!r}{instead}")
    if o.compat is not None:
        return _of_code_base(o, o.solver, schedule, prediction, scheduler_config)
    if o.spacing is not None and "spacing" not in solver.shared:
        raise InvalidArgument(f"spacing={shown(o.spacing)}: {o.solver} has its own spacing; leave it out")
    shared = shared_options(o, solver, schedule, prediction, scheduler_config)
    table = _build(solver, schedule, o.steps, o, scheduler_config, shared)
    if o.late is None:
        return table
    start = late_start(table, o.late)
    if not looks_back(table, start):
        return starting_at(table, start)
    # A multi-step solver has no history where the run starts, so its table is built anew for the later timesteps.
    later = [row.t for row in table.rows[start:] if not row.stage]
    shared.pop("steps_offset", None)
    shared["spacing"] = later if isinstance(schedule, NoiseSchedule) else [schedule.sigma(t) for t in later]
    return _build(solver, schedule, None, o, scheduler_config, shared)


def _given_table(o: Options, table: StepTable) -> StepTable:
    """Return the table that the caller gave, from its late start on; the other options must not contradict it."""
    same = dataclasses.replace(o, steps=None) if is_whole(o.steps) and o.steps == table.steps else o
    name = same.excluded_by(TABLE)
    if name is not None:
        raise InvalidArgument(f"{name}={shown(getattr(o, name))} cannot change a StepTable; leave it out")
    return table if o.late is None else starting_at(table, late_start(table, o.late))


def shared_options(
    o: Options, solver: Solver, schedule: Schedule, prediction: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options that all solvers share, from the call or else from the model."""
    clip, threshold, spacing = o.clip, None, o.spacing
    if isinstance(clip, str):
        clip = value_of(config, "clip_sample_range", 1.0) if clips(config) else None
        if value_of(config, "thresholding", False):
            share, largest = (
                value_of(config, "dynamic_thresholding_ratio", 0.995),
                value_of(config, "sample_max_value", 1),
            )
            threshold = (share, largest)
    if spacing is None and isinstance(schedule, NoiseSchedule) and not solver.own_spacing:
        spacing = value_of(config, "timestep_spacing", "trailing")
    shared = {"prediction": prediction, "clip": clip, "threshold": threshold, "spacing": spacing}
    if spacing == "leading":
        shared["steps_offset"] = value_of(config, "steps_offset", 0)
    return shared


def _build(
    solver: Solver,
    schedule: Schedule,
    steps: int | None,
    o: Options,
    config: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> StepTable:
    """Call the solver's function with those of the options that it takes."""
    own = {name: getattr(o, name) for name in solver.options}
    own = {name: value for name, value in own.items() if value is not None or DEFAULTS[name] is not None}
    model = {name: read(config) for name, read in solver.from_model.items() if name not in own}
    taken = {name: value for name, value in shared.items() if name in solver.shared}
    return solver.function(schedule, steps, **taken, **model, **own)


def _of_code_base(o: Options, name: str, schedule: Schedule, prediction: str, config: Mapping[str, Any]) -> StepTable:
    """Return the table of ``compat``, which may start late where that needs no other table."""
    assert o.compat is not None
    if o.churn is not None:
        raise InvalidArgument(f"compat={o.compat!r} has no churn={shown(o.churn)}; leave one of them out")
    options = CompatOptions(
        o.compat, name, schedule, prediction, config,
        steps=o.steps, eta=o.eta, variance=o.variance, order=o.order, spacing=o.spacing, clip=o.clip,
    )  # fmt: skip
    table = compat_table(options)
    start = 0 if o.late is None else late_start(table, o.late)
    if looks_back(table, start):
        raise InvalidArgument(f"compat={o.compat!r}: {name}, a multi-step solver, cannot start late; leave compat out")
    return starting_at(table, start)
