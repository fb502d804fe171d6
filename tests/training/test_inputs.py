"""Settings, data, networks and devices that do not fit are refused before training starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdiff.errors import DataError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.training import TrainConfig, Trainer
from tests.training.toys import (
    Toys,
    toy_trainer,
    toy_unet,
    weights_of,
)

WHOLE, POSITIVE, SHARE = (0, -1, 1.5, "3", True, None), (0, -1.0, math.nan, "1e-4", None, True), (-0.1, 1, "0.5", None)
BAD: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "a whole number from 1 to 2**62": (("steps", "batch_size", "accumulate", "log_every", "save_every"), WHOLE),
    "a whole number from 0 to 2**62": (("lr_warmup", "sample_every"), (-1, 0.5, None)),
    "a positive number": (("lr", "grad_clip"), POSITIVE),
    "a number from 0": (("weight_decay",), (-0.1, math.inf, math.nan, "0")),
    "a number from 0 to just under 1": (("label_dropout", "beta1", "beta2", "ema_decay"), (*SHARE, 1.5, math.nan)),
    "None or a positive number": (("min_snr_gamma",), (0, -5, math.inf, math.nan, "5")),
    "'epsilon', 'sample', 'v_prediction' or 'flow_prediction'": (("prediction",), ("v", None)),
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
    """An epsilon network cannot start to sample at zero SNR, where the noise determines nothing about the image."""
    schedule = NoiseSchedule("linear", 30, rescale_zero_terminal_snr=True)
    with pytest.raises(InvalidArgument, match="zero SNR"):
        Trainer(toy_unet(), Toys(), tmp_path, TrainConfig(sample_every=5), schedule, device="cpu")


def test_data_of_another_kind_trains_an_unconditional_network(tmp_path: Path) -> None:
    unet = toy_unet(num_class_embeds=None, null_label=None)
    toy_trainer(tmp_path, unet=unet, data=Toys(size=(8, 6), classes=None), steps=2, sample_every=2).fit()
    assert Image.open(tmp_path / "samples" / "step-0000002.png").size == (8 * 8 + 2, 8 * 10 + 2)


class Custom(Toys):
    """A caller's own data set, whose batches are changed."""

    def __init__(self, change: Any):
        super().__init__()
        self.change = change

    def __getitems__(self, indices: Any) -> Any:
        return self.change(*super().__getitems__(indices))


WRONG: dict[str, tuple[Any, str]] = {
    "floats": (lambda x, y: (x / 255, y), r"images torch\.float32 \[8, 1, 8, 8\]; uint8 \[8, 1, 8, 8\], from 0 to 255"),
    "int16": (lambda x, y: (x.short(), y), r"images torch\.int16"),
    "NHWC": (lambda x, y: (x.permute(0, 2, 3, 1), y), r"images torch\.uint8 \[8, 8, 8, 1\]; uint8 \[8, 1, 8, 8\]"),
    "fewer": (lambda x, y: (x[1:], y[1:]), r"images torch\.uint8 \[7, 1, 8, 8\]"),
    "arrays": (lambda x, y: (x.numpy(), y), "images ndarray"),
    "no labels": (lambda x, y: (x, None), r"labels NoneType; int64 \[8\]"),
    "one-hot": (lambda x, y: (x, torch.nn.functional.one_hot(y, 3)), r"labels torch\.int64 \[8, 3\]"),
    "float labels": (lambda x, y: (x, y.float()), r"labels torch\.float32"),
    "null labels": (lambda x, y: (x, y + 1), "labels from 1 to 3; the U-Net takes 0 to 2"),
    "negative": (lambda x, y: (x, y - 1), "labels from -1 to 1; the U-Net takes 0 to 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_batches_of_a_callers_data_are_checked(tmp_path: Path, what: str) -> None:
    change, message = WRONG[what]
    trainer = toy_trainer(tmp_path, data=Custom(change))
    with pytest.raises(DataError, match=message):
        trainer.fit()
    assert trainer.step == 0


def test_half_precision_networks_are_trained_in_float32(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, unet=toy_unet().bfloat16(), steps=1)
    trainer.fit()
    assert {x.dtype for x in weights_of(trainer).values()} == {torch.float32}


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("WORLD_SIZE", "-1"), ("RANK", "1" * 5000)])
def test_numbers_of_launchers_are_checked(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match=f"^{name}=.{{1,200}} in the environment: a whole number is needed$"):
        Trainer(toy_unet(), Toys(), tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["unet", "data", "config", "schedule", "out"])
def test_arguments_of_another_type_are_named(tmp_path, name):
    arguments = {"unet": toy_unet(), "data": Toys(), "out": tmp_path, "device": "cpu", name: torch.nn.Linear(2, 2)}
    with pytest.raises(InvalidArgument, match=f"^{name}=Linear"):
        Trainer(**arguments)
