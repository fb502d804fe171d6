"""``compat=``: whole runs against the loops of the other code bases, and where the default differs from them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.checkpoints import save_folder
from fastdiff.errors import ConfigError, FastdiffError, InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.sampler.choice import resolve
from fastdiff.sampler.options import Options
from fastdiff.sampler.tables import step_table
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.compat import sigmas as compat
from fastdiff.solvers.registry import SOLVERS
from tests.support import loops, oracles
from tests.support.paths import ROOT
from tests.support.schedulers import run_scheduler, scheduler_module
from tests.support.trajectories import SCHEDULES, T, alphas_cumprod, denoiser, draw_noise, run
from tests.support.unets import TINY, random_unet, randomize_, relative_error

TOLERANCE = 1e-8
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own
LINEAR = SCHEDULES["linear"]


def table_of(
    mode: str | None,
    solver: str,
    steps: int | None = None,
    *,
    schedule: Any = LINEAR,
    prediction: str = "epsilon",
    config: dict[str, Any] | None = None,
    **options: Any,
) -> StepTable:
    chosen, _ = resolve(Options(solver=solver, steps=steps, compat=mode, **options), schedule, None)
    return step_table(chosen, schedule, prediction, config or {})


def betas(schedule: str) -> np.ndarray:
    abar = alphas_cumprod(schedule).numpy()
    return 1.0 - abar / np.append(1.0, abar[:-1])


def error(ours: Tensor, theirs: Tensor) -> float:
    assert len(ours) == len(theirs)
    assert theirs[-1].std() > 0.1
    return float((ours - theirs).abs().max())


# openai ---------------------------------------------------------------------------------------------------------------

MEAN = {"epsilon": "eps", "sample": "xstart"}
VARIANCE = {"posterior": "fixedsmall", "beta": "fixedlarge", "learned_range": "learned_range"}
RESPACINGS = ["1", "2", "7", "10", "ddim5", "ddim125", "3,5,7", "0,4,1,2", "10,10,10,10,10,10"]


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("variance", VARIANCE)
@pytest.mark.parametrize(("prediction", "schedule"), [("epsilon", "linear"), ("sample", "cosine")])
def test_p_sample_loop(respacing: str, schedule: str, variance: str, prediction: str) -> None:
    use = loops.space_timesteps(T, respacing)
    network = denoiser(prediction, schedule, learned=variance == "learned_range")
    noise = draw_noise(len(use))
    theirs = loops.spaced(betas(schedule), use, MEAN[prediction], VARIANCE[variance]).p_sample_loop(network, noise)
    table = table_of(
        "openai", "ddpm", schedule=SCHEDULES[schedule], prediction=prediction, spacing=respacing, variance=variance
    )
    assert error(run([table], network, noise), theirs) < TOLERANCE


def test_p_sample_loop_over_all_timesteps() -> None:
    network, noise = denoiser("epsilon"), draw_noise(T)
    use = loops.space_timesteps(T, "")
    theirs = loops.spaced(betas("linear"), use, "eps", "fixedlarge").p_sample_loop(network, noise, clip=False)
    table = table_of("openai", "ddpm", config={"variance_type": "fixed_large", "clip_sample": False})
    assert error(run([table], network, noise), theirs) < TOLERANCE


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("prediction", "clip"), [("epsilon", True), ("epsilon", False), ("sample", True)])
def test_ddim_sample_loop(respacing: str, eta: float, prediction: str, clip: bool) -> None:
    use = loops.space_timesteps(T, respacing)
    network, noise = denoiser(prediction), draw_noise(len(use))
    theirs = loops.spaced(betas("linear"), use, MEAN[prediction], "fixedlarge")
    table = table_of(
        "openai", "ddim", prediction=prediction, spacing=respacing, eta=eta, **({} if clip else {"clip": None})
    )
    assert error(run([table], network, noise), theirs.ddim_sample_loop(network, noise, eta, clip)) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 3, 20, 50, 77, 250, 999, 1000])
def test_openai_by_steps_is_even_respacing(steps: int) -> None:
    table = table_of("openai", "ddim", steps)
    assert [row.t for row in table.rows] == loops.space_timesteps(T, str(steps))[::-1]
    assert table == table_of("openai", "ddim", steps, spacing=str(steps))


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_run_of_improved_diffusion(tmp_path: Path, solver: str) -> None:
    """From the file on: the network hears t / 4 of 4000 timesteps, and says its variance."""
    flags = (
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True "
        "--attention_resolutions 8,4 --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True"
    )
    original = randomize_(oracles.OpenAI(8, 32, (1, 2), 1, (1, 2), out_channels=6, num_heads=4, scale=0.25)).eval()
    torch.save(original.state_dict(), tmp_path / "model.pt")
    u = np.arange(4001) / 4000
    abar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    diffusion = loops.spaced(
        np.minimum(1 - abar[1:] / abar[:-1], 0.999), loops.space_timesteps(4000, "3,4"), "eps", "learned_range"
    )
    noise = torch.randn(8, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    loop = diffusion.p_sample_loop if solver == "ddpm" else lambda d, z: diffusion.ddim_sample_loop(d, z, 0.5)
    expected = loop(original.double(), noise.double())[-1]
    sampler = Sampler.from_pretrained(tmp_path / "model.pt", backend="eager", device="cpu", flags=flags)
    out = sampler.sample(
        2,
        solver=solver,
        compat="openai",
        spacing="3,4",
        eta=0.5 if solver == "ddim" else 0.0,
        noise=lambda row, indices: noise[0 if row is None else 1 + row],
    )
    assert relative_error(out.images, expected) < 1e-4
    default = sampler.sample(2, solver=solver, steps=7, noise=noise[0]).images
    assert relative_error(default, expected) > 1e-2


# ho -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "named"), [("fixedlarge", "fixed_large"), ("fixedsmall", "fixed_small")])
@pytest.mark.parametrize(("prediction", "schedule"), [("epsilon", "linear"), ("sample", "cosine")])
def test_the_original_ddpm(schedule: str, variance: str, named: str, prediction: str) -> None:
    network, noise = denoiser(prediction, schedule), draw_noise(T)
    diffusion = loops.GaussianDiffusion(betas(schedule), MEAN[prediction], variance, range(T))
    options = {"schedule": SCHEDULES[schedule], "prediction": prediction}
    table = table_of("ho", "ddpm", config={"variance_type": named}, **options)
    assert error(run([table], network, noise), diffusion.p_sample_loop(network, noise)) < TOLERANCE
    assert table == table_of("ho", "ddpm", T, variance=VARIANCE_OF[variance], **options)


VARIANCE_OF = {"fixedlarge": "beta", "fixedsmall": "posterior"}
SKIPS = [*itertools.product(("uniform", "quad"), (1, 2, 10, 30, 100))]


@pytest.mark.parametrize(("kind", "steps"), SKIPS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_of_the_port(kind: str, steps: int, eta: float) -> None:
    seq = loops.skips(T, kind, steps)
    network, noise = denoiser("epsilon"), draw_noise(len(seq))
    theirs = loops.generalized_steps(network, noise, seq, betas("linear"), eta)
    table = table_of("ho", "ddim", steps, spacing=kind, eta=eta)
    assert error(run([table], network, noise), theirs) < TOLERANCE


@pytest.mark.parametrize(("kind", "steps"), [*SKIPS, ("uniform", 999), ("quad", T)])
def test_ddpm_of_the_port(kind: str, steps: int) -> None:
    seq = loops.skips(T, kind, steps)
    network, noise = denoiser("epsilon"), draw_noise(len(seq))
    theirs = loops.ddpm_steps(network, noise, seq, betas("linear"))
    table = table_of("ho", "ddpm", steps, spacing=kind)
    assert error(run([table], network, noise), theirs) < TOLERANCE


# diffusers ------------------------------------------------------------------------------------------------------------

BASE = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
DPM = diffusers.DPMSolverMultistepScheduler
ODE = {"algorithm_type": "dpmsolver++"}
THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmpp_1": (DPM, {**ODE, "solver_order": 1}),
    "dpmpp_2m": (DPM, {**ODE, "solver_order": 2}),
    "dpmpp_3m": (DPM, {**ODE, "solver_order": 3}),
    "dpmpp_2m_sde": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 2}),
    "dpmpp_3s": (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3, "solver_type": "heun"}),
    "dpmpp_sde": (scheduler_module("DPMSolverSDEScheduler").DPMSolverSDEScheduler, {}),  # torchsde need not be there
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lms": (scheduler_module("LMSDiscreteScheduler").LMSDiscreteScheduler, {}),  # scipy need not be there
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2_ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
    "consistency": (diffusers.CMStochasticIterativeScheduler, {}),
}
MODELS: dict[str, dict[str, Any]] = {  # scheduler configurations that models have, keys of other schedulers too
    "ddpm": {"_class_name": "DDPMScheduler", **BASE, "variance_type": "fixed_large", "clip_sample": True},
    "ddim": {"_class_name": "DDIMScheduler", **BASE, "timestep_spacing": "trailing", "set_alpha_to_one": False},
    "v": {
        "_class_name": "DPMSolverMultistepScheduler",
        **BASE,
        "prediction_type": "v_prediction",
        "timestep_spacing": "linspace",
        "solver_order": 3,
        "clip_sample": False,
    },
    "threshold": {"_class_name": "DDPMScheduler", **BASE, "thresholding": True, "sample_max_value": 1.3},
}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise levels in float64, as diffusers' are in `run_scheduler`."""
    monkeypatch.setattr(compat, "PRECISION", "float64")


