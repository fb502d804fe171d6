"""`ClipEncoder`: the text encoder of Stable Diffusion 1 and 2, run by the package transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import text as check_text
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.modes import plain_modes


class ClipEncoder:
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
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokens = int(min(tokenizer.model_max_length, model.config.max_position_embeddings))
        if tokenizer.pad_token_id is None or getattr(tokenizer, "padding_side", "right") != "right":
            raise ConfigError(
                f"the tokenizer has pad_token={tokenizer.pad_token!r} and padding_side={tokenizer.padding_side!r}; a "
                "token for padding at the right is needed"
            )
        size, embedded = len(tokenizer), model.config.vocab_size
        if size > embedded:
            raise ConfigError(f"the tokenizer has {size} tokens, the text encoder {embedded}; they must fit")
        self.tokenize("")  # the first call changes a tokenizer, and others may come from several threads

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text's tokens.

        Args:
            text: The text.

        Returns:
            The numbers, ``tokens`` of them: the begin, the pieces of words, the end, and padding.

        Raises:
            InvalidArgument: If the text is no string, or has more pieces than fit.
        """
        # The padding is added here: a tokenizer that pads is changed by each call.
        found = list(self.tokenizer(check_text("text", text), verbose=False)["input_ids"])
        if len(found) > self.tokens:
            raise InvalidArgument(
                f"the text has {len(found) - 2} pieces of words; at most {self.tokens - 2} fit, which are all that "
                "diffusers would read of it"
            )
        return found + [self.tokenizer.pad_token_id] * (self.tokens - len(found))

    @plain_modes()
    def encode(self, text: str) -> tuple[Tensor, None]:
        """Encode one text, by itself, so that the bits do not depend on other texts.

        Args:
            text: The text, as for `tokenize`.

        Returns:
            The states [tokens, channels], and None in the place of a pooled vector.

        Raises:
            InvalidArgument: As `tokenize` does.
        """
        tokens = torch.tensor([self.tokenize(text)], dtype=torch.int64, device=self.model.device)
        mask = None
        if getattr(self.model.config, "use_attention_mask", False):  # in no Stable Diffusion
            pieces = len(self.tokenizer(text, verbose=False)["input_ids"])
            mask = (torch.arange(self.tokens, dtype=torch.int64, device=tokens.device) < pieces).long()[None]
        states: Tensor = self.model(input_ids=tokens, attention_mask=mask)[0]
        return states[0].float(), None

    def to(self, device: torch.device) -> ClipEncoder:
        """Move the model to a device.

        Args:
            device: The device.

        Returns:
            The same object.
        """
        self.model.to(device)
        return self
