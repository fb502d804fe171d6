"""Training with a flow-matching loss: levels, loss, a problem whose optimum is known, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, TrainConfig, Trainer
from fastdiff.errors import InvalidArgument, TrainingError
from fastdiff.solvers import EDMSchedule, FlowSchedule
from fastdiff.training import ArrayData, ConditionedData
from fastdiff.unet import UNet
from tests.support import warm
from tests.support.captioned import network_and_encoder
from tests.training.test_captions import Captioned
from tests.training.test_train_command import command
from tests.training.toys import SHORT, TOY, Toys, digests, rewrite, toy_unet

PLAIN = {"num_class_embeds": None, "null_label": None}
SMALL = (
    "--size", "8", "--channels", "8", "--groups", "4", "--layers", "1", "--attention", "", "--steps", "2",
    "--batch-size", "4", "--lr-warmup", "1", "--log-every", "1", "--sample-every", "2",
)  # fmt: skip


def flow_trainer(
    out: Path, unet: Any = None, data: Any = None, shift: float = 1.0, text_encoder: Any = None, **settings: Any
) -> Trainer:
    config = TrainConfig(**{**SHORT, "prediction": "flow_prediction", **settings})
    return Trainer(
        toy_unet() if unet is None else unet, Toys() if data is None else data, out, config, FlowSchedule(shift),
        device="cpu", text_encoder=text_encoder,
    )  # fmt: skip


def levels(trainer: Trainer, n: int) -> np.ndarray:
    """Return the noise levels of the first n positions, rising."""
    images = trainer.data.images[:1].expand(n, -1, -1, -1)  # type: ignore[attr-defined]  # of Toys
    t = trainer._batch(images, torch.ones(n, dtype=torch.int64), range(n))[2]
    assert t.dtype == torch.float32
    return np.sort(t.double().numpy()) / 1000.0


# Levels and loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sigmas", [None, "logit_normal", "uniform"])
def test_levels_have_the_distribution_of_the_paper(tmp_path, sigmas, shift):
    """Esser et al. 2024: equation 23 undone, s or Phi(logit(s)) is uniform; the bound is that of Kolmogorov-Smirnov."""
    n = 20_000
    s = levels(flow_trainer(tmp_path, data=Toys(size=(1, 2)), shift=shift, flow_sigmas=sigmas), n)
    assert 0.0 < s[0] < s[-1] <= 1.0
    plain = s / (shift - (shift - 1.0) * s)
    if sigmas != "uniform":
        logit = np.log(plain / (1.0 - plain))
        plain = 0.5 * (1.0 + np.array([math.erf(v / math.sqrt(2.0)) for v in logit]))
    distance = np.abs(plain - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand; the seed is fixed


def reference(
    trainer: Trainer, unet: torch.nn.Module, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None
) -> float:
    """Compute the loss in float64, as the page on training writes it."""
    image, condition = x0[:, : noise.shape[1]].double(), x0[:, noise.shape[1] :].double()
    s = (t.double() / 1000.0)[:, None, None, None]
    x = torch.cat([(1.0 - s) * image + s * noise.double(), condition], dim=1)
    with torch.no_grad():
        out = unet.double()(x, t.double(), labels)
    unet.float()
    return float(((out - (noise.double() - image)) ** 2).mean())


def test_the_loss_of_labelled_images(tmp_path):
    trainer = flow_trainer(tmp_path)
    batch = trainer._batch(*trainer._read(range(8)), range(8))
    assert batch[3] is not None
    loss = trainer._loss(trainer.unet, *batch).item()
    assert loss == pytest.approx(reference(trainer, trainer.unet, *batch), rel=1e-5)


def test_the_loss_with_a_condition_image(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(dataclasses.replace(TOY, in_channels=4, **PLAIN))
    data = ConditionedData(Toys(classes=None), Toys(channels=3, classes=None))
    trainer = flow_trainer(tmp_path, unet, data, shift=2.0, flow_sigmas="uniform")
    batch = trainer._batch(*trainer._read(range(8)), range(8))
    assert batch[1].shape == (8, 1, 8, 8)
    assert trainer._loss(unet, *batch).item() == pytest.approx(reference(trainer, unet, *batch), rel=1e-5)


def test_the_loss_from_captions(tmp_path):
    unet, encoder = network_and_encoder()
    trainer = flow_trainer(tmp_path, unet, Captioned(), text_encoder=encoder)
    batch = trainer._batch(*trainer._read(range(6)), range(6))
    network = trainer._network.eval()
    assert trainer._loss(network, *batch).item() == pytest.approx(reference(trainer, network, *batch), rel=1e-4)
    trainer.fit()
    drawn = Sampler.from_pretrained(tmp_path).sample(2, prompts="a red picture", steps=2)
    assert drawn.images.shape == (2, 3, 8, 8)


# A problem whose optimum is known -------------------------------------------------------------------------------------


class TwoPoints(ArrayData):
    """Images that are wholly black, -1, or, one in four, wholly white, +1."""

    def __init__(self, size: int = 4):
        pixels = np.zeros((64, size, size, 1), dtype=np.uint8)
        pixels[::4] = 255
        super().__init__(Path("two"), pixels, None, None, 1, "crop")


def optimum(x: Tensor, s: Tensor) -> Tensor:
    """Return the best velocity, E[eps - x_0 | x]: with d pixels, log odds of white = 2 (1 - s) sum(x) / s^2 - log 3."""
    s = s.double()
    odds = 2.0 * (1.0 - s) * x.double().sum(dim=(1, 2, 3)) / s**2 - math.log(3.0)
    x0 = torch.tanh(0.5 * odds)[:, None, None, None]
    return (x - (1.0 - s)[:, None, None, None] * x0) / s[:, None, None, None] - x0


@pytest.mark.slow
def test_two_points_are_learned(tmp_path):
    """The loss comes close to the least one that is possible, and the samples are black or, one in four, white."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(dataclasses.replace(TOY, sample_size=4, block_out_channels=(16,), norm_num_groups=4, **PLAIN))
    trainer = flow_trainer(
        tmp_path, unet, TwoPoints(), steps=700, batch_size=64, lr=1e-2, lr_decay="cosine", ema_decay=0.95,
        log_every=700, save_every=700, flow_sigmas="uniform",
    )  # fmt: skip
    trainer.fit()
    x0, noise, t, _ = trainer._batch(*trainer._read(range(4096)), range(4096))
    with torch.no_grad():
        loss = float(trainer._loss(trainer.ema, x0, noise, t, None))
    s = t / 1000.0
    x = (1.0 - s)[:, None, None, None] * x0 + s[:, None, None, None] * noise
    least = float(((optimum(x, s) - (noise - x0)) ** 2).mean())
    assert least < loss < 1.25 * least
    images = Sampler.from_pretrained(tmp_path / "model").sample(200, solver="euler", steps=20, clip=None).images
    means = images.mean(dim=(1, 2, 3))
    assert (means.abs() - 1.0).abs().median() < 0.05
    assert (images - means.sign()[:, None, None, None]).abs().mean() < 0.1
    assert 0.15 < float((means > 0).double().mean()) < 0.35