def compare(
    config: dict[str, Any], solver: str, steps: int, change: dict[str, Any], network: Any = None, **options: Any
) -> tuple[float, StepTable]:
    """Our run with ``options`` against the scheduler that diffusers makes of the configuration, with ``change``."""
    prediction = config.get("prediction_type", "epsilon")
    table = table_of(
        "diffusers", solver, steps, prediction=prediction, config=config,
        schedule=NoiseSchedule.from_scheduler_config(config), **options,
    )  # fmt: skip
    scheduler, own = THEIRS[solver]
    made = scheduler.from_config(config, **own, **change)
    theirs = {k: v for k, v in made.config.items() if k in scheduler._get_init_keys(scheduler)}
    network, noise = network or denoiser(prediction), draw_noise(len(table))
    eta = {"eta": options["eta"]} if options.get("eta") else {}
    expected = run_scheduler({**theirs, "_class_name": scheduler.__name__}, steps, network, noise, **eta)
    return error(run([table], network, noise), expected), table


@pytest.mark.parametrize(
    ("solver", "model"),
    [
        pytest.param(solver, model, marks=[pytest.mark.slow] * ((i + j) % 2))
        for (i, solver), (j, model) in itertools.product(enumerate(THEIRS), enumerate(MODELS))
    ],
)
def test_schedulers_of_diffusers(solver: str, model: str, wide: None) -> None:
    """The model's configuration, under whatever scheduler the solver is."""
    config = MODELS[model]
    if (solver, model) == ("consistency", "threshold"):
        return
    if solver == "consistency":  # it has another schedule, and its model another network

        def network(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x + 0.4 * torch.sin(t.to(x.dtype).reshape(-1, 1, 1, 1) / 90))

        changed = {**config, "_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40}
        deviation, _ = compare(changed, solver, 4, {}, network)
    else:
        deviation, _ = compare(config, solver, 4 if solver in ("lcm", "tcd") else 7, {})
    assert deviation < TOLERANCE


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ddpm", {"variance": "posterior"}, {"variance_type": "fixed_small"}),
    ("ddpm", {"variance": "beta", "spacing": "linspace"}, {"variance_type": "fixed_large",
                                                            "timestep_spacing": "linspace"}),
    ("ddpm", {"clip": None}, {"clip_sample": False}),
    ("ddpm", {"clip": 0.7}, {"clip_sample": True, "clip_sample_range": 0.7}),
    ("ddim", {"eta": 0.7}, {}),
    ("ddim", {"spacing": "linspace"}, {"timestep_spacing": "linspace"}),
    ("ddim", {"spacing": "trailing", "clip": None, "eta": 1.0}, {"timestep_spacing": "trailing", "clip_sample": False}),
    ("unipc", {"order": 3, "spacing": "karras"}, {"solver_order": 3, "use_karras_sigmas": True}),
    ("unipc", {"order": 1}, {"solver_order": 1}),
    ("deis", {"order": 3}, {"solver_order": 3}),
    ("lms", {"order": 4}, {}),
    ("dpmpp_2m", {"spacing": "exponential"}, {"use_exponential_sigmas": True}),
    ("euler", {"spacing": "karras", "clip": None}, {"use_karras_sigmas": True}),
    ("heun", {"clip": 0.8}, {"clip_sample": True, "clip_sample_range": 0.8}),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "options", "change"), OPTIONS)
