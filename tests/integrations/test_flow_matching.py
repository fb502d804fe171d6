"""Flow matching: `fastdiff.Scheduler` against diffusers' own loops, and networks in `Sampler` and pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import fastdiff
from fastdiff.checkpoints import save_folder, schedule_of
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.integrations.scheduler import Scheduler
from fastdiff.solvers import FlowSchedule
from tests.support.unets import TINY, diffusers_twin, random_unet

SHAPE = (2, 3, 8, 8)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x, t):
    return torch.sin(2 * x + float(t) / 300)


def loop(scheduler, timesteps, x, **options):
    for t in timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


CONFIGS = [
    ({"shift": 3.0}, {"num_inference_steps": 7}),
    ({"use_dynamic_shifting": True}, {"num_inference_steps": 7, "mu": 0.8}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"sigmas": [1.0, 0.7, 0.2], "mu": 1.8}),
    ({"use_beta_sigmas": True}, {"num_inference_steps": 6}),
    ({"use_karras_sigmas": True, "shift": 2.0}, {"num_inference_steps": 6}),
    ({"use_exponential_sigmas": True}, {"num_inference_steps": 6}),
    ({"shift_terminal": 0.1}, {"num_inference_steps": 6}),
    ({"invert_sigmas": True, "shift": 2.0}, {"num_inference_steps": 6}),
    ({"stochastic_sampling": True}, {"num_inference_steps": 6}),
    ({"shift": 2.0}, {"sigmas": np.linspace(1.0, 1 / 5, 5)}),
    ({"shift": 2.0}, {"timesteps": [900.0, 500.0, 100.0]}),
    ({}, {"timesteps": [900.0, 500.0, 100.0], "sigmas": [0.95, 0.6, 0.1], "num_inference_steps": 3}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("config", "run"), CONFIGS, ids=str)
def test_euler_is_diffusers_with_every_option(config, run):
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = Scheduler.from_config(theirs)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert (ours.sigma_min, ours.sigma_max, ours.shift) == (theirs.sigma_min, theirs.sigma_max, theirs.shift)
    theirs.set_timesteps(**run)
    ours.set_timesteps(**run)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-7)
    assert ours.num_inference_steps == theirs.num_inference_steps
    z, first, second = torch.randn(SHAPE, generator=seeded(0)), seeded(), seeded()
    expected = loop(theirs, theirs.timesteps, z, generator=first)
    assert torch.allclose(loop(ours, ours.timesteps, z, generator=second), expected, atol=5e-6)
    assert torch.equal(first.get_state(), second.get_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heun_is_diffusers(dtype):
    theirs = FlowMatchHeunDiscreteScheduler(shift=3.0)
    ours = Scheduler.from_config(theirs)
    assert ours.order == theirs.order == 2
    assert torch.equal(ours.timesteps, theirs.timesteps)
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-7)
    z = torch.randn(SHAPE, generator=seeded(0)).to(dtype)
    expected, got = loop(theirs, theirs.timesteps, z), loop(ours, ours.timesteps, z)
    assert got.dtype == expected.dtype == dtype
    assert torch.allclose(got.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.05)


def test_heuns_second_stage_reads_an_edited_sample_as_diffusers_does():
    theirs = FlowMatchHeunDiscreteScheduler()
    ours = Scheduler.from_config(theirs)
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    x = y = torch.randn(SHAPE, generator=seeded(0))
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x)[0] + 0.1
        y = ours.step(network(y, t), t, y)[0] + 0.1
    assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"flow_shift": 3.0, "solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}),
        ("DPMSolverSinglestepScheduler", {"flow_shift": 2.0}),
        ("UniPCMultistepScheduler", {"flow_shift": 3.0}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.05}),
        ("DEISMultistepScheduler", {"flow_shift": 3.0, "solver_order": 3}),
    ],
    ids=str,
)
def test_multi_step_schedulers_with_flow_sigmas_are_diffusers(name, config):
    """In float64 the runs agree to 1e-8 (`tests/solvers/test_solver_grid.py`); diffusers' float32 costs more."""
    theirs = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", **config)
    run = {"mu": 0.5} if config.get("use_dynamic_shifting") else {}
    ours = Scheduler.from_config(theirs)
    theirs.set_timesteps(8, **run)
    ours.set_timesteps(8, **run)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
    z, first, second = torch.randn(SHAPE, generator=seeded(0)), seeded(), seeded()
    noisy = {"generator"} & set(theirs.step.__code__.co_varnames)
    expected = loop(theirs, theirs.timesteps, z, **({"generator": first} if noisy else {}))
    got = loop(ours, ours.timesteps, z, **({"generator": second} if noisy else {}))
    assert torch.allclose(got, expected, atol=1e-3)
    images, noise = torch.rand(SHAPE, generator=seeded(1)), torch.randn(SHAPE, generator=seeded(2))
    t = theirs.timesteps[[2, 5]]
    assert torch.allclose(ours.add_noise(images, noise, t), theirs.add_noise(images, noise, t), atol=1e-5)


