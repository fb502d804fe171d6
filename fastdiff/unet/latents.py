"""`LatentDecoder`: the way from the latents of a latent diffusion model to its images.

The keys of its state dict are those of diffusers' ``AutoencoderKL`` without the encoder.

Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff.modes import plain_modes
from fastdiff.unet.decoder import Decoder, DecoderConfig
from fastdiff.unet.model import DTYPE


class LatentDecoder(nn.Module):
    """Map from latents z to images: D(W z / s + b).

    Args:
        config: The configuration of the decoder D.
        scale: The number s that made the latents of unit variance, diffusers' ``scaling_factor``.
        quantised: Whether there is the 1x1 convolution (W, b) before the decoder, ``use_post_quant_conv``.
    """

    @plain_modes()
    def __init__(self, config: DecoderConfig, scale: float, quantised: bool):
        super().__init__()
        self.scale = scale
        channels = config.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1, dtype=DTYPE) if quantised else None
        self.decoder = Decoder(config)

    @property
    def config(self) -> DecoderConfig:
        """The configuration of the decoder."""
        return self.decoder.config

    @property
    def factor(self) -> int:
        """How many times as high and wide as latents their images are."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def prepared(self, z: Tensor) -> Tensor:
        """Return what the decoder takes for latents.

        Args:
            z: Latents [B, C, h, w].

        Returns:
            W z / s + b, of the same shape.
        """
        z = z / self.scale
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z: Latents [B, C, h, w] in the module's dtype.

        Returns:
            The images [B, channels, h factor, w factor]; not clipped.
        """
        return self.decoder(self.prepared(z))
