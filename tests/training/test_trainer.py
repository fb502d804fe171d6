"""The trainer: Ho et al.'s algorithm 1 by statistics and by hand, resuming bit for bit, and what goes wrong.

Runs that are killed or limited, or that need several processes or the command line, are real processes; they import
this module for its toys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff import cli
from fastdiff.core.noise import INITIAL, normal
from fastdiff.errors import CheckpointError, DataError, InvalidArgument, TrainingError
from fastdiff.sampler import Sampler
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.training import ArrayData, TrainConfig, Trainer
from fastdiff.training.log import TrainingLog
from fastdiff.unet import UNet, UNetConfig
from tests.support.paths import ROOT

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]  # of a checkpoint's tensors and info


TOY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    attention_head_dim=None,
    norm_num_groups=4,
    num_class_embeds=4,
    null_label=3,
)
SHORT = {
    "steps": 6, "batch_size": 8, "lr": 1e-3, "lr_warmup": 2, "lr_decay": "none", "log_every": 2, "save_every": 2,
    "sample_every": 0,
}  # fmt: skip


class Toys(ArrayData):
    """Noise as images, with labels 0, 1, 2, 0, .."""

    def __init__(self, n: int = 10, size: tuple[int, int] = (8, 8), channels: int = 1, classes: int | None = 3):
        rng = np.random.default_rng(0)
        labels = None if classes is None else np.arange(n) % classes
        pixels = rng.integers(0, 256, (n, *size, channels), dtype=np.uint8)
        super().__init__(Path("toys"), pixels, labels, None, channels, "crop")


def toy_unet(**changes: Any) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet(dataclasses.replace(TOY, **changes))


def toy_trainer(out: Path | str, *, unet: UNet | None = None, data: Any = None, timesteps: int = 20, **settings: Any):
    config = TrainConfig(**SHORT | settings)
    data = Toys() if data is None else data
    return Trainer(unet or toy_unet(), data, out, config, NoiseSchedule("cosine", timesteps), device="cpu")


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a step changes, in one layout."""
    state = {f"model.{k}": v for k, v in trainer.unet.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    for name, parameter in trainer.unet.named_parameters():
        state |= {f"{moment}.{name}": v for moment, v in trainer.optimizer.state[parameter].items()}
    return {k: v.detach().clone().contiguous() for k, v in state.items()}


def digests(out: Path | str) -> dict[str, str]:
    """SHA-256 of every tensor of the checkpoint, and of every file of the exported model."""
    tensors = load_file(Path(out) / "checkpoint.safetensors")
    found = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in tensors.items()}
    files = sorted(path for path in (Path(out) / "model").rglob("*") if path.is_file())
    return found | {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def log_of(out: Path | str) -> list[dict[str, float]]:
    """log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "lr")} for line in lines]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path, change: Change) -> None:
    """Change the tensors and the info of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["fastdiff"])
    tensors = load_file(path)
    change(tensors, info)
    save_file(tensors, path, metadata={"fastdiff": json.dumps(info)})