def test_the_rest_of_the_surface():
    theirs = FlowMatchEulerDiscreteScheduler(shift=2.0)
    ours = Scheduler.from_config(theirs)
    images, noise = torch.rand(SHAPE, generator=seeded(1)), torch.randn(SHAPE, generator=seeded(2))
    for t in (theirs.timesteps[[10, 700]], theirs.timesteps[[0, 999]]):  # as in training
        assert torch.allclose(ours.scale_noise(images, t, noise), theirs.scale_noise(images, t, noise), atol=1e-6)
    for scheduler in (theirs, ours):
        scheduler.set_shift(4.0)
        scheduler.set_timesteps(6)
    assert ours.shift == theirs.shift == 4.0
    assert torch.equal(ours.timesteps, theirs.timesteps)
    t = theirs.timesteps[[1, 4]]
    assert torch.allclose(ours.scale_noise(images, t, noise), theirs.scale_noise(images, t, noise), atol=1e-6)
    for scheduler in (theirs, ours):  # img2img from the third step on
        scheduler.set_begin_index(2)
    start = ours.scale_noise(images, ours.timesteps[2:3].expand(2), noise)
    assert torch.allclose(start, theirs.scale_noise(images, theirs.timesteps[2:3].expand(2), noise), atol=1e-6)
    a, b = loop(theirs, theirs.timesteps[2:], start), loop(ours, ours.timesteps[2:], start)
    assert torch.allclose(a, b, atol=5e-6)
    result = Scheduler.from_config(ours.config)
    result.set_timesteps(6)
    assert len(result.step(noise, result.timesteps[0], images, return_dict=False)) == 1
    assert isinstance(result.step(noise, result.timesteps[0], images).pred_original_sample, torch.Tensor)
    again = Scheduler.from_config(ours.config)
    assert again.config.shift == 2.0
    assert dict(again.config) == dict(ours.config)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.step(torch.zeros(SHAPE), s.timesteps[0], torch.zeros(SHAPE), per_token_timesteps=1), "per_token"),
        (lambda s: s.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE)), "not one of this run"),
        (lambda s: s.set_timesteps(5, mu=1e9), "mu"),
        (lambda s: s.set_shift(0.0), "shift"),
        (lambda s: s.set_timesteps(5, sigmas=[0.5]), "steps"),
    ],
)
def test_what_is_not_supported_is_named(call, said):
    scheduler = Scheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    scheduler.set_timesteps(5)
    with pytest.raises((InvalidArgument, ConfigError), match=said):
        call(scheduler)


