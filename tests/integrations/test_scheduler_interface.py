"""Compare `fastdiff.Scheduler` with diffusers in what its loops do: late starts, edits, guidance, names and shapes."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
import types
import warnings

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from fastdiff.errors import ConfigError, FastdiffError, InvalidArgument
from fastdiff.integrations.scheduler import Scheduler
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import IN_SIGMA, SCHEDULERS
from fastdiff.solvers.compat.given import TAKES_TIMESTEPS
from tests.integrations.test_scheduler import difference, seeded, theirs_of
from tests.support.schedulers import Brownian, scheduler_module

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own
SHAPE = (2, 3, 4, 4)
SDE = "DPMSolverSDEScheduler"
NAMES = sorted(SCHEDULERS)
# More configurations of the solvers with a history.
MORE = [
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3},
    {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
    {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0, 4]},
    {"_class_name": "DEISMultistepScheduler", "solver_order": 3},
    {"_class_name": "HeunDiscreteScheduler", "clip_sample": True},
    {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"},
]
CONFIGS = [*({"_class_name": name} for name in NAMES), *MORE]


def pair(config, **options):
    """Return diffusers' scheduler and fastdiff's."""
    given = {"skip_prk_steps": True} if config["_class_name"] == "PNDMScheduler" else {}
    theirs = theirs_of({**config, **given, **options})
    return theirs, Scheduler.from_config(theirs)


def label(config):
    return " ".join(map(str, config.values()))


def network(x, t):
    """Evaluate a network whose output depends on the timestep."""
    return torch.sin(2 * x + torch.as_tensor(t).double().reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) / 300)


def prepared(theirs, ours, steps=8, **given):
    """Lay out a run, and return the arguments of a step of each, with equal sources of noise."""
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(**(given if given else {"num_inference_steps": steps}))
    first, second = seeded(), seeded()
    if type(theirs).__name__ == SDE:  # its tree has a seed of its own
        theirs.noise_sampler = Brownian(lambda: torch.randn(SHAPE, generator=first))
    takes = "generator" in inspect.signature(theirs.step).parameters
    return ({"generator": first} if takes else {}), {"generator": second}


def start(theirs):
    """Return the scale of the initial noise, which diffusers' flow-matching schedulers do not have."""
    return float(getattr(theirs, "init_noise_sigma", 1.0))


def scaled(scheduler, x, t):
    """Return the network's input, for which diffusers' flow-matching schedulers have no method."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def run(scheduler, x, times, edit=lambda x: x, **options):
    for t in times:
        out = network(scaled(scheduler, x, t), t)
        x = edit(scheduler.step(out, t, x, **options).prev_sample)
    return x


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_run_starts_in_the_middle(config, begin):
    """Noise an image to a later timestep and go on from there, as img2img does."""
    theirs, ours = pair(config)
    if begin and not hasattr(theirs, "set_begin_index"):
        pytest.skip("this scheduler has no begin_index")
    steps = 8
    for k in (1, 4, 7):
        given, own = prepared(theirs, ours, steps)
        first = k * theirs.order
        if begin:
            theirs.set_begin_index(first)
            ours.set_begin_index(first)
        x0, z = torch.randn((2, *SHAPE), generator=seeded(0))
        t = theirs.timesteps[first : first + 1]
        y = ours.add_noise(x0, z, t)
        x = theirs.add_noise(x0, z, t) if hasattr(theirs, "add_noise") else y  # DDIMInverseScheduler has none
        assert difference(y, x) < 1e-4
        x = run(theirs, x, theirs.timesteps[first:], **given)
        y = run(ours, y, ours.timesteps[first:], **own)
        assert difference(y, x) < 1e-3, k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pndm_starts_at_either_of_two_equal_timesteps(k):
    theirs, ours = pair({"_class_name": "PNDMScheduler"})
    prepared(theirs, ours)
    assert theirs.timesteps[1] == theirs.timesteps[2]
    x = torch.randn(SHAPE, generator=seeded(0))
    assert difference(run(ours, x, ours.timesteps[k:]), run(theirs, x, theirs.timesteps[k:])) < 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_sample_is_edited_between_steps(config):
    """A caller's change between two steps counts where it does in diffusers, as for inpainting by hand."""
    theirs, ours = pair(config)
    given, own = prepared(theirs, ours)
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    mask = torch.arange(4) < 2

    def edit(x):
        return torch.where(mask, 0.7 * x + 0.1, x)

    y = run(ours, x, ours.timesteps, edit, **own)
    x = run(theirs, x, theirs.timesteps, edit, **given)
    assert difference(y, x) < 2e-3


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_guidance_doubles_the_batch_for_the_network_alone(config):
    theirs, ours = pair(config)
    given, own = prepared(theirs, ours, 6)
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    results = []
    for scheduler, options in ((theirs, given), (ours, own)):
        y = x
        for t in scheduler.timesteps:
            both = network(scaled(scheduler, torch.cat([y, y]), t), t) * torch.tensor([1.0, 0.8]).repeat_interleave(
                len(x)
            ).view(-1, 1, 1, 1)
            c, u = both.chunk(2)
            y = scheduler.step(u + 3.0 * (c - u), t, y, **options)[0]
        results.append(y)
    assert difference(results[1], results[0]) < 5e-3


