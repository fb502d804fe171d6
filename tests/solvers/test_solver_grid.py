"""Every solver's table against diffusers' scheduler as a whole run, over the grid of `solver_grid`, and its page."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.solvers import COLUMNS, EDMSchedule, FlowSchedule, StepTable, from_config
from fastdiff.solvers.compat import sigmas as compat
from tests.support.schedulers import run_scheduler, scheduler_module
from tests.support.solver_grid import GRID, PAGE, SIGMAS, Solver, markdown
from tests.support.trajectories import SCHEDULES, Denoise, T, denoiser, draw_noise, run

LINEAR = SCHEDULES["linear"]
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own
TOLERANCE = 1e-8


@pytest.fixture
def wide(monkeypatch):
    """Noise levels in float64, as diffusers' are in `run_scheduler`."""
    monkeypatch.setattr(compat, "PRECISION", "float64")


def continuous(x: Tensor, t: Tensor) -> Tensor:
    """A fixed smooth network for tables whose t is no timestep."""
    t, channel = t.to(x.dtype).reshape(-1, 1, 1, 1), torch.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, 1, 1)
    return 1.5 * torch.tanh((0.8 + 0.3 * channel) * x + 0.4 * torch.sin(t / 9 + channel))


def network(config: dict[str, object]) -> Denoise:
    continuous_levels = str(config["_class_name"]).startswith(("EDM", "CM", "FlowMatch"))
    discrete = not (continuous_levels or "timestep_type" in config or "use_flow_sigmas" in config)
    return denoiser(str(config.get("prediction_type", "epsilon"))) if discrete else continuous


def compare(config: dict[str, object], steps: int, *tables: StepTable) -> list[float]:
    """The largest difference of each table's run from the scheduler's."""
    noise = draw_noise(len(tables[0]))
    theirs = run_scheduler(config, steps, network(config), noise)
    ours = run(tables, network(config), noise)
    assert len(ours) == len(theirs)
    errors = (ours - theirs).abs().amax(dim=(0, 2, 3, 4))
    return [math.inf if math.isnan(e) else e for e in errors.tolist()]


def direct(solver: Solver, prediction: str, spacing: str, steps: int, table: StepTable) -> StepTable | None:
    """The same run by the function of `fastdiff.solvers`; None where the right mathematics is another."""
    if solver.differs:
        return None
    name = solver.name
    if name == "consistency":
        return solver.build(None, steps)
    if name.endswith("EDM"):
        if (spacing, steps) == ("exponential", 1):
            return None  # diffusers starts at sigma_min
        said = {"epsilon": "edm"}.get(prediction, prediction)
        own = solver.build(EDMSchedule(), steps, spacing=spacing, prediction=said, clip=None)
        # diffusers starts at sqrt(sigma_max^2 + 1), Karras et al. at sigma_max
        assert own.init_scale == pytest.approx(table.init_scale, rel=1e-4)
        return dataclasses.replace(own, init_scale=table.init_scale)
    if name.endswith("flow"):
        sigmas = [table.signal_and_noise(row.abar)[1] for row in table.rows if not row.stage]
        return solver.build(FlowSchedule(), spacing=sigmas, clip=None)
    if name == "lcm":
        return solver.build(LINEAR, steps, prediction=prediction)
    ts = [row.t for row in table.rows if not row.stage]
    if spacing in SIGMAS or any(t != int(t) for t in ts):
        return None  # other levels: rounded timesteps, sigma interpolated
    stride = T // steps
    if name in ("ddim", "plms") and any(a - stride != b and b >= 0 for a, b in itertools.pairwise(ts)):
        return None
    if name in ("ddim", "plms") and ts[-1] - stride >= 0:
        return None
    options = {"prediction": prediction, "spacing": ts, **({} if name.startswith("dd") else {"clip": None})}
    return dataclasses.replace(solver.build(LINEAR, **options), init_scale=table.init_scale)


# The runs of these take diffusers ten times as long as the others'; the tests below run them at a few numbers of steps.
LONG = ("dpm2", "dpm2_ancestral", "dpmpp_sde")


@pytest.mark.parametrize(
    ("solver", "prediction"),
    [(s, s.predictions[-1]) for s in GRID if s.name not in LONG],
    ids=lambda v: getattr(v, "name", v),
)
def test_runs_equal_diffusers(solver, prediction, wide):
    """Take every third number of steps of each spacing, and each number of steps with some spacing."""
    compare_runs(solver, prediction, 3)


@pytest.mark.slow
@pytest.mark.parametrize("solver", GRID, ids=lambda s: s.name)
def test_every_run_equals_diffusers(solver, wide):
    for prediction in solver.predictions:
        compare_runs(solver, prediction, 1)