def python(*arguments: str | Path, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run another Python, with one thread (its bits are compared, and processes share a machine)."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | settings,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def answer_of(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON on the last line of a process that went well."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# What a step sees -----------------------------------------------------------------------------------------------------


def drawn(trainer: Trainer, n: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`_batch` for n positions of one image with label 1."""
    image = trainer.data.images[:1].expand(n, -1, -1, -1)
    return trainer._batch(image, torch.ones(n, dtype=torch.int64), range(start, start + n))


def small(tmp_path: Path, **settings: Any) -> Trainer:
    return toy_trainer(tmp_path, data=Toys(size=(1, 2)), timesteps=50, **settings)


def test_timesteps_are_uniform_and_one_per_image(tmp_path: Path) -> None:
    t = drawn(small(tmp_path), 50_000)[2]
    counts = torch.bincount(t, minlength=50).double()
    assert len(counts) == 50
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert 49 - 4 * 98**0.5 < chi2 < 49 + 5 * 98**0.5  # mean and variance for 49 degrees of freedom: 49 and 98
    centred = t.double() - 24.5
    for lag in (1, 2, 8, 50):  # neighbours in a batch, the same place of the next batch
        assert abs(float((centred[lag:] * centred[:-lag]).mean() / centred.square().mean())) < 5 / 50_000**0.5


def test_timesteps_reach_both_ends_of_a_schedule(tmp_path: Path) -> None:
    for timesteps in (1, 2, 3):
        trainer = toy_trainer(tmp_path / str(timesteps), data=Toys(size=(1, 2)), timesteps=timesteps)
        assert drawn(trainer, 200)[2].unique().tolist() == list(range(timesteps))


def test_noise_is_standard_normal_and_independent(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, data=Toys(size=(2, 8)), timesteps=50)
    n, (_, z, t, _) = 20_000, drawn(trainer, 20_000)
    z = z.double().flatten(1)
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of a standard normal
        assert abs(float((z**power).mean()) - moment) < 5 * (variance / count) ** 0.5, power
    tails = float((z.abs() > 3).double().mean())
    assert abs(tails - math.erfc(3 / 2**0.5)) < 5 * (0.0027 / count) ** 0.5
    between_elements = z.T @ z / n - torch.eye(16)
    assert between_elements.abs().max() < 6 / n**0.5
    for lag in (1, 7, 8):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / count**0.5
    assert abs(float((z.mean(dim=1) * (t - 24.5)).mean())) < 5 * (50**2 / 12 / 16 / n) ** 0.5


def test_training_noise_is_not_the_noise_of_sampling(tmp_path: Path) -> None:
    """Position 0 and image 0 of one seed share no draw."""
    z = drawn(small(tmp_path, seed=3), 4)[1]
    seed, index = torch.full((4,), 3), torch.arange(4)
    assert (z - normal(seed, index, torch.zeros_like(index), INITIAL, (1, 1, 2))).abs().min() > 1e-6


def test_a_position_is_the_same_in_every_batch(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, hflip=True, label_dropout=0.5)
    together = drawn(trainer, 16)
    for start, n in ((0, 5), (5, 1), (6, 10)):
        for whole, part in zip(together, drawn(trainer, n, start), strict=True):
            assert torch.equal(whole[start : start + n], part)
    other_seed = drawn(toy_trainer(tmp_path, hflip=True, label_dropout=0.5, seed=1), 16)
    assert not torch.equal(together[1], other_seed[1])
    assert not torch.equal(together[2], other_seed[2])


def test_an_epoch_shows_every_image_once(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, data=Toys(n=10))
    order = [trainer._indices(range(start, start + 4)) for start in range(0, 40, 4)]  # batches cross epochs
    flat = [index for batch in order for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert trainer._indices(range(5, 35)) == flat[5:35]
    assert toy_trainer(tmp_path, data=Toys(n=10), seed=1)._indices(range(40)) != flat


def test_processes_and_parts_tile_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        parts = list(toy_trainer(tmp_path, batch_size=12, accumulate=3)._positions(5))
        assert [len(part) for part in parts] == [2, 2, 2]
        seen += [position for part in parts for position in part]
    assert sorted(seen) == list(range(60, 72))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_labels_are_dropped_to_the_null_label(tmp_path: Path, share: float) -> None:
    n = 20_000
    _, _, t, labels = drawn(small(tmp_path, label_dropout=share), n)
    assert labels is not None
    dropped = labels == 3
    assert (labels[~dropped] == 1).all()
    assert abs(float(dropped.double().mean()) - share) <= 5 * (share * (1 - share) / n) ** 0.5
    if share:  # at any timestep alike
        assert abs(float(t[dropped].double().mean()) - 24.5) < 5 * (50**2 / 12 / (share * n)) ** 0.5


def test_labels_stay_where_there_is_no_null_label(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, unet=toy_unet(num_class_embeds=3, null_label=None), label_dropout=0.9)
    labels = drawn(trainer, 100)[3]
    assert labels is not None
    assert (labels == 1).all()
    unconditional = toy_trainer(tmp_path, unet=toy_unet(num_class_embeds=None, null_label=None), label_dropout=0.9)
    assert drawn(unconditional, 100)[3] is None


def test_flips_are_per_image(tmp_path: Path) -> None:
    n, pixels = 20_000, np.array([[[0, 51, 255]]], np.uint8)[..., None]
    data = ArrayData(Path("three"), pixels, np.zeros(1, np.int64), None, 1, "crop")
    x0, _, t, _ = drawn(toy_trainer(tmp_path, data=data, timesteps=50, hflip=True), n)
    as_it_is = torch.tensor([-1.0, -0.6, 1.0])
    flipped = x0[:, 0, 0, 0] == 1
    assert torch.allclose(x0[~flipped, 0, 0], as_it_is)
    assert torch.allclose(x0[flipped, 0, 0], as_it_is.flip(0))
    assert abs(float(flipped.double().mean()) - 0.5) < 5 * (0.25 / n) ** 0.5
    assert abs(float(t[flipped].double().mean()) - 24.5) < 5 * (50**2 / 12 / (0.5 * n)) ** 0.5
    assert torch.allclose(drawn(toy_trainer(tmp_path, data=data), 50)[0][:, 0, 0], as_it_is)


# The loss -------------------------------------------------------------------------------------------------------------


class Formula(nn.Module):
    """A network that numpy can say too: 0.3 x + 0.02 t - 0.1 label."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        label = torch.zeros_like(t) if labels is None else labels
        return 0.3 * x + (0.02 * t - 0.1 * label)[:, None, None, None]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss(tmp_path: Path, prediction: str, gamma: float | None) -> None:
    """Equation 14 with Hang et al.'s weights, evaluated in float64 from the images on."""
    settings = {"prediction": prediction, "min_snr_gamma": gamma, "label_dropout": 0.3, "hflip": True}
    trainer = toy_trainer(tmp_path, data=Toys(n=16), timesteps=20, **settings)
    images, labels = trainer.data.__getitems__(range(16))
    x0, noise, t, dropped = trainer._batch(images, labels, range(16))
    assert dropped is not None
    loss = trainer._loss(Formula(), x0, noise, t, dropped)

    u = (np.arange(21) / 20 + 0.008) / 1.008  # the cosine schedule of Nichol & Dhariwal 2021
    curve = np.cos(u * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], 0.999))
    total = 0.0
    for i in range(16):
        pixels = images[i].numpy() / 127.5 - 1.0
        x = x0[i].double().numpy()
        assert np.allclose(x, pixels, atol=1e-6) or np.allclose(x, pixels[..., ::-1], atol=1e-6)
        z, a, s = noise[i].double().numpy(), math.sqrt(abar[t[i]]), math.sqrt(1 - abar[t[i]])
        said = 0.3 * (a * x + s * z) + 0.02 * int(t[i]) - 0.1 * int(dropped[i])
        wanted = {"epsilon": z, "sample": x, "v_prediction": a * z - s * x}[prediction]
        snr = abar[t[i]] / (1 - abar[t[i]])
        clipped = snr if gamma is None else min(snr, gamma)
        weight = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[prediction]
        total += (1.0 if gamma is None else weight) * np.mean((wanted - said) ** 2)
    assert float(loss) == pytest.approx(total / 16, rel=1e-5)


# The update -----------------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    config = TrainConfig(steps=110, lr=0.5, lr_warmup=10)
    assert [config.lr_at(step) for step in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5])
    for step in (10, 35, 60, 109):
        progress = (step - 10) / 100
        assert config.lr_at(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * progress)))
        assert dataclasses.replace(config, lr_decay="linear").lr_at(step) == pytest.approx(0.5 * (1 - progress))
        assert dataclasses.replace(config, lr_decay="none").lr_at(step) == 0.5
    assert TrainConfig(lr=0.5, lr_warmup=0).lr_at(0) == 0.5
    assert TrainConfig(steps=5, lr=0.5, lr_warmup=10).lr_at(4) == pytest.approx(0.25)