@pytest.mark.parametrize("name", [n for n in NAMES if n in IN_SIGMA])
def test_scaling_needs_no_history(name):
    theirs, ours = pair({"_class_name": name})
    prepared(theirs, ours)
    x = torch.randn(SHAPE, generator=seeded(0))
    index = 4 if theirs.order == 2 else 3
    t = theirs.timesteps[index]
    assert difference(ours.scale_model_input(x, ours.timesteps[index]), theirs.scale_model_input(x, t)) < 1e-5


TIMES = [980, 700, 350, 90, 20]


@pytest.mark.parametrize("name", [n for n in TAKES_TIMESTEPS if n[:2] != "CM"])
def test_timesteps_of_ones_own(name):
    theirs, ours = pair({"_class_name": name})
    given, own = prepared(theirs, ours, timesteps=TIMES)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    assert difference(run(ours, x, ours.timesteps, **own), run(theirs, x, theirs.timesteps, **given)) < 2e-3


def test_timesteps_of_consistency_models():
    theirs, ours = pair({"_class_name": "CMStochasticIterativeScheduler"})
    given, own = prepared(theirs, ours, timesteps=[22, 0])
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist())
    x = torch.randn(SHAPE, generator=seeded(0)) * theirs.init_noise_sigma
    assert difference(run(ours, x, ours.timesteps, **own), run(theirs, x, theirs.timesteps, **given)) < 1e-4