def compare_runs(solver, prediction, every):
    compared = 0
    for i, spacing in enumerate(solver.spacings):
        for j, (steps, why) in enumerate(solver.runs(spacing)):
            if why or (i + j) % every:
                continue
            config = solver.config(prediction, spacing)
            tables = [from_config(config, steps)]
            own = direct(solver, prediction, spacing, steps, tables[0])
            tables += [] if own is None else [own]
            compared += own is not None
            errors = compare(config, steps, *tables)
            assert max(errors) < TOLERANCE, (spacing, steps, errors)
    assert bool(compared) == (not solver.differs)


def test_the_page_is_the_grid():
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "docs/solvers.md is stale: python -m tests.support.solver_grid"
    )


def mutants(table: StepTable):
    """(what, table) with one used coefficient of one row 1 % larger, or one flag the other way."""
    for i, name in itertools.product(range(len(table)), COLUMNS):
        value = getattr(table.rows[i], name)
        if value in (0.0, math.inf) or name in ("abar", "abar_next", "g", "stage"):
            continue
        new = 0.0 if name in ("save", "push") else 1.01 * value
        rows = (*table.rows[:i], table.rows[i]._replace(**{name: new}), *table.rows[i + 1 :])
        yield f"{name} of row {i}", dataclasses.replace(table, rows=rows, ascending=True)
    yield "init_scale", dataclasses.replace(table, init_scale=1.01 * table.init_scale)


@pytest.mark.parametrize("solver", GRID, ids=lambda s: s.name)
def test_one_percent_of_any_coefficient_shows(solver, wide):
    """The comparison above turns red for every used coefficient of every row of 5 steps."""
    prediction, spacing, steps = solver.predictions[-1], solver.spacings[0], 5
    config = solver.config(prediction, spacing)
    table = from_config(config, steps)
    names, tables = zip(("none", table), *mutants(table), strict=True)
    errors = compare(config, steps, *tables)
    assert errors[0] < TOLERANCE
    unseen = [name for name, error in zip(names[1:], errors[1:], strict=True) if not error > TOLERANCE]
    # A bound may bind nowhere; 1 % of what is tiny is less than the tolerance; x0 may serve the preview alone, and the
    # output of a step from a level to itself serves nothing.
    tiny = {
        f"{name} of row {i}" for i, row in enumerate(table.rows) for name in ("s", "ax") if getattr(row, name) < 1e-6
    }
    idle = {f"{k} of row {i}" for i, row in enumerate(table.rows) for k in ("kx", "ko") if row.a0 == row.h0 == 0.0}
    idle |= {f"t of row {i}" for i, row in enumerate(table.rows) if row.ao == row.a0 == row.ho == row.h0 == 0.0}
    idle |= {f"t of row {i}" for i, row in enumerate(table.rows) if row.abar == row.abar_next}
    assert [name for name in unseen if name[:2] != "c " and name not in tiny | idle] == []
    used = {name.split()[0] for name in names}
    assert {"ko", "init_scale"} <= used
    assert ("a1" in used) == bool(table.history)
    assert ("s" in used) == table.stochastic


# More options of from_config ------------------------------------------------------------------------------------------