def test_the_loss_falls_to_the_best_one_of_a_single_image(tmp_path):
    """Learn one image: the best velocity is (x - x_0) / s, whose loss is 0; the start has E |eps - x_0|^2."""

    class One(ArrayData):
        def __init__(self) -> None:
            super().__init__(Path("one"), np.full((8, 4, 4, 1), 255, np.uint8), None, None, 1, "crop")

    unet = toy_unet(sample_size=4, **PLAIN).zero_residuals_()
    trainer = flow_trainer(tmp_path, unet, One(), steps=80, batch_size=16, lr=2e-2, ema_decay=0.9, log_every=80,
                           save_every=80)  # fmt: skip
    batch = trainer._batch(*trainer._read(range(64)), range(64))
    with torch.no_grad():
        start = float(trainer._loss(trainer.unet, *batch))
    assert start == pytest.approx(2.0, rel=0.15)
    trainer.fit()
    with torch.no_grad():
        assert float(trainer._loss(trainer.ema, *batch)) < 0.2
    images = Sampler.from_pretrained(tmp_path / "model").sample(8, solver="euler", steps=10, clip=None).images
    assert (images - 1.0).abs().mean() < 0.15


# Files ----------------------------------------------------------------------------------------------------------------


def test_diffusers_draws_the_same_images_from_the_exported_model(tmp_path):
    trainer = flow_trainer(tmp_path, toy_unet(**PLAIN), Toys(classes=None), shift=2.0, sample_every=6)
    trainer.fit()
    assert (tmp_path / "samples" / "step-0000006.png").exists()
    written = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["_class_name"], written["shift"]) == ("FlowMatchEulerDiscreteScheduler", 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    network = UNet2DModel.from_pretrained(tmp_path / "model" / "unet").eval()
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise.clone()
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    for path in (tmp_path, tmp_path / "model", tmp_path / "checkpoint.safetensors"):
        sampler = Sampler.from_pretrained(path)
        assert (sampler.schedule, sampler.prediction) == (FlowSchedule(2.0), "flow_prediction")
        drawn = sampler.sample(3, solver="euler", steps=7, compat="diffusers", noise=noise).images
        torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(3, generator=generator, num_inference_steps=7, output_type="np").images
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures - expected).max() < 1e-5


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    for out, steps in (("a", (3, 6)), ("b", (6,))):
        for k in steps:
            flow_trainer(tmp_path / out, steps=k, hflip=True).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    for changes, words in (
        ({"flow_sigmas": "uniform"}, r"flow_sigmas: None then, 'uniform' now.*--accept-changes"),
        ({"shift": 2.0}, "scheduler: shift 1.0 then, 2.0 now"),
    ):
        with pytest.raises(TrainingError, match=words):
            flow_trainer(tmp_path / "a", hflip=True, steps=7, **changes).fit()
    flow_trainer(tmp_path / "a", hflip=True, steps=7, flow_sigmas="uniform").fit(accept_changes=True)


