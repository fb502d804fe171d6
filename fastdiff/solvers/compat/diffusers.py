"""The table that reproduces a diffusers scheduler, quirks included, from its ``scheduler_config.json``.

Everything here was read in diffusers' sources and is held to them by tests/solvers/test_solver_grid.py. Where diffusers
departs from the method, its own way is taken, so that a model's pictures stay the same; `fastdiff.solvers`' own
functions have the right mathematics. The quirks:

- DDIM and PNDM step to t - T // steps, which is not the next timestep for "linspace", nor for "trailing" where steps do
  not divide T.
- DDPM adds noise to the finished image where its last timestep is above 0 (fixed_large, learned_range).
- One step of "leading" or "linspace" visits t = 0.
- PNDM mixes the outputs of a v-prediction network, not their eps.
- DPM-Solver++ of order 3 takes half of the second derivative, which makes it of order 2; its SDE has a sign wrong too.
- Timesteps of sigma spacings are rounded, so that some repeat; those rows are marked as stages.
- The solvers in sigma compute noise levels in float32 and have abar = 2^-24 for zero terminal SNR. Initial noise has
  the standard deviation sqrt(1 - abar) with "linspace" and "trailing" (Euler, Heun, LMS), 1 elsewhere.
- UniPC with "bh1" ends in NaN where the last step goes to sigma = 0, as do order 2 (heun) and 3 of DPM-Solver++ where a
  sigma spacing ends with "sigma_min" behind 15 steps. Not reproduced: the table has the limit, which is finite.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers.adams import deis_table, lms_table
from fastdiff.solvers.consistency import consistency, lcm_table, lcm_timesteps
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.ddpm import ddpm_table
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.plms import plms_table
from fastdiff.solvers.spacing import spaced_sigmas
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.unipc import unipc_table
from fastdiff.solvers.walk import Level, Walk

ZERO_SNR = 2.0**-24
PRECISION = "float32"  # of diffusers' noise levels


def from_config(
    config: Mapping[str, Any],
    steps: int,
    schedule: NoiseSchedule | None = None,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """The table of the scheduler that ``config`` describes, after its ``set_timesteps(steps)``.

    config
        A diffusers ``scheduler_config.json``; ``_class_name`` names the scheduler, an absent key has its default.
    schedule
        Replaces the configuration's noise schedule.
    eta, use_clipped_model_output
        Options of DDIMScheduler's step.

    Multiplied by the table's init_scale, N(0, I) noise starts the same run as noise times init_noise_sigma does in
    diffusers; its sigma-space samples x are sqrt(1 + sigma^2) (EDM: sqrt(sigma_data^2 + sigma^2)) times the states.

    Raises `ConfigError` naming the scheduler or the option that is not supported, or the number of steps at which
    diffusers itself fails; `InvalidArgument` for options of other schedulers.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"a scheduler configuration is an object with keys, not {type(config).__name__}")
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler {name!r} (_class_name) is not supported; supported: {', '.join(SCHEDULERS)}")
    if name != "DDIMScheduler" and (eta != 0.0 or use_clipped_model_output):
        raise InvalidArgument(f"eta and use_clipped_model_output are options of DDIMScheduler, not of {name}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise InvalidArgument(f"steps={steps!r}: a whole number of at least 1 is needed")
    source = Source(name, config, int(steps), schedule, eta, use_clipped_model_output)
    return SCHEDULERS[name](source)


@dataclasses.dataclass(frozen=True)
class Source:
    """A configuration that is being read."""

    name: str
    config: Mapping[str, Any]
    steps: int
    given: NoiseSchedule | None
    eta: float
    use_clipped: bool

    def get(self, key: str, default: Any) -> Any:
        value = self.config.get(key, default)
        return default if value is None else value

    def refuse(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.name}: {key}={self.config.get(key)!r} is not supported: {why}")

    def only(self, **defaults: Any) -> None:
        """Options of which one value is supported, diffusers' default for most."""
        for key, default in defaults.items():
            if self.config.get(key, default) not in (default, None):
                raise self.refuse(key, f"only {default!r} is")

    def one_of(self, key: str, default: str, allowed: Sequence[str]) -> str:
        value = self.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"supported are {', '.join(allowed)}")
        return value

    def fails(self, why: str) -> ConfigError:
        return ConfigError(f"{self.name}: {why}; another number of steps than {self.steps} works")

    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return noise_schedule({**self.config, "_class_name": self.name}) if self.given is None else self.given

    def prediction(self, allowed: Sequence[str] = PREDICTIONS) -> str:
        return self.one_of("prediction_type", "epsilon", allowed)

    def bounds(self, clips: bool | None, thresholds: bool = True) -> dict[str, Any]:
        """c and threshold of the walk; clips: the default of clip_sample, None where the scheduler has none."""
        if thresholds and self.get("thresholding", False):
            largest = float(self.get("sample_max_value", 1.0))
            if largest < 1.0:
                raise self.refuse("sample_max_value", "at least 1 is needed")
            return {"c": 1.0, "threshold": (float(self.get("dynamic_thresholding_ratio", 0.995)), largest)}
        if clips is not None and self.get("clip_sample", clips):
            return {"c": float(self.get("clip_sample_range", 1.0))}
        return {"c": math.inf}

    def timesteps(
        self, T: int, default: str, *, whole: bool = True, skip_last: bool = False, top: int | None = None
    ) -> NDArray[np.float64]:
        """set_timesteps' integers, or fractions where not ``whole``. skip_last: one more is laid out, and the last, 0,
        left out; top: what linspace and trailing start from.
        """
        n = self.steps
        if n > T:
            raise InvalidArgument(f"steps={n}: a whole number from 1 to {T}, the schedule's timesteps, is needed")
        top = T if top is None else top
        spacing = self.one_of("timestep_spacing", default, ("linspace", "leading", "trailing"))
        m = n + 1 if skip_last else n
        if spacing == "linspace":
            t = np.linspace(0, top - 1, m)[::-1]
            t = t.round() if whole else t
        elif spacing == "leading":
            t = (np.arange(m) * (top // m))[::-1] + self.get("steps_offset", 0)
        else:
            t = np.arange(top, 0, -T / n).round() - 1
            if len(t) > n:
                raise self.fails(f"its 'trailing' timesteps for {n} steps end in a stray t = -1")
        t = t[:n].astype(np.float64)
        if t[0] > T - 1 or t[-1] < 0 or len(t) < n:
            raise self.fails(f"its timesteps {t[0]:g} .. {t[-1]:g} leave 0 .. {T - 1}")
        return t


# Schedulers whose betas by default are not DDPM's, and those that know rescale_betas_zero_snr.
BETAS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}
ZERO_SNR_SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
)  # fmt: skip


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a scheduler that has one (EDM and consistency models have none)."""
    name = config.get("_class_name")
    betas = {**BETAS.get(str(name), {}), **config}
    if name not in ZERO_SNR_SCHEDULERS:
        betas.pop("rescale_betas_zero_snr", None)
    return NoiseSchedule.from_scheduler_config(betas)


# Schedulers in timesteps ----------------------------------------------------------------------------------------------


def _ddpm(source: Source) -> StepTable:
    schedule = source.schedule()
    names = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}
    names["learned_range"] = "learned_range"
    variance = names[source.one_of("variance_type", "fixed_small", tuple(names))]
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
    prediction = source.prediction(("epsilon", "v_prediction"))
    t = source.timesteps(schedule.timesteps, "leading")
    stride = schedule.timesteps // source.steps
    final = 1.0 if source.get("set_alpha_to_one", False) else schedule.abar(0)
    walk = _discrete(source, schedule, t, t - stride, final, {"c": math.inf})
    stage = None
    if len(t) > 1:
        start = t[1] + stride
        if start > schedule.timesteps - 1:
            raise source.fails(f"its second step starts from timestep {start:g}")
        stage = Level(float(start), schedule.abar(start), schedule.abar(t[1]))
    return plms_table(walk, mix_outputs=prediction == "v_prediction", stage=stage)


def _lcm(source: Source) -> StepTable:
    schedule = source.schedule()
    t = np.array(lcm_timesteps(schedule.timesteps, source.steps, source.get("original_inference_steps", 50)))
    walk = _discrete(source, schedule, t, [*t[1:], -1], 1.0, source.bounds(False))
    return lcm_table(walk, float(source.get("timestep_scaling", 10.0)))


def _discrete(
    source: Source,
    schedule: NoiseSchedule,
    t: NDArray[np.float64],
    after: Sequence[float] | NDArray[np.float64],
    final: float,
    bounds: dict[str, Any],
) -> Walk:
    """A walk over whole timesteps; a negative one in ``after`` is the final level."""
    ends = [final if p < 0 else schedule.abar(float(p)) for p in after]
    levels = tuple(Level(float(v), schedule.abar(float(v)), end) for v, end in zip(t, ends, strict=True))
    return Walk(levels, source.prediction(), compat=True, **bounds)


# Schedulers in sigma --------------------------------------------------------------------------------------------------


def _sigmas(schedule: NoiseSchedule) -> NDArray[np.floating[Any]]:
    """sigma of every timestep, rising, in float32 by diffusers' own operations.

    A cosine schedule's smallest sigma is 1.5e-3 off in float32, and timesteps are rounded from these sigmas.
    """
    import torch

    dtype = getattr(torch, PRECISION)
    start, end, T = schedule.beta_start, schedule.beta_end, schedule.timesteps
    if schedule.kind == "linear":
        betas = torch.linspace(start, end, T, dtype=dtype)
    elif schedule.kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=dtype) ** 2
    else:  # these come from float64
        plain = dataclasses.replace(schedule, rescale_zero_terminal_snr=False)
        betas = torch.tensor(plain.variances, dtype=dtype)
    abar = torch.cumprod(1.0 - betas, dim=0)
    if schedule.rescale_zero_terminal_snr:
        root = abar.sqrt()
        scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        squares = scaled**2
        abar = torch.cumprod(torch.cat([squares[:1], squares[1:] / squares[:-1]]), dim=0)
        abar[-1] = ZERO_SNR
    return (((1 - abar) / abar) ** 0.5).numpy()


def _times(sigmas: NDArray[np.float64], train: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Timesteps of sigmas, log sigma interpolated between whole ones; differences of neighbours in float32."""
    logs, wanted = np.log(train), np.log(sigmas)
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(train) - 2)
    w = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0.0, 1.0)
    return (1.0 - w) * low + w * (low + 1)


