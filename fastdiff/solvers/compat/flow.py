"""The tables of diffusers' flow-matching schedulers, and the levels of its multi-step schedulers with use_flow_sigmas.

Samples are those of a flow, (1 - sigma) x_0 + sigma eps. Where diffusers departs from `fastdiff.solvers.FlowSchedule`:

- FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler apply the shift twice to the lowest level.
- The multi-step schedulers cut timesteps to whole numbers, so that some repeat, and start just below sigma = 1; DEIS
  ends at its own last level, and DPM-Solver++ with final_sigmas_type="sigma_min" at the lowest sigma of the betas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import checks
from fastdiff.checks import shown
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.solvers.compat import sigmas as sigma_levels
from fastdiff.solvers.compat.source import Source, beta_quantiles
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.flow import PREDICTIONS, FlowSchedule, abar_of, shifted
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.keys import value_of
from fastdiff.solvers.spacing import SIGMA_SPACINGS, spaced_sigmas
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Level, Walk

BELOW_ONE = 1e-6  # what UniPCMultistepScheduler subtracts from a first level of 1


def flow_euler(source: Source) -> StepTable:
    """Return the table of FlowMatchEulerDiscreteScheduler."""
    T, dtype = source.get("num_train_timesteps", 1000), getattr(np, sigma_levels.PRECISION)
    sigmas, t = _levels(source, T, dtype)
    inverted = bool(source.get("invert_sigmas", False))
    stochastic = bool(source.get("stochastic_sampling", False))
    if inverted:
        if stochastic or source.times is not None:
            raise source.refuse("invert_sigmas", "it does not go with stochastic_sampling, nor with timesteps=")
        t = (1 - sigmas) * T
    walk = flow_walk(source, sigmas, t, 0.0, {"c": math.inf}, prediction="flow_prediction")
    if stochastic:  # every step draws the noise anew
        rows = [walk.row(i, x0=level.a_next, z=level.s_next) for i, level in enumerate(walk.levels)]
        return walk.table("euler", rows)
    if not inverted:
        return euler_table(walk, "euler", 0.0)
    # The timestep rises from noise to data, and the network predicts x_0 - eps.
    table = euler_table(dataclasses.replace(walk, ascending=True), "euler", 0.0)
    rows = [row._replace(ko=-row.ko, ao=-row.ao) for row in table.rows]
    return dataclasses.replace(table, rows=tuple(rows))


def flow_heun(source: Source) -> StepTable:
    """Return the table of FlowMatchHeunDiscreteScheduler, which has no other option than the shift."""
    T, dtype = source.get("num_train_timesteps", 1000), getattr(np, sigma_levels.PRECISION)
    config = {key: source.config[key] for key in ("num_train_timesteps", "shift") if key in source.config}
    sigmas, t = _levels(dataclasses.replace(source, config=config), T, dtype)
    return heun_table(flow_walk(source, sigmas, t, 0.0, {"c": math.inf}, prediction="flow_prediction"))


def flow_config(name: str, schedule: FlowSchedule, prediction: str) -> dict[str, Any]:
    """Return the configuration of a scheduler that runs networks of this schedule and prediction."""
    if name.startswith("FlowMatch"):
        if prediction != "flow_prediction":
            raise InvalidArgument(f"diffusers' {name} has no prediction={prediction!r}; it has flow_prediction")
        return {"num_train_timesteps": schedule.timesteps, "shift": schedule.shift}
    return {
        "num_train_timesteps": schedule.timesteps,
        "flow_shift": schedule.shift,
        "use_flow_sigmas": True,
        "prediction_type": prediction,
    }


def flow_schedule(config: Mapping[str, Any]) -> tuple[FlowSchedule, str] | None:
    """Return the schedule and the prediction of a flow-matching configuration; None for any other configuration."""
    name, T = config.get("_class_name"), value_of(config, "num_train_timesteps", 1000)
    own = isinstance(name, str) and name.startswith("FlowMatch")
    if not own and not value_of(config, "use_flow_sigmas", False):
        return None
    for key in ("use_dynamic_shifting", "invert_sigmas"):
        if value_of(config, key, False):
            remedy = "its shift is another for each size: give FlowSchedule(shift=) of yours to Sampler(unet, schedule)"
            why = remedy if key == "use_dynamic_shifting" else "its network predicts x_0 - eps of a rising timestep"
            raise ConfigError(f"{key}=True is not supported for sampling ({why}); fastdiff.Scheduler has it")
    if own:
        return FlowSchedule(value_of(config, "shift", 1.0), T), "flow_prediction"
    prediction = value_of(config, "prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        allowed = ", ".join(PREDICTIONS)
        raise ConfigError(f"prediction_type={shown(prediction)} with use_flow_sigmas=True: allowed are {allowed}")
    return FlowSchedule(value_of(config, "flow_shift", 1.0), T), prediction


def trained_sigmas(config: Any, dtype: Any) -> NDArray[Any]:
    """Return the noise levels of the training of the flow-matching schedulers, falling."""
    T, shift = int(config["num_train_timesteps"]), float(config["shift"])
    sigmas = np.linspace(1, T, T, dtype=dtype)[::-1] / T
    return sigmas if config.get("use_dynamic_shifting") else shifted(sigmas, shift)


def _levels(source: Source, T: int, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the noise levels of a run and its timesteps, as ``set_timesteps`` computes them."""
    shift, dynamic = float(source.get("shift", 1.0)), bool(source.get("use_dynamic_shifting", False))
    sigmas: NDArray[Any]
    if source.sigmas is not None:
        sigmas = source.sigmas.astype(dtype)
    elif source.times is not None:
        sigmas = source.times.astype(dtype) / T
    else:
        trained = trained_sigmas({"num_train_timesteps": T, "shift": shift, "use_dynamic_shifting": dynamic}, dtype)
        sigmas = np.linspace(float(trained[0]) * T, float(trained[-1]) * T, source.steps) / T
    # `Scheduler.set_shift` changes the shift of a run, but not the levels of the training.
    sigmas = _dynamic(source, sigmas) if dynamic else shifted(sigmas, float(source.get("_shift", shift)))
    sigmas = _stretched(source, sigmas)
    kinds = [kind for kind in (*SIGMA_SPACINGS, "beta") if source.get(f"use_{kind}_sigmas", False)]
    if len(kinds) > 1:
        raise source.refuse(f"use_{kinds[-1]}_sigmas", "one spacing by sigma is")
    if kinds:
        sigmas = _spaced(kinds[0], source.steps, float(sigmas[0]), float(sigmas[-1]))
    sigmas = sigmas.astype(dtype)
    return sigmas, sigmas * T if source.times is None else source.times.astype(dtype)


