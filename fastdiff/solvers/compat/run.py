"""The table of another code base's own sampling loop, quirks included: ``sample(..., compat=...)``.

The default is the right mathematics; these reproduce what a code base draws from the same noise. Options then speak
its language: ``spacing`` is a timestep_spacing, timestep_respacing or skip_type. The network's conventions follow from
the checkpoint and need no option (`fastdiff.checkpoints.layouts`, ``timestep_scale`` for rescaled timesteps).

"diffusers": the scheduler of the solver's name with the model's scheduler_config, as its ``from_config`` makes it; the
quirks are listed in `fastdiff.solvers.compat`.

"openai": improved- and guided-diffusion, SpacedDiffusion's ``p_sample_loop`` (ddpm) and ``ddim_sample_loop`` (ddim).
Betas recomputed from the kept abar, variances, and the eps of the clipped x_0 are the right mathematics. Quirks:

- Timesteps are those of ``space_timesteps``: evenly spaced from T-1 to 0, rounded from a running sum; "ddimN" has the
  smallest stride that gives N of them, from 0 on; "a,b,c" are so many in equal sections of the timesteps.
- One step visits t = 0, where the network is not told of the pure noise that it is shown.

"ho": the original DDPM (hojonathanho/diffusion) over all its timesteps, and ermongroup/ddim, its port, for "ddim" and
for fewer steps. Over all timesteps ddpm is the right mathematics, with the variance that the model names. Quirks:

- "uniform" visits 0, k, 2k, ... with k = T // steps, which can be more steps than were asked for, and starts below T-1.
- "quad" visits (i sqrt(0.8 T) / (steps-1))^2 cut to integers, so that t = 0 can come several times, to no effect.
- ddim does not bound x_0. ddpm with fewer steps has fixedlarge's variance, whatever the model's.
- One step visits t = 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.compat.diffusers import from_config
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import ddpm_table
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.spacing import SIGMA_SPACINGS
from fastdiff.solvers.table import StepTable, check_clip
from fastdiff.solvers.walk import Level, Schedule, Walk

FROM_MODEL = "model"  # the clip that means the model's
VARIANCES = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned_range"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is asked to be, as in `fastdiff.Sampler.sample`; config: the model's scheduler configuration."""

    code_base: str
    solver: str
    schedule: Schedule
    prediction: str
    config: Mapping[str, Any]
    steps: int | None = None
    eta: float = 0.0
    variance: str | None = None
    order: int | None = None
    spacing: str | Sequence[float] | None = None
    clip: float | str | None = FROM_MODEL

    def table(self) -> StepTable:
        """The code base's table. Raises `InvalidArgument` for what it does not have, naming what it has."""
        if not isinstance(self.code_base, str) or self.code_base not in CODE_BASES:
            raise InvalidArgument(f"compat={self.code_base!r} is unknown; allowed: {', '.join(CODE_BASES)}, or None")
        if not (isinstance(self.clip, str) and self.clip == FROM_MODEL):
            check_clip(self.clip)  # type: ignore[arg-type]  # refuses other strings
        return CODE_BASES[self.code_base](self)

    def one_of(self, name: str, value: Any, allowed: Sequence[Any]) -> Any:
        if not isinstance(value, (str, int, float, type(None))) or value not in allowed:
            has = ", ".join(map(str, allowed))
            raise InvalidArgument(f"compat={self.code_base!r} has no {name}={value!r} with {self.solver}; it has {has}")
        return value

    def discrete(self) -> NoiseSchedule:
        if not isinstance(self.schedule, NoiseSchedule):
            raise InvalidArgument(f"compat={self.code_base!r} has no EDM networks; compat='diffusers' has")
        return self.schedule

    def count(self, T: int, default: int) -> int:
        """The number of steps, 1 to T."""
        n = default if self.steps is None else self.steps
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= T:
            raise InvalidArgument(f"steps={n!r}: a whole number from 1 to {T}, the schedule's timesteps, is needed")
        return int(n)

    def default_steps(self) -> int:
        if isinstance(self.schedule, EDMSchedule):
            return 1 if self.solver == "consistency" else 18
        T = self.schedule.timesteps
        return {"ddpm": T, "lcm": 4, "consistency": 1}.get(self.solver, min(50, T))

    def named_variance(self, allowed: Sequence[str]) -> str:
        named = self.config.get("variance_type", "fixed_small")
        return self.one_of("variance", self.variance or VARIANCES.get(named, named), allowed)