def test_ema_warms_up() -> None:
    config = TrainConfig(ema_decay=0.99)
    assert [config.ema_at(i) for i in (0, 1, 90)] == pytest.approx([1 / 10, 2 / 11, 91 / 100])
    assert config.ema_at(890) == pytest.approx(891 / 900)
    assert config.ema_at(891) == config.ema_at(10**6) == 0.99


def test_ema_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ema <- d ema + (1 - d) w, d = min(decay, (1 + i) / (10 + i)); the first update takes the weights."""
    trainer = toy_trainer(tmp_path, steps=6, lr=1e-2, lr_warmup=0, ema_decay=0.3)
    average, expected, errors = trainer._average, np.zeros(()), []

    def averaged() -> None:
        nonlocal expected
        average()
        i, w = trainer.step, trainer.unet.conv_in.weight.detach().double().numpy().copy()
        d = min(0.3, (1 + i) / (10 + i))  # 0.3 from i = 3 on
        expected = w if i == 0 else d * expected + (1 - d) * w
        errors.append(np.abs(trainer.ema.conv_in.weight.numpy() - expected).max())

    monkeypatch.setattr(trainer, "_average", averaged)
    trainer.fit()
    assert len(errors) == 6
    assert max(errors) < 1e-6  # each update moves weights by 1e-2


def adamw_by_hand(trainer: Trainer, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Weights, averages and gradient norms after some steps: Loshchilov & Hutter 2019, algorithm 2, in float64."""
    c = trainer.config
    unet = toy_unet()
    w = {k: p.detach().double().numpy().copy() for k, p in unet.named_parameters()}
    m, v = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    ema: dict[str, np.ndarray] = {}
    norms = []
    for i in range(steps):
        unet.load_state_dict({k: torch.from_numpy(x) for k, x in w.items()})
        unet.zero_grad()
        positions = range(i * c.batch_size, (i + 1) * c.batch_size)
        images, labels = trainer.data.__getitems__(trainer._indices(positions))
        trainer._loss(unet, *trainer._batch(images, labels, positions)).backward()
        g = {k: p.grad.double().numpy() for k, p in unet.named_parameters()}
        norms.append(math.sqrt(sum(np.sum(x**2) for x in g.values())))
        clip = min(1.0, c.grad_clip / norms[-1])
        lr = c.lr * min(1.0, (i + 1) / c.lr_warmup)
        for k in w:
            m[k] = c.beta1 * m[k] + (1 - c.beta1) * clip * g[k]
            v[k] = c.beta2 * v[k] + (1 - c.beta2) * (clip * g[k]) ** 2
            mean, square = m[k] / (1 - c.beta1 ** (i + 1)), v[k] / (1 - c.beta2 ** (i + 1))
            w[k] = w[k] - lr * c.weight_decay * w[k] - lr * mean / (np.sqrt(square) + 1e-8)
            d = min(c.ema_decay, (1 + i) / (10 + i))
            ema[k] = w[k] if i == 0 else d * ema[k] + (1 - d) * w[k]
    return w, ema, norms


def test_steps_by_hand(tmp_path: Path) -> None:
    """The whole step (clipping, AdamW, warm-up, EMA) against float64, gradients from autograd."""
    settings = {"steps": 4, "lr": 5e-3, "lr_warmup": 3, "weight_decay": 0.1, "beta2": 0.9, "ema_decay": 0.25}
    norms = adamw_by_hand(toy_trainer(tmp_path, **settings), 4)[2]
    clip = sorted(norms)[2]  # two steps are clipped
    trainer = toy_trainer(tmp_path, grad_clip=clip, **settings)
    trainer.fit()
    w, ema, norms = adamw_by_hand(trainer, 4)
    assert min(norms) < clip < max(norms)
    start = dict(toy_unet().named_parameters())
    exact = {k for k in w if "to_k.bias" not in k}  # the softmax cancels it: its gradient is rounding
    for k, p in trainer.unet.named_parameters():
        if k not in exact:
            continue
        moved = np.abs(w[k] - start[k].detach().numpy()).max()
        assert moved > 1e-4
        assert np.abs(p.detach().numpy() - w[k]).max() < 2e-3 * moved + 1e-6, k
    for k, p in trainer.ema.named_parameters():
        if k not in exact:
            continue
        assert np.abs(p.numpy() - ema[k]).max() < 2e-3 * np.abs(ema[k] - start[k].detach().numpy()).max() + 1e-6, k
    unclipped = toy_trainer(tmp_path / "unclipped", grad_clip=math.inf, **settings)
    unclipped.fit()
    pairs = zip(unclipped.unet.parameters(), trainer.unet.parameters(), strict=True)
    difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert difference > 1e-4  # so the comparison sees clipping