def _spaced(kind: str, steps: int, largest: float, smallest: float) -> NDArray[np.float64]:
    if kind == "beta":
        return smallest + beta_quantiles(1.0 - np.linspace(0.0, 1.0, steps)) * (largest - smallest)
    return spaced_sigmas(kind, steps, largest, smallest)


def _dynamic(source: Source, sigmas: NDArray[Any]) -> NDArray[Any]:
    """Return noise levels after the shift by mu, which pipelines compute from the size of an image."""
    if source.mu is None:
        raise InvalidArgument(f"{source.name}: use_dynamic_shifting=True needs mu=")
    kind = source.one_of("time_shift_type", "exponential", ("exponential", "linear"))
    shift = math.exp(source.mu) if kind == "exponential" else source.mu
    if not 0.0 < shift < math.inf:
        raise InvalidArgument(f"mu={source.mu:g}: the shift must be a positive number, and is {shift:g}")
    return shift / (shift + (1 / sigmas - 1))


def _stretched(source: Source, sigmas: NDArray[Any]) -> NDArray[Any]:
    """Return noise levels of which the last one is shift_terminal, if there is such an option."""
    last = source.get("shift_terminal", 0.0)
    if not last:
        return sigmas
    if not 0.0 < last < 1.0 or sigmas[-1] >= 1.0:
        raise source.refuse("shift_terminal", "a level above 0 and below 1, of at least two steps, is")
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - last))


