"""The encoder of a tiny autoencoder (TAESD), which maps images to latents an eighth as large, or so.

The keys of its state dict are those of the ``encoder`` in diffusers' ``AutoencoderTiny``.

Source: O. Boer Bohan, TAESD (github.com/madebyollin/taesd).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastdiff.modes import plain_modes
from fastdiff.unet.model import DTYPE
from fastdiff.unet.tiny_decoder import TinyBlock, check_tiny


@dataclasses.dataclass(frozen=True, slots=True)
class TinyEncoderConfig:
    """Configuration of a `TinyEncoder`, with the keys and defaults of diffusers' ``AutoencoderTiny``."""

    in_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    latent_channels: int = 4
    act_fn: str = "relu"

    def __post_init__(self) -> None:
        check_tiny(self, "encoder_block_out_channels", "num_encoder_blocks", "in_channels")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyEncoderConfig:
        """Create a configuration from that of an autoencoder, whose other keys do not concern the encoder."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in known})


class TinyEncoder(nn.Module):
    """Encoder of images [B, in_channels, H, W] to latents [B, latent_channels, H / s, W / s], s = 2^(levels - 1).

    Sizes are rounded up.
    """

    least = 1  # height and width of the smallest image

    @plain_modes()
    def __init__(self, config: TinyEncoderConfig):
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        C = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            channels, stride = (config.in_channels, 1) if i == 0 else (C, 2)
            layers.append(nn.Conv2d(channels, C, 3, padding=1, stride=stride, bias=i == 0, dtype=DTYPE))
            layers += [TinyBlock(C) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(C, config.latent_channels, 3, padding=1, dtype=DTYPE))

    @staticmethod
    def prepared(x: Tensor) -> Tensor:
        """Return the images as the layers take them, from 0 to 1."""
        return x.add(1).div(2)

    @staticmethod
    def finished(y: Tensor) -> Tensor:
        """Return the latents that the layers give, as they are."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.prepared(x))
