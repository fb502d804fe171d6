"""The tables of diffusers' schedulers, quirks included: by name of the solver, or by ``scheduler_config.json``.

`from_config` repeats what a scheduler computes, so that a model's pictures stay the same, while the functions of
`fastdiff.solvers` follow the papers. tests/solvers/test_solver_grid.py compares whole runs with diffusers' own code.
Where diffusers departs from the method:

- DDIM and PNDM step to t - T // steps, which is not the next timestep for "linspace", nor for "trailing" where steps do
  not divide T.
- DDPM adds noise to the finished image where its last timestep is above 0 (fixed_large, learned_range).
- A run of one step with "leading" or "linspace" evaluates the network at t = 0.
- PNDM combines the outputs of a v-prediction network, not their eps.
- DPM-Solver++ of order 3 takes half of the second derivative, which makes it of order 2; its SDE form also has a wrong
  sign.
- Timesteps of spacings by sigma are rounded, so that some repeat; the rows of a repeated timestep are stages.
- The solvers in sigma compute noise levels in float32 and have abar = 2^-24 for zero terminal SNR. Their initial noise
  has the standard deviation sqrt(1 - abar) with "linspace" and "trailing" (Euler, Heun, LMS), 1 elsewhere.
- `fastdiff.solvers.compat.flow` lists those of flow matching.
- DDIM's inverse evaluates the network at the level where a step ends, and takes the sample to be at that where it
  starts. DPM-Solver++'s takes an image to be at the level of its first timestep.
- UniPC with "bh1" ends in NaN where the last step goes to sigma = 0, as do order 2 (heun) and 3 of DPM-Solver++ where a
  spacing by sigma ends at "sigma_min" after 15 or more steps. This is not reproduced: the table has the limit, which is
  finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdiff import checks
from fastdiff.checks import shown
from fastdiff.errors import ConfigError, FastdiffError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.arguments import ARGUMENTS
from fastdiff.solvers.compat import discrete, edm, in_sigma, multistep
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.edm import EDM_PREDICTIONS
from fastdiff.solvers.compat.flow import flow_config, flow_euler, flow_heun
from fastdiff.solvers.compat.given import TAKES_FLOW_SIGMAS, given_levels
from fastdiff.solvers.compat.run import FROM_MODEL, CompatOptions
from fastdiff.solvers.compat.source import TIMESTEP_SPACINGS, Source
from fastdiff.solvers.compat.ve import score_sde_ve
from fastdiff.solvers.consistency import TCD_ETA
from fastdiff.solvers.ddpm import VARIANCE_TYPES
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.flow import FlowSchedule
from fastdiff.solvers.keys import check_config
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.spacing import SIGMA_SPACINGS
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.ve import VESchedule

ETA = {"DDIMScheduler": 0.0, "TCDScheduler": TCD_ETA}  # schedulers whose step has the option eta, and its default


def from_config(
    config: Mapping[str, Any],
    steps: int | None = None,
    schedule: NoiseSchedule | None = None,
    *,
    eta: float | None = None,
    use_clipped_model_output: bool = False,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
    start: int = 0,
    mu: float | None = None,
) -> StepTable:
    """Return the table of the scheduler that ``config`` describes, after its ``set_timesteps(steps)``.

    Noise N(0, I) times the table's init_scale starts the run that noise times init_noise_sigma starts in diffusers.
    Where diffusers keeps samples in sigma space, they are sqrt(1 + sigma^2) times the table's states (with EDM
    schedulers sqrt(sigma_data^2 + sigma^2) times).

    Args:
        config: A diffusers ``scheduler_config.json``; ``_class_name`` names the scheduler, and an absent key has
            diffusers' default.
        steps: Number of steps, at least 1; None with ``timesteps`` or ``sigmas``.
        schedule: Noise schedule in place of the configuration's.
        eta: Option of the step of DDIMScheduler (0, the default, is deterministic) and of TCDScheduler (by default
            0.3).
        use_clipped_model_output: Option of DDIMScheduler's step: take eps from the clipped x_0.
        timesteps: Falling timesteps in place of the spacing's, for the schedulers whose ``set_timesteps`` has this
            option, or for DDIMScheduler and its inverse with ``steps``, which gives the length of their steps.
        sigmas: Falling noise levels in place of the spacing's: for EulerDiscreteScheduler with the run's end as the
            last of them, which may be 0; for FlowMatchEulerDiscreteScheduler, also beside ``timesteps``, and
            UniPCMultistepScheduler with use_flow_sigmas without the end, and before the shift.
        strength: Share of the distillation's timesteps that LCMScheduler and TCDScheduler choose from, as for img2img.
        start: Row at which the run starts, as in img2img: a solver with a history begins there at its lowest order. The
            rows before it are there, but have no meaning.
        mu: The shift of a flow's levels where the configuration has use_dynamic_shifting.

    Returns:
        The table, with the quirks that the docstring of `fastdiff.solvers.compat.diffusers` lists.

    Raises:
        ConfigError: If the scheduler or one of its options is not supported, or if diffusers itself fails with this
            number of steps.
        InvalidArgument: If the number of steps is out of range, or an option belongs to another scheduler.
    """
    config = check_config(config)
    name = scheduler_name(config)
    given: dict[str, Any] = {"use_clipped_model_output": use_clipped_model_output}
    given |= {} if schedule is None else {"schedule": schedule}
    checks.check_all(given | ({} if eta is None else {"eta": eta}), ARGUMENTS)
    if name not in ETA and eta not in (None, 0.0):
        raise InvalidArgument(f"eta is an option of {' and '.join(ETA)}, not of {name}")
    if name != "DDIMScheduler" and use_clipped_model_output:
        raise InvalidArgument(f"use_clipped_model_output is an option of DDIMScheduler, not of {name}")
    eta = ETA.get(name, 0.0) if eta is None else eta
    times, levels = given_levels(name, config, timesteps, sigmas)
    listed = len(times) if times is not None else None
    if levels is not None:
        listed = len(levels) - (name == "EulerDiscreteScheduler")
    steps = listed if steps is None else steps
    if name in TAKES_FLOW_SIGMAS and listed is not None and steps != listed:
        raise InvalidArgument(f"steps={shown(steps)}, but {listed} levels are listed; steps can be left out")
    checks.number("strength", strength, 0.0, 1.0)
    if mu is not None and "use_dynamic_shifting" not in DEFAULTS[name]:
        raise InvalidArgument(f"mu is an option of flow matching, not of {name}")
    mu = None if mu is None else checks.number("mu", mu, -100.0, 100.0)
    source = Source(
        name, config, checks.whole("steps", steps, 1), schedule, eta, use_clipped_model_output, times, levels,
        checks.whole("start", start, 0), strength, mu,
    )  # fmt: skip
    try:
        return ALL[name](source)
    except FastdiffError:
        raise
    except (ArithmeticError, ValueError) as e:
        raise ConfigError(f"{name}: noise levels this extreme leave the range of float64 ({e})") from e


def scheduler_name(config: Mapping[str, Any]) -> str:
    """Return the ``_class_name`` of a configuration, which must be one of `ALL`."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"a scheduler configuration is an object with keys, not {type(config).__name__}")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in ALL:
        raise ConfigError(f"scheduler {shown(name)} (_class_name) is not supported; supported: {', '.join(ALL)}")
    return str(name)


