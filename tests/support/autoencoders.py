"""Small autoencoders of diffusers, with random weights, for each layout that the engine runs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from tests.support.unets import randomize_

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
THREE: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "small": {},
    "16 latent channels": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, **THREE},
    "three levels": THREE,
    "no mid attention": {"mid_block_add_attention": False},
    "attention behind blocks": {
        "down_block_types": ("AttnDownEncoderBlock2D",) * 2,
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "one level": {
        "block_out_channels": (12,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "channels and groups": {
        "block_out_channels": (21, 42), "norm_num_groups": 7, "in_channels": 2, "out_channels": 1, "act_fn": "swish",
    },
}  # fmt: skip
TINIES: dict[str, dict[str, Any]] = {  # of AutoencoderTiny
    "tiny": {},
    "tiny, two levels": {"num_decoder_blocks": (1, 2), "decoder_block_out_channels": (12, 12)},
    "tiny, one level": {"num_decoder_blocks": (1,), "decoder_block_out_channels": (8,), "out_channels": 1},
    "tiny, odd channels": {
        "latent_channels": 16, "num_decoder_blocks": (1, 1), "decoder_block_out_channels": (21, 21),
        "num_encoder_blocks": (1, 2), "encoder_block_out_channels": (21, 21), "in_channels": 1,
    },
}  # fmt: skip
ALL = [*LAYOUTS, *TINIES]
STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def autoencoder(kind: Any = AutoencoderKL, seed: int = 0, **changes: Any) -> Any:
    """Build an autoencoder whose mid attention is far from uniform."""
    vae = randomize_(kind(**{**SMALL, **changes}), seed).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                p *= 3.0**0.5
    return vae.requires_grad_(False)


def tiny(seed: int = 0, **changes: Any) -> Any:
    """Build a tiny autoencoder."""
    encoder = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    config = {"decoder_block_out_channels": (8,) * 4, **encoder, **changes}
    return randomize_(AutoencoderTiny(**config), seed).eval().requires_grad_(False)


def of_layout(layout: str) -> Any:
    """Build the autoencoder of a layout."""
    return tiny(**TINIES[layout]) if layout in TINIES else autoencoder(**LAYOUTS[layout])


def latents(vae: Any, *shape: int, seed: int = 0) -> Tensor:
    """Draw latents of an autoencoder, for a batch, a height and a width."""
    B, H, W = shape
    return torch.randn(B, vae.config.latent_channels, H, W, generator=torch.Generator().manual_seed(seed))


def images(vae: Any, *shape: int, seed: int = 0) -> Tensor:
    """Draw images for an autoencoder, likewise."""
    B, H, W = shape
    return torch.rand(B, vae.config.in_channels, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1
