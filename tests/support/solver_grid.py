"""The grid of solvers, predictions, spacings and steps whose runs are compared with diffusers, and docs/solvers.md.

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
from fastdiff.solvers.registry import SOLVERS
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "solvers.md"
STEPS = (1, 2, 5, 10, 20, 50)
TIMESTEPS = ("trailing", "leading", "linspace")
SIGMAS = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
EDM = ("karras", "exponential")


@dataclasses.dataclass(frozen=True)
class Solver:
    """One line of the grid: a function of `fastdiff.solvers` and the diffusers scheduler with which it must agree."""

    name: str
    build: Callable[..., StepTable]
    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()
    predictions: tuple[str, ...] = PREDICTIONS
    sigmas: bool = True
    differs: str = ""  # where the method differs from diffusers, so that only from_config agrees with it

    @property
    def spacings(self) -> tuple[str, ...]:
        if self.scheduler.startswith("EDM"):
            return EDM
        if self.scheduler.startswith("CM"):
            return ("karras",)
        if self.scheduler.startswith("FlowMatch") or ("use_flow_sigmas", True) in self.options:
            return ("linspace", *(SIGMAS if self.sigmas else ()))
        if self.scheduler.startswith(("LCM", "TCD")):
            return ("leading",)
        if self.scheduler == SINGLE:
            return ("linspace", *SIGMAS)
        if self.scheduler == "DDIMInverseScheduler":
            return TIMESTEPS[:2]
        return (*TIMESTEPS, *(SIGMAS if self.sigmas else ()))

    def config(self, prediction: str, spacing: str) -> dict[str, Any]:
        config = {"_class_name": self.scheduler, **dict(self.options)}
        if self.scheduler.startswith("CM"):
            return config
        if self.scheduler.startswith("FlowMatch"):
            return {**config, **SIGMAS.get(spacing, {})}
        config["prediction_type"] = prediction
        if self.scheduler.startswith("EDM"):
            return {**config, "sigma_schedule": spacing}
        if self.scheduler == SINGLE:  # "linspace" is its only spacing by timestep
            return {**config, **SIGMAS.get(spacing, {})}
        return {**config, **SIGMAS.get(spacing, {"timestep_spacing": spacing})}

    def runs(self, spacing: str) -> Iterator[tuple[int, str]]:
        """Yield numbers of steps, each with the reason why diffusers itself fails there, which is "" where it works."""
        for steps in STEPS:
            try:
                from_config(self.config(self.predictions[0], spacing), steps)
            except (ConfigError, InvalidArgument) as e:
                yield steps, str(e)
            else:
                yield steps, ""


def _bind(build: Callable[..., StepTable], **options: Any) -> Callable[..., StepTable]:
    return functools.partial(build, **options)


SINGLE = "DPMSolverSinglestepScheduler"
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
LOW = ("final_sigmas_type", "sigma_min")
SDE = ("algorithm_type", "sde-dpmsolver++")
DDPM_BETAS = (("beta_start", 1e-4), ("beta_end", 0.02))
BETWEEN = "the timestep of a level between two others"
NO_SAMPLE = ("epsilon", "v_prediction")
FLOW, FLOW_SIGMAS = "flow_prediction", ("use_flow_sigmas", True)
WHOLE = "whole timesteps, and other levels"
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
    Solver("dpmpp_2s", solvers.dpmpp_2s, SINGLE),
    Solver("dpmpp_2s, heun", _bind(solvers.dpmpp_2s, solver_type="heun"), SINGLE, (("solver_type", "heun"),)),
    Solver("dpmpp_3s", solvers.dpmpp_3s, SINGLE, (("solver_order", 3), ("solver_type", "heun"))),
    Solver(
        "dpmpp_3s, midpoint",
        solvers.dpmpp_3s,
        SINGLE,
        (("solver_order", 3),),
        differs="the slope of the last value alone",
    ),
    Solver("dpmpp_sde", solvers.dpmpp_sde, "DPMSolverSDEScheduler", DDPM_BETAS, NO_SAMPLE, differs=BETWEEN),
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
    Solver("heun", solvers.heun, "HeunDiscreteScheduler", DDPM_BETAS),
    Solver("lms", solvers.lms, "LMSDiscreteScheduler", differs="a step to zero noise is of order 1"),
    Solver("dpm2", solvers.dpm2, "KDPM2DiscreteScheduler", DDPM_BETAS, NO_SAMPLE, differs=BETWEEN),
    Solver(
        "dpm2_ancestral",
        solvers.dpm2_ancestral,
        "KDPM2AncestralDiscreteScheduler",
        DDPM_BETAS,
        NO_SAMPLE,
        differs=BETWEEN,
    ),
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
        (("beta_schedule", "linear"), *DDPM_BETAS),
    ),
    Solver(
        "tcd",
        solvers.tcd,
        "TCDScheduler",
        (("beta_schedule", "linear"), *DDPM_BETAS),
        differs="the last step ends at zero noise",
    ),
    Solver(
        "ddim, inverse",
        solvers.ddim_inversion,
        "DDIMInverseScheduler",
        (("clip_sample", False),),
        predictions=NO_SAMPLE,
        differs="the network is evaluated at the level of the sample it reads",
    ),
    Solver(
        "dpmpp_2m, inverse",
        solvers.dpmpp_inversion,
        "DPMSolverMultistepInverseScheduler",
        differs="the levels are those of `dpmpp_2m`, backwards",
    ),
    Solver("euler, EDM", solvers.euler, "EDMEulerScheduler", predictions=NO_SAMPLE),
    Solver("dpmpp_2m, EDM", solvers.dpmpp_2m, "EDMDPMSolverMultistepScheduler", predictions=NO_SAMPLE),
    Solver("euler, flow", solvers.euler, "FlowMatchEulerDiscreteScheduler", (("shift", 3.0),), predictions=(FLOW,)),
    Solver(
        "heun, flow",
        solvers.heun,
        "FlowMatchHeunDiscreteScheduler",
        (("shift", 3.0),),
        predictions=(FLOW,),
        sigmas=False,
    ),
    *(
        Solver(
            f"{name}, of flow",
            build,
            scheduler,
            (*options, FLOW_SIGMAS, ("flow_shift", 2.0)),
            predictions=("epsilon", "sample", FLOW),
            sigmas=False,
            differs=WHOLE,
        )
        for name, build, scheduler, options in (
            ("dpmpp_2m", solvers.dpmpp_2m, DPM, ()),
            ("dpmpp_2m_sde", solvers.dpmpp_2m_sde, DPM, (SDE,)),
            ("dpmpp_2s", solvers.dpmpp_2s, SINGLE, ()),
            ("unipc", solvers.unipc, UNIPC, ()),
            ("deis", solvers.deis, DEIS, ()),
        )
    ),
    Solver("consistency", solvers.consistency, "CMStochasticIterativeScheduler", predictions=("epsilon",)),
]

HEAD = """# Solvers

