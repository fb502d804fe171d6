"""Backend `triton`: fastdiff's own U-Net on CUDA, as Triton launches in a CUDA graph."""

from fastdiff.backends.triton.runner import TritonRunner, TritonStep, has_kernels, prepare, reasons_against

__all__ = ["TritonRunner", "TritonStep", "has_kernels", "prepare", "reasons_against"]