# diffusers ------------------------------------------------------------------------------------------------------------

DPM, ODE = "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}
# The scheduler of a solver, what its name says of the configuration, and whether it has spacings by sigma.
SCHEDULERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "ddpm": ("DDPMScheduler", {}, False),
    "ddim": ("DDIMScheduler", {}, False),
    "dpmpp_1": (DPM, {**ODE, "solver_order": 1}, True),
    "dpmpp_2m": (DPM, {**ODE, "solver_order": 2}, True),
    "dpmpp_3m": (DPM, {**ODE, "solver_order": 3}, True),
    "dpmpp_2m_sde": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, True),
    "unipc": ("UniPCMultistepScheduler", {}, True),
    "euler": ("EulerDiscreteScheduler", {}, True),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, False),
    "heun": ("HeunDiscreteScheduler", {}, True),
    "lms": ("LMSDiscreteScheduler", {}, True),
    "deis": ("DEISMultistepScheduler", {}, True),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, False),
    "lcm": ("LCMScheduler", {}, False),
    "consistency": ("CMStochasticIterativeScheduler", {}, False),
}
EDM = {DPM: "EDMDPMSolverMultistepScheduler", "EulerDiscreteScheduler": "EDMEulerScheduler"}
EDM |= {"CMStochasticIterativeScheduler": "CMStochasticIterativeScheduler"}


def _diffusers(run: Run) -> StepTable:
    name, own, by_sigma = SCHEDULERS[run.solver]
    config: dict[str, Any] = {**run.config, **own}
    if isinstance(run.schedule, EDMSchedule):
        if name not in EDM:
            known = ", ".join(solver for solver, (scheduler, *_) in SCHEDULERS.items() if scheduler in EDM)
            raise InvalidArgument(f"diffusers has no {run.solver} for EDM networks; it has {known}")
        name = EDM[name]
        said = {"edm": "epsilon", "v_prediction": "v_prediction"}
        config |= {"prediction_type": said[run.one_of("prediction", run.prediction, tuple(said))]}
        config |= dataclasses.asdict(run.schedule)
    else:
        config |= {"prediction_type": run.prediction, **run.schedule.to_scheduler_config()}
    if run.variance is not None:
        types = {v: k for k, v in VARIANCES.items()}
        config["variance_type"] = types[run.one_of("variance", run.variance, tuple(types))]
    if run.order is not None:
        if run.solver == "lms":
            run.one_of("order", run.order, (4,))
        config["solver_order"] = run.order
    if run.spacing is not None:
        config |= _diffusers_spacing(run, by_sigma)
    if run.clip is None:
        config |= {"clip_sample": False, "clip_denoised": False, "thresholding": False}
    elif run.clip != FROM_MODEL:
        config |= {"clip_sample": True, "clip_denoised": True, "clip_sample_range": run.clip, "thresholding": False}
    steps = run.default_steps() if run.steps is None else run.steps
    table = from_config({**config, "_class_name": name}, steps, eta=run.eta)
    if run.clip not in (None, FROM_MODEL) and any(row.c * table.data_scale != run.clip for row in table.rows):
        raise InvalidArgument(f"clip={run.clip!r}: diffusers' {name} cannot bound x0 so; leave it out, or give None")
    return table


def _diffusers_spacing(run: Run, by_sigma: bool) -> dict[str, Any]:
    """The keys of a spacing, of which a configuration says at most one."""
    edm = isinstance(run.schedule, EDMSchedule)
    allowed = (*(() if edm else ("trailing", "leading", "linspace")), *(SIGMA_SPACINGS if by_sigma else ()))
    if run.solver in ("lcm", "consistency"):
        raise InvalidArgument(f"spacing={run.spacing!r}: {run.solver} has its own spacing; leave it out")
    spacing = run.one_of("spacing", run.spacing, allowed)
    if edm:
        return {"sigma_schedule": spacing}
    keys: dict[str, Any] = {f"use_{kind}_sigmas": kind == spacing for kind in (*SIGMA_SPACINGS, "beta")}
    return keys if keys.get(f"use_{spacing}_sigmas") else {**keys, "timestep_spacing": spacing}


