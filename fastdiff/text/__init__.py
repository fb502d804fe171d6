"""Text: its division into pieces of words. No network is conditioned on it yet."""

from fastdiff.text.wordpiece import WordPiece

__all__ = ["WordPiece"]
