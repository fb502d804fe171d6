"""A small network that reads text, with its encoder, whose output depends strongly on the text."""

from __future__ import annotations

import torch

from fastdiff import UNetCondition, UNetConditionConfig
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig

TEXT = CaptionEncoderConfig(channels=16, layers=1, heads=2, tokens=8)
NETWORK = UNetConditionConfig(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4, class_embed_type="simple_projection",
    projection_class_embeddings_input_dim=16,
)  # fmt: skip


def network_and_encoder(**changes: object) -> tuple[UNetCondition, CaptionEncoder]:
    """Return a network and an encoder with random weights; attention to the text has logits of a spread of about 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {**NETWORK.to_dict(), **changes}
        unet, encoder = UNetCondition(UNetConditionConfig.from_dict(fields)), CaptionEncoder(TEXT)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4.0)
    return unet.eval(), encoder.eval()
