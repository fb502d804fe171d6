"""`PaddedEncoder`: what the text encoders of the package transformers have in common."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.checks import text as check_text
from fastdiff.checks import whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.modes import plain_modes

Self = TypeVar("Self", bound="PaddedEncoder")


class PaddedEncoder:
    """A model of the package transformers with its tokenizer, for texts that are padded to one length.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tokens: Number of tokens of every text.

    Attributes:
        model: As given, in evaluation mode.
        tokenizer: As given.
        tokens: As given.

    Raises:
        ConfigError: If the tokenizer has no token for padding at the right, or does not fit the model.
        InvalidArgument: If the number of tokens leaves no room for a text.
    """

    def __init__(self, model: Any, tokenizer: Any, tokens: int):
        self.model = model.eval()
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None or getattr(tokenizer, "padding_side", "right") != "right":
            raise ConfigError(
                f"the tokenizer has pad_token={tokenizer.pad_token!r} and padding_side={tokenizer.padding_side!r}; a "
                "token for padding at the right is needed"
            )
        size, embedded = len(tokenizer), model.config.vocab_size
        if size > embedded:
            raise ConfigError(f"the tokenizer has {size} tokens, the text encoder {embedded}; they must fit")
        # The first call changes a tokenizer, and others may come from several threads.
        self._others = len(self._pieces(""))  # tokens that are no piece of a text
        self.tokens = whole("tokens", tokens, self._others + 1)

    @property
    def hides_padding(self) -> bool:
        """Whether attention leaves out the padding."""
        return True

    def _pieces(self, text: str) -> list[int]:
        # The padding is added by `tokenize`: a tokenizer that pads is changed by each call.
        return list(self.tokenizer(check_text("text", text), verbose=False)["input_ids"])

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text's tokens.

        Args:
            text: The text.

        Returns:
            The numbers, ``tokens`` of them: the pieces of words, the tokenizer's marks of begin and end, and padding.

        Raises:
            InvalidArgument: If the text is no string, or has more pieces than fit.
        """
        found = self._pieces(text)
        if len(found) > self.tokens:
            raise InvalidArgument(
                f"the text has {len(found) - self._others} pieces of words; at most {self.tokens - self._others} fit, "
                "which are all that diffusers would read of it"
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
        mask = self._mask(text) if self.hides_padding else None
        states: Tensor = self.model(input_ids=self._tensor(text), attention_mask=mask)[0]
        return states[0].float(), None

    def _tensor(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 [1, tokens]."""
        return torch.tensor([self.tokenize(text)], dtype=torch.int64, device=self.model.device)

    def _mask(self, text: str) -> Tensor:
        """Return 1 for the tokens of a text and 0 for its padding, int64 [1, tokens]."""
        place = torch.arange(self.tokens, dtype=torch.int64, device=self.model.device)
        return (place < len(self._pieces(text))).long()[None]

    def to(self: Self, device: torch.device) -> Self:
        """Move the model to a device.

        Args:
            device: The device.

        Returns:
            The same object.
        """
        self.model.to(device)
        return self
