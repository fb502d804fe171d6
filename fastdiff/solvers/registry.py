"""All solvers by name, for `fastdiff.Sampler`, the command line, ``compat=`` and docs/solvers.md.

docs/adding-a-solver.md describes how to add one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import edm, flow, walk
from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.consistency import consistency, lcm, tcd
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import VARIANCE_TYPES, ddpm
from fastdiff.solvers.dpm2 import dpm2, dpm2_ancestral
from fastdiff.solvers.dpmpp import dpmpp_1, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from fastdiff.solvers.dpmpp_stages import dpmpp_2s_ancestral, dpmpp_sde
from fastdiff.solvers.euler import euler, euler_ancestral
from fastdiff.solvers.heun import heun
from fastdiff.solvers.keys import value_of
from fastdiff.solvers.paths import ddim_inversion, dpmpp_inversion
from fastdiff.solvers.plms import plms
from fastdiff.solvers.singlestep import dpmpp_2s, dpmpp_3s
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.unipc import unipc

Config = Mapping[str, Any]  # the model's scheduler_config.json

# Options of `Sampler.sample` that belong to some solvers only. The text ends the message that refuses one elsewhere.
OPTIONS = {
    "eta": "; the noise of ddpm is variance",
    "variance": "; the noise of ddim is eta",
    "order": "; dpmpp_1 to dpmpp_3m say theirs",
    "churn": "",
}


@dataclasses.dataclass(frozen=True)
class DiffusersScheduler:
    """The scheduler of diffusers that runs a solver."""

    name: str  # of the scheduler's class
    config: Config = dataclasses.field(default_factory=dict)  # keys that select this solver among those of the class
    by_sigma: bool = False  # whether the class has the spacings by sigma, "karras" and "exponential"
    edm: str | None = None  # the class that runs the solver with EDM networks; None where diffusers has none
    flow: str | None = None  # the same with flow-matching networks
    exploding: str | None = None  # the same with variance-exploding networks


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver: the function that builds its table, its options, and the other code bases that have it."""

    function: Callable[..., StepTable]  # public, (schedule, steps, **options)
    help: str  # one line for users: the method and its source
    steps: int | None = walk.STEPS  # of a run that gives no number; None is every timestep of the schedule
    edm_steps: int = edm.STEPS  # the same with an `EDMSchedule`
    flow_steps: int = flow.STEPS  # the same with a `FlowSchedule`
    options: tuple[str, ...] = ()  # the solver's own among `OPTIONS`, which are passed to ``function`` by these names
    # The options shared by all solvers that ``function`` takes.
    shared: tuple[str, ...] = ("spacing", "prediction", "clip", "threshold", "steps_offset")
    own_spacing: bool = False  # whether it chooses its timesteps itself, so that the model's spacing does not apply
    # Arguments of ``function`` that the model's scheduler configuration decides where the caller does not.
    from_model: Mapping[str, Callable[[Config], Any]] = dataclasses.field(default_factory=dict)
    # The table from an image to the noise that the solver turns into it, (schedule, steps, **options); None for none.
    inverse: Callable[..., StepTable] | None = None
    diffusers: DiffusersScheduler | None = None  # None where diffusers does not have the solver
    others: tuple[str, ...] = ()  # the other code bases, "openai" or "ho", that have it

    @property
    def code_bases(self) -> tuple[str, ...]:
        """Values of ``compat=`` that have the solver."""
        return self.others if self.diffusers is None else ("diffusers", *self.others)

    def default_steps(self, schedule: walk.Schedule) -> int:
        """Return the number of steps of a run that gives none."""
        if isinstance(schedule, flow.FlowSchedule):
            return min(self.flow_steps, schedule.timesteps)
        if not isinstance(schedule, NoiseSchedule):
            return self.edm_steps
        return schedule.timesteps if self.steps is None else min(self.steps, schedule.timesteps)


def _variance(config: Config) -> str:
    name = value_of(config, "variance_type", "fixed_small")
    if name not in VARIANCE_TYPES:
        raise InvalidArgument(f"the model's variance_type {shown(name)} is not supported; give variance=")
    return VARIANCE_TYPES[name]


def _dpm(order: int, algorithm: str = "dpmsolver++") -> DiffusersScheduler:
    return DiffusersScheduler(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": algorithm, "solver_order": order},
        by_sigma=True,
        edm="EDMDPMSolverMultistepScheduler",
        flow="DPMSolverMultistepScheduler",
    )


def _inverse(order: int) -> Callable[..., StepTable]:
    return functools.partial(dpmpp_inversion, order=order)