`python -m tests.support.solver_grid` writes this page from the registry (`fastdiff/solvers/registry.py`) and from the
grid that `tests/solvers/test_solver_grid.py` runs; a test fails where the page is stale.
[adding-a-solver.md](adding-a-solver.md) describes how to add one.

| solver | method | default steps | own options | `compat=` |
|---|---|---|---|---|
"""
COMPARED = """
`solver="auto"` chooses one by the number of steps. Every solver also takes `spacing`, `clip` and `steps`, except that
`lcm`, `tcd` and `consistency` have their own spacing. `consistency` needs an `EDMSchedule`; the others, except `lcm`
and `tcd`, take one too, with 18 steps by default.

They take a `FlowSchedule` as well, with 28 steps by default: networks of flow matching (rectified flow), whose states
are x = (1 - sigma) x_0 + sigma eps and which predict the velocity eps - x_0. `euler` and `heun` are then Euler's and
Heun's methods for dx/dsigma = velocity. A run starts at sigma = 1, pure noise, where `plms`, `deis`, `lms`, `dpm2`,
`dpm2_ancestral`, `dpmpp_sde` and `dpmpp_2s_ancestral` cannot start: they need `spacing=`, a list of sigmas below 1.

And they take a `VESchedule`: networks of the variance-exploding process (NCSN++), whose states are x_0 + sigma eps and
which predict the score, -eps / sigma. `ddpm` is then the ancestral predictor of Song et al. (2021, eq. 47), and with
`variance="beta"` the reverse diffusion predictor (eq. 46); the spacings are those of an `EDMSchedule`.

## Compared with diffusers

Every number of steps below is a whole sampling run that is compared with diffusers' own scheduler after every row:
the same noise, a fixed smooth network, diffusers' code in float64, the largest difference below 1e-8. The comparison
notices one coefficient that is changed by 1 %: a test changes every coefficient of every solver's table of 5 steps.