def flow_multistep(source: Source, train: NDArray[Any], final: str | None, bounds: dict[str, Any]) -> Walk:
    """Return the walk of DPMSolverMultistep, DPMSolverSinglestep, UniPC or DEIS with use_flow_sigmas.

    ``train`` are the sigmas of the betas, rising; ``final`` is the default of final_sigmas_type, or None where the
    scheduler ends at its last level.
    """
    T, n = len(train), checks.whole("steps", source.steps, 1, len(train), of="the schedule's timesteps")
    unipc = source.name == "UniPCMultistepScheduler"
    shift = float(source.get("flow_shift", 1.0))
    dynamic = bool(source.get("use_dynamic_shifting", False))
    others = [key for key in ("use_exponential_sigmas", "use_beta_sigmas") if source.get(key, False)]
    if not unipc:
        others += [key for key in ("use_karras_sigmas", "use_lu_lambdas") if source.get(key, False)]
    if others:
        raise source.refuse(others[0], "with use_flow_sigmas=True its levels are not those of a flow")
    if source.mu is not None and not unipc:
        kind = source.get("time_shift_type", "exponential")
        if not dynamic or kind != "exponential":
            raise InvalidArgument(f"{source.name}: mu= needs use_dynamic_shifting=True and time_shift_type exponential")
        shift = math.exp(source.mu)
    if unipc and source.get("use_karras_sigmas", False):
        ends = source.get("sigma_max", float(train[-1])), source.get("sigma_min", float(train[0]))
        sigmas = spaced_sigmas("karras", n, *ends)
        sigmas = sigmas / (sigmas + 1.0)
    elif unipc:
        plain = np.linspace(1, 1 / T, n + 1)[:-1] if source.sigmas is None else source.sigmas
        sigmas = _stretched(source, _dynamic(source, plain) if dynamic else shifted(plain, shift))
        if abs(sigmas[0] - 1.0) < BELOW_ONE:
            sigmas[0] -= BELOW_ONE
    else:
        sigmas = np.flip(shifted(1.0 - np.linspace(1, 1 / T, n + 1), shift))[:-1]
    t = np.trunc(sigmas * T)
    sigmas = sigmas.astype(getattr(np, sigma_levels.PRECISION))
    end = float(sigmas[-1])
    if final is not None:
        zero = source.one_of("final_sigmas_type", final, ("zero", "sigma_min")) == "zero"
        end = 0.0 if zero else end if unipc else float(train[0])
    return flow_walk(source, sigmas, t, end, bounds)


def flow_walk(
    source: Source,
    sigmas: NDArray[Any],
    t: NDArray[Any],
    end: float,
    bounds: dict[str, Any],
    prediction: str | None = None,
) -> Walk:
    """Return a walk over noise levels of a flow, whose last step ends at ``end``."""
    listed = sigmas.astype(np.float64).tolist()
    if not (np.diff(listed) < 0).all() or listed[0] > 1.0 or listed[-1] <= 0.0 or end > listed[-1]:
        raise ConfigError(
            f"{source.name}: its noise levels {listed[0]:g} .. {listed[-1]:g}, {end:g} for {source.steps} steps "
            "repeat, rise or leave 0 .. 1; another number of steps or another shift works"
        )
    abar = [abar_of(s) for s in (*listed, end)]
    levels = tuple(Level(float(v), abar[i], abar[i + 1]) for i, v in enumerate(t.tolist()))
    said = source.prediction(PREDICTIONS) if prediction is None else prediction
    return Walk(levels, said, compat=True, start=source.start, flow=True, **bounds)