def test_accumulation_changes_rounding_only(tmp_path: Path) -> None:
    whole, parts = (toy_trainer(tmp_path / str(n), accumulate=n, steps=4, log_every=1) for n in (1, 4))
    whole.fit()
    parts.fit()
    for (name, a), b in zip(weights_of(whole).items(), weights_of(parts).values(), strict=True):
        # Adam divides by the gradient's size: where a gradient is all rounding, so is the step of at most lr.
        assert float((a - b).abs().max()) < 1e-4, name
        assert float((a - b).norm()) <= 2e-3 * float(a.norm()) + 1e-6, name
    for a, b in zip(log_of(tmp_path / "1"), log_of(tmp_path / "4"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_it_learns(tmp_path: Path) -> None:
    """Two images, one of each class: the loss falls by far, and the averaged weights draw the two images."""
    pixels = np.full((2, 8, 8, 1), 30, np.uint8)
    pixels[0, 2:6, 2:6] = pixels[1, :, 4:] = 220
    data = ArrayData(Path("two"), pixels, np.arange(2), None, 1, "crop")
    unet = toy_unet(
        block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    settings = {
        "steps": 300, "batch_size": 32, "lr": 8e-3, "lr_warmup": 10, "lr_decay": "cosine", "prediction": "v_prediction",
        "ema_decay": 0.95, "log_every": 10, "save_every": 300,
    }  # fmt: skip
    trainer = toy_trainer(tmp_path, unet=unet, data=data, timesteps=100, **settings)
    trainer.fit()
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < losses[0] / 10
    samples = (
        Sampler(trainer.ema, trainer.schedule, prediction="v_prediction").sample(16, steps=20, labels=[0, 1] * 8).images
    )
    wanted = torch.from_numpy(pixels[:, :, :, 0] / 127.5 - 1.0).float()
    error = (samples[:, 0] - wanted.repeat(8, 1, 1)).square().mean(dim=(1, 2)).sqrt()
    assert error.max() < 0.2, error  # of [-1, 1]; the two images are 1.1 apart


# Sampling and random state --------------------------------------------------------------------------------------------


def test_grids_do_not_disturb_training(tmp_path: Path) -> None:
    for every in (0, 1):
        toy_trainer(tmp_path / str(every), unet=toy_unet(dropout=0.2), steps=3, sample_every=every).fit()
    assert digests(tmp_path / "0") == digests(tmp_path / "1")
    assert log_of(tmp_path / "0") == log_of(tmp_path / "1")
    assert not (tmp_path / "0" / "samples").exists()
    grids = sorted((tmp_path / "1" / "samples").iterdir())
    assert [path.name for path in grids] == [f"step-{step:07d}.png" for step in (1, 2, 3)]
    pictures = [np.asarray(Image.open(path)) for path in grids]
    assert pictures[0].shape == (3 * 10 + 2, 8 * 10 + 2)  # three classes of eight 8x8 images, with padding
    assert not (pictures[0] == pictures[2]).all()


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    toy_trainer(tmp_path, unet=toy_unet(dropout=0.2), steps=2, sample_every=1).fit()
    assert torch.equal(torch.rand(3), expected)


def test_the_callers_random_state_does_not_matter(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        toy_trainer(tmp_path / str(seed), unet=toy_unet(dropout=0.2), steps=2).fit()
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


# Resuming -------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {"hflip": True},
    "dropout": {"dropout": 0.2, "accumulate": 2},
    "bf16": {"dropout": 0.1, "precision": "bf16"},
}


def variant(out: Path | str, name: str, **settings: Any) -> Trainer:
    """Two resolutions and attention; log and checkpoints at steps that do not fall together."""
    options = {"save_every": 3, "log_every": 4} | VARIANTS[name] | settings
    unet = toy_unet(
        dropout=options.pop("dropout", 0.0),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return toy_trainer(out, unet=unet, **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_in_process(tmp_path: Path, name: str) -> None:
    variant(tmp_path / "a", name, steps=10).fit()
    for steps in (3, 5, 10):
        trainer = variant(tmp_path / "b", name, steps=steps)
        trainer.fit()
        assert trainer.step == steps
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [line["step"] for line in log_of(tmp_path / "a")] == [4, 8, 10]
    assert [line["step"] for line in log_of(tmp_path / "b")] == [3, 4, 5, 8, 10]  # 3 and 5 ended their parts
    assert log_of(tmp_path / "a")[-1] == log_of(tmp_path / "b")[-1]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=3).fit()
    before = digests(tmp_path), log_of(tmp_path)
    shutil.rmtree(tmp_path / "model")
    toy_trainer(tmp_path, steps=3).fit()
    assert (digests(tmp_path), log_of(tmp_path)) == before


def test_restored_moments_lie_in_memory_as_their_parameters(tmp_path: Path) -> None:
    """Fused AdamW does not look at strides: moments in another layout would be those of other weights."""
    variant(tmp_path, "plain", steps=3).fit()
    trainer = variant(tmp_path, "plain", steps=3)
    trainer.fit()
    strides = {p.stride() for p in trainer.unet.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1}
    assert all(stride[1] == 1 for stride in strides)  # channels last
    for p in trainer.unet.parameters():
        moments = trainer.optimizer.state[p]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
        assert moments["step"].device == p.device


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant(tmp_path / "a", "plain").fit()
    trainer = variant(tmp_path / "b", "plain")
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *x: loss(*x) if trainer.step < 5 else signal_interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [line["step"] for line in log_of(tmp_path / "b")] == [4]
    variant(tmp_path / "b", "plain").fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def signal_interrupt() -> Any:
    raise KeyboardInterrupt


# Forks runs and kills them: at random moments, and at every point of a save. Prints what it did.
KILLER = """
import json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path

import torch
import torch.utils.tensorboard  # once, not in every fork

from fastdiff import files
from fastdiff.training import resume as state
from tests.training.test_trainer import variant

out, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = {"steps": 8, "save_every": 1 + seed % 2, "log_every": 3}
POINTS = ("half", "written", "replace", "replaced")


def die_in_save(point, count):
    "Kill this process at a point of its count-th checkpoint."
    left = [count]

    def at(here, path):
        if here == point and "checkpoint" in str(path):
            left[0] -= 1
            if left[0] == 0:
                if point == "half":  # as safetensors leaves it: a temporary file of its own
                    os.truncate(path, os.path.getsize(path) // 2)
                    os.rename(path, path.parent / ".tmpAbC123")
                os.kill(os.getpid(), signal.SIGKILL)

    save_file, replace = state.save_file, os.replace

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        at("half", path)
        at("written", path)

    def rename(source, destination):
        at("replace", destination)
        replace(source, destination)
        at("replaced", destination)

    state.save_file, files.os.replace = save, rename


def run(folder, before=lambda: None):
    pid = os.fork()
    if pid:
        return pid
    try:
        before()
        variant(folder, name, **settings).fit()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(pid, within=None):
    "Wait for a run; kill it when its time is over."
    end = None if within is None else time.monotonic() + within
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


started = time.monotonic()
assert finished(run(out / "a")) == 0
usual = time.monotonic() - started

rng = random.Random(seed)
report = {"in_saves": 0, "random": 0, "leftovers": 0}
for point in POINTS:
    code = finished(run(out / "b", lambda: die_in_save(point, rng.randint(1, 2))))
    report["in_saves"] += code == -signal.SIGKILL
    report["leftovers"] += bool(list((out / "b").glob(".*")))
    # Steps may have run out before a late point: then the run has ended well.
    assert code in (0, -signal.SIGKILL), code
for _ in range(4):
    code = finished(run(out / "b"), within=rng.uniform(0.1, 0.9) * usual)
    report["random"] += code == -signal.SIGKILL
    assert code in (0, -signal.SIGKILL), code
assert finished(run(out / "b")) == 0
report["hidden"] = [path.name for path in (out / "b").rglob(".*")]
print(json.dumps(report))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("name", "seed"), [("plain", 1), ("dropout", 2), ("bf16", 3)])
def test_killed_and_resumed(tmp_path: Path, name: str, seed: int) -> None:
    report = answer_of(python("-c", KILLER, tmp_path, name, str(seed)))
    print(f"seed {seed}: {report}")
    assert report["in_saves"] >= 3
    assert report["leftovers"] >= 2  # the kills did strike in the middle of saves
    assert report["hidden"] == []  # and what they left was removed
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [line["step"] for line in log_of(tmp_path / "b")] == [3, 6, 8]


def test_the_log_survives_a_torn_line(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=4).fit()
    before = log_of(tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "loss": 1.0}\n5\n\xff\x00\n{"step": 5, "lo')
    toy_trainer(tmp_path, steps=6).fit()
    assert log_of(tmp_path)[:2] == before
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6]
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)


CHANGES: dict[str, dict[str, Any]] = {
    "train.seed": {"seed": 1},
    "train.batch_size": {"batch_size": 16},
    "train.lr": {"lr": 2e-3},
    "train.prediction": {"prediction": "sample"},
    "train.precision": {"precision": "bf16"},
    "unet": {"unet": {"layers_per_block": 2}},
    "scheduler": {"timesteps": 21},
    "data": {"data": {"n": 11}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_settings_are_refused(tmp_path: Path, what: str) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    files = snapshot(tmp_path)
    change = dict(CHANGES[what])
    unet, data = toy_unet(**change.pop("unet", {})), Toys(**change.pop("data", {}))
    trainer = toy_trainer(tmp_path, unet=unet, data=data, **change)
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match=rf"checkpoint\.safetensors was written with other settings \(.*{what}"):
        trainer.fit()
    assert snapshot(tmp_path) == files
    assert trainer.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(trainer).values(), strict=True))


def test_another_number_of_processes_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    rewrite(tmp_path / "checkpoint.safetensors", lambda tensors, info: info.update(world_size=2))
    trainer = toy_trainer(tmp_path, steps=4)
    trainer.fit()
    assert trainer.step == 4
    assert "1 processes instead of 2" in caplog.text


def test_checkpoints_without_newer_metadata_resume(tmp_path: Path) -> None:
    """The format of the first release: no losses since the log's last line."""
    toy_trainer(tmp_path / "a", steps=6).fit()
    toy_trainer(tmp_path / "b", steps=4).fit()
    rewrite(tmp_path / "b" / "checkpoint.safetensors", lambda tensors, info: info.pop("losses"))
    toy_trainer(tmp_path / "b", steps=6).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def damage(change: Change) -> Callable[[Path], None]:
    return lambda path: rewrite(path, change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "truncated"),
    "header only": (lambda path: os.truncate(path, 100), "truncated"),
    "empty": (lambda path: os.truncate(path, 0), "too short"),
    "noise": (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"no JSON at all, bytes"), "damaged"),
    "tensor missing": (
        damage(lambda tensors, _: tensors.pop("optimizer.exp_avg.conv_in.weight")),
        "1 tensors",
    ),
    "wrong shape": (damage(lambda tensors, _: tensors.update({"ema.conv_in.bias": torch.zeros(9)})), "1 tensors"),
    "no step": (damage(lambda _, info: info.pop("step")), "lacks step"),
    "strange step": (damage(lambda _, info: info.update(step="x")), "metadata cannot be read"),
    "weights only": (damage(lambda _, info: info.update(kind="model")), "not a training checkpoint"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path: Path, what: str) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    harm, message = DAMAGES[what]
    harm(tmp_path / "checkpoint.safetensors")
    files = snapshot(tmp_path)
    trainer = toy_trainer(tmp_path, steps=4)
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}.checkpoint\.safetensors.*{message}"):
        trainer.fit()
    assert snapshot(tmp_path) == files
    assert trainer.step == 0
    assert not any(trainer.optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(trainer).values(), strict=True))


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "a", steps=2).fit()
    toy_trainer(tmp_path / "b", steps=2).save()
    toy_trainer(tmp_path / "b", steps=2).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_checkpoints_are_as_readable_as_other_files(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}
    assert modes["checkpoint.safetensors"] == modes["log.jsonl"]


