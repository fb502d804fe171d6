"""ScoreSdeVeScheduler: loops of one's own with `fastdiff.Scheduler`, and folders of NCSN++ models in `Sampler`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ScoreSdeVeScheduler, UNet2DModel
from torch import Tensor

from fastdiff import Sampler, Scheduler
from fastdiff.checkpoints import convert, save_folder
from fastdiff.core.noise import UPDATE, normal
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.files import write_text
from fastdiff.solvers import VESchedule, from_config
from tests.support.schedulers import scheduler_module
from tests.support.unets import TINY, diffusers_twin, random_unet
from tests.unet.test_ncsnpp import ncsnpp

OPTIONS = {"sigma_min": 0.01, "sigma_max": 50.0, "num_train_timesteps": 100, "snr": 0.15}
SMALL = ncsnpp(
    block_out_channels=(32, 32), down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), sample_size=8,
    up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"), layers_per_block=1,
)  # fmt: skip


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return -torch.tanh(x) / (sigma + 0.5)


def loop(scheduler, steps: int, correct: bool, seed: int = 0) -> Tensor:
    """Run the loop of ScoreSdeVePipeline."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        for _ in range(scheduler.config.correct_steps if correct else 0):
            x = scheduler.step_correct(denoise(x, sigma), x, generator=generator).prev_sample
        output = scheduler.step_pred(denoise(x, sigma), t, x, generator=generator)
        x = output.prev_sample
    return output.prev_sample_mean


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_loop_of_the_pipeline(steps, correct):
    theirs = ScoreSdeVeScheduler(**OPTIONS, correct_steps=2)
    ours = Scheduler.from_config(theirs)
    assert torch.equal(loop(ours, steps, correct), loop(theirs, steps, correct))
    assert torch.equal(ours.discrete_sigmas, theirs.discrete_sigmas)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_the_interface():
    theirs = ScoreSdeVeScheduler(**OPTIONS)
    ours = Scheduler({"_class_name": "ScoreSdeVeScheduler", **OPTIONS})
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    assert len(ours) == len(theirs) == 100
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    x, z = torch.randn(2, 2, 3, 4, 4)
    index = torch.tensor([3, 90])
    assert torch.equal(ours.add_noise(x, z, index), theirs.add_noise(x, z, index))
    for args in ((7, 0.01), (7, 0.01, "cpu"), (7, None, "cpu")):
        ours.set_timesteps(*args)
        theirs.set_timesteps(*args)
        assert torch.equal(ours.timesteps, theirs.timesteps)
    ours.set_sigmas(7, 0.1, 9.0)
    theirs.set_sigmas(7, 0.1, 9.0)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    t = torch.tensor([1.0, 0.4])
    assert torch.equal(ours.get_adjacent_sigma(index // 20, t), theirs.get_adjacent_sigma(index // 20, t))
    pair = [s.step_pred(z, 0.4, x, torch.Generator().manual_seed(1), False) for s in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    pair = [s.step_correct(z, x, torch.Generator().manual_seed(1), False) for s in (ours, theirs)]
    assert len(pair[0]) == len(pair[1]) == 1
    assert torch.equal(pair[0][0], pair[1][0])
    assert ours.scale_model_input(x, 0.3) is x
    again = Scheduler.from_config(ours.config, sigma_max=9.0)
    assert again.init_noise_sigma == 9.0


def test_what_does_not_fit_is_named():
    scheduler = Scheduler({"_class_name": "ScoreSdeVeScheduler", **OPTIONS})
    x = torch.zeros(1, 3, 4, 4)
    for call, words in (
        (lambda: scheduler.step(x, 0.5, x), "has step_pred and step_correct in place of step"),
        (lambda: scheduler.step_pred(x, 3.0, x), "a time from 0 to 1"),
        (lambda: scheduler.step_pred(x[:, :1], 0.5, x), "must be of one shape"),
        (lambda: scheduler.step_correct(None, x), "a tensor"),
        (lambda: scheduler.set_timesteps(0), "num_inference_steps"),
        (lambda: scheduler.set_sigmas(5, 3.0, 2.0), "must be less than sigma_max"),
        (lambda: scheduler.add_noise(x, x, 100), "an index of discrete_sigmas"),
        (lambda: Scheduler({"_class_name": "DDIMScheduler"}).set_timesteps(5, sampling_eps=0.1), "sampling_eps"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            call()
    with pytest.raises(AttributeError, match="step_pred"):
        Scheduler({"_class_name": "DDIMScheduler"}).step_pred(x, 0.5, x)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as google/ncsnpp-celebahq-256 is one, without the corrector."""
    folder = tmp_path_factory.mktemp("ncsnpp")
    diffusers_twin(random_unet(SMALL)).save_pretrained(folder / "unet")
    ScoreSdeVeScheduler(**OPTIONS, correct_steps=0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ScoreSdeVePipeline", "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "ScoreSdeVeScheduler"],
    }  # fmt: skip
    write_text(folder / "model_index.json", json.dumps(index))
    return folder


def drawn_by_diffusers(folder: Path, steps: int, noise: Tensor, seed: int, monkeypatch) -> Tensor:
    """Return the images, in [-1, 1], of a loop with diffusers' classes and the noise that fastdiff draws."""
    module = scheduler_module("ScoreSdeVeScheduler")
    row, seeds, index = iter(range(steps)), torch.full((len(noise),), seed), torch.arange(len(noise))

    def draw(shape, **_):
        return normal(seeds, index, torch.full_like(index, next(row)), UPDATE, shape[1:])

    monkeypatch.setattr(module, "randn_tensor", draw)
    network = UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler = ScoreSdeVeScheduler.from_pretrained(folder / "scheduler")
    x = noise * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = scheduler.step_pred(network(x, scheduler.sigmas[i] * torch.ones(len(x))).sample, t, x)
            x = output.prev_sample
    return 2.0 * output.prev_sample_mean - 1.0


def test_a_folder_draws_what_a_loop_of_diffusers_draws(folder, monkeypatch):
    sampler = Sampler.from_pretrained(folder)
    assert (sampler.schedule, sampler.prediction, sampler.backend) == (VESchedule(0.02, 100.0, 100), "score", "eager")
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = sampler.sample(3, solver="ddpm", steps=9, compat="diffusers", seed=5, noise=noise).images
    theirs = drawn_by_diffusers(folder, 9, noise, 5, monkeypatch)
    assert float((drawn - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    # Without compat the noise is around gray, and the levels of the steps are others in the last digits.
    noise = noise - 1.0 / 100.0
    plain = sampler.sample(3, solver="ddpm", steps=9, variance="beta", seed=5, noise=noise).images
    assert float((plain - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"solver": "heun", "steps": 4}, {"solver": "euler", "steps": 4, "spacing": "karras"},
        {"solver": "dpmpp_2m", "steps": 6}, {"solver": "euler_ancestral", "steps": 5}, {"solver": "ddpm", "steps": 5},
        {"solver": "heun", "steps": 4, "image": "self", "strength": 0.5}, {"solver": "unipc", "steps": 5, "order": 2},
    ],
    ids=str,
)  # fmt: skip
def test_solvers_run_it(folder, options):
    """Images are finite and do not depend on their batch."""
    sampler = Sampler.from_pretrained(folder)
    options = {"steps": 3, "clip": 1.0, "seed": 1, **options}
    start = torch.zeros(2, 3, 8, 8) if options.pop("image", None) else None
    images = sampler.sample(2, image=start, **options).images
    assert images.shape == (2, 3, 8, 8)
    assert bool(images.isfinite().all())
    alone = sampler.sample(1, image=None if start is None else start[1:], start_index=1, **options).images
    torch.testing.assert_close(alone, images[1:], rtol=1e-3, atol=1e-3)


def test_the_corrector_and_what_else_is_refused(folder, tmp_path):
    network = Sampler.from_pretrained(folder)
    corrected = Sampler(
        network.unet, network.schedule, scheduler_config={**network.scheduler_config, "correct_steps": 1}
    )
    with pytest.raises(ConfigError, match="Langevin corrector"):
        corrected.sample(1, solver="ddpm", steps=3, compat="diffusers")
    with pytest.raises(InvalidArgument, match="diffusers has no heun for variance-exploding networks"):
        network.sample(1, solver="heun", steps=3, compat="diffusers")
    with pytest.raises(InvalidArgument, match="has no variance='posterior'"):
        network.sample(1, solver="ddpm", variance="posterior", steps=3, compat="diffusers")
    with pytest.raises(InvalidArgument, match="adapt is not supported with a VESchedule"):
        network.adapt(1)
    with pytest.raises(InvalidArgument, match="VESchedule is not supported"):
        network.invert(torch.zeros(1, 3, 8, 8), steps=3)
    random_unet(TINY).save_pretrained(tmp_path / "unet")
    write_text(tmp_path / "scheduler" / "scheduler_config.json", json.dumps({"_class_name": "ScoreSdeVeScheduler"}))
    with pytest.raises((ConfigError, CheckpointError), match="needs a network of noise levels"):
        Sampler.from_pretrained(tmp_path)


def test_saving_and_converting_keep_the_model(folder, tmp_path):
    sampler = Sampler.from_pretrained(folder)
    save_folder(tmp_path / "saved", sampler.unet, sampler.schedule, "score")
    convert(folder, tmp_path / "converted")
    wanted = sampler.sample(2, solver="heun", steps=3, seed=2).images
    for name in ("saved", "converted"):
        again = Sampler.from_pretrained(tmp_path / name)
        assert (again.schedule, again.prediction) == (sampler.schedule, "score")
        assert torch.equal(again.sample(2, solver="heun", steps=3, seed=2).images, wanted)
        assert json.loads((tmp_path / name / "model_index.json").read_text())["_class_name"] == "ScoreSdeVePipeline"
        ScoreSdeVeScheduler.from_pretrained(tmp_path / name / "scheduler")
        UNet2DModel.from_pretrained(tmp_path / name / "unet")
    with pytest.raises(ConfigError, match="unit_range is needed"):
        save_folder(tmp_path / "no", random_unet(SMALL), sampler.schedule, "score")


def test_a_table_of_the_configuration():
    table = from_config({"_class_name": "ScoreSdeVeScheduler", **OPTIONS, "correct_steps": 0}, 5)
    assert table.exploding
    assert table.init_scale == 50.0