def test_options_with_diffusers(solver: str, options: dict[str, Any], change: dict[str, Any], wide: None) -> None:
    deviation, _ = compare(MODELS["ddpm"], solver, 7, change, **options)
    assert deviation < TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde"])
def test_edm_networks_with_diffusers(solver: str) -> None:
    config = {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon", "sigma_max": 60.0}
    table = table_of("diffusers", solver, 5, schedule=EDMSchedule(sigma_max=60.0), prediction="edm", config=config)
    order = {"dpmpp_1": {"solver_order": 1}, "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}}.get(solver, {})
    name = "EDMEulerScheduler" if solver == "euler" else "EDMDPMSolverMultistepScheduler"
    assert table == solvers.from_config({**config, **order, "_class_name": name}, 5)
    assert table != table_of(None, solver, 5, schedule=EDMSchedule(sigma_max=60.0), prediction="edm", config=config)


def test_a_whole_pipeline_of_diffusers(tmp_path: Path) -> None:
    """DDIMPipeline clips x0 and keeps the network's eps: the default does not draw that, compat does."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, beta_end=0.1, timestep_spacing="trailing")
    unet = random_unet(TINY)
    save_folder(tmp_path, unet, NoiseSchedule(timesteps=100, beta_end=0.1))
    scheduler.save_pretrained(tmp_path / "scheduler")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=15, output_type="np").images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = Sampler.from_pretrained(tmp_path, device="cpu")

    def picture(**options: Any) -> np.ndarray:
        images = sampler.sample(2, steps=15, noise=noise, **options).images
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    assert np.abs(picture(compat="diffusers") - theirs).max() < 1e-3
    assert np.abs(picture() - theirs).max() > 1e-2


# The default is the right mathematics, and differs where the pages say so ---------------------------------------------


def same(a: StepTable, b: StepTable) -> bool:
    """The same runs up to roundings of float64."""
    if a.timesteps != b.timesteps:
        return False
    states = run([a, b], denoiser("epsilon"), draw_noise(len(a)))
    return bool((states[:, 0] - states[:, 1]).abs().max() < 1e-9)


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_openai_is_the_default_at_its_timesteps(respacing: str, solver: str) -> None:
    options: dict[str, Any] = {"variance": "beta"} if solver == "ddpm" else {"eta": 0.5}
    theirs = table_of("openai", solver, spacing=respacing, **options)
    assert same(theirs, table_of(None, solver, spacing=theirs.timesteps, **options))


def test_openai_differs_in_its_timesteps() -> None:
    assert table_of("openai", "ddim", 1).timesteps == (0.0,)
    assert table_of(None, "ddim", 1).timesteps == (999.0,)
    for steps in (2, 10, 50):  # evenly spaced timesteps are the default's "linspace", not its "trailing"
        assert same(table_of("openai", "ddim", steps), table_of(None, "ddim", steps, spacing="linspace"))
        assert not same(table_of("openai", "ddim", steps), table_of(None, "ddim", steps))
    assert same(table_of("openai", "ddim", spacing="ddim50"), table_of(None, "ddim", 50, spacing="leading"))


def test_ho_over_all_timesteps_is_the_default() -> None:
    for variance in ("posterior", "beta"):
        assert same(table_of("ho", "ddpm", variance=variance), table_of(None, "ddpm", variance=variance))


def test_ho_differs_where_its_port_does() -> None:
    config = {"variance_type": "fixed_small"}
    assert len(table_of("ho", "ddim", 30)) == table_of("ho", "ddim", 30).steps == 31  # 0, 33, ..., 990
    theirs = table_of("ho", "ddim", 30)
    assert same(theirs, table_of(None, "ddim", spacing=theirs.timesteps, clip=None))
    assert not same(theirs, table_of(None, "ddim", spacing=theirs.timesteps))  # x0 is bounded
    fewer = table_of("ho", "ddpm", 50, config=config)
    assert same(fewer, table_of(None, "ddpm", spacing=fewer.timesteps, variance="beta"))
    assert not same(fewer, table_of(None, "ddpm", spacing=fewer.timesteps, config=config))
    assert table_of("ho", "ddim", 1).timesteps == (0.0,)
    quad = table_of("ho", "ddim", 100, spacing="quad")
    assert quad.timesteps.count(0.0) == 4
    for row in quad.rows[-4:-1]:  # to no effect: x' = sqrt(abar) x0 + sqrt(1 - abar) eps = x
        assert row.a0 * row.kx + row.ax == pytest.approx(1.0, abs=1e-12)
        assert row.a0 * row.ko + row.ao == pytest.approx(0.0, abs=1e-12)
    plain = table_of(None, "ddim", 100, spacing="quadratic").timesteps
    assert len(set(plain)) == 100


@pytest.mark.parametrize("solver", ["dpmpp_1", "dpmpp_2m", "unipc", "plms", "euler", "heun", "lms"])
@pytest.mark.parametrize("mode", ["openai", "ho"])
def test_only_their_own_solvers(mode: str, solver: str) -> None:
    with pytest.raises(InvalidArgument, match=f"compat='{mode}' has no solver='{solver}'.*it has ddim, ddpm"):
        table_of(mode, solver, 10)


def test_diffusers_has_these_solvers() -> None:
    assert {name for name, solver in SOLVERS.items() if solver.diffusers} == set(THEIRS)


# Late starts, bad input -----------------------------------------------------------------------------------------------


def test_late_starts() -> None:
    x = torch.zeros(1, 3, 8, 8)
    for mode, solver in (("diffusers", "ddim"), ("openai", "ddpm"), ("ho", "ddim"), ("diffusers", "heun")):
        whole = table_of(mode, solver, 10)
        late = table_of(mode, solver, 10, image=x, strength=0.5)
        assert late.rows == whole.rows[-len(late) :]
        assert late.steps == 5
    with pytest.raises(InvalidArgument, match="compat='diffusers': unipc, a multi-step solver, cannot start late"):
        table_of("diffusers", "unipc", 10, image=x, strength=0.5)
    assert len(table_of("diffusers", "unipc", 10, image=x, strength=1.0)) == 10


EDM: dict[str, Any] = {"compat": "diffusers", "schedule": EDMSchedule(), "prediction": "edm"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"compat": "openapi"}, "compat='openapi' is unknown; allowed: diffusers, openai, ho, or None"),
    ({"compat": 3}, "compat=3 is unknown"),
    ({"compat": ["ho"]}, "compat=['ho'] is unknown"),
    ({"compat": "ho", "solver": "auto"}, "compat='ho' needs a solver by name"),
    ({"compat": "ho", "solver": solvers.ddim(LINEAR, 3), "steps": 3}, "compat='ho' cannot change a StepTable"),
    ({"compat": "ho", "solver": "ddpm", "eta": 0.5}, "eta=0.5 belongs to solver 'ddim'"),
    ({"compat": "openai", "prediction": "v_prediction"}, "no prediction='v_prediction' with ddim; it has eps"),
    ({"compat": "openai", "spacing": "trailing"}, "it is a timestep_respacing, as '250'"),
    ({"compat": "openai", "spacing": [3.0, 1.0]}, "it is a timestep_respacing"),
    ({"compat": "openai", "spacing": ""}, "it is a timestep_respacing"),
    ({"compat": "openai", "spacing": "ddim"}, "it is a timestep_respacing"),
    ({"compat": "openai", "spacing": "ddim300"}, "spacing='ddim300': no whole stride visits 300 of 1000"),
    ({"compat": "openai", "spacing": "1001"}, "a section of 1000 timesteps cannot give 1001"),
    ({"compat": "openai", "spacing": "0,0"}, "visits no timestep"),
    ({"compat": "openai", "spacing": "5,5", "steps": 9}, "steps=9, but spacing lists 10"),
    ({"compat": "openai", "steps": 1001}, "steps=1001: a whole number from 1 to 1000"),
    ({"compat": "openai", "steps": 2.5}, "steps=2.5"),
    ({"compat": "openai", "clip": 2.0}, "has no clip=2.0 with ddim; it has 1.0, None"),
    ({"compat": "openai", "clip": True}, "clip=True"),
    ({"compat": "openai", "clip": "all"}, "clip='all'"),
    ({"compat": "openai", "solver": "ddpm", "variance": "none"}, "no variance='none' with ddpm; it has posterior"),
    ({"compat": "openai", "schedule": EDMSchedule(), "prediction": "edm"}, "has no EDM networks"),
    ({"compat": "ho", "spacing": "trailing"}, "has no spacing='trailing' with ddim; it has uniform, quad"),
    ({"compat": "ho", "steps": 0}, "steps=0"),
    ({"compat": "ho", "clip": 1.0}, "has no clip=1.0 with ddim; it has model, None"),
    ({"compat": "ho", "solver": "ddpm", "clip": None}, "has no clip=None with ddpm; it has model, 1.0"),
    ({"compat": "ho", "solver": "ddpm", "variance": "learned_range", "steps": None}, "it has posterior, beta"),
    ({"compat": "ho", "solver": "ddpm", "variance": "posterior"}, "no variance='posterior' with ddpm; it has beta"),
    ({"compat": "ho", "prediction": "sample"}, "has no prediction='sample' with ddim; it has epsilon"),
    ({"compat": "diffusers", "spacing": "quadratic"}, "it has trailing, leading, linspace"),
    ({"compat": "diffusers", "spacing": "karras"}, "has no spacing='karras' with ddim"),
    ({"compat": "diffusers", "spacing": [5.0, 1.0], "steps": None}, "has no spacing=[5.0, 1.0] with ddim"),
    ({"compat": "diffusers", "solver": "lcm", "spacing": "leading"}, "lcm has its own spacing"),
    ({"compat": "diffusers", "solver": "ddpm", "variance": "none"}, "no variance='none' with ddpm"),
    ({"compat": "diffusers", "solver": "unipc", "clip": 1.0}, "UniPCMultistepScheduler cannot bound x0 so"),
    ({"compat": "diffusers", "solver": "unipc", "order": 4}, "solver_order=4"),
    ({"compat": "diffusers", "solver": "lms", "order": 2}, "no order=2 with lms; it has 4"),
    ({"compat": "diffusers", "steps": 1001}, "steps=1001"),
    ({"compat": "diffusers", "clip": -1.0}, "clip=-1.0"),
    ({**EDM, "solver": "heun"}, "no heun for EDM networks; it has dpmpp_1"),
    ({**EDM, "solver": "euler", "spacing": "trailing"}, "it has karras, exponential"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda v: str(v)[:60])
def test_bad_combinations(options: dict[str, Any], words: str) -> None:
    options = {"solver": "ddim", "steps": 10 if "spacing" not in options else None, **options}
    solver, mode, steps = options.pop("solver"), options.pop("compat"), options.pop("steps")
    with pytest.raises(FastdiffError, match=re.escape(words)) as caught:
        table_of(mode, solver, steps, **options)
    assert isinstance(caught.value, (InvalidArgument, ConfigError))


def test_errors_come_before_anything_runs() -> None:
    class Never(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise AssertionError("the network ran")

    sampler = Sampler(Never(), shape=(3, 8, 8))
    with pytest.raises(InvalidArgument, match="compat='ho' has no solver='unipc'"):
        sampler.sample(1, solver="unipc", compat="ho")
    with pytest.raises(InvalidArgument, match="compat='ho' has no solver='unipc'"):
        sampler.stream(1, solver="unipc", compat="ho")


def test_the_documentation() -> None:
    """Run the lines of docs/sampling.md unchanged, on a network of one multiplication."""

    class Half(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x / 2

    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(sampler\.sample\(16,[^`]*compat=.*?)```", text, re.DOTALL)
    drawn = []

    class Sampling(Sampler):
        def sample(self, *arguments: Any, **options: Any) -> Any:
            drawn.append(super().sample(*arguments, **options))

    exec(block, {"sampler": Sampling(Half(), shape=(1, 4, 4))})
    assert [out.table.solver for out in drawn] == ["dpmpp_2m", "ddpm", "ddim", "unipc_3"]
    assert [len(out.table) for out in drawn] == [20, 50, 50, 8]