def diffusers_table(options: CompatOptions) -> StepTable:
    """Return the table of the solver's scheduler, configured as the model's is and then by the options."""
    options.check_solver()
    scheduler = SOLVERS[options.solver].diffusers
    assert scheduler is not None
    name = scheduler.name
    config: dict[str, Any] = {**options.config, **scheduler.config}
    if isinstance(options.schedule, FlowSchedule):
        if scheduler.flow is None:
            known = ", ".join(n for n, solver in SOLVERS.items() if solver.diffusers and solver.diffusers.flow)
            raise InvalidArgument(f"diffusers has no {options.solver} for flow-matching networks; it has {known}")
        name = scheduler.flow
        config |= flow_config(name, options.schedule, options.prediction)
    elif isinstance(options.schedule, VESchedule):
        if scheduler.exploding is None:
            raise InvalidArgument(f"diffusers has no {options.solver} for variance-exploding networks; it has ddpm")
        name = scheduler.exploding
        options.one_of("prediction", options.prediction, ("score",))
        options.one_of("variance", options.variance or "beta", ("beta",))
        options.one_of("spacing", options.spacing, (None,))
        levels = {key: getattr(options.schedule, key) for key in ("sigma_min", "sigma_max")}
        config |= {"num_train_timesteps": options.schedule.timesteps, **levels}
    elif isinstance(options.schedule, EDMSchedule):
        if scheduler.edm is None:
            known = ", ".join(n for n, solver in SOLVERS.items() if solver.diffusers and solver.diffusers.edm)
            raise InvalidArgument(f"diffusers has no {options.solver} for EDM networks; it has {known}")
        name = scheduler.edm
        theirs = {ours: name for name, ours in EDM_PREDICTIONS.items()}
        config |= {"prediction_type": theirs[options.one_of("prediction", options.prediction, tuple(theirs))]}
        config |= dataclasses.asdict(options.schedule)
    else:
        config |= {"prediction_type": options.prediction, **options.schedule.to_scheduler_config()}
    if options.variance is not None:
        types = {v: k for k, v in VARIANCE_TYPES.items()}
        config["variance_type"] = types[options.one_of("variance", options.variance, tuple(types))]
    if options.order is not None:
        if options.solver == "lms":
            options.one_of("order", options.order, (4,))
        config["solver_order"] = options.order
    if options.spacing is not None:
        config |= _spacing(options, scheduler.by_sigma)
    if options.clip is None:
        config |= {"clip_sample": False, "clip_denoised": False, "thresholding": False}
    elif options.clip != FROM_MODEL:
        config |= {"clip_sample": True, "clip_denoised": True, "clip_sample_range": options.clip, "thresholding": False}
    steps = options.default_steps() if options.steps is None else options.steps
    eta = options.eta if name == "DDIMScheduler" else None
    table = from_config({**config, "_class_name": name}, steps, eta=eta)
    if name in EXPLODING and options.config.get("_class_name") in EXPLODING:
        table = dataclasses.replace(table, init_mean=-1.0)  # the noise is around the 0 of images in [0, 1]
    if options.clip not in (None, FROM_MODEL) and any(row.c * table.data_scale != options.clip for row in table.rows):
        raise InvalidArgument(
            f"clip={options.clip!r}: diffusers' {name} cannot bound x0 so; leave it out, or give None"
        )
    return table


