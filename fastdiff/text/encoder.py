"""The encoder of captions: vectors of words from a table that comes with fastdiff, and a small transformer over them.

Sources: Vaswani et al. 2017 (arXiv:1706.03762) for the transformer, its norms placed as by Xiong et al. 2020
(arXiv:2002.04745). The table was distilled from all-MiniLM-L6-v2 by recipes/emoji_scenes/words.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastdiff.checks import shown, whole
from fastdiff.errors import ConfigError
from fastdiff.modes import plain_modes
from fastdiff.text.wordpiece import WordPiece

WORDS = Path(__file__).parent / "words.safetensors"  # the table, with its vocabulary in the metadata
MOST_LAYERS, MOST_CHANNELS, MOST_TOKENS = 64, 4096, 1024


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionEncoderConfig:
    """Configuration of a `CaptionEncoder`.

    Attributes:
        channels: Channels of a state, a multiple of ``heads``, at most 4096.
        layers: Number of transformer layers, 1 to 64.
        heads: Attention heads of a layer.
        tokens: Number of tokens of every caption, 2 to 1024: "[CLS]", up to ``tokens`` - 2 pieces of words, "[SEP]",
            and "[PAD]" for the rest.

    Raises:
        ConfigError: If a value is out of range; the message names it and what is allowed.
    """

    channels: int = 128
    layers: int = 2
    heads: int = 4
    tokens: int = 24

    def __post_init__(self) -> None:
        limits = {"channels": MOST_CHANNELS, "layers": MOST_LAYERS, "heads": MOST_CHANNELS, "tokens": MOST_TOKENS}
        for key, most in limits.items():
            low = 2 if key == "tokens" else 1
            object.__setattr__(self, key, whole(key, getattr(self, key), low, most, error=ConfigError))
        if self.channels % self.heads:
            raise ConfigError(f"channels={self.channels} is not divisible by heads={self.heads}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CaptionEncoderConfig:
        """Create a configuration from the contents of its ``config.json``.

        Args:
            config: The keys and values; keys that start with "_" are ignored.

        Returns:
            The configuration.

        Raises:
            ConfigError: If a key is unknown or its value is out of range.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"the configuration of a text encoder is an object with keys, not {shown(config)}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(str(k) for k in config if k not in known and not str(k).startswith("_"))
        if unknown:
            raise ConfigError(f"unknown keys of a text encoder: {shown(unknown)}; allowed: {', '.join(sorted(known))}")
        return cls(**{k: v for k, v in config.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``.

        Returns:
            A dictionary that JSON can hold.
        """
        return dataclasses.asdict(self)


@functools.cache
def words() -> tuple[WordPiece, Tensor, Tensor]:
    """Read the table of words: its vocabulary, the vectors int8 [V, C], and the scale of each channel, float32 [C]."""
    with plain_modes(), safe_open(WORDS, framework="pt") as file:
        return WordPiece(file.metadata()["vocabulary"].split("\n")), file.get_tensor("table"), file.get_tensor("scale")


class CaptionEncoder(nn.Module):
    """Encoder of short texts for the cross-attention of a `fastdiff.UNetCondition`: ``encoder(tokens)``.

        h_i = W (s * table[token_i]) + position_i,    states = LayerNorm(layers(h)),    pooled = states_0

    The table is fixed and part of fastdiff; all else is trained with the network that reads the states. Attention sees
    the padding as well, as in the encoders of Stable Diffusion, so every caption has the same number of states.

    Args:
        config: The configuration, which stays available as ``encoder.config``.
    """

    @plain_modes()
    def __init__(self, config: CaptionEncoderConfig):
        super().__init__()
        self.config = config
        self.pieces, table, scale = words()
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.project = nn.Linear(table.shape[1], config.channels, dtype=torch.float32)
        self.position = nn.Embedding(config.tokens, config.channels, dtype=torch.float32)
        nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.channels, config.heads, 4 * config.channels, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True, dtype=torch.float32,
            )
            for _ in range(config.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.channels, dtype=torch.float32)

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text's pieces of words.

        Args:
            text: The text; upper case and accents make no difference, and pieces that the vocabulary lacks are
                unknown ones.

        Returns:
            The numbers, ``config.tokens`` of them.

        Raises:
            InvalidArgument: If the text is no string, or has more pieces than fit.
        """
        return self.pieces.encode(text, self.config.tokens)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens.

        Args:
            tokens: Numbers of pieces, int64 [B, config.tokens], as `tokenize` gives them.

        Returns:
            The states [B, config.tokens, config.channels] and the pooled vectors [B, config.channels].
        """
        table, scale = self.get_buffer("table"), self.get_buffer("scale")
        h = self.project(table[tokens].to(scale.dtype) * scale) + self.position.weight
        for layer in self.layers:
            h = layer(h)
        states = self.norm(h)
        return states, states[:, 0]

    @plain_modes()
    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode one text, by itself, so that the bits do not depend on other texts.

        Args:
            text: The text, as for `tokenize`.

        Returns:
            The states [config.tokens, config.channels] and the pooled vector [config.channels].

        Raises:
            InvalidArgument: As `tokenize` does.
        """
        tokens = torch.tensor([self.tokenize(text)], dtype=torch.int64, device=self.position.weight.device)
        states, pooled = self(tokens)
        return states[0], pooled[0]
