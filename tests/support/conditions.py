"""Text-conditioned networks that several tests use, their inputs, and diffusers' networks with the same weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff.core.lower import added_vector, vector_kind
from fastdiff.unet import UNetCondition, UNetConditionConfig
from fastdiff.unet.transformer import TextAttention
from tests.support.unets import randomize_

# A network with both kinds of blocks, a few thousand parameters, and milliseconds per evaluation.
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
THREE: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# Changes to TINY, which together set every field of the configuration that changes the network.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "linear projections": {"use_linear_projection": True},
    "heads of each level": {**THREE, "attention_head_dim": (4, 2, 8), "block_out_channels": (8, 16, 32)},
    "heads that leave channels over": {"attention_head_dim": 3},
    "heads that leave channels over, linear": {"attention_head_dim": 3, "use_linear_projection": True},
    "depth of each level": {**THREE, "transformer_layers_per_block": (1, 2, 3), "layers_per_block": 2},
    "no depth": {"transformer_layers_per_block": 0},
    "depth of each layer": {
        **THREE,
        "layers_per_block": (1, 2, 2),
        "transformer_layers_per_block": (0, (2, 1), (1, 3)),
        "reverse_transformer_layers_per_block": ((3, 1, 2), (1, 0, 1), 1),
    },
    "reverse depth": {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": (1, (2, 1))},
    "layers of each level": {**THREE, "layers_per_block": (1, 3, 2)},
    "only cross-attention": {"only_cross_attention": True},
    "only cross-attention at a level": {**THREE, "only_cross_attention": (False, False, True)},
    "mid block without a transformer": {"mid_block_type": "UNetMidBlock2D"},
    "no mid block": {"mid_block_type": None},
    "mid_block_scale_factor": {"mid_block_scale_factor": math.sqrt(2)},
    "self-attention blocks": {
        **THREE,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (4, 8, 2),
        "layers_per_block": 2,
    },
    "self-attention at the ends": {
        "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (4, 8),
    },
    "resnet blocks": {
        **THREE,
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_out_scale_factor": 1.7,
    },
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "padding 0": {**THREE, "downsample_padding": 0},
    "class labels": {"num_class_embeds": 5},
    "timestep class": {"class_embed_type": "timestep"},
    "identity class": {"class_embed_type": "identity", "num_class_embeds": 9},
    "projection class": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "simple_projection class": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
    "text_time": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 28,
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "flip_sin_to_cos": False,
    },
    "timestep_cond": {"time_cond_proj_dim": 7},
    "text_proj": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "text_proj by its size alone": {"encoder_hid_dim": 20},
    "activations": {"time_embedding_act_fn": "gelu", "timestep_post_act": "mish"},
    "centered input": {"center_input_sample": True},
    "sinusoid": {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 20},
    "channels in and out": {"in_channels": 9, "out_channels": 8},
    "widths of each level's text": {**THREE, "cross_attention_dim": (None, 12, 12)},
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "no effect": {
        "upcast_attention": True,
        "mid_block_only_cross_attention": True,
        "cross_attention_norm": "layer_norm",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0,
    },
    "norm_eps": {"norm_eps": 0.3, "act_fn": "swish"},
}
LOGITS = 3.0  # standard deviation of the attentions' logits


def config(**changes: Any) -> UNetConditionConfig:
    """Return the configuration `TINY` with some fields replaced."""
    return UNetConditionConfig(**{**TINY, **changes})


def random_condition(described: UNetConditionConfig, seed: int = 0) -> UNetCondition:
    """Build a network with random weights, whose attentions are far from uniform.

    With random projections alone the logits are so small that every token gets nearly the same attention, and keys,
    heads and scales could be wrong unnoticed.
    """
    unet = randomize_(UNetCondition(described), seed)
    with torch.no_grad():
        for m in unet.modules():
            if isinstance(m, TextAttention):
                m.to_q.weight *= math.sqrt(LOGITS)
                m.to_k.weight *= math.sqrt(LOGITS)
    return unet.eval()


def text_states(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw the states of a text of mean square 1, with one channel ten times as large as others, as CLIP's have."""
    z = torch.randn(shape, generator=generator)
    z[..., shape[2] // 3] = 10.0 + z[..., shape[2] // 3]
    return z / z.square().mean().sqrt()


def random_inputs(
    described: UNetConditionConfig, batch: int = 2, size: tuple[int, int] = (8, 8), tokens: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Draw the inputs of a network, under the names of `UNetCondition.forward`, but for x and t which are "x", "t"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {"x": normal(batch, described.in_channels, *size)}
    inputs["t"] = torch.tensor([3.0, 917.25, 500.0])[:batch]
    if described.context_channels is not None:
        inputs["encoder_hidden_states"] = text_states((batch, tokens, described.context_channels), generator)
    width = described.projection_class_embeddings_input_dim
    if described.class_embed_type == "timestep":
        inputs["class_labels"] = torch.tensor([0.5, 7.0, 80.0])[:batch]
    elif described.class_embed_type is not None:
        inputs["class_labels"] = normal(batch, described.temb_channels if width is None else width)
    elif described.num_class_embeds is not None:
        inputs["class_labels"] = torch.arange(batch) % described.num_class_embeds
    if described.addition_embed_type is not None:
        ids = torch.tensor([[512.0, 640.0, 0.0], [1024.0, 8.0, 77.0], [64.0, 64.0, 1.0]])[:batch]
        assert width is not None
        assert described.addition_time_embed_dim is not None
        text = normal(batch, width - 3 * described.addition_time_embed_dim)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    if described.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = normal(batch, described.time_cond_proj_dim)
    return inputs


def vector_of(unet: UNetCondition, inputs: dict[str, Any]) -> Tensor | None:
    """Return the vector that enters the time embedding, from the inputs of `random_inputs`."""
    kind = vector_kind(unet)
    if kind == "added":
        return added_vector(unet, **inputs["added_cond_kwargs"])
    return None if kind is None else inputs["class_labels" if kind == "class" else "timestep_cond"]


def diffusers_condition(unet: UNetCondition) -> Any:
    """Build diffusers' UNet2DConditionModel with the configuration of ``unet`` and a copy of its weights."""
    from diffusers import UNet2DConditionModel

    twin: Any = UNet2DConditionModel(**unet.config.to_dict())  # on "meta" it takes three times as long
    twin.load_state_dict(unet.state_dict())
    return twin.eval()


def diffusers_output(twin: Any, inputs: dict[str, Any]) -> Tensor:
    """Evaluate diffusers' network for the inputs of `random_inputs`."""
    rest = {k: v for k, v in inputs.items() if k not in ("x", "t", "encoder_hidden_states")}
    return twin(inputs["x"], inputs["t"], inputs.get("encoder_hidden_states"), **rest).sample
