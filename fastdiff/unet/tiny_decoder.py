"""The decoder of a tiny autoencoder (TAESD), which maps latents to images eight times as large, or so.

It is a fraction of the work of `fastdiff.unet.decoder.Decoder`: convolutions and ReLU, no norms and no attention. The
keys of its state dict are those of the ``decoder`` in diffusers' ``AutoencoderTiny``.

Source: O. Boer Bohan, TAESD (github.com/madebyollin/taesd).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.checks import shown
from fastdiff.errors import ConfigError
from fastdiff.modes import plain_modes
from fastdiff.unet.config import MAX_LAYERS, MAX_LEVELS, choice, size
from fastdiff.unet.model import DTYPE


def check_tiny(config: Any, levels: str, numbers: str, pixels: str) -> None:
    """Raise `ConfigError` for what is not supported.

    The keys ``levels``, ``numbers`` and ``pixels`` have the channels and blocks of each level, and the channels of
    images.
    """
    for key in (levels, numbers):
        value = getattr(config, key)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_LEVELS:
            raise ConfigError(f"{key}={shown(value)}: a list of 1 to {MAX_LEVELS} entries is needed")
        object.__setattr__(config, key, tuple(value))
    channels, blocks = getattr(config, levels), getattr(config, numbers)
    if len(channels) != len(blocks):
        raise ConfigError(f"{levels} has {len(channels)} entries but {numbers} has {len(blocks)}; they must agree")
    for key in (pixels, "latent_channels"):
        size(key, getattr(config, key))
    for i, number in enumerate(blocks):
        size(f"{numbers}[{i}]", number, MAX_LAYERS)
    if any(size(levels, C) != channels[0] for C in channels):
        raise ConfigError(
            f"{levels}={shown(channels)}: the levels must have as many channels each, as no layer changes their number"
        )
    choice("act_fn", config.act_fn, ("relu",))


@dataclasses.dataclass(frozen=True, slots=True)
class TinyDecoderConfig:
    """Configuration of a `TinyDecoder`, with the keys and defaults of diffusers' ``AutoencoderTiny``."""

    out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    upsampling_scaling_factor: int = 2

    def __post_init__(self) -> None:
        check_tiny(self, "decoder_block_out_channels", "num_decoder_blocks", "out_channels")
        choice("upsample_fn", self.upsample_fn, ("nearest",))
        choice("upsampling_scaling_factor", self.upsampling_scaling_factor, (2,))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyDecoderConfig:
        """Create a configuration from that of an autoencoder, whose other keys do not concern the decoder."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in known})


class TinyBlock(nn.Module):
    """Residual block: relu(x + W3 relu(W2 relu(W1 x)))."""

    def __init__(self, channels: int):
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1, dtype=DTYPE) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Decoder of latents [B, latent_channels, H, W] to images [B, out_channels, H s, W s], s = 2^(levels - 1)."""

    least = 1  # height and width of the smallest latents

    @plain_modes()
    def __init__(self, config: TinyDecoderConfig):
        super().__init__()
        self.config = config
        self.in_channels = config.latent_channels
        C = config.decoder_block_out_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, C, 3, padding=1, dtype=DTYPE), nn.ReLU()]
        for blocks in config.num_decoder_blocks[:-1]:
            layers += [TinyBlock(C) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, padding=1, bias=False, dtype=DTYPE)]
        layers += [TinyBlock(C) for _ in range(config.num_decoder_blocks[-1])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(C, config.out_channels, 3, padding=1, dtype=DTYPE))

    @staticmethod
    def prepared(z: Tensor) -> Tensor:
        """Return the latents as the layers take them: 3 tanh(z / 3), which bounds them."""
        return (z / 3).tanh() * 3

    @staticmethod
    def finished(y: Tensor) -> Tensor:
        """Return images, from -1 to 1, of what the layers give, from 0 to 1."""
        return y.mul(2).sub(1)

    def forward(self, z: Tensor) -> Tensor:
        return self.finished(self.layers(self.prepared(z)))
