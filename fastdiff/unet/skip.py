"""The blocks of NCSN++ (Song et al. 2021, arXiv:2011.13456, appendix H): a picture is resampled beside the maps.

On the way down the input picture is halved with every level and added to its maps by a 1x1 convolution; on the way up
every level draws a picture, and the output is their sum. Sizes change by a separable FIR filter, [1, 3, 3, 1] / 8 in
each direction (StyleGAN2: Karras et al. 2020, arXiv:1912.04958). The keys are those of diffusers' SkipDownBlock2D,
AttnSkipDownBlock2D, SkipUpBlock2D and AttnSkipUpBlock2D.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.unet.config import PICTURE_CHANNELS, SKIP_NORM_GROUPS, UNetConfig, skip_groups
from fastdiff.unet.model import DTYPE, Attention, ResnetBlock, fir_down, fir_up

SCALE = math.sqrt(2.0)  # divisor of a branch and its shortcut


def _attention(config: UNetConfig, channels: int) -> Attention:
    return Attention(channels, config.head_dim(channels), SKIP_NORM_GROUPS, config.norm_eps, SCALE)


class SkipDownBlock(nn.Module):
    """Residual blocks, with attention after each in "AttnSkipDownBlock2D", and one that halves maps and picture."""

    skips = True

    def __init__(self, config: UNetConfig, kind: str, in_channels: int, out_channels: int, downsample: bool):
        super().__init__()
        widths = [in_channels, *[out_channels] * config.layers_per_block]
        self.resnets = nn.ModuleList(
            ResnetBlock(config, a, b, scale_factor=SCALE, groups=(skip_groups(a), skip_groups(b)))
            for a, b in itertools.pairwise(widths)
        )
        self.attentions = None
        if kind.startswith("Attn"):
            self.attentions = nn.ModuleList(_attention(config, out_channels) for _ in self.resnets)
        self.resnet_down = self.skip_conv = None
        if downsample:
            groups = (skip_groups(out_channels),) * 2
            self.resnet_down = ResnetBlock(
                config, out_channels, out_channels, resample="fir_down", scale_factor=SCALE, groups=groups
            )
            self.skip_conv = nn.Conv2d(PICTURE_CHANNELS, out_channels, 1, dtype=DTYPE)

    def forward(self, x: Tensor, emb: Tensor, picture: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions is not None:
                x = self.attentions[j](x)
            skips.append(x)
        if self.resnet_down is not None:
            assert self.skip_conv is not None
            picture = fir_down(picture)
            x = self.skip_conv(picture) + self.resnet_down(x, emb)
            skips.append(x)
        return x, skips, picture


class SkipUpBlock(nn.Module):
    """Residual blocks on [h, skip], in "AttnSkipUpBlock2D" attention after the last, and one that doubles the maps.

    The picture of the levels below is doubled, and this level's is added to it, which the last level leaves out.
    """

    skips = True

    def __init__(
        self, config: UNetConfig, kind: str, prev_channels: int, out_channels: int, in_channels: int, upsample: bool
    ):
        super().__init__()
        layers, attention = config.layers_per_block + 1, kind.startswith("Attn")
        groups = skip_groups(out_channels)
        self.resnets = nn.ModuleList()
        for j in range(layers):
            own = prev_channels if j == 0 else out_channels
            skip = in_channels if j == layers - 1 else out_channels
            first = skip_groups(own + skip, of_skip=skip if attention else None)
            self.resnets.append(
                ResnetBlock(config, own + skip, out_channels, scale_factor=SCALE, groups=(first, groups))
            )
        self.attentions = nn.ModuleList([_attention(config, out_channels)]) if attention else None
        self.resnet_up = self.skip_conv = self.skip_norm = None
        if upsample:
            self.resnet_up = ResnetBlock(
                config, out_channels, out_channels, resample="fir_up", scale_factor=SCALE, groups=(groups, groups)
            )
            self.skip_conv = nn.Conv2d(out_channels, PICTURE_CHANNELS, 3, padding=1, dtype=DTYPE)
            self.skip_norm = nn.GroupNorm(groups, out_channels, eps=config.norm_eps, dtype=DTYPE)

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, picture: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for resnet in self.resnets:
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
        if self.attentions is not None:
            x = self.attentions[0](x)
        if picture is not None:
            picture = fir_up(picture)
        if self.resnet_up is not None:
            assert self.skip_conv is not None
            assert self.skip_norm is not None
            drawn = self.skip_conv(F.silu(self.skip_norm(x)))
            picture = drawn if picture is None else picture + drawn
            x = self.resnet_up(x, emb)
        return x, picture
