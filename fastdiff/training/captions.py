"""Training from captions: the U-Net and the encoder of captions as one network, which is trained as any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdiff.data import ImageData
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.text import CaptionEncoder
from fastdiff.unet import UNetCondition


class Captioned(nn.Module):
    """Network of images and tokens of captions: eps(x, t, tokens) = unet(x, t, *encoder(tokens)).

    The pooled vector of the encoder is the network's class vector, where it takes one.
    """

    def __init__(self, unet: UNetCondition, encoder: CaptionEncoder):
        super().__init__()
        self.unet, self.encoder = unet, encoder
        self.pooled = unet.config.class_embed_type is not None

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        states, pooled = self.encoder(tokens)
        return self.unet(x, t, states, class_labels=pooled if self.pooled else None)


def check(unet: UNetCondition, encoder: CaptionEncoder, data: ImageData) -> None:
    """Raise `InvalidArgument` where network, encoder and data do not fit together."""
    config, channels = unet.config, encoder.config.channels
    if config.context_channels != channels:
        raise InvalidArgument(
            f"the U-Net reads text states of {config.context_channels} channels, the text encoder gives {channels}: "
            f"set cross_attention_dim={channels}, with blocks of type CrossAttn..."
        )
    if config.class_embed_type not in (None, "projection", "simple_projection") or config.num_class_embeds is not None:
        raise InvalidArgument(
            f"class_embed_type={config.class_embed_type!r}, num_class_embeds={config.num_class_embeds}: to train from "
            "captions, 'simple_projection' or 'projection' for the pooled text, or None, is needed, and no classes"
        )
    if config.class_embed_type is not None and config.projection_class_embeddings_input_dim != channels:
        raise InvalidArgument(
            f"projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim}: it must be the "
            f"channels of the text encoder, {channels}"
        )
    for key in ("addition_embed_type", "time_cond_proj_dim"):
        if getattr(config, key) is not None:
            raise InvalidArgument(
                f"{key}={getattr(config, key)!r} needs an input that training does not give; use None"
            )
    if data.captions is None:
        raise InvalidArgument("the network reads text, but the data has no captions")
    if len(data.captions) != len(data):
        raise InvalidArgument(f"{len(data.captions)} captions for {len(data)} images: one for each is needed")


def tokens_of(encoder: CaptionEncoder, captions: Sequence[str], indices: Sequence[int]) -> Tensor:
    """Return the tokens of the captions of some images, int64 [images, tokens]; `DataError` names a bad caption."""
    rows = []
    for i in indices:
        try:
            rows.append(encoder.tokenize(captions[i]))
        except InvalidArgument as e:
            raise DataError(f"caption of image {i}: {e}") from e
    return torch.tensor(rows, dtype=torch.int64, device="cpu")