def test_churn_of_heun_is_refused_and_that_of_euler_ignored_as_in_diffusers():
    euler = Scheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    euler.set_timesteps(5)
    x = torch.randn(SHAPE, generator=seeded(0))
    plain = euler.step(x, euler.timesteps[0], x).prev_sample
    euler.set_timesteps(5)
    assert torch.equal(euler.step(x, euler.timesteps[0], x, 3.0).prev_sample, plain)
    heun = Scheduler.from_config({"_class_name": "FlowMatchHeunDiscreteScheduler"})
    heun.set_timesteps(5)
    with pytest.raises(InvalidArgument, match="s_churn"):
        heun.step(x, heun.timesteps[0], x, s_churn=3.0)
    with pytest.raises(InvalidArgument, match="scale_noise belongs to"):
        Scheduler.from_config({"_class_name": "DDIMScheduler"}).scale_noise(x, 5, x)


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "model"
    save_folder(path, random_unet(TINY), FlowSchedule(shift=2.0), "flow_prediction")
    return path


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_compat_draws_diffusers_images(folder, backend, solver):
    if backend == "native":
        from fastdiff.backends.native import extension

        if extension() is None:
            pytest.skip("the native engine is not built")
    sampler = fastdiff.Sampler.from_pretrained(folder, backend=backend, device="cpu")
    assert isinstance(sampler.schedule, FlowSchedule)
    z = torch.randn((2, 3, 8, 8), generator=seeded(0))
    got = sampler.sample(2, solver=solver, steps=6, compat="diffusers", noise=z).images
    flow = {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
    theirs = {
        "euler": FlowMatchEulerDiscreteScheduler(shift=2.0),
        "heun": FlowMatchHeunDiscreteScheduler(shift=2.0),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": diffusers.UniPCMultistepScheduler(**flow),
    }[solver]
    theirs.set_timesteps(6)
    unet, x = diffusers_twin(random_unet(TINY)), z
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(unet(x, t).sample, t, x).prev_sample
    assert (got - x).abs().max() < 2e-3 * x.abs().max()


def test_every_solver_that_a_flow_has_draws_images(folder):
    sampler = fastdiff.Sampler.from_pretrained(folder, backend="eager", device="cpu")
    for solver in ("auto", "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "heun", "euler_ancestral"):
        out = sampler.sample(1, solver=solver, steps=4, seed=1)
        assert out.images.isfinite().all()
        assert out.table.flow
    auto = sampler.sample(1, seed=1, solver="auto").table
    assert (auto.solver, auto.steps) == ("euler", 28)


def test_edits_use_levels_of_the_flow(folder):
    """An image that is known everywhere is at (1 - sigma) image + sigma z in every row, and at the end itself."""
    sampler = fastdiff.Sampler.from_pretrained(folder, backend="eager", device="cpu")
    image = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    anew = torch.zeros(8, 8)
    anew[0, 0] = 1
    seen = []
    events = sampler.stream(1, solver="euler", steps=5, image=image, mask=anew, seed=4)
    for event in events:
        seen.append(event.x)
    assert torch.equal(seen[-1][0, :, 1:].cpu(), image[0, :, 1:])
    sigmas = [t / 1000 for t in sampler.schedule.times(5)][1:]
    for x, sigma in zip(seen[:-1], sigmas, strict=True):
        z = ((x.cpu() - (1 - sigma) * image) / sigma)[:, :, 1:]
        assert float(z.std()) == pytest.approx(1.0, abs=0.2)
        assert abs(float(z.mean())) < 0.25
    late = sampler.sample(1, solver="euler", steps=10, image=image, strength=0.3, seed=4)
    assert late.table.rows[0].t == pytest.approx(1000 * sampler.schedule.sigma(sampler.schedule.times(10)[7]))
    multistep = sampler.sample(1, solver="dpmpp_2m", steps=10, image=image, strength=0.3, seed=4)
    assert multistep.table.rows[0].t == pytest.approx(late.table.rows[0].t)


def test_guidance_by_a_function_moves_images_to_what_it_asks_for(folder):
    sampler = fastdiff.Sampler.from_pretrained(folder, backend="eager", device="cpu")

    def to_one(x0, indices):
        return -(x0 - 1.0).square().sum(dim=(1, 2, 3))

    plain = sampler.sample(2, solver="euler", steps=12, seed=1).images.mean()
    for through, scale in (("x0", 1.0), ("network", 1e-2)):
        guided = sampler.sample(
            2, solver="euler", steps=12, seed=1, guide=lambda *a, scale=scale: scale * to_one(*a), guide_through=through
        ).images.mean()
        assert guided > plain + 0.04, through


def test_configurations_of_folders():
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert schedule_of(flow) == (FlowSchedule(3.0), "flow_prediction")
    heun = {"_class_name": "FlowMatchHeunDiscreteScheduler", "num_train_timesteps": 500}
    assert schedule_of(heun) == (FlowSchedule(timesteps=500), "flow_prediction")
    dpm = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert schedule_of({**dpm, "prediction_type": "flow_prediction"}) == (FlowSchedule(3.0), "flow_prediction")
    assert schedule_of({**dpm, "prediction_type": "sample"}) == (FlowSchedule(3.0), "sample")
    for wrong, said in (
        ({**flow, "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({**flow, "invert_sigmas": True}, "invert_sigmas"),
        ({**dpm, "prediction_type": "v_prediction"}, "v_prediction"),
    ):
        with pytest.raises(ConfigError, match=said):
            schedule_of(wrong)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "epsilon"])
def test_a_saved_flow_is_the_same_when_loaded(tmp_path, prediction):
    save_folder(tmp_path, random_unet(TINY), FlowSchedule(1.5, 400), prediction)
    sampler = fastdiff.Sampler.from_pretrained(tmp_path, backend="eager", device="cpu")
    assert (sampler.schedule, sampler.prediction) == (FlowSchedule(1.5, 400), prediction)


def test_what_a_sampler_of_a_flow_does_not_have_is_named(folder):
    sampler = fastdiff.Sampler.from_pretrained(folder, backend="eager", device="cpu")
    image = torch.zeros(1, 3, 8, 8)
    for call, said in (
        (lambda: sampler.adapt(1), "FlowSchedule"),
        (lambda: sampler.invert(image), "FlowSchedule"),
        (lambda: sampler.sample(1, solver="lcm"), "NoiseSchedule"),
        (lambda: sampler.sample(1, solver="consistency"), "EDMSchedule"),
        (lambda: sampler.sample(1, solver="ddpm", steps=3, compat="diffusers"), "flow-matching"),
        (lambda: sampler.sample(1, solver="ddim", steps=3, compat="openai"), "openai"),
        (lambda: fastdiff.Sampler(sampler.unet, FlowSchedule(), prediction="v_prediction"), "v_prediction"),
        (lambda: fastdiff.Sampler(sampler.unet, prediction="flow_prediction"), "needs a FlowSchedule"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            call()


@pytest.mark.parametrize("config", [{"shift": 2.0}, {"stochastic_sampling": True}], ids=str)
def test_accelerated_pipelines_draw_the_same_images(config):
    def call(accelerated):
        pipeline = DDPMPipeline(diffusers_twin(random_unet(TINY)), FlowMatchEulerDiscreteScheduler(**config))
        pipeline.set_progress_bar_config(disable=True)
        pipeline = fastdiff.accelerate(pipeline, backend="eager") if accelerated else pipeline
        return pipeline(2, generator=seeded(), num_inference_steps=5, output_type="np").images

    assert np.abs(call(True) - call(False)).max() < 1e-4
