"""Networks that many tests use, and their diffusers twins."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from fastdiff.unet import UNet, UNetConfig

Module = TypeVar("Module", bound=nn.Module)

# The two published configurations that users know.
_PUBLISHED = UNetConfig(
    attention_head_dim=None, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1
)
PUBLISHED = {
    "ddpm-cifar10-32": dataclasses.replace(
        _PUBLISHED,
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "ddpm-celebahq-256": dataclasses.replace(
        _PUBLISHED,
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    ),
}

# Every kind of block in two levels; a few thousand parameters, milliseconds an evaluation.
TINY = UNetConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=8,
    norm_num_groups=4,
)
TINY_CLASSES = dataclasses.replace(TINY, num_class_embeds=5, null_label=4)


def randomize_(module: Module, seed: int = 0) -> Module:
    """Random weights, none of them zero, scaled so that activations keep their size and every path is heard.

    A module on the meta device is allocated on the CPU. torch's own random state is left alone.
    """
    if any(p.is_meta for p in module.parameters()):
        module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            z = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                z = 1 + 0.2 * z
            elif parameter.ndim == 1:
                z = 0.2 * z
            elif "embedding.weight" not in name:
                z = z / math.sqrt(parameter[0].numel())
            parameter.copy_(z.masked_fill_(z == 0, 0.1))
    return module


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """The network with random weights, in evaluation mode."""
    with torch.device("meta"):  # the initial weights of large networks take seconds
        unet = UNet(config)
    return randomize_(unet, seed).eval()


def diffusers_twin(unet: UNet) -> UNet2DModel:
    """diffusers' network with the configuration and the very weights (shared memory) of ``unet``."""
    with torch.device("meta"):
        twin = UNet2DModel(**unet.config.to_dict())
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()


def random_images(config: UNetConfig, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
    """Normal noise of the network's input shape."""
    if size is None:
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, config.in_channels, *size), generator=generator)


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