@pytest.mark.parametrize("sigmas", [[10.0, 3.0, 0.5, 0.0], [80.0, 5.0, 0.4, 0.05], [9.0, 0.3, 0.3]])
def test_noise_levels_of_ones_own(sigmas):
    theirs, ours = pair({"_class_name": "EulerDiscreteScheduler"})
    given, own = prepared(theirs, ours, sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    assert difference(run(ours, x, ours.timesteps, **own), run(theirs, x, theirs.timesteps, **given)) < 1e-4


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_share_of_the_distilled_timesteps(name):
    theirs, ours = pair({"_class_name": name})
    given, own = prepared(theirs, ours, num_inference_steps=4, original_inference_steps=40, strength=0.6)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.randn(SHAPE, generator=seeded(0))
    assert difference(run(ours, x, ours.timesteps, **own), run(theirs, x, theirs.timesteps, **given)) < 1e-3


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMInverseScheduler"])
def test_ddim_takes_any_timestep(name):
    theirs, ours = pair({"_class_name": name})
    prepared(theirs, ours, 10)
    x = torch.randn(SHAPE, generator=seeded(0))
    for t in (950, 431, 7):
        assert difference(ours.step(x.sin(), t, x).prev_sample, theirs.step(x.sin(), t, x).prev_sample) < 1e-5
    run(ours, x, ours.timesteps)  # the run's own timesteps are as before
    with pytest.raises(FastdiffError, match="1000"):
        ours.step(x, 1000, x)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 7), (2, 3, 2, 4, 4), (2, 3, 2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
def test_samples_of_any_number_of_dimensions(name, shape):
    theirs, ours = pair({"_class_name": name})
    given, own = prepared(theirs, ours)
    x = torch.randn(shape, generator=seeded(0)) * start(theirs)
    y = run(ours, x, ours.timesteps, **own)
    assert y.shape == x.shape
    assert difference(y, run(theirs, x, theirs.timesteps, **given)) < 1e-3


def test_a_sample_may_be_a_list_of_numbers():
    ours = Scheduler.from_config(DDPMScheduler())
    ours.set_timesteps(3)
    x = torch.randn(5, generator=seeded(0))
    alone = Scheduler.from_config(ours)
    alone.set_timesteps(3)
    expected = run(alone, x[:, None], ours.timesteps, generator=seeded())[:, 0]
    assert torch.equal(run(ours, x, ours.timesteps, generator=seeded()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_scheduler_is_as_in_diffusers(name):
    theirs, ours = pair({"_class_name": name})
    if theirs.timesteps is not None:  # as PNDMScheduler's are
        torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=1e-3)
    assert float(ours.init_noise_sigma) == pytest.approx(start(theirs), rel=1e-5)
    for attribute in ("betas", "alphas", "alphas_cumprod", "sigmas", "final_alpha_cumprod"):
        if not hasattr(theirs, attribute):
            assert not hasattr(ours, attribute)
            continue
        torch.testing.assert_close(getattr(ours, attribute), getattr(theirs, attribute).float(), rtol=1e-4, atol=1e-5)
    assert ours.step_index is None
    assert ours.begin_index is None
    assert len(ours) == len(theirs)
    assert ours.order == theirs.order


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_as_in_diffusers(name):
    theirs, ours = pair({"_class_name": name})
    given, own = prepared(theirs, ours)
    if hasattr(theirs, "sigmas"):
        torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), rtol=1e-4, atol=1e-5)
    if hasattr(theirs, "index_for_timestep"):
        for t, u in zip(theirs.timesteps, ours.timesteps, strict=True):
            # The last two of KDPM2 are equal or 5e-6 apart, as the processor rounds; the second of equals counts.
            assert abs(float(u) - float(t)) <= 1e-5 or difference(u, t) < 1e-3
            if (theirs.timesteps == t).sum() == (ours.timesteps == u).sum():
                assert ours.index_for_timestep(u) == theirs.index_for_timestep(t)
    x = torch.randn(SHAPE, generator=seeded(0))
    for t, u in list(zip(theirs.timesteps, ours.timesteps, strict=True))[:3]:
        expected = theirs.step(x.sin(), t, x, **given, return_dict=False)
        got = ours.step(x.sin(), u, x, **own, return_dict=False)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            if torch.is_tensor(b):
                assert difference(a, b) < 1e-3
        assert ours.step_index == getattr(theirs, "step_index", ours.step_index)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_have_diffusers_options(name):
    """Every option of diffusers' class is there with its default, and is written and read by both."""
    cls = getattr(scheduler_module(name), name)
    defaults = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()}
    defaults = {key: value for key, value in defaults.items() if key not in ("self", "kwargs")}
    assert DEFAULTS[name] == defaults
    ours = Scheduler({"_class_name": name})
    assert {key: ours.config[key] for key in defaults} == defaults
    assert ours.config.num_train_timesteps == ours.config["num_train_timesteps"] == len(ours)


