"""The decoder of a latent diffusion model's autoencoder, which maps latents to images eight times as large, or so.

It is the upper half of the U-Net of `fastdiff.unet.model` without a timestep and without skips. The keys of its state
dict are those of the ``decoder`` in diffusers' ``AutoencoderKL`` and ``VQModel``.

Source: Rombach et al. 2022 (arXiv:2112.10752), appendix G; Esser et al. 2021 (arXiv:2012.09841).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.checks import shown
from fastdiff.errors import ConfigError
from fastdiff.modes import plain_modes
from fastdiff.unet.config import MAX_LAYERS, MAX_LEVELS, choice, size
from fastdiff.unet.model import DTYPE, Attention, MidBlock, ResnetBlock, Upsample

UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclasses.dataclass(frozen=True, slots=True)
class CoderConfig:
    """The keys that a `Decoder` and a `fastdiff.unet.encoder.Encoder` share, with the defaults of ``AutoencoderKL``."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True

    # What the blocks of `fastdiff.unet.model` ask of a configuration besides.
    norm_eps: ClassVar[float] = 1e-6
    temb_channels: ClassVar[None] = None
    dropout: ClassVar[float] = 0.0
    resnet_time_scale_shift: ClassVar[str] = "default"
    block_scale_factor: ClassVar[float] = 1.0
    resample_shortcut: ClassVar[bool] = False
    mid_block_scale_factor: ClassVar[float] = 1.0
    attn_norm_num_groups: ClassVar[None] = None

    @property
    def add_attention(self) -> bool:
        """Whether the mid block has attention."""
        return self.mid_block_add_attention

    @staticmethod
    def head_dim(channels: int) -> int:
        """Return the width of an attention's only head."""
        return channels


def check_coder(config: CoderConfig, types: str, allowed: tuple[str, ...], pixels: str) -> None:
    """Raise `ConfigError` for what is not supported; ``types`` and ``pixels`` are keys, of blocks and of channels."""
    for key in (types, "block_out_channels"):
        value = getattr(config, key)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_LEVELS:
            raise ConfigError(f"{key}={shown(value)}: a list of 1 to {MAX_LEVELS} entries is needed")
        object.__setattr__(config, key, tuple(value))
    kinds = getattr(config, types)
    if len(kinds) != len(config.block_out_channels):
        raise ConfigError(
            f"{types} has {len(kinds)} entries but block_out_channels has {len(config.block_out_channels)}; they must "
            "agree"
        )
    for name in kinds:
        if not isinstance(name, str) or name not in allowed:
            raise ConfigError(f"{types}: {shown(name)} is not supported; allowed: {', '.join(allowed)}")
    for key in (pixels, "latent_channels", "norm_num_groups"):
        size(key, getattr(config, key))
    size("layers_per_block", config.layers_per_block, MAX_LAYERS)
    for i, channels in enumerate(config.block_out_channels):
        if size(f"block_out_channels[{i}]", channels) % config.norm_num_groups:
            raise ConfigError(
                f"block_out_channels[{i}]={channels} is not divisible by norm_num_groups={config.norm_num_groups}"
            )
    choice("act_fn", config.act_fn, ("silu", "swish"))
    choice("mid_block_add_attention", config.mid_block_add_attention, (False, True))


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderConfig(CoderConfig):
    """Configuration of a `Decoder`, with the keys and defaults of diffusers' ``AutoencoderKL``."""

    out_channels: int = 3
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    norm_type: str = "group"

    def __post_init__(self) -> None:
        check_coder(self, "up_block_types", UP_BLOCKS, "out_channels")
        choice("norm_type", self.norm_type, ("group",))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Create a configuration from that of an autoencoder, whose other keys do not concern the decoder."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in known})


class DecoderBlock(nn.Module):
    """``layers_per_block + 1`` residual blocks, with attention after each in the type "Attn...", and an upsampler."""

    def __init__(self, config: DecoderConfig, kind: str, in_channels: int, out_channels: int, upsample: bool):
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList(
            ResnetBlock(config, in_channels if j == 0 else out_channels, out_channels) for j in range(layers)
        )
        self.attentions = None
        if kind.startswith("Attn"):
            groups, eps = config.norm_num_groups, config.norm_eps
            self.attentions = nn.ModuleList(Attention(out_channels, out_channels, groups, eps) for _ in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, None)
            if self.attentions is not None:
                x = self.attentions[j](x)
        return x if self.upsamplers is None else self.upsamplers[0](x, None)


class Plain(nn.Module):
    """A part of an autoencoder whose layers take what it is given, and give its result."""

    @staticmethod
    def prepared(x: Tensor) -> Tensor:
        """Return what is given as the layers take it, which is as it is."""
        return x

    @staticmethod
    def finished(y: Tensor) -> Tensor:
        """Return what the layers give, as it is."""
        return y


class Decoder(Plain):
    """Decoder of latents [B, latent_channels, H, W] to images [B, out_channels, H s, W s], s = 2^(levels - 1)."""

    least = 1  # height and width of the smallest latents

    @plain_modes()
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.in_channels = config.latent_channels
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1, dtype=DTYPE)
        self.mid_block = MidBlock(config, channels[0])
        self.up_blocks = nn.ModuleList(
            DecoderBlock(config, kind, channels[max(i - 1, 0)], channels[i], upsample=i < len(channels) - 1)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=config.norm_eps, dtype=DTYPE)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1, dtype=DTYPE)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z), None)
        for up in self.up_blocks:
            h = up(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