MORE = [
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "clip_sample_range": 0.7}),
    ("DDPMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}),
    ("DDIMInverseScheduler", {"clip_sample_range": 0.8, "steps_offset": 1, "set_alpha_to_one": False}),
    ("DDIMInverseScheduler", {"prediction_type": "sample", "set_alpha_to_one": False}),
    ("DPMSolverMultistepInverseScheduler", {"solver_order": 3, "lower_order_final": False}),
    ("DPMSolverMultistepInverseScheduler", {"solver_type": "heun", "euler_at_final": True, "thresholding": True}),
    ("DPMSolverMultistepInverseScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "solver_order": 1}),
    ("DPMSolverMultistepInverseScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
    ("LCMScheduler", {"clip_sample": True, "original_inference_steps": 100}),
    ("LCMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 1, 4], "solver_order": 3}),
    ("UniPCMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "final_sigmas_type": "sigma_min"}),
    ("DEISMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0, "lower_order_final": False}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 50.0}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}),
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.9}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min", "sigma_data": 0.7, "rho": 5.0}),
    ("EDMDPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0, "solver_order": 3}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False, "sigma_min": 0.01}),
]


@pytest.mark.parametrize(("name", "options"), MORE, ids=[f"{n}-{','.join(o)}" for n, o in MORE])
def test_more_options_equal_diffusers(name, options, wide):
    for steps in (2, 7, 16):
        config = {"_class_name": name, **options}
        assert max(compare(config, steps, from_config(config, steps))) < TOLERANCE, steps


@pytest.mark.parametrize(("eta", "clipped"), [(0.0, True), (0.7, False), (1.0, True)])
def test_ddims_own_options(eta, clipped, wide):
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    table = from_config(config, 7, eta=eta, use_clipped_model_output=clipped)
    noise = draw_noise(7)
    theirs = run_scheduler(config, 7, denoiser("epsilon"), noise, eta=eta, use_clipped_model_output=clipped)
    assert (run([table], denoiser("epsilon"), noise) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "solver", [pytest.param(s, marks=[pytest.mark.slow] * (s.name in LONG)) for s in GRID], ids=lambda s: s.name
)
def test_pictures_are_diffusers_in_float32(solver):
    """diffusers as it is, in float32, and the table in float32: the same timesteps, PSNR above 60 dB."""
    for spacing in solver.spacings[::2]:
        config, steps = solver.config(solver.predictions[-1], spacing), 20
        table = from_config(config, steps)
        module = scheduler_module(solver.scheduler)
        scheduler = getattr(module, solver.scheduler)(**{k: v for k, v in config.items() if k[0] != "_"})
        scheduler.set_timesteps(steps)
        assert np.abs(np.array(table.timesteps) - scheduler.timesteps.double().numpy()).max() < 1e-3
        if table.stochastic:
            continue
        noise = draw_noise(len(table), torch.float32)
        flow = solver.scheduler.startswith("FlowMatch")  # these scale neither noise nor the network's input
        x = noise[0] if flow else noise[0] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            read = x if flow else scheduler.scale_model_input(x, t)
            out = network(config)(read.float(), t.double().reshape(1)).float()
            x = scheduler.step(out, t, x).prev_sample
        ours = run([table], network(config), noise)[-1]
        psnr = 10 * math.log10(4 / float((ours - x).square().mean() + 1e-20))
        assert psnr > 60, (spacing, psnr)


# Where diffusers fails, and what is refused ---------------------------------------------------------------------------


def test_unipc_bh1_ends_in_nan(wide):
    """B = -h is infinite at sigma = 0, and 0 times it NaN; ours goes to the limit, and is the same up to there."""
    config = {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}
    table, noise = from_config(config, 10), draw_noise(10)
    ours, theirs = run([table], denoiser("epsilon"), noise), run_scheduler(config, 10, denoiser("epsilon"), noise)
    assert theirs[-1].isnan().all()
    assert ours.isfinite().all()
    assert (ours - theirs)[:-1].abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("config", "steps", "said"),
    [
        ({}, 5, "scheduler None (_class_name) is not supported; supported: DDPMScheduler"),
        ({"_class_name": "KarrasVeScheduler"}, 5, "KarrasVeScheduler"),
        ({"_class_name": "GaussianDDPMScheduler"}, 5, "GaussianDDPMScheduler"),
        ({"_class_name": "PNDMScheduler"}, 5, "skip_prk_steps"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "sample"}, 5, "prediction_type"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, 5, "variance_type='learned'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, 5, "fixed_large_log"),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "trailing"}, 61, "stray t = -1"),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "leading", "steps_offset": 1}, 1000, "leave 0 .. 999"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, 5, "laplace"),
        ({"_class_name": "DDPMScheduler", "thresholding": True, "sample_max_value": 0.0}, 5, "sample_max_value=0.0"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, 1000, "repeat"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            5,
            "algorithm_type='dpmsolver'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            5,
            "use_beta_sigmas",
        ),
        ({"_class_name": "DPMSolverMultistepInverseScheduler", "use_flow_sigmas": True}, 5, "use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, 5, "flow_prediction"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, 5, "solver_order=4"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, 5, "flow_prediction"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, 5, "predict_x0=False"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, 5, "lower_order_final"),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"},
            5,
            "prediction_type='sample'",
        ),
        ({"_class_name": "CMStochasticIterativeScheduler", "s_noise": 2.0}, 5, "s_noise=2.0"),
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            5,
            "algorithm_type",
        ),
    ],
)
def test_what_is_not_supported_is_named(config, steps, said):
    with pytest.raises(ConfigError) as caught:
        from_config(config, steps)
    assert said in str(caught.value)


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="not list"):
        from_config([], 5)
    for steps in (0, -1, True, 2.5, "5", 1001):
        with pytest.raises(InvalidArgument, match="steps="):
            from_config({"_class_name": "DDPMScheduler"}, steps)
    with pytest.raises(InvalidArgument, match="an option of DDIMScheduler and TCDScheduler"):
        from_config({"_class_name": "DDPMScheduler"}, 5, eta=1.0)


def test_keys_of_other_schedulers_are_ignored(wide):
    """A scheduler built from another one's configuration keeps keys that it does not read."""
    extra = {"clip_sample": True, "variance_type": "fixed_small", "skip_prk_steps": False, "set_alpha_to_one": False}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"):
        assert from_config({"_class_name": name, **extra}, 8) == from_config({"_class_name": name}, 8)


def test_repeated_timesteps_are_stages(wide):
    """Karras' spacing rounds small sigmas to the same timestep; levels differ, so diffusers runs, and so do we."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    table = from_config(config, 150)
    assert any(row.stage for row in table.rows)
    assert len(set(table.timesteps)) + sum(int(row.stage) for row in table.rows) == len(table) == 150
    assert max(compare(config, 150, table)) < TOLERANCE


def test_a_given_schedule_replaces_the_configurations():
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    cosine = SCHEDULES["cosine"]
    assert from_config(config, 5, cosine).rows[0].abar == cosine.alphas_cumprod[800]