def test_sampling_from_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, steps=3, prediction="v_prediction")
    trainer.fit()
    expected = Sampler(trainer.ema, trainer.schedule, prediction="v_prediction").sample(2, steps=3, labels=1).images
    for model in (tmp_path / "checkpoint.safetensors", tmp_path / "model"):
        images = Sampler.from_pretrained(model, device="cpu").sample(2, steps=3, labels=1, spacing="trailing").images
        assert (images - expected).abs().max() < 1e-5


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_loss_that_stops_being_finite_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at the fifth step: the checkpoint of the fourth is kept, and a sound run takes it up."""
    toy_trainer(tmp_path / "a", log_every=1).fit()
    for value in (math.nan, math.inf, -math.inf):
        out = tmp_path / str(value)
        trainer = toy_trainer(out, log_every=1)
        loss = trainer._loss
        monkeypatch.setattr(trainer, "_loss", lambda *x, t=trainer, f=loss, v=value: f(*x) * (v if t.step == 4 else 1))
        before = {}
        update = trainer.optimizer.step
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda f=update, t=trainer, b=before: (f(), b.update(weights_of(t)))
        )
        with pytest.raises(TrainingError, match=r"the loss became -?(nan|inf) at step 5; .*checkpoint\.safetensors"):
            trainer.fit()
        assert trainer.step == 4
        assert all(torch.isfinite(x).all() for x in weights_of(trainer).values())
        assert torch.equal(weights_of(trainer)["model.conv_in.weight"], before["model.conv_in.weight"])
        toy_trainer(out, log_every=1).fit()
        assert digests(out) == digests(tmp_path / "a")
        assert log_of(out) == log_of(tmp_path / "a")


def test_a_learning_rate_that_is_too_large(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, lr=1e30, lr_warmup=0, save_every=1)
    with pytest.raises(TrainingError, match=r"(loss|gradient's norm) became (nan|inf) at step 2; .*lower lr"):
        trainer.fit()
    assert trainer.step == 1
    assert Sampler.from_pretrained(tmp_path / "checkpoint.safetensors", device="cpu").info.classes == 3


def test_a_gradient_that_stops_being_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sqrt at zero: a finite loss whose gradient is not."""
    trainer = toy_trainer(tmp_path)
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *x: (lambda value: value + (value - value).sqrt())(loss(*x)))
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match="the gradient's norm became nan at step 1"):
        trainer.fit()
    assert torch.equal(before["model.conv_in.weight"], weights_of(trainer)["model.conv_in.weight"])