Predictions: E epsilon, S sample, V v_prediction, F flow_prediction. Steps in parentheses are those at which diffusers
itself fails (a stray timestep, a noise level twice, more steps than levels), where fastdiff raises an error that says
so.

| solver | diffusers scheduler | predictions | spacing | steps |
|---|---|---|---|---|
"""
TAIL = """
`fastdiff.solvers.from_config(scheduler_config, steps)` builds the table of every line, diffusers' quirks included. The
functions of `fastdiff.solvers` follow the papers, and differ from diffusers where the table above says so and in these
points:

- With `linspace` and `trailing`, diffusers' DDIM and PNDM step to t - T // steps, which is not where the next row
  starts.
- A run of one step starts at pure noise (t = T-1); diffusers' `leading` and `linspace` start it at t = 0.
- Timesteps of Karras' and exponential spacing are fractional, those at which the schedule has the sigma; diffusers
  rounds or cuts them for DPM-Solver++, UniPC and DEIS.
- `init_scale` is 1, as the state is variance-preserving; diffusers starts Euler, Heun and LMS at sqrt(1 - abar) with
  `linspace` and `trailing`.
- The last step ends at zero noise (`final="zero"`); diffusers' DEIS, PNDM and TCD end at the schedule's lowest level.
- The network's timestep at a level between two others is where the schedule, linear in log abar between timesteps, has
  that level; diffusers' DPM2 and DPM++ SDE interpolate log sigma.
- With use_flow_sigmas, diffusers cuts timesteps to whole numbers, and its levels, which `fastdiff.solvers.compat.flow`
  describes, are not those of `FlowSchedule.times`; FlowMatchEuler and FlowMatchHeun apply the shift to the lowest level
  twice.
- A step to zero noise is of order 1 in every multi-step solver; k-diffusion and diffusers keep the full order of LMS
  there.
- diffusers draws the noise of DPM++ SDE from a Brownian tree with a seed of its own (torchsde); the same increments of
  the same Brownian motion give the same run.

`tests/solvers/test_ve.py` compares the predictor of `ScoreSdeVeScheduler` in the same way, the table `ddpm` with
`compat="diffusers"`. The length of a step of its corrector depends on the norms of the scores of a whole batch, so that
no table has it: with `correct_steps` above 0 it is refused by name, and `fastdiff.Scheduler` has both steps for loops
of one's own (`step_pred`, `step_correct`).

Faults of diffusers: DPM-Solver++(3M) takes half of the second derivative, as in the authors' code, which makes it of
order 2 (the whole one wins at many steps, the half at 15 to 20); the SDE form of order 3 has a wrong sign; UniPC with
`bh1` ends in NaN at sigma = 0; DDPM with `fixed_large` or `learned_range` leaves noise on the image where its last
timestep is above 0.

Not supported, and refused by name: `skip_prk_steps=false`, `use_flow_sigmas` of
`DPMSolverMultistepInverseScheduler` or with another spacing by sigma (UniPC has `use_karras_sigmas`),
`per_token_timesteps` and churn of flow matching, `algorithm_type` `dpmsolver` and
`sde-dpmsolver` (noise prediction), single-step `sde-dpmsolver++`, `predict_x0=false`, `solver_p`, and every scheduler
that the table does not name. A `variance_type` of DDPM that diffusers does not know is `fixed_small`, as there.

### diffusers' own tests

`python benchmarks/diffusers_scheduler_tests.py CHECKOUT` runs the tests of diffusers' schedulers, from a checkout of
diffusers, with `fastdiff.Scheduler` in place of its classes: of 346 tests in 14 files 312 pass. The others:

| tests | why they fail |
|---|---|
| `pndm`: 16 tests | The Runge-Kutta start (`skip_prk_steps=false`) needs more earlier values than a table keeps. |
| `ddim`, `ddpm`, `lcm`: `test_betas` | It goes up to a beta of 2. Betas are below 1, or variances are negative. |
| `ddpm`: `test_rescale_betas_zero_snr` | eps says nothing about x0 at zero SNR, where the run starts. |
| `ddpm`: `test_full_loop_with_noise` | 1 - abar at t = 1 is rounded to float32 in diffusers: a sum differs by 5e-5. |
| `euler`, `euler_ancestral`: `test_rescale_betas_zero_snr` | 1100 steps visit a noise level twice in float32. |
| `deis`, `dpm_multi`, `unipc` (twice): `test_timesteps` | 25 steps of 25 timesteps visit a noise level twice. |
| `dpm_multi`: `test_duplicated_timesteps` | 1000 steps of 1000 timesteps do, too. |
| `deis`, `unipc` (twice): `test_inference_steps` | The run has no timestep 0; diffusers takes the last one instead. |
| `edm_dpmsolver_multistep`: `test_add_noise_device`, `test_scheduler_public_api` | The same, for scaling. |
| `dpm_multi`: `test_solver_order_and_type` | `algorithm_type="dpmsolver"` predicts noise, and is deprecated. |

