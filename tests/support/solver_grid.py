"""The grid of solvers x predictions x spacings x numbers of steps that is held to diffusers, and docs/solvers.md of it.

python -m tests.support.solver_grid      # writes docs/solvers.md
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from fastdiff import solvers
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import PREDICTIONS
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.diffusers import from_config
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "solvers.md"
STEPS = (1, 2, 5, 10, 20, 50)
TIMESTEPS = ("trailing", "leading", "linspace")
SIGMAS = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
EDM = ("karras", "exponential")


@dataclasses.dataclass(frozen=True)
class Solver:
    """One line of the grid: a function of `fastdiff.solvers` and the diffusers scheduler that it must agree with."""

    name: str
    build: Callable[..., StepTable]
    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()
    predictions: tuple[str, ...] = PREDICTIONS
    sigmas: bool = True
    differs: str = ""  # how the right mathematics differs from diffusers, so that only from_config reproduces it

    @property
    def spacings(self) -> tuple[str, ...]:
        if self.scheduler.startswith("EDM"):
            return EDM
        if self.scheduler.startswith("CM"):
            return ("karras",)
        if self.scheduler.startswith("LCM"):
            return ("leading",)
        return (*TIMESTEPS, *(SIGMAS if self.sigmas else ()))

    def config(self, prediction: str, spacing: str) -> dict[str, Any]:
        config = {"_class_name": self.scheduler, **dict(self.options)}
        if self.scheduler.startswith("CM"):
            return config
        config["prediction_type"] = prediction
        if self.scheduler.startswith("EDM"):
            return {**config, "sigma_schedule": spacing}
        return {**config, **SIGMAS.get(spacing, {"timestep_spacing": spacing})}

    def runs(self, spacing: str) -> Iterator[tuple[int, str]]:
        """Numbers of steps and why diffusers itself cannot run them, "" where it can."""
        for steps in STEPS:
            try:
                from_config(self.config(self.predictions[0], spacing), steps)
            except (ConfigError, InvalidArgument) as e:
                yield steps, str(e)
            else:
                yield steps, ""


def _bind(build: Callable[..., StepTable], **options: Any) -> Callable[..., StepTable]:
    return functools.partial(build, **options)


DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
LOW = ("final_sigmas_type", "sigma_min")
SDE = ("algorithm_type", "sde-dpmsolver++")
NO_SAMPLE = ("epsilon", "v_prediction")
GRID = [
    Solver("ddpm", _bind(solvers.ddpm, clip=1.0), "DDPMScheduler", sigmas=False),
    Solver(
        "ddpm, variance beta",
        _bind(solvers.ddpm, variance="beta"),
        "DDPMScheduler",
        (("variance_type", "fixed_large"),),
        sigmas=False,
        differs="no noise on the finished image",
    ),
    Solver("ddim", _bind(solvers.ddim, clip=1.0, eps_from="output"), "DDIMScheduler", sigmas=False),
    Solver("dpmpp_1", solvers.dpmpp_1, DPM, (("solver_order", 1),)),
    Solver("dpmpp_2m", solvers.dpmpp_2m, DPM),
    Solver("dpmpp_2m, heun", _bind(solvers.dpmpp_2m, solver_type="heun"), DPM, (("solver_type", "heun"),)),
    Solver(
        "dpmpp_2m, euler_at_final",
        _bind(solvers.dpmpp_2m, euler_at_final=True, lower_order_final=False, final="sigma_min"),
        DPM,
        (("euler_at_final", True), ("lower_order_final", False), LOW),
    ),
    Solver("dpmpp_3m", solvers.dpmpp_3m, DPM, (("solver_order", 3),), differs="the whole second derivative"),
    Solver("dpmpp_2m_sde", solvers.dpmpp_2m_sde, DPM, (SDE,)),
    Solver("dpmpp_2m_sde, heun", _bind(solvers.dpmpp_2m_sde, solver_type="heun"), DPM, (SDE, ("solver_type", "heun"))),
    Solver("unipc, order 1", _bind(solvers.unipc, order=1), UNIPC, (("solver_order", 1),)),
    Solver("unipc", solvers.unipc, UNIPC),
    Solver("unipc, order 3", _bind(solvers.unipc, order=3), UNIPC, (("solver_order", 3),)),
    Solver(
        "unipc, order 3, bh1",
        _bind(solvers.unipc, order=3, solver_type="bh1", final="sigma_min"),
        UNIPC,
        (("solver_order", 3), ("solver_type", "bh1"), LOW),
    ),
    Solver("deis, order 1", _bind(solvers.deis, order=1, final="sigma_min"), DEIS, (("solver_order", 1),)),
    Solver("deis", _bind(solvers.deis, final="sigma_min"), DEIS),
    Solver("deis, order 3", _bind(solvers.deis, order=3, final="sigma_min"), DEIS, (("solver_order", 3),)),
    Solver("euler", solvers.euler, "EulerDiscreteScheduler"),
    Solver(
        "euler_ancestral",
        solvers.euler_ancestral,
        "EulerAncestralDiscreteScheduler",
        predictions=NO_SAMPLE,
        sigmas=False,
    ),
    Solver("heun", solvers.heun, "HeunDiscreteScheduler", (("beta_start", 1e-4), ("beta_end", 0.02))),
    Solver("lms", solvers.lms, "LMSDiscreteScheduler"),
    Solver(
        "plms",
        _bind(solvers.plms, final="sigma_min"),
        "PNDMScheduler",
        (("skip_prk_steps", True),),
        ("epsilon",),
        sigmas=False,
    ),
    Solver(
        "plms, v",
        _bind(solvers.plms, final="sigma_min"),
        "PNDMScheduler",
        (("skip_prk_steps", True),),
        ("v_prediction",),
        sigmas=False,
        differs="a history of eps, not of v",
    ),
    Solver(
        "lcm",
        solvers.lcm,
        "LCMScheduler",
        (("beta_schedule", "linear"), ("beta_start", 1e-4), ("beta_end", 0.02)),
    ),
    Solver("euler, EDM", solvers.euler, "EDMEulerScheduler", predictions=NO_SAMPLE),
    Solver("dpmpp_2m, EDM", solvers.dpmpp_2m, "EDMDPMSolverMultistepScheduler", predictions=NO_SAMPLE),
    Solver("consistency", solvers.consistency, "CMStochasticIterativeScheduler", predictions=("epsilon",)),
]

HEAD = """# Solvers

