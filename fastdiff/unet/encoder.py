"""The encoder of a latent diffusion model's autoencoder, which maps images to latents an eighth as large, or so.

It is the lower half of the U-Net of `fastdiff.unet.model` without a timestep and without skips. The keys of its state
dict are those of the ``encoder`` in diffusers' ``AutoencoderKL`` and ``VQModel``.

Source: Rombach et al. 2022 (arXiv:2112.10752), appendix G; Esser et al. 2021 (arXiv:2012.09841).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.modes import plain_modes
from fastdiff.unet.config import choice
from fastdiff.unet.decoder import CoderConfig, Plain, check_coder
from fastdiff.unet.model import DTYPE, Attention, Downsample, MidBlock, ResnetBlock

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderConfig(CoderConfig):
    """Configuration of an `Encoder`, with the keys and defaults of diffusers' ``AutoencoderKL``.

    With ``double_z`` it gives the mean and the logarithm of the variance of each latent, else the latents alone.
    """

    in_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    double_z: bool = True

    def __post_init__(self) -> None:
        check_coder(self, "down_block_types", DOWN_BLOCKS, "in_channels")
        choice("double_z", self.double_z, (False, True))

    @property
    def out_channels(self) -> int:
        """The channels that the encoder gives."""
        return self.latent_channels * (1 + self.double_z)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], double_z: bool = True) -> EncoderConfig:
        """Create a configuration from that of an autoencoder, whose other keys do not concern the encoder."""
        known = {f.name for f in dataclasses.fields(cls)} - {"double_z"}
        return cls(**{k: v for k, v in config.items() if k in known}, double_z=double_z)


class EncoderBlock(nn.Module):
    """``layers_per_block`` residual blocks, with attention after each in the type "Attn...", and a downsampler."""

    def __init__(self, config: EncoderConfig, kind: str, in_channels: int, out_channels: int, downsample: bool):
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(config, in_channels if j == 0 else out_channels, out_channels) for j in range(layers)
        )
        self.attentions = None
        if kind.startswith("Attn"):
            groups, eps = config.norm_num_groups, config.norm_eps
            self.attentions = nn.ModuleList(Attention(out_channels, out_channels, groups, eps) for _ in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)]) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, None)
            if self.attentions is not None:
                x = self.attentions[j](x)
        return x if self.downsamplers is None else self.downsamplers[0](x, None)


class Encoder(Plain):
    """Encoder of images [B, in_channels, H, W] to [B, out_channels, H / s, W / s], rounded down; s = 2^(levels - 1)."""

    @plain_modes()
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        self.in_channels = config.in_channels
        self.least = 1 << (len(channels) - 1)  # height and width of the smallest image
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1, dtype=DTYPE)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(config, kind, channels[max(i - 1, 0)], channels[i], downsample=i < len(channels) - 1)
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config, channels[-1])
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=config.norm_eps, dtype=DTYPE)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for down in self.down_blocks:
            h = down(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h, None))))