def _spacing(options: CompatOptions, by_sigma: bool) -> dict[str, Any]:
    """Return the configuration keys of a spacing; they replace any other spacing of the model's configuration."""
    edm, flow = isinstance(options.schedule, EDMSchedule), isinstance(options.schedule, FlowSchedule)
    by_sigma = by_sigma and (not flow or options.solver == "euler")
    allowed = (*(() if edm or flow else TIMESTEP_SPACINGS), *(SIGMA_SPACINGS if by_sigma else ()))
    if SOLVERS[options.solver].own_spacing:
        raise InvalidArgument(f"spacing={shown(options.spacing)}: {options.solver} has its own spacing; leave it out")
    spacing = options.one_of("spacing", options.spacing, allowed)
    if edm:
        return {"sigma_schedule": spacing}
    keys: dict[str, Any] = {f"use_{kind}_sigmas": kind == spacing for kind in (*SIGMA_SPACINGS, "beta")}
    return keys if keys.get(f"use_{spacing}_sigmas") else {**keys, "timestep_spacing": spacing}


Build = Callable[[Source], StepTable]
# Schedulers whose samples are variance-preserving, as the states of a table are.
VARIANCE_PRESERVING: dict[str, Build] = {
    "DDPMScheduler": discrete.ddpm,
    "DDIMScheduler": discrete.ddim,
    "DDIMInverseScheduler": discrete.ddim_inverse,
    "PNDMScheduler": discrete.pndm,
    "LCMScheduler": discrete.lcm,
    "TCDScheduler": discrete.tcd,
    "DPMSolverMultistepScheduler": multistep.dpm,
    "DPMSolverMultistepInverseScheduler": multistep.dpm_inverse,
    "DPMSolverSinglestepScheduler": multistep.dpm_singlestep,
    "UniPCMultistepScheduler": multistep.unipc,
    "DEISMultistepScheduler": multistep.deis,
}
# Schedulers whose samples are those of a flow, (1 - sigma) x_0 + sigma eps, as the states of their tables are. The
# multi-step schedulers join them with use_flow_sigmas.
FLOW_SCHEDULERS: dict[str, Build] = {
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "FlowMatchHeunDiscreteScheduler": flow_heun,
}
EDM_SCHEDULERS: dict[str, Build] = {
    "EDMEulerScheduler": edm.edm_euler,
    "EDMDPMSolverMultistepScheduler": edm.edm_dpm,
}
# Schedulers of continuous noise levels, which have no `NoiseSchedule`.
CONTINUOUS: dict[str, Build] = {**EDM_SCHEDULERS, "CMStochasticIterativeScheduler": edm.consistency_models}
WITHOUT_SCHEDULE = {*CONTINUOUS, *FLOW_SCHEDULERS, "ScoreSdeVeScheduler"}
# Schedulers whose samples are x_0 + sigma eps.
IN_SIGMA: dict[str, Build] = {
    "EulerDiscreteScheduler": in_sigma.euler,
    "EulerAncestralDiscreteScheduler": in_sigma.euler_ancestral,
    "HeunDiscreteScheduler": in_sigma.heun,
    "LMSDiscreteScheduler": in_sigma.lms,
    "KDPM2DiscreteScheduler": in_sigma.dpm2,
    "KDPM2AncestralDiscreteScheduler": in_sigma.dpm2_ancestral,
    "DPMSolverSDEScheduler": in_sigma.dpm_sde,
    **CONTINUOUS,
}
# Schedulers whose samples the network reads as they are.
UNSCALED: dict[str, Build] = {**VARIANCE_PRESERVING, **FLOW_SCHEDULERS}
SCHEDULERS = {**UNSCALED, **IN_SIGMA}
# Schedulers of variance-exploding networks, which have no step, but a predictor and a corrector.
EXPLODING: dict[str, Build] = {"ScoreSdeVeScheduler": score_sde_ve}
ALL = {**SCHEDULERS, **EXPLODING}