Generated by `python -m tests.support.solver_grid` from the grid that
`tests/solvers/test_solver_grid.py` runs; a test fails where this page is stale. Every number of steps below is a whole
sampling run, compared with diffusers' own scheduler after every row: the same noise, a fixed smooth network, diffusers'
code in float64, the largest difference below 1e-8. One coefficient changed by 1 % turns a run red: a test does that to
every coefficient of every solver's table of 5 steps.

Predictions: E epsilon, S sample, V v_prediction. Steps in parentheses: diffusers itself fails there (a stray timestep,
a noise level twice, more steps than levels), and an error says so.

| solver | diffusers scheduler | predictions | spacing | steps |
|---|---|---|---|---|
"""
TAIL = """
`fastdiff.solvers.from_config(scheduler_config, steps)` gives the table of every line, diffusers' quirks included; the
functions of `fastdiff.solvers` have the right mathematics, which differs where the table above says so and in these:

- `linspace` and `trailing` of DDIM and PNDM step to t - T // steps in diffusers, elsewhere than where the next row
  starts.
- One step starts at pure noise (t = T-1); diffusers' `leading` and `linspace` start it at t = 0.
- Timesteps of Karras' and exponential spacing are fractional, those at which the schedule has the sigma; diffusers
  rounds or cuts them for DPM-Solver++, UniPC and DEIS.