def test_configurations_are_saved(tmp_path):
    for name in NAMES:
        if name == "PNDMScheduler":
            continue
        ours = Scheduler({"_class_name": name}, num_train_timesteps=100)
        (ours.save_pretrained if name < "H" else ours.save_config)(tmp_path / name)
        theirs = getattr(scheduler_module(name), name).from_pretrained(tmp_path / name)
        assert theirs.config.num_train_timesteps == 100
        again = Scheduler.from_pretrained(tmp_path / name, prediction_type="v_prediction")
        kept = {key: value for key, value in ours.config.items() if key != "_use_default_values"}
        assert again.config == {**kept, "prediction_type": "v_prediction"}
    assert (
        json.loads((tmp_path / "DDIMScheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    )


def small_pipeline(scheduler):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return DDIMPipeline(UNet2DModel(sample_size=8, block_out_channels=(32, 32), **blocks), scheduler)


def test_configurations_are_taken_and_changed():
    pipeline = small_pipeline(DDIMScheduler(beta_end=0.03))
    ours = Scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert (ours.config.beta_end, ours.config.timestep_spacing) == (0.03, "trailing")
    other = Scheduler.from_config(ours.config, _class_name="EulerDiscreteScheduler")
    assert other.config.timestep_spacing == "trailing"
    assert Scheduler.from_config(
        DDIMScheduler().config, _class_name="EulerDiscreteScheduler"
    ).config.timestep_spacing == (EulerDiscreteScheduler.from_config(DDIMScheduler().config).config.timestep_spacing)
    assert "beta_end" in repr(ours)
    ambiguous = {**DEFAULTS["LMSDiscreteScheduler"], "_use_default_values": []}
    with pytest.raises(ConfigError, match=r"LMSDiscreteScheduler and KDPM2DiscreteScheduler .* _class_name="):
        Scheduler.from_config(ambiguous)
    with pytest.raises(InvalidArgument, match="'beta_ned': no supported scheduler has this option"):
        Scheduler.from_config(DDIMScheduler(), beta_ned=0.1)
    with pytest.raises(InvalidArgument, match="a configuration does not change"):
        ours.config["beta_end"] = 0.1
    with pytest.raises(AttributeError, match="has no beta_ned"):
        ours.config.beta_ned  # noqa: B018
    with pytest.warns(FutureWarning, match=r"scheduler\.config\.beta_end"):
        assert ours.beta_end == 0.03
    assert DDIMScheduler in ours.compatibles
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert made.config == ours.config


def test_a_pipeline_of_diffusers_takes_it():
    pipeline = small_pipeline(DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    call = functools.partial(pipeline, num_inference_steps=4, eta=0.5, output_type="np")
    expected = call(generator=seeded()).images
    pipeline.scheduler = Scheduler.from_config(pipeline.scheduler)
    torch.testing.assert_close(
        torch.from_numpy(call(generator=seeded()).images), torch.from_numpy(expected), rtol=1e-3, atol=1e-3
    )


def test_results_have_names_and_numbers():
    for theirs, second in ((DDIMScheduler(), "pred_original_sample"), (LCMScheduler(), "denoised")):
        ours = Scheduler.from_config(theirs)
        prepared(theirs, ours, 4)
        x = torch.randn(SHAPE, generator=seeded(0))
        expected = theirs.step(x.sin(), theirs.timesteps[1], x, generator=seeded())
        got = ours.step(x.sin(), ours.timesteps[1], x, generator=seeded())
        assert got[0] is got["prev_sample"] is got.prev_sample
        assert got[1] is got[second] is getattr(got, second)
        assert difference(got[second], expected[second]) < 1e-4
        assert len(got[:2]) == 2
        with pytest.raises(AttributeError, match="has no other"):
            got.other  # noqa: B018


def test_arguments_have_places_and_foreign_ones_do_nothing():
    x = torch.randn(SHAPE, generator=seeded(0))
    theirs, ours = pair({"_class_name": "DDIMScheduler"})
    prepared(theirs, ours)
    t = ours.timesteps[2]
    expected = theirs.step(x.sin(), t, x, 0.7, True, seeded())[0]
    assert difference(ours.step(x.sin(), t, x, 0.7, True, seeded())[0], expected) < 1e-5
    theirs, ours = pair({"_class_name": "DDPMScheduler"})
    prepared(theirs, ours)
    t = ours.timesteps[2]
    expected = theirs.step(x.sin(), t, x, seeded(), False)
    assert difference(ours.step(x.sin(), t, x, seeded(), False)[0], expected[0]) < 1e-5
    ours = Scheduler.from_config(EulerDiscreteScheduler())
    ours.set_timesteps(8)
    plain = ours.step(x.sin(), ours.timesteps[0], x)[0]
    assert torch.equal(
        ours.step(x.sin(), ours.timesteps[0], x, eta=0.5, use_clipped_model_output=True, s_noise=1.1)[0], plain
    )
    for options in ({"s_churn": 1.0}, {"order": 2}, {"churn": 1.0}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            ours.step(x.sin(), ours.timesteps[0], x, **options)
    with pytest.raises(InvalidArgument, match="step takes s_churn, s_tmin"):
        ours.step(x, ours.timesteps[0], x, *range(9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_noise_has_diffusers_dtype(dtype):
    theirs, ours = pair({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"})
    given, own = prepared(theirs, ours, 5)
    x = 0.5 * torch.ones(SHAPE, dtype=dtype)
    y = x
    for t in ours.timesteps:
        x = theirs.step(0.1 * x, t, x, **given).prev_sample
        y = ours.step(0.1 * y, t, y, **own).prev_sample
    assert difference(y, x) < 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    assert torch.equal(given["generator"].get_state(), own["generator"].get_state())


def test_arguments_of_a_run_have_places():
    ours = Scheduler.from_config(DDPMScheduler())
    ours.set_timesteps(None, None, [900, 300])
    assert ours.timesteps.tolist() == [900, 300]
    ours = Scheduler({"_class_name": "HeunDiscreteScheduler"})
    ours.set_timesteps(5, None, 1000)
    assert len(ours.timesteps) == 9


def test_timesteps_of_ddpm():
    ours = Scheduler.from_config(DDPMScheduler())
    assert ours.previous_timestep(500) == 499
    ours.set_timesteps(timesteps=[100, 87, 50, 1, 0])
    assert [int(ours.previous_timestep(t)) for t in ours.timesteps] == [87, 50, 1, 0, -1]
    x = torch.randn(SHAPE, generator=seeded(0))
    theirs, ours = pair({"_class_name": "DDPMScheduler"})
    for t in (999, 500, 0):  # without set_timesteps
        a = theirs.step(x.sin(), t, x, generator=seeded()).prev_sample
        assert difference(ours.step(x.sin(), t, x, generator=seeded()).prev_sample, a) < 1e-4


@pytest.mark.parametrize(
    ("options", "prediction"),
    [
        ({"thresholding": True, "sample_max_value": 0.5}, "epsilon"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.0}, "sample"),
        ({"variance_type": "other"}, "epsilon"),
    ],
)
def test_options_that_diffusers_takes(options, prediction):
    theirs, ours = pair({"_class_name": "DDPMScheduler", "prediction_type": prediction}, **options)
    given, own = prepared(theirs, ours)
    x = torch.randn(SHAPE, generator=seeded(0))
    assert difference(run(ours, x, ours.timesteps, **own), run(theirs, x, theirs.timesteps, **given)) < 1e-4


def test_exponential_betas_of_heun():
    theirs, ours = pair({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"})
    torch.testing.assert_close(ours.betas, theirs.betas)
    prepared(theirs, ours)
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    assert difference(run(ours, x, ours.timesteps), run(theirs, x, theirs.timesteps)) < 1e-3


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_noise_levels_of_a_beta_distribution(name, monkeypatch):
    mpmath = pytest.importorskip("mpmath")

    def quantile(share, a, b):  # in place of scipy, which need not be installed
        return (
            0.0
            if share == 0
            else float(
                mpmath.findroot(
                    lambda x: mpmath.betainc(a, b, 0, x, regularized=True) - share, (0.0, 1.0), solver="anderson"
                )
            )
        )

    module = scheduler_module(name)
    monkeypatch.setattr(module, "is_scipy_available", lambda: True)
    beta = types.SimpleNamespace(beta=types.SimpleNamespace(ppf=quantile))
    monkeypatch.setattr(module, "scipy", types.SimpleNamespace(stats=beta), raising=False)
    theirs = getattr(module, name)(use_beta_sigmas=True)
    ours = Scheduler({"_class_name": name, "use_beta_sigmas": True})  # not from what was replaced
    prepared(theirs, ours)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), rtol=1e-5, atol=1e-6)
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    assert difference(run(ours, x, ours.timesteps), run(theirs, x, theirs.timesteps)) < 2e-3


def test_noise_levels_of_lu():
    theirs, ours = pair({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True})
    prepared(theirs, ours)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.randn(SHAPE, generator=seeded(0))
    assert difference(run(ours, x, ours.timesteps), run(theirs, x, theirs.timesteps)) < 2e-3


@pytest.mark.parametrize("steps", [4, 10])
def test_continuous_euler_evaluates_as_often_as_diffusers(steps):
    options = {"prediction_type": "v_prediction", "timestep_type": "continuous", "interpolation_type": "log_linear"}
    theirs, ours = pair({"_class_name": "EulerDiscreteScheduler", **options})
    prepared(theirs, ours, steps)
    assert len(ours.timesteps) == len(theirs.timesteps) == steps + 1
    x = torch.randn(SHAPE, generator=seeded(0)) * start(theirs)
    assert difference(run(ours, x, ours.timesteps), run(theirs, x, theirs.timesteps)) < 1e-3


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("DDIMScheduler", lambda s: s.set_timesteps(timesteps=[9, 5]), "takes no timesteps=, as in diffusers"),
        ("UniPCMultistepScheduler", lambda s: s.set_timesteps(sigmas=[9.0, 0.0]), "use_flow_sigmas=True alone"),
        ("DEISMultistepScheduler", lambda s: s.set_timesteps(sigmas=[9.0, 0.0]), "takes no sigmas="),
        ("DDPMScheduler", lambda s: s.set_timesteps(5, timesteps=[9, 5]), "exclude each other"),
        ("DDPMScheduler", lambda s: s.set_timesteps(timesteps=[5, 9]), "descending order, got 5 before 9"),
        ("DDPMScheduler", lambda s: s.set_timesteps(timesteps=[1000, 9]), "timesteps end at 999"),
        ("DDPMScheduler", lambda s: s.set_timesteps(timesteps=[]), "timesteps is empty"),
        ("DDPMScheduler", lambda s: s.set_timesteps(), "steps=None"),
        ("DDPMScheduler", lambda s: s.set_timesteps(5, strength=0.5), "options of LCMScheduler and TCDScheduler"),
        ("EulerDiscreteScheduler", lambda s: s.set_timesteps(sigmas=[3.0]), "at least one positive noise level"),
        ("EulerDiscreteScheduler", lambda s: s.set_timesteps(5, mu=1.0), "mu is an option of flow matching"),
        ("LCMScheduler", lambda s: s.set_timesteps(4, strength=0.01), "strength=0.01 of 50 timesteps leaves none"),
        ("DDIMScheduler", lambda s: s.set_timesteps(4, None, 7), "set_timesteps takes nothing in these places"),
        ("EulerDiscreteScheduler", lambda s: s.set_begin_index(1000), "begin_index=1000"),
        ("EulerDiscreteScheduler", lambda s: s.index_for_timestep("a"), "a number, or one for each"),
        ("DDPMScheduler", lambda s: s.previous_timestep("a"), "a number, or one for each"),
        ("DDPMScheduler", lambda s: s.step(None, 5, torch.zeros(1, 3)), "model_output is a NoneType"),
        ("DDPMScheduler", lambda s: s.step(torch.zeros(1, 3), float("inf"), torch.zeros(1, 3)), "timestep inf"),
        ("EulerDiscreteScheduler", lambda s: s.index_for_timestep(3.5), "timestep 3.5 is not one of the 1000"),
        ("EulerDiscreteScheduler", lambda s: s.sigma_to_t(1.0), "belongs to CMStochasticIterativeScheduler"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(name, call, words):
    with pytest.raises(FastdiffError) as caught:
        call(Scheduler({"_class_name": name}))
    assert words in str(caught.value)


def test_a_run_cannot_start_within_a_step():
    ours = Scheduler({"_class_name": "HeunDiscreteScheduler"})
    ours.set_timesteps(4)
    ours.set_begin_index(1)
    x = torch.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="is within a step of heun"):
        ours.step(x, ours.timesteps[1], x)


def test_a_scheduler_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Scheduler.from_config(UniPCMultistepScheduler())
        ours.set_timesteps(3)
        run(ours, torch.zeros(SHAPE), ours.timesteps)