def _dpm_singlestep(order: int, **more: str) -> DiffusersScheduler:
    name = "DPMSolverSinglestepScheduler"
    return DiffusersScheduler(name, {"solver_order": order, **more}, by_sigma=True, flow=name)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(
        ddim,
        "Denoising diffusion implicit models (Song et al. 2021).",
        options=("eta",),
        inverse=ddim_inversion,
        from_model={"set_alpha_to_one": lambda config: value_of(config, "set_alpha_to_one", True)},
        diffusers=DiffusersScheduler("DDIMScheduler"),
        others=("openai", "ho"),
    ),
    "ddpm": Solver(
        ddpm,
        "Ancestral sampling (Ho et al. 2020).",
        steps=None,
        options=("variance",),
        from_model={"variance": _variance},
        diffusers=DiffusersScheduler("DDPMScheduler", exploding="ScoreSdeVeScheduler"),
        others=("openai", "ho"),
    ),
    "dpmpp_1": Solver(dpmpp_1, "DPM-Solver++ of order 1 (Lu et al. 2022).", inverse=_inverse(1), diffusers=_dpm(1)),
    "dpmpp_2m": Solver(
        dpmpp_2m, "DPM-Solver++(2M), multi-step, of order 2 (Lu et al. 2022).", inverse=_inverse(2), diffusers=_dpm(2)
    ),
    "dpmpp_3m": Solver(
        dpmpp_3m, "DPM-Solver++(3M), multi-step, of order 3 (Lu et al. 2022).", inverse=_inverse(3), diffusers=_dpm(3)
    ),
    "dpmpp_2m_sde": Solver(
        dpmpp_2m_sde, "SDE-DPM-Solver++(2M), stochastic (Lu et al. 2022).", diffusers=_dpm(2, "sde-dpmsolver++")
    ),
    "dpmpp_3m_sde": Solver(dpmpp_3m_sde, "SDE-DPM-Solver++(3M), stochastic (k-diffusion)."),
    "dpmpp_2s": Solver(
        dpmpp_2s, "DPM-Solver++(2S), single-step, of order 2 (Lu et al. 2022).", diffusers=_dpm_singlestep(2)
    ),
    "dpmpp_3s": Solver(
        dpmpp_3s,
        "DPM-Solver++(3S), single-step, of order 3 (Lu et al. 2022).",
        diffusers=_dpm_singlestep(3, solver_type="heun"),
    ),
    "dpmpp_sde": Solver(
        dpmpp_sde,
        "DPM++ SDE, stochastic, two evaluations a step (k-diffusion).",
        diffusers=DiffusersScheduler("DPMSolverSDEScheduler", by_sigma=True),
    ),
    "dpmpp_2s_ancestral": Solver(
        dpmpp_2s_ancestral, "DPM++ 2S ancestral, stochastic, two evaluations a step (k-diffusion)."
    ),
    "unipc": Solver(
        unipc,
        "UniPC, a multi-step predictor and corrector (Zhao et al. 2023).",
        options=("order",),
        diffusers=DiffusersScheduler("UniPCMultistepScheduler", by_sigma=True, flow="UniPCMultistepScheduler"),
    ),
    "euler": Solver(
        euler,
        "Euler's method in sigma (Karras et al. 2022).",
        options=("churn",),
        diffusers=DiffusersScheduler(
            "EulerDiscreteScheduler", by_sigma=True, edm="EDMEulerScheduler", flow="FlowMatchEulerDiscreteScheduler"
        ),
    ),
    "euler_ancestral": Solver(
        euler_ancestral,
        "Euler's method with fresh noise in every step (k-diffusion).",
        diffusers=DiffusersScheduler("EulerAncestralDiscreteScheduler"),
    ),
    "heun": Solver(
        heun,
        "Heun's method of order 2, two evaluations a step (Karras et al. 2022).",
        options=("churn",),
        diffusers=DiffusersScheduler("HeunDiscreteScheduler", by_sigma=True, flow="FlowMatchHeunDiscreteScheduler"),
    ),
    "dpm2": Solver(
        dpm2,
        "The midpoint rule in sigma, two evaluations a step (k-diffusion).",
        diffusers=DiffusersScheduler("KDPM2DiscreteScheduler", by_sigma=True),
    ),
    "dpm2_ancestral": Solver(
        dpm2_ancestral,
        "The midpoint rule with fresh noise in every step (k-diffusion).",
        diffusers=DiffusersScheduler("KDPM2AncestralDiscreteScheduler", by_sigma=True),
    ),
    "deis": Solver(
        deis,
        "DEIS, Adams-Bashforth in log sigma (Zhang & Chen 2023).",
        options=("order",),
        diffusers=DiffusersScheduler("DEISMultistepScheduler", by_sigma=True, flow="DEISMultistepScheduler"),
    ),
    "lms": Solver(
        lms,
        "Adams-Bashforth in sigma (k-diffusion).",
        options=("order",),
        diffusers=DiffusersScheduler("LMSDiscreteScheduler", by_sigma=True),
    ),
    "plms": Solver(
        plms,
        "PNDM's pseudo linear multi-step method (Liu et al. 2022).",
        diffusers=DiffusersScheduler("PNDMScheduler", {"skip_prk_steps": True}),
    ),
    "lcm": Solver(
        lcm,
        "Latent consistency models (Luo et al. 2023).",
        steps=4,
        shared=("spacing", "prediction", "clip", "threshold"),
        own_spacing=True,
        from_model={
            "original_steps": lambda config: value_of(config, "original_inference_steps", None),
            "timestep_scaling": lambda config: value_of(config, "timestep_scaling", 10.0),
        },
        diffusers=DiffusersScheduler("LCMScheduler"),
    ),
    "tcd": Solver(
        tcd,
        "Trajectory consistency distillation (Zheng et al. 2024).",
        steps=4,
        shared=("spacing", "prediction", "clip", "threshold"),
        own_spacing=True,
        from_model={"original_steps": lambda config: config.get("original_inference_steps")},
        diffusers=DiffusersScheduler("TCDScheduler"),
    ),
    "consistency": Solver(
        consistency,
        "Consistency models, of an EDMSchedule (Song et al. 2023).",
        steps=1,
        edm_steps=1,
        shared=("clip",),
        own_spacing=True,
        diffusers=DiffusersScheduler("CMStochasticIterativeScheduler", edm="CMStochasticIterativeScheduler"),
    ),
}