## Sampling as other code bases do

With `sample(..., compat="diffusers" | "openai" | "ho")` or `fastdiff sample --compat`, a run from the same noise draws
the images that the code base's own loop draws, and `spacing` is an option in its terms.
`tests/solvers/test_codebases.py` compares whole runs with their published arithmetic (largest difference 1e-8 in
float64), and asserts that the default differs from them in the following and nowhere else:

- `diffusers`: `from_config` of the solver's scheduler with the model's configuration, so all of the above. `ddim` keeps
  the network's eps where x0 is clipped.
- `openai` (improved- and guided-diffusion): timesteps of `space_timesteps`, where `spacing` is a `timestep_respacing`
  such as `"250"`, `"ddim50"`, `"10,20,30"`; a run of one step visits t = 0. Recomputed betas, the variances fixed_large
  and learned_range, eps of the clipped x0 and no noise in the last step are as in the default.
- `ho` (hojonathanho/diffusion): `ddpm` over all timesteps is the default's. Fewer steps and `ddim` are those of its
  port ermongroup/ddim, where `spacing` is `"uniform"` (stride T // steps, so there can be more steps than asked for) or
  `"quad"` (t = 0 can repeat); ddim does not clip x0, and ddpm has fixedlarge's variance.

## Order of convergence

On Gaussian data with the exact network, over log-SNR lambda from -6 to 1.5 in equal steps, the error of the samples'
standard deviation falls with the number of steps to the power below (`tests/solvers/test_orders.py` asserts it).
`tests/solvers/test_nonlinear_orders.py` asserts it on a mixture of Gaussians, whose network is not linear: for the
probability flow, for the drift of the reverse SDE (there `dpmpp_3m_sde` is of order 3), for the flow between the noise
of ancestral and churned steps, for `tcd` with eta=0 (1), both inversions and the steps of `Sampler.adapt` (2 and 3).
`tests/solvers/test_flow.py` does for a flow, and `tests/solvers/test_ve.py` for a variance-exploding process:

| solver | order |
|---|---|
"""
ORDERS = {
    "ddim, euler, dpmpp_1, euler_ancestral": "1",
    "dpmpp_2m (midpoint, heun), heun, plms, dpmpp_2m_sde": "2",
    "dpmpp_3m_sde, dpmpp_2s, dpmpp_sde, dpmpp_2s_ancestral, dpm2, dpm2_ancestral": "2",
    "dpmpp_3s": "3",
    "dpmpp_3m": "3 (the authors' and diffusers' coefficients: 2)",
    "unipc of order 1, 2, 3": "2, 3, 4: the corrector adds one; without it 1, 2, 3",
    "deis of order 1, 2, 3": "1, 2, 3",
    "lms of order 1, 2, 3, 4": "1, 2, 3, 4",
    "euler, heun, dpmpp_2m, deis of order 2, dpm2, unipc of order 2, with a `FlowSchedule`": "1, 2, 2, 2, 2, 3",
    "the same with a `VESchedule`": "1, 2, 2, 2, 2, 3",
}


def listing() -> Iterator[str]:
    """Yield a line of the page for each solver of the registry."""
    for name, solver in SOLVERS.items():
        steps = "all timesteps" if solver.steps is None else str(solver.steps)
        options = ", ".join(f"`{option}`" for option in solver.options)
        yield f"| `{name}` | {solver.help} | {steps} | {options} | {', '.join(solver.code_bases)} |\n"


def markdown() -> str:
    """Return the text of docs/solvers.md."""
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
    return (
        HEAD
        + "".join(listing())
        + COMPARED
        + "".join(lines)
        + TAIL
        + "".join(f"| {name} | {order} |\n" for name, order in ORDERS.items())
    )


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
