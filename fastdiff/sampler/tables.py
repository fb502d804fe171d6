"""The step table that a call's options ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fastdiff import solvers
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.options import Options
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.run import FROM_MODEL, VARIANCES, Run
from fastdiff.solvers.paths import late_start, looks_back, starting_at
from fastdiff.solvers.walk import Schedule


def step_table(
    o: Options,
    schedule: Schedule,
    prediction: str,
    scheduler_config: Mapping[str, Any],
) -> StepTable:
    """Return the table that the options ask for; the model's scheduler configuration decides what they leave open.

    ``solver`` must be a name or a table: `fastdiff.sampler.choice.resolve` replaces "auto" and quality= before.
    """
    config = scheduler_config
    if isinstance(o.solver, StepTable):
        given = {"eta": o.eta != 0.0, "variance": o.variance is not None, "spacing": o.spacing is not None}
        given |= {"steps": o.steps not in (None, o.solver.steps), "clip": o.clip != FROM_MODEL}
        given |= {"order": o.order is not None, "compat": o.compat is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise InvalidArgument(f"{name}={getattr(o, name)!r} cannot change a StepTable; leave it out")
        return o.solver if o.late is None else starting_at(o.solver, late_start(o.solver, o.late))
    if o.solver not in SOLVERS:
        raise InvalidArgument(f"solver={o.solver!r} is unknown; allowed: {', '.join(SOLVERS)}, or a StepTable")
    name = str(o.solver)
    for option, (owners, is_given, instead) in OWNERS.items():
        if is_given(o) and name not in owners:
            owner = " or ".join(map(repr, owners))
            raise InvalidArgument(f"{option}={getattr(o, option)!r} belongs to solver {owner}, not {name!r}{instead}")
    if o.compat is not None:
        return _of_code_base(o, name, schedule, prediction, config)
    clip, threshold = o.clip, None
    if isinstance(clip, str):
        if clip != FROM_MODEL:
            raise InvalidArgument(f"clip={clip!r}: a positive number, None or {FROM_MODEL!r} is needed")
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None
        if config.get("thresholding"):
            threshold = (config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
    spacing = o.spacing
    if spacing is None and isinstance(schedule, NoiseSchedule):
        spacing = config.get("timestep_spacing", "trailing")
    common: dict[str, Any] = {"prediction": prediction, "clip": clip, "threshold": threshold, "spacing": spacing}
    if spacing == "leading":
        common["steps_offset"] = config.get("steps_offset", 0)
    if o.order is not None:
        common["order"] = o.order
    table = TABLES[name](schedule, o, config, common)
    if o.late is None:
        return table
    start = late_start(table, o.late)
    if not looks_back(table, start):
        return starting_at(table, start)
    # A multi-step solver starts anew, at its lowest order, where the run does.
    later = [row.t for row in table.rows[start:] if not row.stage]
    spacing = later if isinstance(schedule, NoiseSchedule) else [schedule.sigma(t) for t in later]
    kept = {k: v for k, v in common.items() if k != "steps_offset"}
    return TABLES[name](schedule, dataclasses.replace(o, steps=None), config, {**kept, "spacing": spacing})


def _of_code_base(o: Options, name: str, schedule: Schedule, prediction: str, config: Mapping[str, Any]) -> StepTable:
    """The table of ``compat``, which may start late where that needs no other table."""
    assert o.compat is not None
    table = Run(
        o.compat, name, schedule, prediction, config,
        steps=o.steps, eta=o.eta, variance=o.variance, order=o.order, spacing=o.spacing, clip=o.clip,
    ).table()  # fmt: skip
    start = 0 if o.late is None else late_start(table, o.late)
    if looks_back(table, start):
        raise InvalidArgument(f"compat={o.compat!r}: {name}, a multi-step solver, cannot start late; leave compat out")
    return starting_at(table, start)


Build = Callable[[Any, Options, Mapping[str, Any], dict[str, Any]], StepTable]


def _ddim(schedule: Schedule, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    return solvers.ddim(schedule, o.steps, eta=o.eta, set_alpha_to_one=config.get("set_alpha_to_one", True), **common)


def _ddpm(schedule: Schedule, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    named = config.get("variance_type", "fixed_small")
    if o.variance is None and named not in VARIANCES:
        raise InvalidArgument(f"the model's variance_type {named!r} is not supported; give variance=")
    return solvers.ddpm(schedule, o.steps, variance=o.variance or VARIANCES[named], **common)


def _lcm(schedule: Any, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    scaling = config.get("timestep_scaling", 10.0)
    T = schedule.timesteps if isinstance(schedule, NoiseSchedule) else 1
    original = config.get("original_inference_steps", min(50, T))
    kept = {k: v for k, v in common.items() if k not in ("spacing", "steps_offset")}
    return solvers.lcm(schedule, o.steps, original_steps=original, timestep_scaling=scaling, spacing=o.spacing, **kept)


def _consistency(schedule: Any, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    if o.spacing is not None:
        raise InvalidArgument(f"spacing={o.spacing!r}: consistency has its own spacing; leave it out")
    return solvers.consistency(schedule, o.steps, clip=common["clip"])


def _plain(build: Callable[..., StepTable]) -> Build:
    return lambda schedule, o, config, common: build(schedule, o.steps, **common)


TABLES: dict[str, Build] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "dpmpp_1": _plain(solvers.dpmpp_1),
    "dpmpp_2m": _plain(solvers.dpmpp_2m),
    "dpmpp_3m": _plain(solvers.dpmpp_3m),
    "dpmpp_2m_sde": _plain(solvers.dpmpp_2m_sde),
    "unipc": _plain(solvers.unipc),
    "euler": _plain(solvers.euler),
    "euler_ancestral": _plain(solvers.euler_ancestral),
    "heun": _plain(solvers.heun),
    "lms": _plain(solvers.lms),
    "deis": _plain(solvers.deis),
    "plms": _plain(solvers.plms),
    "lcm": _lcm,
    "consistency": _consistency,
}
SOLVERS = ("auto", *TABLES)

# Options of some solvers: whose they are, whether they are given, and what another solver has instead.
OWNERS: dict[str, tuple[tuple[str, ...], Callable[[Options], bool], str]] = {
    "eta": (("ddim",), lambda o: o.eta != 0.0, "; the noise of ddpm is variance"),
    "variance": (("ddpm",), lambda o: o.variance is not None, "; the noise of ddim is eta"),
    "order": (("unipc", "deis", "lms"), lambda o: o.order is not None, "; dpmpp_1 to dpmpp_3m say theirs"),
}
