"""Small networks, data and runs that the tests of training share, and that their child processes import."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.schedule import NoiseSchedule
from fastdiff.training import ArrayData, TrainConfig, Trainer
from fastdiff.unet import UNet, UNetConfig
from tests.support import warm
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
    """Images of random bytes, with labels 0, 1, 2, 0, .."""

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
    """Copy all tensors that a step changes, in one memory layout."""
    state = {f"model.{k}": v for k, v in trainer.unet.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    for name, parameter in trainer.unet.named_parameters():
        state |= {f"{moment}.{name}": v for moment, v in trainer.optimizer.state[parameter].items()}
    return {k: v.detach().clone().contiguous() for k, v in state.items()}


def digests(out: Path | str) -> dict[str, str]:
    """Compute the SHA-256 of every tensor of the checkpoint, and of every file of the exported model."""
    tensors = load_file(Path(out) / "checkpoint.safetensors")
    found = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in tensors.items()}
    files = sorted(path for path in (Path(out) / "model").rglob("*") if path.is_file())
    return found | {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def log_of(out: Path | str) -> list[dict[str, float]]:
    """Read log.jsonl, without the values that depend on the clock."""
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
    """Run another Python; it has one thread, as its bits are compared."""
    if not environment:
        return warm.run(*arguments, timeout=timeout)
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
    """Read the JSON on the last line of a process, which must have succeeded."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


VARIANTS = {
    "plain": {"hflip": True},
    "dropout": {"dropout": 0.2, "accumulate": 2},
    "bf16": {"dropout": 0.1, "precision": "bf16"},
}


def variant(out: Path | str, name: str, **settings: Any) -> Trainer:
    """Make a trainer of a network with two resolutions and attention, which logs and saves at different steps."""
    options = {"save_every": 3, "log_every": 4} | VARIANTS[name] | settings
    unet = toy_unet(
        dropout=options.pop("dropout", 0.0),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return toy_trainer(out, unet=unet, **options)
