"""Text: its division into pieces of words, and the encoders: of captions, and Stable Diffusion's of prompts."""

from fastdiff.text.clip import ClipEncoder
from fastdiff.text.encoder import CaptionEncoder, CaptionEncoderConfig
from fastdiff.text.wordpiece import WordPiece

__all__ = ["CaptionEncoder", "CaptionEncoderConfig", "ClipEncoder", "WordPiece"]
