"""The trainer against Ho et al.'s algorithm 1: what a step draws, its loss, its update, and its use of random state."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.core.noise import INITIAL, normal
from fastdiff.sampler import Sampler
from fastdiff.schedule import PREDICTIONS
from fastdiff.training import ArrayData, TrainConfig, Trainer
from fastdiff.unet import UNet
from tests.training.toys import (
    Toys,
    digests,
    log_of,
    toy_trainer,
    toy_unet,
    weights_of,
)

# The draws of a step --------------------------------------------------------------------------------------------------


def drawn(trainer: Trainer, n: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Call ``_batch`` for n positions, all with the same image and label 1."""
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
    """With equal seeds, position 0 in training and image 0 in sampling get different noise."""
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
    """A network simple enough to be written in NumPy: 0.3 x + 0.02 t - 0.1 label."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        label = torch.zeros_like(t) if labels is None else labels
        return 0.3 * x + (0.02 * t - 0.1 * label)[:, None, None, None]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss(tmp_path: Path, prediction: str, gamma: float | None) -> None:
    """The loss is equation 14 with the weights of Hang et al., computed here in float64 from the images."""
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
        out = 0.3 * (a * x + s * z) + 0.02 * int(t[i]) - 0.1 * int(dropped[i])
        wanted = {"epsilon": z, "sample": x, "v_prediction": a * z - s * x}[prediction]
        snr = abar[t[i]] / (1 - abar[t[i]])
        clipped = snr if gamma is None else min(snr, gamma)
        weight = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[prediction]
        total += (1.0 if gamma is None else weight) * np.mean((wanted - out) ** 2)
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
    """ema <- d ema + (1 - d) w, d = min(decay, (1 + i) / (10 + i)); the first update copies the weights."""
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
    """Compute weights, averages and gradient norms after some steps: Loshchilov & Hutter 2019, algorithm 2, float64."""
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
    """Compare whole steps (clipping, AdamW, warm-up, EMA) with float64, with gradients from autograd."""
    settings = {"steps": 4, "lr": 5e-3, "lr_warmup": 3, "weight_decay": 0.1, "beta2": 0.9, "ema_decay": 0.25}
    norms = adamw_by_hand(toy_trainer(tmp_path, **settings), 4)[2]
    clip = sorted(norms)[2]  # two steps are clipped
    trainer = toy_trainer(tmp_path, grad_clip=clip, **settings)
    trainer.fit()
    w, ema, norms = adamw_by_hand(trainer, 4)
    assert min(norms) < clip < max(norms)
    start = dict(toy_unet().named_parameters())
    exact = {k for k in w if "to_k.bias" not in k}  # the softmax cancels it, so that its gradient is rounding alone
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
    assert difference > 1e-4  # so clipping makes a difference that the comparison would detect


def test_accumulation_changes_rounding_only(tmp_path: Path) -> None:
    whole, parts = (toy_trainer(tmp_path / str(n), accumulate=n, steps=4, log_every=1) for n in (1, 4))
    whole.fit()
    parts.fit()
    for (name, a), b in zip(weights_of(whole).items(), weights_of(parts).values(), strict=True):
        # Adam divides by the gradient's size, so a gradient that is rounding alone still gives a step of up to lr.
        assert float((a - b).abs().max()) < 1e-4, name
        assert float((a - b).norm()) <= 2e-3 * float(a.norm()) + 1e-6, name
    for a, b in zip(log_of(tmp_path / "1"), log_of(tmp_path / "4"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_it_learns(tmp_path: Path) -> None:
    """On two images, one of each class, the loss falls by far, and the averaged weights reproduce both images."""
    pixels = np.full((2, 8, 8, 1), 30, np.uint8)
    pixels[0, 2:6, 2:6] = pixels[1, :, 4:] = 220
    data = ArrayData(Path("two"), pixels, np.arange(2), None, 1, "crop")
    unet = toy_unet(
        block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    settings = {
        "steps": 120, "batch_size": 32, "lr": 1.2e-2, "lr_warmup": 10, "lr_decay": "cosine",
        "prediction": "v_prediction", "ema_decay": 0.95, "log_every": 10, "save_every": 120,
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
