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
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import checks
from fastdiff.checks import shown
from fastdiff.errors import ConfigError, FastdiffError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.adams import deis_table, lms_table
from fastdiff.solvers.arguments import ARGUMENTS, check_order
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.flow import flow_config, flow_euler, flow_heun, flow_multistep
from fastdiff.solvers.compat.run import FROM_MODEL, CompatOptions
from fastdiff.solvers.compat.source import TIMESTEP_SPACINGS, Source, beta_quantiles
from fastdiff.solvers.consistency import TCD_ETA, consistency, consistency_table, lcm_table, tcd_table
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import VARIANCE_TYPES, ddpm_table
from fastdiff.solvers.dpm2 import dpm2_table
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.dpmpp_stages import dpmpp_sde_table
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.flow import FlowSchedule
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.keys import check_config
from fastdiff.solvers.plms import plms_table
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.singlestep import singlestep_table
from fastdiff.solvers.spacing import SIGMA_SPACINGS, spaced_sigmas
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.unipc import unipc_table
from fastdiff.solvers.walk import Level, Walk

if TYPE_CHECKING:
    import torch

ZERO_SNR = 2.0**-24  # abar that diffusers has in place of 0
PRECISION = "float32"  # of diffusers' noise levels
ETA = {"DDIMScheduler": 0.0, "TCDScheduler": TCD_ETA}  # schedulers whose step has the option eta, and its default
EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "v_prediction"}  # diffusers' names, and those of fastdiff


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
            option, or for DDIMScheduler with ``steps``, which gives the length of its steps.
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
    times, levels = _given(name, config, timesteps, sigmas)
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
        return SCHEDULERS[name](source)
    except FastdiffError:
        raise
    except (ArithmeticError, ValueError) as e:
        raise ConfigError(f"{name}: noise levels this extreme leave the range of float64 ({e})") from e


