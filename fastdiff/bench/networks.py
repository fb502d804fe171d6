"""Networks to measure: models with their weights, and published configurations with random weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastdiff import checkpoints
from fastdiff.errors import CheckpointError
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.walk import Schedule
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig

Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network to measure, and the settings of its training."""

    unet: UNet | UNetCondition
    schedule: Schedule | None
    prediction: str | None
    scheduler_config: dict[str, Any]
    path: Path


# The networks of google/ddpm-cifar10-32 and google/ddpm-celebahq-256, from their config.json on the hub.
PUBLISHED = {
    "ddpm-cifar10-32": UNetConfig.like(
        "ho",
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "ddpm-celebahq-256": UNetConfig.like(
        "ho",
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    ),
}
# The network of Stable Diffusion 1.5, likewise, for images of 512 and of 256 pixels.
STABLE_DIFFUSION = UNetConditionConfig(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
)
READING_TEXT = {"sd15": STABLE_DIFFUSION, "sd15-256": dataclasses.replace(STABLE_DIFFUSION, sample_size=32)}


def load(model: str) -> Model:
    """Load a model by name or path, or build a network of a published configuration with random weights."""
    if model in PUBLISHED and not Path(model).exists():
        return Model(random_unet(PUBLISHED[model]), NoiseSchedule(), "epsilon", {}, Path(model))
    if model in READING_TEXT and not Path(model).exists():
        process = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012)
        return Model(random_condition(READING_TEXT[model]), process, "epsilon", {"clip_sample": False}, Path(model))
    try:
        found = checkpoints.load_text(model) or checkpoints.load(model)
        return Model(found.unet, found.schedule, found.prediction, found.scheduler_config, found.path)
    except CheckpointError as e:
        if Path(model).exists():
            raise
        raise CheckpointError(f"{e}; with random weights: {', '.join([*PUBLISHED, *READING_TEXT])}") from e


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """Build a network with random weights, in evaluation mode."""
    with torch.device("meta"):  # initialising a large network twice would take seconds
        unet = UNet(config)
    return randomize_(unet, seed).eval()


def random_condition(config: UNetConditionConfig, seed: int = 0) -> UNetCondition:
    """Build a text-conditioned network with random weights, in evaluation mode."""
    with torch.device("meta"):
        unet = UNetCondition(config)
    return randomize_(unet, seed).eval()


def randomize_(module: Module, seed: int = 0) -> Module:
    """Set random weights, none of them zero, scaled so that activations keep their size and every path contributes.

    A module on the meta device is allocated on the CPU. PyTorch's global random state is not touched.
    """
    if any(p.is_meta for p in module.parameters()):
        module = module.to_empty(device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            z = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            if parameter.ndim == 1 and name.endswith("weight"):  # the weight of a norm
                z = 1 + 0.2 * z
            elif parameter.ndim == 1:
                z = 0.2 * z
            elif "embedding.weight" not in name:
                z = z / math.sqrt(parameter[0].numel())
            parameter.copy_(z.masked_fill_(z == 0, 0.1))
    return module
