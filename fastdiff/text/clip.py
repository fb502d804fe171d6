"""The text encoders of Stable Diffusion 1 and 2, `ClipEncoder`, and XL, `ClipPair`, run by the package transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import ConfigError
from fastdiff.modes import plain_modes
from fastdiff.text.padded import PaddedEncoder


class ClipEncoder(PaddedEncoder):
    """Encoder of prompts by a ``CLIPTextModel`` and its tokenizer.

    As in Stable Diffusion, every text is padded to the same number of tokens, attention sees the padding, and the
    states are those behind the last norm. A text that is too long is refused, while diffusers cuts it.

    Args:
        model: The ``transformers.CLIPTextModel``.
        tokenizer: The ``transformers.CLIPTokenizer``.

    Attributes:
        model: As given, in evaluation mode.
        tokenizer: As given.
        tokens: Number of tokens of every text.

    Raises:
        ConfigError: If the tokenizer pads texts in another way than Stable Diffusion's, or does not fit the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__(model, tokenizer, int(min(tokenizer.model_max_length, model.config.max_position_embeddings)))

    @property
    def channels(self) -> int:
        """Channels of the states."""
        return int(self.model.config.hidden_size)

    @property
    def hides_padding(self) -> bool:
        """Whether attention leaves out the padding, which it does in no Stable Diffusion."""
        return bool(getattr(self.model.config, "use_attention_mask", False))

    @plain_modes()
    def penultimate(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Encode one text as Stable Diffusion XL reads it.

        Args:
            text: The text, as for `tokenize`.

        Returns:
            The states [tokens, channels] before the last layer, without a norm; and, of a
            ``CLIPTextModelWithProjection``, the projected vector of the whole text, else None.

        Raises:
            InvalidArgument: As `tokenize` does.
        """
        found = self.model(input_ids=self._tensor(text), output_hidden_states=True)
        vector = getattr(found, "text_embeds", None)
        return found.hidden_states[-2][0].float(), None if vector is None else vector[0].float()


class ClipPair:
    """The two encoders of Stable Diffusion XL: the states of both beside each other, and the second one's vector.

    Args:
        first: The first encoder, of a ``CLIPTextModel``.
        second: The second one, of a ``CLIPTextModelWithProjection``, with as many tokens.
        negative_is_zeros: Whether no negative prompt is zeros, and not the text "", diffusers'
            ``force_zeros_for_empty_prompt``.

    Attributes:
        first: As given.
        second: As given.
        negative_is_zeros: As given.
        tokens: Number of tokens of every text.

    Raises:
        ConfigError: If the encoders differ in their number of tokens, or the second one gives no vector.
    """

    def __init__(self, first: ClipEncoder, second: ClipEncoder, negative_is_zeros: bool = True):
        if first.tokens != second.tokens:
            raise ConfigError(f"the text encoders take {first.tokens} and {second.tokens} tokens; they must agree")
        if second.penultimate("")[1] is None:
            raise ConfigError("the second text encoder gives no vector; a CLIPTextModelWithProjection is needed")
        self.first, self.second = first, second
        self.negative_is_zeros = negative_is_zeros
        self.tokens = first.tokens

    @property
    def model(self) -> nn.Module:
        """Both models."""
        return nn.ModuleList([self.first.model, self.second.model])

    @property
    def channels(self) -> int:
        """Channels of the states, of both encoders together."""
        return self.first.channels + self.second.channels

    @property
    def pooled_channels(self) -> int:
        """Channels of the vector of a whole text."""
        return int(self.second.model.config.projection_dim)

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text's tokens for the first encoder, after a check that it suits both.

        Args:
            text: The text.

        Returns:
            The numbers, ``tokens`` of them.

        Raises:
            InvalidArgument: As `ClipEncoder.tokenize` does.
        """
        self.second.tokenize(text)
        return self.first.tokenize(text)

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode one text, by itself.

        Args:
            text: The text, as for `tokenize`.

        Returns:
            The states [tokens, channels], and the vector [pooled_channels].

        Raises:
            InvalidArgument: As `tokenize` does.
        """
        states, vector = self.second.penultimate(text)
        assert vector is not None
        return torch.cat([self.first.penultimate(text)[0], states], dim=1), vector

    def to(self, device: torch.device) -> ClipPair:
        """Move the models to a device.

        Args:
            device: The device.

        Returns:
            The same object.
        """
        self.first.to(device)
        self.second.to(device)
        return self