def test_checkpoints_without_the_setting_resume(tmp_path):
    """Versions before flow matching wrote no flow_sigmas."""
    config = TrainConfig(**SHORT)
    Trainer(toy_unet(), Toys(), tmp_path, dataclasses.replace(config, steps=3), device="cpu").fit()
    rewrite(tmp_path / "checkpoint.safetensors", lambda _, info: info["train"].pop("flow_sigmas"))
    trainer = Trainer(toy_unet(), Toys(), tmp_path, config, device="cpu")
    trainer.fit()
    assert trainer.step == 6


# The command, and what is refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "photos.npz", images=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    return folder / "photos.npz"


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "flow", "--shift", "3"),
        pytest.param(("--prediction", "flow_prediction"), marks=pytest.mark.slow),  # another way to say it
    ],
)
def test_the_command_trains_and_samples_a_flow(tmp_path, photos, options):
    trained = warm.run("-m", "fastdiff", "train", photos, "-o", tmp_path / "run", *SMALL, *options)
    assert trained.returncode == 0, trained.stderr
    drawn = warm.run(
        "-m", "fastdiff", "sample", tmp_path / "run", "--n", "2", "--steps", "2", "--out", tmp_path / "a.png"
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "a.png").exists()
    schedule = Sampler.from_pretrained(tmp_path / "run").schedule
    assert schedule == FlowSchedule(3.0 if "--shift" in options else 1.0)


def test_a_flow_goes_on_from_a_flow(tmp_path, photos, capsys, monkeypatch):
    flow_trainer(tmp_path / "run", toy_unet(in_channels=3, out_channels=3, **PLAIN), Toys(channels=3, classes=None),
                 steps=1).fit()  # fmt: skip
    init = ("train", photos, "-o", tmp_path / "on", *SMALL, "--init", tmp_path / "run", "--schedule", "flow")
    assert command(capsys, monkeypatch, *init)[0] == 0
    code, errors = command(capsys, monkeypatch, *init, "--shift", "2", "-o", tmp_path / "other")
    assert code == 2
    assert "another --schedule, --timesteps, --shift or --prediction" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shift", "2"), "--shift moves the noise levels of a flow; it needs --schedule flow"),
        (("--flow-sigmas", "uniform"), "flow_sigmas='uniform': None with prediction='epsilon'"),
        (("--schedule", "flow", "--flow-sigmas", "normal"), "flow_sigmas='normal': 'logit_normal' or 'uniform'"),
        (("--schedule", "flow", "--min-snr-gamma", "5"), "min_snr_gamma=5.0: None with prediction='flow_prediction'"),
        (("--schedule", "flow", "--shift", "0"), "shift=0.0: a positive number is needed"),
        (("--schedule", "flow", "--prediction", "epsilon"), "with prediction='epsilon': 'flow_prediction' is trained"),
        (
            ("--schedule", "cosine", "--prediction", "flow_prediction"),
            "'flow_prediction' is trained with a FlowSchedule",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, photos, capsys, monkeypatch, options, words):
    code, errors = command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL, *options)
    assert code == 2
    assert words in errors.splitlines()[-1].replace("--flow-sigmas ", "flow_sigmas=")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("schedule", [EDMSchedule(), NoiseSchedule(), "flow", 1.0])
def test_schedules_that_are_not_trained(tmp_path, schedule):
    with pytest.raises(InvalidArgument, match="FlowSchedule"):
        Trainer(toy_unet(), Toys(), tmp_path, TrainConfig(prediction="flow_prediction"), schedule, device="cpu")
    with pytest.raises(InvalidArgument, match="NoiseSchedule"):
        Trainer(toy_unet(), Toys(), tmp_path, TrainConfig(), FlowSchedule(), device="cpu")
    with pytest.raises(InvalidArgument, match="NoiseSchedule"):
        Trainer(toy_unet(), Toys(), tmp_path, TrainConfig(), EDMSchedule(), device="cpu")  # type: ignore[arg-type]