- `init_scale` is 1 (the state is variance-preserving); diffusers starts Euler, Heun and LMS at sqrt(1 - abar) with
  `linspace` and `trailing`.
- `final` is zero noise; diffusers' DEIS and PNDM end at the schedule's lowest level.

diffusers' own wrongs: DPM-Solver++(3M) takes half of the second derivative, in the authors' code too, which makes it of
order 2; the SDE form of order 3 has a sign wrong; UniPC with `bh1` ends in NaN at sigma = 0; DDPM with `fixed_large` or
`learned_range` leaves noise on the image where its last timestep is above 0.

Not supported, and refused by name: `skip_prk_steps=false`, `use_beta_sigmas`, `use_lu_lambdas`, `use_flow_sigmas`,
`algorithm_type` `dpmsolver` and `sde-dpmsolver` (noise prediction), `predict_x0=false`, `solver_p`, and every scheduler
that the table does not name.

## What other code bases draw

`sample(..., compat="diffusers" | "openai" | "ho")` and `fastdiff sample --compat` draw what a code base's own loop
draws from the same noise; `spacing` is then in its terms. `tests/solvers/test_codebases.py` holds whole runs to their
published arithmetic (largest difference 1e-8 in float64), and the default to differ here and nowhere else:

- `diffusers`, every solver: `from_config` of the solver's scheduler with the model's configuration, so all of the
  above, and `ddim` keeps the network's eps where x0 is clipped.
- `openai` (improved- and guided-diffusion), `ddpm` and `ddim`: timesteps of `space_timesteps`, `spacing` being a
  `timestep_respacing` such as `"250"`, `"ddim50"`, `"10,20,30"`; one step visits t = 0. Recomputed betas, fixed_large
  and learned_range variances, eps of the clipped x0, no noise in the last step are the default's too.
- `ho` (hojonathanho/diffusion): `ddpm` over all timesteps is the default's. Fewer steps and `ddim` are those of its
  port ermongroup/ddim, `spacing` being `"uniform"` (stride T // steps, so there can be more steps than asked for) or
  `"quad"` (t = 0 can repeat): ddim does not bound x0, ddpm has fixedlarge's variance.

## Order of convergence

On Gaussian data with the exact network, over log-SNR lambda from -6 to 1.5 in equal steps, the error of the samples'
spread falls with the number of steps to the power (`tests/solvers/test_orders.py` asserts it):

| solver | order |
|---|---|
"""
ORDERS = {
    "ddim, euler, dpmpp_1, euler_ancestral": "1",
    "dpmpp_2m (midpoint, heun), heun, plms, dpmpp_2m_sde": "2",
    "dpmpp_3m": "3 (the authors' and diffusers' coefficients: 2)",
    "unipc of order 1, 2, 3": "2, 3, 4: the corrector adds one; without it 1, 2, 3",
    "deis of order 1, 2, 3": "1, 2, 3",
    "lms of order 1, 2, 3, 4": "1, 2, 3, 4",
}


def markdown() -> str:
    lines = []
    for solver in GRID:
        letters = "".join(p[0].upper() for p in solver.predictions)
        options = ", ".join(f"{k}={v}" for k, v in solver.options if not k.startswith("beta_"))
        cells = [f"`{solver.name}`", f"{solver.scheduler} {options}".strip(), letters]
        if solver.differs:
            cells[0] += f" ({solver.differs})"
        same: dict[str, list[str]] = {}
        for spacing in solver.spacings:
            runs = " ".join(f"({n})" if why else str(n) for n, why in solver.runs(spacing))
            same.setdefault(runs, []).append(spacing)
        for runs, spacings in same.items():
            lines.append("| " + " | ".join([*cells, ", ".join(spacings), runs]) + " |\n")
            cells = ["", "", ""]
    return HEAD + "".join(lines) + TAIL + "".join(f"| {name} | {order} |\n" for name, order in ORDERS.items())


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
