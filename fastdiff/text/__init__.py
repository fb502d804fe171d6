"""Text: its division into pieces of words, and the encoder of captions for networks that are trained here."""

from fastdiff.text.encoder import CaptionEncoder, CaptionEncoderConfig
from fastdiff.text.wordpiece import WordPiece

__all__ = ["CaptionEncoder", "CaptionEncoderConfig", "WordPiece"]
