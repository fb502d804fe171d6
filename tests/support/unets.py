"""Networks that many tests use, and diffusers' networks with the same weights."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastdiff.bench.networks import PUBLISHED, random_unet, randomize_
from fastdiff.bench.peers import diffusers_twin
from fastdiff.unet import UNetConfig

__all__ = ["PUBLISHED", "diffusers_twin", "random_unet", "randomize_"]  # tests import fastdiff.bench's from here

# A network with plain blocks and blocks with attention, a few thousand parameters, and milliseconds per evaluation.
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


def change(config: UNetConfig = TINY, **changes) -> UNetConfig:
    """Return the configuration with some fields replaced."""
    return dataclasses.replace(config, **changes)


# Changes to TINY, which together set every field of the configuration that changes the network.
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (12, 24, 36),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
ATTENTION_EVERYWHERE = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
VARIANTS = {
    "tiny": {},
    "one head": {"attention_head_dim": None},
    "four heads": {"attention_head_dim": 4},
    "heads that leave channels over": {"attention_head_dim": 5},
    "one group": {"norm_num_groups": 1},
    "a group per channel": {"norm_num_groups": 8, "block_out_channels": (8, 8)},
    "another norm_eps": {"norm_eps": 0.3},
    "24x40": {"sample_size": (24, 40), **THREE_LEVELS},
    "odd groups across the concatenation": {**THREE_LEVELS, "norm_num_groups": 6, "sample_size": 12},
    "attention everywhere": {**ATTENTION_EVERYWHERE, "downsample_padding": 0},
    "no attention anywhere": {**NO_ATTENTION, "add_attention": False},
    "channels in and out": {"in_channels": 1, "out_channels": 6},
    "class embedding": {"num_class_embeds": 5},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift, one head": {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": None},
    "scale-shift with classes": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5, **RESNET_BLOCKS},
    "scale-shift, norm before the mid attention": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
    },
    "attn_norm_num_groups": {"attn_norm_num_groups": 16},
    "resnet blocks": RESNET_BLOCKS,
    "resnet resampling": {**ATTENTION_EVERYWHERE, "downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet resampling names plain blocks too": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "timestep class": {"class_embed_type": "timestep"},
    "identity class": {"class_embed_type": "identity", "num_class_embeds": 9},
    "padding 0": {"downsample_padding": 0},
    "centered input": {"center_input_sample": True},
    "no mid block": {"mid_block_type": None},
    "no mid attention": {"add_attention": False},
    "mid_block_scale_factor": {"mid_block_scale_factor": math.sqrt(2)},
    "odd sinusoid": {"block_out_channels": (9, 18), "norm_num_groups": 3, "attention_head_dim": 6},
    "sinusoid of [cos, sin] and shift": {"flip_sin_to_cos": True, "freq_shift": 1},
    "sinusoid of [sin, cos]": {"flip_sin_to_cos": False, "freq_shift": 0},
    "time_embedding_dim": {"time_embedding_dim": 20, "num_class_embeds": 3},
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "layers": {"layers_per_block": 3},
    "act_fn swish": {"act_fn": "swish"},
}

# The same for the fields that diffusers does not have.
OWN_VARIANTS = {
    "two heads at every level": {**ATTENTION_EVERYWHERE, "num_attention_heads": 2},
    "a wider sinusoid": {"sinusoid_dim": 12, "time_embedding_dim": 48, "num_class_embeds": 3},
    "scaled timesteps": {"timestep_scale": 0.25},
    "scaled blocks": {"block_scale_factor": 1.7, **ATTENTION_EVERYWHERE},
    "attention behind the last block": {**ATTENTION_EVERYWHERE, "up_attention": "last", "layers_per_block": 2},
    "shortcuts that resample": {"resample_shortcut": True, **RESNET_BLOCKS},
    "classes before the time MLP": {"class_before_mlp": True, "num_class_embeds": 5, "null_label": 4},
    "circular padding": {"padding_mode": "circular"},
    "circular padding of resnet blocks": {"padding_mode": "circular", **RESNET_BLOCKS},
}


def configs():
    """Return a strategy for configurations that diffusers supports too; the GPU checks do without hypothesis."""
    from hypothesis import strategies as st

    return st.composite(_config)()


def _config(draw):
    from hypothesis import strategies as st

    levels = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    first = st.integers(math.ceil(4 / groups), 4)
    channels = [groups * draw(first)] + [groups * draw(st.integers(1, 4)) for _ in range(levels - 1)]
    stride = 1 << (levels - 1)
    types = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    ups = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
    return UNetConfig(
        sample_size=(stride * draw(st.integers(2, 5)), stride * draw(st.integers(2, 5))),
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        center_input_sample=draw(st.booleans()),
        time_embedding_dim=draw(st.none() | st.integers(1, 20)),
        freq_shift=draw(st.integers(0, 1)),
        flip_sin_to_cos=draw(st.booleans()),
        down_block_types=draw(st.tuples(*[st.sampled_from(types)] * levels)),
        up_block_types=draw(st.tuples(*[st.sampled_from(ups)] * levels)),
        mid_block_type=draw(st.sampled_from(["UNetMidBlock2D", None])),
        block_out_channels=tuple(channels),
        layers_per_block=draw(st.integers(1, 2)),
        mid_block_scale_factor=draw(st.sampled_from([1.0, 0.7, 2])),
        downsample_padding=draw(st.integers(0, 1)),
        downsample_type=draw(st.sampled_from(["conv", "resnet"])),
        upsample_type=draw(st.sampled_from(["conv", "resnet"])),
        attention_head_dim=draw(st.none() | st.integers(1, min(channels))),
        norm_num_groups=groups,
        attn_norm_num_groups=draw(st.sampled_from([None, 1, channels[-1]])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        add_attention=draw(st.booleans()),
        class_embed_type=draw(st.sampled_from([None, "timestep", "identity"])),
        num_class_embeds=draw(st.none() | st.integers(1, 5)),
    )


def random_images(config: UNetConfig, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
    """Draw normal noise of the network's input shape."""
    if size is None:
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, config.in_channels, *size), generator=generator)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Compute ||a - b|| / ||b|| in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def random_labels(config: UNetConfig, batch: int) -> torch.Tensor | None:
    """Return labels of the kind that the network takes, different for every image; None for a network without."""
    generator = torch.Generator().manual_seed(7)
    if config.class_embed_type == "identity":
        return torch.randn((batch, config.temb_channels), generator=generator)
    if config.class_embed_type == "timestep":
        return torch.linspace(0.5, 700.25, batch)
    if config.num_class_embeds is not None:
        return torch.arange(batch) % config.num_class_embeds
    return None