@pytest.mark.parametrize("what", ["unet", "ema", "moment"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, what: str) -> None:
    trainer = toy_trainer(tmp_path, steps=2)
    trainer.fit()
    files = snapshot(tmp_path)
    parameter = trainer.unet.conv_out.bias
    broken = {
        "unet": parameter,
        "ema": trainer.ema.conv_out.bias,
        "moment": trainer.optimizer.state[parameter]["exp_avg"],
    }
    with torch.no_grad():
        broken[what][0] = math.inf
    name = {"unet": "model", "ema": "ema", "moment": "optimizer.exp_avg"}[what]
    with pytest.raises(TrainingError, match=rf"{name}\.conv_out\.bias has NaN or infinite values; .*checkpoint"):
        trainer.save()
    assert snapshot(tmp_path) == files


# A disk that is full: no file may grow beyond a limit, and the checkpoint would.
FULL = """
import json, resource, sys
from pathlib import Path

from fastdiff.errors import TrainingError
from tests.training.test_trainer import toy_trainer

out = Path(sys.argv[1])
toy_trainer(out, steps=2).fit()
before = (out / "checkpoint.safetensors").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * int(sys.argv[2]) // 100, resource.RLIM_INFINITY))
message = None
try:
    toy_trainer(out, steps=6).fit()
except TrainingError as e:
    message = str(e)
same = (out / "checkpoint.safetensors").read_bytes() == before
hidden = [path.name for path in out.rglob(".*")]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
toy_trainer(out, steps=6).fit()
print(json.dumps({"message": message, "same": same, "hidden": hidden}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(("percent", "file"), [("50", "checkpoint.safetensors"), ("0", "log.jsonl")])
def test_a_full_disk(tmp_path: Path, percent: str, file: str) -> None:
    toy_trainer(tmp_path / "a", steps=6).fit()
    result = python("-c", FULL, tmp_path / "b", percent)
    report = answer_of(result)
    assert report["message"] is not None
    assert report["message"].startswith(f"{tmp_path / 'b' / file} could not be written (")
    assert "File too large" in report["message"]
    assert report["same"]
    assert report["hidden"] == []
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_no_space_left_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(tensors: Any, path: Path, metadata: Any) -> None:  # as safetensors says it
        path.write_bytes(b"some")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fastdiff.training.resume.save_file", full)
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors could not be written .*No space.*Free some space"):
        toy_trainer(tmp_path).fit()
    assert [path.name for path in tmp_path.glob("*") if path.suffix in (".safetensors", ".tmp")] == []
    assert list(tmp_path.glob(".*")) == []


def test_a_log_that_cannot_be_closed(tmp_path: Path) -> None:
    """It is an error, but does not hide what ended the run."""

    def fail() -> None:
        raise OSError("no more")

    def end(error: Exception | None) -> None:
        with TrainingLog(tmp_path, TrainConfig(), 0, [], enabled=True) as log:
            log._open.callback(fail)
            if error is not None:
                raise error

    with pytest.raises(TrainingError, match="what ended it"):
        end(TrainingError("what ended it"))
    with pytest.raises(TrainingError, match=r"log\.jsonl could not be written \(no more\)"):
        end(None)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = toy_trainer(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"file/log\.jsonl could not be written"):
        trainer.fit()
    assert trainer.step == 0


# Reports --------------------------------------------------------------------------------------------------------------


def test_the_log_says_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path, steps=5, log_every=2, lr_warmup=4)
    update, losses = trainer._update, []
    monkeypatch.setattr(trainer, "_update", lambda *x: losses.append(update(*x)) or losses[-1])
    trainer.fit()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-12)
    assert [line["lr"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3])
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        assert line["images_per_s"] > 0
        assert line["seconds"] >= 0


def test_images_per_second_leave_out_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    trainer = toy_trainer(tmp_path, steps=4, log_every=2, save_every=1)
    update, save = trainer._update, trainer.save

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*x: Any) -> Any:
            clock[0] += seconds
            return work(*x)

        return timed

    monkeypatch.setattr(trainer, "_update", takes(0.5, update))
    monkeypatch.setattr(trainer, "save", takes(100.0, save))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines] == [16.0, 16.0]
    assert [line["seconds"] for line in lines] == [101.0, 302.0]


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy_trainer(tmp_path, steps=4, sample_every=4).fit()
    toy_trainer(tmp_path, steps=6, sample_every=4).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for key in ("loss", "lr"):
        scalars = {event.step: event.value for event in events.Scalars(key)}
        assert scalars == pytest.approx({line["step"]: line[key] for line in lines})
    assert [image.step for image in events.Images("samples")] == [4, 6]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    toy_trainer(tmp_path, steps=2, sample_every=2).fit()
    assert not (tmp_path / "tensorboard").exists()
    assert len(log_of(tmp_path)) == 1


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    toy_trainer(tmp_path / "live", steps=3).fit()
    assert "3/3" in screen.getvalue()
    assert "images/s" in screen.getvalue()
    plain = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", plain)
    toy_trainer(tmp_path / "plain", steps=3).fit()
    lines = plain.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3"]  # the first, every 30 s, the last
    assert "\x1b" not in plain.getvalue()


# Several processes ----------------------------------------------------------------------------------------------------

RANKED = """
import os, sys
from tests.training.test_trainer import toy_trainer, toy_unet

out, rank = sys.argv[1], os.environ["RANK"]
toy_trainer(f"{out}/rank-{rank}", steps=4, accumulate=2, log_every=1, sample_every=4).fit()
"""


def test_two_processes_train_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    two = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path)
    assert two.returncode == 0, two.stderr
    assert not (tmp_path / "rank-1").exists()  # only rank 0 writes
    assert {path.name for path in (tmp_path / "rank-0").iterdir()} >= {"checkpoint.safetensors", "log.jsonl", "model"}

    one = toy_trainer(tmp_path / "one", steps=4, accumulate=2, log_every=1)
    one.fit()
    tensors = load_file(tmp_path / "rank-0" / "checkpoint.safetensors")
    alone = load_file(tmp_path / "one" / "checkpoint.safetensors")
    start = dict(toy_unet().named_parameters())
    for name, expected in alone.items():
        assert float((tensors[name] - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6, name
    moved = max(float((alone[f"model.{name}"] - p.detach()).abs().max()) for name, p in start.items())
    assert moved > 1e-3
    for a, b in zip(log_of(tmp_path / "rank-0"), log_of(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)

    resumed = toy_trainer(tmp_path / "rank-0", steps=6, accumulate=2, log_every=1)
    resumed.fit()
    assert "1 processes instead of 2" in caplog.text
    one = toy_trainer(tmp_path / "one", steps=6, accumulate=2, log_every=1)
    one.fit()
    for (name, a), b in zip(weights_of(resumed).items(), weights_of(one).values(), strict=True):
        assert float((a - b).norm()) <= 4e-3 * float(b.norm()) + 1e-6, name


# Bad input ------------------------------------------------------------------------------------------------------------

WHOLE, POSITIVE, SHARE = (0, -1, 1.5, "3", True, None), (0, -1.0, math.nan, "1e-4", None, True), (-0.1, 1, "0.5", None)
BAD: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "a whole number of at least 1": (("steps", "batch_size", "accumulate", "log_every", "save_every"), WHOLE),
    "a whole number of at least 0": (("lr_warmup", "sample_every"), (-1, 0.5, None)),
    "a positive number": (("lr", "grad_clip"), POSITIVE),
    "a number from 0": (("weight_decay",), (-0.1, math.inf, math.nan, "0")),
    "a number from 0 to just under 1": (("label_dropout", "beta1", "beta2", "ema_decay"), (*SHARE, 1.5, math.nan)),
    "None or a positive number": (("min_snr_gamma",), (0, -5, math.inf, math.nan, "5")),
    "'epsilon' or 'sample' or 'v_prediction'": (("prediction",), ("v", None)),
    "'none', 'cosine' or 'linear'": (("lr_decay",), ("exp", None)),
    "'fp32' or 'bf16'": (("precision",), ("fp16", torch.bfloat16)),
    "True or False": (("hflip", "compile"), ("yes", 1, None)),
}
BAD_SETTINGS = [(key, value, allowed) for allowed, (keys, values) in BAD.items() for key in keys for value in values]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_SETTINGS)
def test_bad_settings(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        TrainConfig(**{key: value})
    assert str(error.value).startswith(f"{key}={value!r}: {allowed}")


@pytest.mark.parametrize("seed", [-1, 1 << 64, 0.5, "1", None])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(InvalidArgument, match="seed must be an integer from 0"):
        TrainConfig(seed=seed)


def test_a_batch_must_divide() -> None:
    with pytest.raises(InvalidArgument, match="batch_size=10: a multiple of accumulate=4 is needed"):
        TrainConfig(batch_size=10, accumulate=4)


class Nothing(Toys):
    def __len__(self) -> int:
        return 0


LEVELS = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
MISFITS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], str]] = {
    "channels": ({}, {"channels": 3}, {}, "the images have 3 channels, the U-Net takes 1"),
    "out_channels": ({"out_channels": 2}, {}, {}, "out_channels=2: training needs out_channels=1"),
    "height": (LEVELS, {"size": (7, 8)}, {}, "images of 7x8: both must be multiples of the U-Net's stride 2"),
    "width": (LEVELS, {"size": (8, 7)}, {}, "images of 8x7: both must be multiples"),
    "classes": ({}, {"classes": 5}, {}, "the U-Net takes 3 classes, the data has 5"),
    "no labels": ({}, {"classes": None}, {}, "the U-Net takes 3 classes, the data has no labels"),
    "embedding": ({"class_embed_type": "timestep", "null_label": None}, {}, {}, "class_embed_type='timestep' cannot"),
    "no images": ({}, None, {}, "the data holds no images"),
    "pictures": (
        {"in_channels": 2, "out_channels": 2},
        {"channels": 2},
        {"sample_every": 5},
        "sample_every=5: images of 2 channels",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_data_and_network_must_fit(tmp_path: Path, what: str) -> None:
    network, images, settings, message = MISFITS[what]
    unet = toy_unet(**network)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    data = Nothing() if images is None else Toys(**images)
    with pytest.raises(InvalidArgument) as error:
        toy_trainer(tmp_path / "out", unet=unet, data=data, **settings)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_a_batch_must_divide_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidArgument, match=r"batch_size=8 must be a multiple of processes x accumulate = 3 x 1"):
        toy_trainer(tmp_path)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu:x"])
def test_devices_that_are_not_there(tmp_path: Path, device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"device='{device}' cannot be used"):
        Trainer(toy_unet(), Toys(), tmp_path, device=device)


def test_grids_that_cannot_be_are_refused_at_once(tmp_path: Path) -> None:
    """The noise says nothing about the image at zero SNR, where sampling starts."""
    schedule = NoiseSchedule("linear", 30, rescale_zero_terminal_snr=True)
    with pytest.raises(InvalidArgument, match="zero SNR"):
        Trainer(toy_unet(), Toys(), tmp_path, TrainConfig(sample_every=5), schedule, device="cpu")


def test_data_of_another_kind_trains_an_unconditional_network(tmp_path: Path) -> None:
    unet = toy_unet(num_class_embeds=None, null_label=None)
    toy_trainer(tmp_path, unet=unet, data=Toys(size=(8, 6), classes=None), steps=2, sample_every=2).fit()
    assert Image.open(tmp_path / "samples" / "step-0000002.png").size == (8 * 8 + 2, 8 * 10 + 2)


def test_half_precision_networks_are_trained_in_float32(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, unet=toy_unet().bfloat16(), steps=1)
    trainer.fit()
    assert {x.dtype for x in weights_of(trainer).values()} == {torch.float32}


# Command line ---------------------------------------------------------------------------------------------------------

SMALL = (
    "--size", "8", "--channels", "8", "--groups", "4", "--layers", "1", "--attention", "", "--timesteps", "20",
    "--steps", "4", "--batch-size", "4", "--lr-warmup", "1", "--log-every", "1", "--save-every", "2",
    "--sample-every", "2",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes; colour, gray, 16-bit and transparent images; files that are no use."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "cats" / f"colour{i}.png")
    Image.fromarray(rng.integers(0, 256, (12, 10), dtype=np.uint8)).save(folder / "cats" / "gray.png")
    Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16)).save(folder / "dogs" / "deep.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)).save(folder / "dogs" / "clear.png")
    Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)).save(folder / "dogs" / "small.png")
    (folder / "dogs" / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    torn = (folder / "cats" / "colour0.png").read_bytes()
    (folder / "cats" / "torn.png").write_bytes(torn[: len(torn) * 2 // 3])
    return folder


def test_command_line(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    result = python("-m", "fastdiff", "train", photos, "--out", out, *SMALL, "--json")
    answer = answer_of(result)
    assert len(result.stdout.splitlines()) == 1
    assert answer["model"] == str(out / "model")
    assert answer["step"] == 4
    assert "Traceback" not in result.stderr
    for name in ("small.png", "noise.png", "torn.png"):
        assert name in result.stderr, name
    for name in ("colour0", "gray", "deep", "clear"):
        assert name not in result.stderr
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(out / "samples" / "step-0000004.png").size == (8 * 10 + 2, 2 * 10 + 2)

    from diffusers import DDPMPipeline

    unet = UNet.from_pretrained(out / "model")
    assert unet.config.num_classes == 2
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), torch.tensor([0, 2])
    pipeline = DDPMPipeline.from_pretrained(out / "model")
    assert pipeline.scheduler.config.num_train_timesteps == 20
    with torch.no_grad():
        theirs = pipeline.unet(x, t, class_labels=labels).sample
        assert (unet(x, t, labels) - theirs).abs().max() < 1e-5
    ema = UNet.from_pretrained(out / "checkpoint.safetensors").state_dict()
    assert all(torch.equal(ema[k], v) for k, v in unet.state_dict().items())


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Exit code and standard error of the command line, run here."""
    monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    code = leaving.value.code
    assert code is None or isinstance(code, int)
    return code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "0"), "error: lr=0.0: a positive number is needed"),
        (("--prediction", "noise"), "error: prediction='noise': 'epsilon' or"),
        (("--batch-size", "6", "--accumulate", "4"), "error: batch_size=6: a multiple of accumulate=4"),
        (("--size", "8by8"), "error: --size 8by8: a number"),
        (("--size", "7", "--channels", "8,8"), "error: images of 7x7: both must be multiples of the U-Net's stride 2"),
        (("--attention", "3"), "error: --attention 3: the feature maps are 8 high"),
        (("--device", "abacus"), "error: device='abacus' cannot be used"),
        (("--groups", "3"), "error: block_out_channels[0]=8 is not divisible by norm_num_groups=3"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_command_line_errors(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    code, errors = command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL, *arguments)
    assert code == 2
    assert errors.splitlines()[-1].startswith(message)
    assert errors.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_command_line_without_data(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for data in ("empty", "nowhere"):
        code, errors = command(capsys, monkeypatch, "train", tmp_path / data, "--out", tmp_path / "out", *SMALL)
        assert code == 2
        assert errors.startswith("error: ")
        assert str(tmp_path / data) in errors
        assert len(errors.splitlines()) == 1


def test_command_line_resumes(tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("train", photos, "--out", tmp_path / "out", *SMALL, "--lr-decay", "none")
    for steps in ("2", "4"):
        command_code, _ = command(capsys, monkeypatch, *line, "--steps", steps)
        assert command_code == 0
    code, errors = command(capsys, monkeypatch, *line, "--seed", "1")
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'out' / 'checkpoint.safetensors'} was written with")
    assert "train.seed" in errors
    command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "whole", *SMALL, "--lr-decay", "none")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_unreadable_data_ends_training_with_its_name(tmp_path: Path) -> None:
    """An error of the reading thread reaches the caller."""

    class Broken(Toys):
        def __getitems__(self, indices: Any) -> Any:
            raise DataError("toys/7.png: cannot be read")

    with pytest.raises(DataError, match=r"toys/7\.png"):
        toy_trainer(tmp_path, data=Broken()).fit()


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)
def test_compiled(tmp_path: Path) -> None:
    plain, compiled = (toy_trainer(tmp_path / str(c), compile=c, steps=4, save_every=2) for c in (False, True))
    plain.fit()
    compiled.fit()
    for (name, a), b in zip(weights_of(plain).items(), weights_of(compiled).values(), strict=True):
        assert float((a - b).norm()) <= 5e-3 * float(a.norm()) + 1e-6, name
    UNet.from_pretrained(tmp_path / "True" / "model")
    resumed = toy_trainer(tmp_path / "True", compile=False, steps=6)
    resumed.fit()
    assert resumed.step == 6
