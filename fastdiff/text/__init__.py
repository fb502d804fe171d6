"""Text: its division into pieces of words, and the encoders: of captions, and those of Stable Diffusion's prompts."""

from fastdiff.text.clip import ClipEncoder, ClipPair
from fastdiff.text.encoder import CaptionEncoder, CaptionEncoderConfig
from fastdiff.text.t5 import T5Encoder
from fastdiff.text.wordpiece import WordPiece

__all__ = ["CaptionEncoder", "CaptionEncoderConfig", "ClipEncoder", "ClipPair", "T5Encoder", "WordPiece"]