# Schedulers whose set_timesteps takes timesteps, and those that take noise levels.
TAKES_TIMESTEPS = (
    "DDPMScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "CMStochasticIterativeScheduler",
    "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
# These take noise levels of a flow, without the end of the run.
TAKES_FLOW_SIGMAS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
TAKES_SIGMAS = ("EulerDiscreteScheduler", *TAKES_FLOW_SIGMAS)


def _given(
    name: str, config: Mapping[str, Any], timesteps: Any, sigmas: Any
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Check the timesteps or the noise levels of a run that were given in place of a spacing."""
    both = timesteps is not None and sigmas is not None
    if both and name != "FlowMatchEulerDiscreteScheduler":
        raise InvalidArgument("timesteps and sigmas exclude each other: give one of them")
    times = levels = None
    if timesteps is not None:
        if name not in (*TAKES_TIMESTEPS, "DDIMScheduler"):
            raise InvalidArgument(f"{name} takes no timesteps=, as in diffusers; {', '.join(TAKES_TIMESTEPS)} do")
        spaced = [key for key in config if key.startswith("use_") and key.endswith(("_sigmas", "_lambdas"))]
        spaced = [] if name == "FlowMatchEulerDiscreteScheduler" else spaced
        if any(config[key] for key in spaced) or (
            config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
        ):
            raise InvalidArgument(
                f"timesteps= does not go with {', '.join(k for k in spaced if config[k]) or 'timestep_type=continuous'}"
                f" of {name}, which lays out noise levels"
            )
        times = _falling("timesteps", timesteps, 0.0)
    if sigmas is not None:
        if name not in TAKES_SIGMAS:
            raise InvalidArgument(f"{name} takes no sigmas=, as in diffusers; {', '.join(TAKES_SIGMAS)} do")
        if name in TAKES_FLOW_SIGMAS:
            return times, _flow_sigmas(name, config, times, sigmas)
        listed = checks.items("sigmas", sigmas, 1 << 20, need="a list of falling numbers")
        # A last step may end at the level where it starts, as diffusers' own lists do.
        ends = listed[-1:] if len(listed) > 1 and listed[-1] == listed[-2] else []
        falling = [*_falling("sigmas", listed[: len(listed) - len(ends)], 0.0), *ends]
        levels = np.array(falling, dtype=np.float32).astype(np.float64)
        if len(levels) < 2 or levels[-2] <= 0.0:
            raise InvalidArgument("sigmas: at least one positive noise level and the run's end, as 0, are needed")
    return times, levels


def _flow_sigmas(
    name: str, config: Mapping[str, Any], times: NDArray[np.float64] | None, sigmas: Any
) -> NDArray[np.float64]:
    """Check the noise levels of a flow that were given in place of a spacing."""
    if name != "FlowMatchEulerDiscreteScheduler" and not config.get("use_flow_sigmas"):
        raise InvalidArgument(f"{name} takes sigmas= with use_flow_sigmas=True alone, as in diffusers")
    levels = _falling("sigmas", sigmas, 0.0)
    if levels[0] > 1.0 or levels[-1] <= 0.0:
        raise InvalidArgument(f"sigmas {levels[0]:g} .. {levels[-1]:g}: those of a flow lie above 0, at most at 1")
    if times is not None and len(times) != len(levels):
        raise InvalidArgument(f"{len(times)} timesteps and {len(levels)} sigmas: as many of both are needed")
    return levels


def _falling(name: str, values: Any, low: float) -> NDArray[np.float64]:
    """Return a list of falling numbers, at least ``low``, as an array."""
    listed = checks.items(name, values, 1 << 20, need="a list of falling numbers")
    numbers = [checks.number(f"{name}[{i}]", v, low) for i, v in enumerate(listed)]
    if not numbers:
        raise InvalidArgument(f"{name} is empty; at least one number is needed")
    for a, b in itertools.pairwise(numbers):
        if a <= b:
            raise InvalidArgument(f"{name} must fall, in descending order, got {a:g} before {b:g}")
    return np.array(numbers, dtype=np.float64)


def scheduler_name(config: Mapping[str, Any]) -> str:
    """Return the ``_class_name`` of a configuration, which must be one of `SCHEDULERS`."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"a scheduler configuration is an object with keys, not {type(config).__name__}")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ConfigError(f"scheduler {shown(name)} (_class_name) is not supported; supported: {', '.join(SCHEDULERS)}")
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


# Schedulers in timesteps ----------------------------------------------------------------------------------------------


def _ddpm(source: Source) -> StepTable:
    schedule = source.schedule()
    kind = source.get("variance_type", "fixed_small")
    if kind in ("learned", "fixed_large_log"):
        raise source.refuse("variance_type", f"supported are {', '.join(VARIANCE_TYPES)}, fixed_small_log")
    variance = VARIANCE_TYPES.get(kind, "posterior")  # as diffusers, for a name that it does not know
    t = source.timesteps(schedule.timesteps, "leading")
    walk = _discrete(source, schedule, t, [*t[1:], -1], 1.0, source.bounds(True))
    return ddpm_table(walk, variance, last_beta=bool(t[-1] > 0))


def _ddim(source: Source) -> StepTable:
    schedule = source.schedule()
    t = source.timesteps(schedule.timesteps, "leading")
    final = 1.0 if source.get("set_alpha_to_one", True) else schedule.abar(0)
    walk = _discrete(source, schedule, t, t - schedule.timesteps // source.steps, final, source.bounds(True))
    return ddim_table(walk, source.eta, "clipped" if source.use_clipped else "output")


def _pndm(source: Source) -> StepTable:
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


def _ddim_inverse(source: Source) -> StepTable:
    """Return the table of DDIM from less to more noise: x' = a_t x_0 + s_t eps, both predicted at the step's start."""
    schedule = source.schedule()
    T, n = schedule.timesteps, checks.whole("steps", source.steps, 1, schedule.timesteps, of="the schedule's timesteps")
    if source.one_of("timestep_spacing", "leading", ("leading", "trailing")) == "leading":
        t = np.arange(n) * (T // n) + source.get("steps_offset", 0)
    else:
        t = np.arange(T, 0, -T / n)[::-1].round() - 1
    if len(t) != n or t[0] < 0 or t[-1] > T - 1:
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


def _lcm(source: Source) -> StepTable:
    schedule = source.schedule()
    t = source.distilled(schedule.timesteps)
    walk = _discrete(source, schedule, t, [*t[1:], -1], 1.0, source.bounds(False))
    return lcm_table(walk, float(source.get("timestep_scaling", 10.0)))


def _tcd(source: Source) -> StepTable:
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


# Schedulers in sigma --------------------------------------------------------------------------------------------------


def training_betas(schedule: NoiseSchedule) -> torch.Tensor:
    """Return the betas of a schedule before any rescaling, computed in float32 by diffusers' operations."""
    import torch

    dtype = getattr(torch, PRECISION)
    start, end, T = schedule.beta_start, schedule.beta_end, schedule.timesteps
    if schedule.kind == "linear":
        return torch.linspace(start, end, T, dtype=dtype, device="cpu")
    if schedule.kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=dtype, device="cpu") ** 2
    # These come from float64.
    plain = dataclasses.replace(schedule, rescale_zero_terminal_snr=False)
    return torch.tensor(plain.variances, dtype=dtype, device="cpu")


def _sigmas(schedule: NoiseSchedule) -> NDArray[np.floating[Any]]:
    """Return sigma of every timestep, rising, computed in float32 by the operations that diffusers uses.

    In float32 a cosine schedule's smallest sigma is off by 1.5e-3, and timesteps are rounded from these sigmas.
    """
    import torch

    betas = training_betas(schedule)
    abar = torch.cumprod(1.0 - betas, dim=0)
    if schedule.rescale_zero_terminal_snr:
        root = abar.sqrt()
        scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        squares = scaled**2
        abar = torch.cumprod(torch.cat([squares[:1], squares[1:] / squares[:-1]]), dim=0)
        abar[-1] = ZERO_SNR
    sigmas = (((1 - abar) / abar) ** 0.5).numpy()
    if not (np.isfinite(sigmas).all() and (sigmas > 0.0).all()):
        raise ConfigError("the betas are too extreme for float32, in which diffusers computes these noise levels")
    return sigmas


def _times(sigmas: NDArray[np.float64], train: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the timesteps of sigmas, by interpolating log sigma; differences of neighbours are taken in float32."""
    logs, wanted = np.log(train), np.log(sigmas)
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(train) - 2)
    w = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0.0, 1.0)
    return (1.0 - w) * low + w * (low + 1)


def _respaced(source: Source, between: NDArray[Any], train: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return (t, sigma) of a spacing by sigma from between[0] to between[-1]; None where there is no such key."""
    kinds = [kind for kind in (*SIGMA_SPACINGS, "beta") if source.get(f"use_{kind}_sigmas", False)]
    if source.lu:
        kinds.append("exponential")  # equal steps of log sigma
    if not kinds:
        return None
    if len(kinds) > 1:
        raise source.refuse(f"use_{kinds[-1]}_sigmas", "one spacing by sigma is")
    largest, smallest = source.get("sigma_max", float(between[0])), source.get("sigma_min", float(between[-1]))
    if kinds == ["beta"]:
        sigmas = smallest + beta_quantiles(1.0 - np.linspace(0.0, 1.0, source.steps)) * (largest - smallest)
    else:
        sigmas = spaced_sigmas(kinds[0], source.steps, largest, smallest)
    return _times(sigmas, train), sigmas


def _sigma_walk(
    source: Source,
    t: Sequence[float] | NDArray[np.float64],
    sigmas: NDArray[np.float64],
    final: float,
    bounds: dict[str, Any],
    prediction: str | None = None,
    **more: Any,
) -> Walk:
    """Return a walk over sigmas, whose last step ends at ``final``."""
    if not (np.diff(sigmas) < 0).all():
        raise source.fails(f"its noise levels for {source.steps} steps repeat")
    abar = [1.0 / (1.0 + s * s) for s in [*sigmas.tolist(), final]]
    levels = tuple(Level(float(v), a, b) for v, (a, b) in zip(t, itertools.pairwise(abar), strict=True))
    return Walk(levels, prediction or source.prediction(), compat=True, start=source.start, **bounds, **more)


def _between(train: NDArray[Any], sigma: float) -> tuple[float, float]:
    """Return the timestep at a sigma between two levels, and abar there."""
    return float(_times(np.array([sigma]), train)[0]), 1.0 / (1.0 + sigma * sigma)


def _multistep(source: Source, final: str | None, floor: bool, bounds: dict[str, Any]) -> Walk:
    """Return the walk of DPMSolverMultistep, UniPC and DEIS, which compute one timestep more and drop t = 0.

    ``final`` is the default of final_sigmas_type; None where the scheduler does not have it and ends as at "sigma_min".
    ``floor``: at "sigma_min" a spacing by sigma ends at its own last sigma, instead of that of timestep 0.
    """
    schedule = source.schedule()
    train = _sigmas(schedule)
    if source.get("use_flow_sigmas", False):
        return flow_multistep(source, train, final, bounds, PRECISION)
    source.only(use_dynamic_shifting=False, shift_terminal=None)
    single = source.name == "DPMSolverSinglestepScheduler"  # which has no other timesteps than "linspace"
    dpm = single or source.name == "DPMSolverMultistepScheduler"
    if single:
        source = dataclasses.replace(source, config={**source.config, "timestep_spacing": "linspace"})
    lowest = source.get("lambda_min_clipped", -math.inf) if dpm else -math.inf
    top = len(train) - int(np.searchsorted(-np.log(train)[::-1], lowest))
    t = source.timesteps(len(train), "linspace", skip_last=True, top=top)
    respaced = _respaced(source, train[::-1], train)
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
    return _sigma_walk(source, t, sigmas, float(end), bounds)


def _order(source: Source, default: int = 2) -> int:
    return check_order(source.get("solver_order", default), 3, name=f"{source.name}: solver_order", error=ConfigError)


def _dpm(source: Source) -> StepTable:
    return _dpm_table(source, _multistep(source, final="zero", floor=False, bounds=source.bounds(None)))


def _dpm_inverse(source: Source) -> StepTable:
    """Return the table of DPM-Solver++ over rising levels, from that of the first timestep to the noisiest one."""
    source.only(use_flow_sigmas=False)
    if source.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
        raise source.refuse("algorithm_type", "diffusers' noise is then NaN, as the SDE has no inverse")
    train = _sigmas(source.schedule())
    T, n = len(train), checks.whole("steps", source.steps, 1, len(train), of="the schedule's timesteps")
    top = T - int(np.searchsorted(-np.log(train)[::-1], source.get("lambda_min_clipped", -math.inf)))
    spacing = source.one_of("timestep_spacing", "linspace", TIMESTEP_SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, top - 1, n + 1).round()[:-1]
    elif spacing == "leading":
        t = np.arange(n) * float(top // (n + 1)) + source.get("steps_offset", 0)
    else:
        t = np.arange(top, 0, -T / n).round()[::-1] - 1
    respaced = _respaced(source, train, train)
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
    return _dpm_table(source, walk)


def _dpm_table(source: Source, walk: Walk) -> StepTable:
    algorithm = source.one_of("algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis"))
    solver_type = source.get("solver_type", "midpoint")
    order, sde = _order(source), algorithm == "sde-dpmsolver++"
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


def _unipc(source: Source) -> StepTable:
    source.only(predict_x0=True, solver_p=None)
    walk = _multistep(source, final="zero", floor=True, bounds=source.bounds(None))
    order, lower = _order(source), source.get("lower_order_final", True)
    if not lower and order > 1 and walk.levels[-1].abar_next == 1.0:
        raise source.refuse("lower_order_final", "diffusers' last step to sigma = 0 is then NaN")
    solver_type = source.get("solver_type", "bh2")
    solver_type = "bh2" if solver_type in ("midpoint", "heun", "logrho") else solver_type
    return unipc_table(walk, order, solver_type, source.get("disable_corrector", ()), lower)


def _deis(source: Source) -> StepTable:
    walk = _multistep(source, final=None, floor=True, bounds=source.bounds(None))
    return deis_table(walk, _order(source), source.get("lower_order_final", True))


def _dpm_singlestep(source: Source) -> StepTable:
    source.one_of("algorithm_type", "dpmsolver++", ("dpmsolver++", "deis"))
    walk = _multistep(source, final="zero", floor=False, bounds=source.bounds(None))
    order, n = _order(source), source.steps
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


def _single(source: Source, bounds: dict[str, Any], final: bool) -> Walk:
    """Return the walk of the schedulers in sigma; ``final``: whether there is a final_sigmas_type."""
    schedule = source.schedule()
    train = _sigmas(schedule)
    end = 0.0
    continuous = final and source.get("timestep_type", "discrete") == "continuous"
    continuous = continuous and source.prediction() == "v_prediction"
    if source.sigmas is not None:
        sigmas, end = source.sigmas[:-1], float(source.sigmas[-1])
        t = 0.25 * np.log(sigmas) if continuous else _times(sigmas, train)
        return _single_walk(source, t, sigmas, end, bounds, train, continuous)
    t = source.timesteps(len(train), "linspace", whole=False)
    sigmas = np.interp(t, np.arange(len(train)), train)
    if final and source.one_of("final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min":
        end = float(train[0])
    if final and source.one_of("interpolation_type", "linear", ("linear", "log_linear")) == "log_linear":
        sigmas = np.exp(np.linspace(math.log(train[-1]), math.log(train[0]), source.steps + 1))
    respaced = _respaced(source, sigmas, train)
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
    return _sigma_walk(
        source,
        t,
        sigmas,
        end,
        bounds,
        init_scale=scale,
        output_scale=math.hypot(end, 1.0),
        continuous=continuous,
        between=partial(_between, train),
    )


def _euler(source: Source) -> StepTable:
    if source.config.get("prediction_type") == "original_sample":
        source = dataclasses.replace(source, config={**source.config, "prediction_type": "sample"})
    return euler_table(_single(source, {"c": math.inf}, final=True), "euler", 0.0)


def _euler_ancestral(source: Source) -> StepTable:
    source.prediction(("epsilon", "v_prediction"))
    # This scheduler ignores these keys, which another one may have left in the configuration.
    ignored = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    source = dataclasses.replace(source, config={k: v for k, v in source.config.items() if k not in ignored})
    return euler_table(_single(source, {"c": math.inf}, final=False), "euler_ancestral", 1.0)


def _heun(source: Source) -> StepTable:
    return heun_table(_single(source, source.bounds(False, thresholds=False), final=False))


def _lms(source: Source) -> StepTable:
    return lms_table(_single(source, {"c": math.inf}, final=False), 4)


def _two_stages(source: Source) -> Walk:
    source.prediction(("epsilon", "v_prediction"))
    return _single(source, {"c": math.inf}, final=False)


def _dpm2(source: Source) -> StepTable:
    return dpm2_table(_two_stages(source), "dpm2", 0.0)


def _dpm2_ancestral(source: Source) -> StepTable:
    return dpm2_table(_two_stages(source), "dpm2_ancestral", 1.0)


def _dpm_sde(source: Source) -> StepTable:
    return dpmpp_sde_table(_two_stages(source), 1.0)


# EDM ------------------------------------------------------------------------------------------------------------------


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
    return _sigma_walk(
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


def _edm_euler(source: Source) -> StepTable:
    return euler_table(_edm_walk(source, {"c": math.inf}), "euler", 0.0)


def _edm_dpm(source: Source) -> StepTable:
    if _order(source) == 3 and source.get("algorithm_type", "") == "sde-dpmsolver++":
        raise source.refuse("algorithm_type", "diffusers fails with solver_order=3")
    return _dpm_table(source, _edm_walk(source, source.bounds(None)))


def _consistency(source: Source) -> StepTable:
    source.only(s_noise=1.0)
    train = source.get("num_train_timesteps", 40)
    clip = 1.0 if source.get("clip_denoised", True) else None
    schedule = _edm_schedule(source, time_scale=1000.0)
    if source.times is None:
        return consistency(schedule, source.steps, train_steps=train, clip=clip)
    # diffusers' timesteps count the noise levels from the largest one on, and the last of them comes first.
    return consistency_table(schedule, np.trunc(source.times[::-1]).astype(np.int64), train, clip)


Build = Callable[[Source], StepTable]
# Schedulers whose samples are variance-preserving, as the states of a table are.
VARIANCE_PRESERVING: dict[str, Build] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMInverseScheduler": _ddim_inverse,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverMultistepInverseScheduler": _dpm_inverse,
    "DPMSolverSinglestepScheduler": _dpm_singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
}
# Schedulers whose samples are those of a flow, (1 - sigma) x_0 + sigma eps, as the states of their tables are. The
# multi-step schedulers join them with use_flow_sigmas.
FLOW_SCHEDULERS: dict[str, Build] = {
    "FlowMatchEulerDiscreteScheduler": lambda source: flow_euler(source, PRECISION),
    "FlowMatchHeunDiscreteScheduler": lambda source: flow_heun(source, PRECISION),
}
EDM_SCHEDULERS: dict[str, Build] = {
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
}
# Schedulers of continuous noise levels, which have no `NoiseSchedule`.
CONTINUOUS: dict[str, Build] = {**EDM_SCHEDULERS, "CMStochasticIterativeScheduler": _consistency}
WITHOUT_SCHEDULE: dict[str, Build] = {**CONTINUOUS, **FLOW_SCHEDULERS}
# Schedulers whose samples are x_0 + sigma eps.
IN_SIGMA: dict[str, Build] = {
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun,
    "LMSDiscreteScheduler": _lms,
    "KDPM2DiscreteScheduler": _dpm2,
    "KDPM2AncestralDiscreteScheduler": _dpm2_ancestral,
    "DPMSolverSDEScheduler": _dpm_sde,
    **CONTINUOUS,
}
# Schedulers whose samples the network reads as they are.
UNSCALED: dict[str, Build] = {**VARIANCE_PRESERVING, **FLOW_SCHEDULERS}
SCHEDULERS = {**UNSCALED, **IN_SIGMA}