def _respaced(source: Source, between: NDArray[Any], train: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """(t, sigma) where the configuration asks for a sigma spacing, from between[0] to between[-1]; else None."""
    kinds = [kind for kind in ("karras", "exponential", "beta") if source.get(f"use_{kind}_sigmas", False)]
    if not kinds:
        return None
    if len(kinds) > 1 or kinds == ["beta"]:
        raise source.refuse(f"use_{kinds[-1]}_sigmas", "one of karras and exponential is")
    largest, smallest = (
        source.get(key, float(v)) for key, v in (("sigma_max", between[0]), ("sigma_min", between[-1]))
    )
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
    """A walk over sigmas; ``final`` is where the last step ends."""
    if not (np.diff(sigmas) < 0).all():
        raise source.fails(f"its noise levels for {source.steps} steps repeat")
    abar = [1.0 / (1.0 + s * s) for s in [*sigmas.tolist(), final]]
    levels = tuple(Level(float(v), a, b) for v, (a, b) in zip(t, itertools.pairwise(abar), strict=True))
    return Walk(levels, prediction or source.prediction(), compat=True, **bounds, **more)


def _multistep(source: Source, final: str | None, floor: bool, bounds: dict[str, Any]) -> Walk:
    """The walk of DPMSolverMultistep, UniPC and DEIS: one timestep more is laid out, and t = 0 left out.

    final: the default of final_sigmas_type; None: always the last sigma of a sigma spacing, else of timestep 0.
    floor: a sigma spacing's last level under "sigma_min" is its own last sigma (UniPC), not that of timestep 0.
    """
    source.only(use_flow_sigmas=False, use_lu_lambdas=False, use_dynamic_shifting=False)
    schedule = source.schedule()
    train = _sigmas(schedule)
    lowest = source.get("lambda_min_clipped", -math.inf) if source.name == "DPMSolverMultistepScheduler" else -math.inf
    top = len(train) - int(np.searchsorted(-np.log(train)[::-1], lowest))
    t = source.timesteps(len(train), "linspace", skip_last=True, top=top)
    respaced = _respaced(source, train[::-1], train)
    sigmas = np.interp(t, np.arange(len(train)), train)
    end = train[0]
    if respaced is not None:
        t, sigmas = respaced
        # Rounded for Karras' spacing, then cut to int64.
        cosine = source.name == "DPMSolverMultistepScheduler" and source.config.get("beta_schedule") == COSINE
        t = np.floor(t.round() if source.get("use_karras_sigmas", False) and not cosine else t)
        end = sigmas[-1] if floor else end
    if final is not None and source.one_of("final_sigmas_type", final, ("zero", "sigma_min")) == "zero":
        end = 0.0
    return _sigma_walk(source, t, sigmas, float(end), bounds)


COSINE = "squaredcos_cap_v2"


def _order(source: Source, default: int = 2) -> int:
    order = source.get("solver_order", default)
    if order not in (1, 2, 3):
        raise source.refuse("solver_order", "1, 2 or 3 is needed")
    return int(order)


def _dpm(source: Source) -> StepTable:
    walk = _multistep(source, final="zero", floor=False, bounds=source.bounds(None))
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


def _single(source: Source, bounds: dict[str, Any], final: bool) -> Walk:
    """The walk of Euler, Euler ancestral, Heun and LMS. final: the scheduler knows final_sigmas_type."""
    schedule = source.schedule()
    train = _sigmas(schedule)
    t = source.timesteps(len(train), "linspace", whole=False)
    sigmas = np.interp(t, np.arange(len(train)), train)
    end, continuous = 0.0, False
    if final and source.one_of("final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min":
        end = float(train[0])
    if final and source.one_of("interpolation_type", "linear", ("linear", "log_linear")) == "log_linear":
        sigmas = np.exp(np.linspace(math.log(train[-1]), math.log(train[0]), source.steps + 1))
    respaced = _respaced(source, sigmas, train)
    if respaced is not None:
        t, sigmas = respaced
    elif len(sigmas) > source.steps:  # log_linear has one sigma more, where the last step ends
        sigmas, end = sigmas[:-1], float(sigmas[-1])
    if final and source.get("timestep_type", "discrete") == "continuous" and source.prediction() == "v_prediction":
        t, continuous = 0.25 * np.log(sigmas), True
    abar = 1.0 / (1.0 + float(sigmas[0]) ** 2)
    scale = 1.0 if source.get("timestep_spacing", "linspace") == "leading" else math.sqrt(1.0 - abar)
    return _sigma_walk(
        source, t, sigmas, end, bounds, init_scale=scale, output_scale=math.hypot(end, 1.0), continuous=continuous
    )


def _euler(source: Source) -> StepTable:
    if source.config.get("prediction_type") == "original_sample":
        source = dataclasses.replace(source, config={**source.config, "prediction_type": "sample"})
    return euler_table(_single(source, {"c": math.inf}, final=True), "euler", 0.0)


def _euler_ancestral(source: Source) -> StepTable:
    source.prediction(("epsilon", "v_prediction"))
    return euler_table(_single(_without_sigmas(source), {"c": math.inf}, final=False), "euler_ancestral", 1.0)


def _without_sigmas(source: Source) -> Source:
    """Without keys that another scheduler left in the configuration and this one ignores."""
    ignored = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    return dataclasses.replace(source, config={k: v for k, v in source.config.items() if k not in ignored})


def _heun(source: Source) -> StepTable:
    bounds = source.bounds(False, thresholds=False)
    return heun_table(_single(source, bounds, final=False))


def _lms(source: Source) -> StepTable:
    return lms_table(_single(source, {"c": math.inf}, final=False), 4)


# EDM ------------------------------------------------------------------------------------------------------------------


def _edm_walk(source: Source, bounds: dict[str, Any]) -> Walk:
    schedule = _edm_schedule(source)
    kind = source.one_of("sigma_schedule", "karras", ("karras", "exponential"))
    if kind == "karras":
        sigmas = spaced_sigmas(kind, source.steps, schedule.sigma_max, schedule.sigma_min, schedule.rho)
    else:  # one step is the smallest
        ends = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        sigmas = np.exp(np.linspace(*ends, source.steps))[::-1]
    final = source.one_of("final_sigmas_type", "zero", ("zero", "sigma_min"))
    end = 0.0 if final == "zero" else sigmas[-1] if source.name == "EDMEulerScheduler" else schedule.sigma_min
    data = schedule.sigma_data
    prediction = {"epsilon": "edm", "v_prediction": "v_prediction"}[source.prediction(("epsilon", "v_prediction"))]
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
    return consistency(_edm_schedule(source, time_scale=1000.0), source.steps, train_steps=train, clip=clip)


SCHEDULERS: dict[str, Callable[[Source], StepTable]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "DPMSolverMultistepScheduler": _dpm,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun,
    "LMSDiscreteScheduler": _lms,
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
    "CMStochasticIterativeScheduler": _consistency,
}
