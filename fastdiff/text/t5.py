"""`T5Encoder`: the text encoder of networks that read T5's states, run by the package transformers."""

from __future__ import annotations

from typing import Any

from fastdiff.text.padded import PaddedEncoder


class T5Encoder(PaddedEncoder):
    """Encoder of prompts by a ``T5EncoderModel`` and its tokenizer.

        text_encoder = T5Encoder(T5EncoderModel.from_pretrained("t5"), T5Tokenizer.from_pretrained("t5"))
        sampler = Sampler(unet, text_encoder=text_encoder)      # a UNetCondition that reads states of this width

    As in diffusers' pipelines, every text is padded to the same number of tokens, T5's own attention does not see the
    padding, and the network reads the states of all tokens. A text that is too long is refused, while diffusers cuts
    it.

    Args:
        model: The ``transformers.T5EncoderModel``.
        tokenizer: The ``transformers.T5Tokenizer``.
        tokens: Number of tokens of every text.

    Attributes:
        model: As given, in evaluation mode.
        tokenizer: As given.
        tokens: As given.

    Raises:
        ConfigError: If the tokenizer has no token for padding at the right, or does not fit the model.
        InvalidArgument: If the number of tokens leaves no room for a text.
    """

    def __init__(self, model: Any, tokenizer: Any, tokens: int = 77):
        super().__init__(model, tokenizer, tokens)

    @property
    def channels(self) -> int:
        """Channels of the states."""
        return int(self.model.config.d_model)