# improved- and guided-diffusion ---------------------------------------------------------------------------------------


def _openai(run: Run) -> StepTable:
    schedule = run.discrete()
    run.one_of("solver", run.solver, ("ddpm", "ddim"))
    prediction = run.one_of("prediction", run.prediction, ("epsilon", "sample"))
    clip = run.clip
    if clip == FROM_MODEL:
        clip = 1.0 if run.config.get("clip_sample", True) else None
    walk = Walk.of(
        schedule,
        run.steps if run.spacing is not None else None,
        spacing=_respaced(run, schedule.timesteps),
        prediction=prediction,
        clip=run.one_of("clip", clip, (1.0, None)),  # clip_denoised
    )
    if run.solver == "ddim":
        return ddim_table(walk, run.eta, "clipped")
    return ddpm_table(walk, run.named_variance(("posterior", "beta", "learned_range")))


def _respaced(run: Run, T: int) -> list[float]:
    """``space_timesteps(T, timestep_respacing)``, falling."""
    respacing = run.spacing
    if respacing is None:
        respacing = str(run.count(T, run.default_steps()))
    head, _, stride = respacing.partition("ddim") if isinstance(respacing, str) else ("?", "", "")
    counts = [stride] if not head else str(respacing).split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts):
        raise InvalidArgument(
            f"spacing={run.spacing!r}: with compat='openai' it is a timestep_respacing, as '250', 'ddim50', '10,20,30'"
        )
    numbers = [int(count) for count in counts]
    if not head:
        for k in range(1, T):
            if len(range(0, T, k)) == numbers[0]:
                return [float(t) for t in range(0, T, k)][::-1]
        raise InvalidArgument(f"spacing={respacing!r}: no whole stride visits {numbers[0]} of {T} timesteps")
    ts: list[int] = []
    sizes = [T // len(numbers) + (i < T % len(numbers)) for i in range(len(numbers))]
    for start, size, count in zip(itertools.accumulate(sizes, initial=0), sizes, numbers, strict=False):
        if count > size:
            raise InvalidArgument(f"spacing={respacing!r}: a section of {size} timesteps cannot give {count}")
        at = 0.0  # a running sum, whose rounding is theirs
        for _ in range(count):
            ts.append(start + round(at))
            at += (size - 1) / (count - 1) if count > 1 else 1.0
    if not ts:
        raise InvalidArgument(f"spacing={respacing!r} visits no timestep; at least one is needed")
    return [float(t) for t in reversed(ts)]


# The original DDPM, and DDIM in its port ------------------------------------------------------------------------------


def _ho(run: Run) -> StepTable:
    schedule = run.discrete()
    T = schedule.timesteps
    run.one_of("solver", run.solver, ("ddpm", "ddim"))
    kind = run.one_of("spacing", "uniform" if run.spacing is None else run.spacing, ("uniform", "quad"))
    n = run.count(T, run.default_steps())
    whole = run.solver == "ddpm" and kind == "uniform" and n == T
    run.one_of("prediction", run.prediction, ("epsilon", "sample") if whole else ("epsilon",))
    c = 1.0 if run.solver == "ddpm" else None
    run.one_of("clip", run.clip, (FROM_MODEL, c))
    if kind == "uniform":
        ts = list(range(0, T, T // n))
    else:
        ts = [int(t) for t in np.linspace(0.0, math.sqrt(T * 0.8), n) ** 2]
    abar = [1.0, *(schedule.abar(t) for t in ts)]
    levels = [Level(float(t), *pair[::-1]) for t, pair in zip(ts, itertools.pairwise(abar), strict=True)]
    walk = Walk(tuple(levels[::-1]), run.prediction, c=math.inf if c is None else c, compat=True)
    if run.solver == "ddim":
        return ddim_table(walk, run.eta, "output")
    if whole:
        return ddpm_table(walk, run.named_variance(("posterior", "beta")))
    return ddpm_table(walk, run.one_of("variance", run.variance or "beta", ("beta",)))


CODE_BASES: dict[str, Callable[[Run], StepTable]] = {"diffusers": _diffusers, "openai": _openai, "ho": _ho}
