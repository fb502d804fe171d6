"""Checkpoints: reading untrusted files, recognising layouts of other code bases, and converting between them."""

from fastdiff.checkpoints.loading import load

__all__ = ["load"]
