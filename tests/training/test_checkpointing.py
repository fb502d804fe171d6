"""Gradient checkpointing: the same training, bit for bit, in less memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.training import Trainer
from fastdiff.unet import UNet, UNetConfig
from tests.support.unets import TINY, random_unet
from tests.training.toys import TOY, log_of, python, toy_trainer, toy_unet, weights_of

ATTENTION = dataclasses.replace(
    TOY,
    block_out_channels=(8, 16),
    down_block_types=("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D"),
)


def trained(out: Path, config: UNetConfig, **settings: Any) -> Trainer:
    torch.manual_seed(1)
    trainer = toy_trainer(out, unet=UNet(config), **settings)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"dropout": 0.3}, {}),
        ({}, {"precision": "bf16"}),
        ({"resnet_time_scale_shift": "scale_shift"}, {"accumulate": 2}),
    ],
    ids=["plain", "dropout", "bf16", "scale_shift, accumulate"],
)
def test_the_same_bits(tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    config = dataclasses.replace(ATTENTION, **changes)
    plain = trained(tmp_path / "plain", config, **settings)
    less = trained(tmp_path / "less", config, gradient_checkpointing=True, **settings)
    assert [line["loss"] for line in log_of(tmp_path / "less")] == [line["loss"] for line in log_of(tmp_path / "plain")]
    ours, theirs = weights_of(less), weights_of(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_blocks_keep_their_inputs_alone() -> None:
    """Count the bytes that the graph keeps outside of blocks: within them nothing is kept."""
    unet = random_unet(TINY).train().requires_grad_(True)
    x, t = torch.randn(2, TINY.in_channels, 8, 8), torch.tensor([3, 7])

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(x, t).sum().backward()
        own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    everything = kept()
    with unet.gradient_checkpointing():
        assert kept() < 0.5 * everything
    assert kept() == everything


def test_the_network_is_as_it_was_afterwards() -> None:
    unet = toy_unet()

    def fail() -> None:
        with unet.gradient_checkpointing():
            assert any(vars(m).get("recompute") for m in unet.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any("recompute" in vars(m) for m in unet.modules())


def test_a_run_goes_on_with_and_without(tmp_path: Path) -> None:
    """It changes no result, so that a run may be resumed with the other setting."""
    for out, second in (("a", True), ("b", False)):
        toy_trainer(tmp_path / out, steps=4).fit()
        toy_trainer(tmp_path / out, steps=6, gradient_checkpointing=second).fit()
    a, b = (json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[-1])["loss"] for out in ("a", "b"))
    assert a == b


MEASURE = """
import sys, torch
from fastdiff.unet import UNet, UNetConfig
torch.set_num_threads(1)
unet = UNet(UNetConfig(sample_size=32, block_out_channels=(64, 64), layers_per_block=2, norm_num_groups=8,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, in_channels=3, out_channels=3)).train()
import contextlib
x, t = torch.randn(48, 3, 32, 32), torch.arange(48)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
with unet.gradient_checkpointing() if sys.argv[1] == "less" else contextlib.nullcontext():
    unet(x, t).square().mean().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_the_memory_of_a_process(tmp_path: Path) -> None:
    """An update of 48 images of 32x32 with 64 channels took 764 MiB, and 479 with gradient checkpointing."""
    (tmp_path / "measure.py").write_text(MEASURE)
    returned = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # to the system, when it is free

    plain, less = (int(python(tmp_path / "measure.py", kind, **returned).stdout) for kind in ("plain", "less"))
    print(f"{plain / 1024:.0f} MiB, {less / 1024:.0f} MiB with gradient checkpointing")
    assert less < 0.75 * plain


@pytest.mark.slow  # two processes
def test_the_option_of_the_command(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    options = (
        "--channels",
        "8",
        "--groups",
        "4",
        "--layers",
        "1",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--sample-every",
        "0",
    )
    for out, more in (("a", ()), ("b", ("--gradient-checkpointing",))):
        result = python("-m", "fastdiff", "train", tmp_path / "photos", "--out", tmp_path / out, *options, *more)
        assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in log_of(tmp_path / "a")] == [line["loss"] for line in log_of(tmp_path / "b")]
