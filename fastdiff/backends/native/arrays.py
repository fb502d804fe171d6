"""Memory of the native engine's operands: where it is allocated, and how the engine is given it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.native.extension import extension
from fastdiff.core.plan import ALIGNMENT
from fastdiff.errors import BackendError

LARGE_PAGE = 2 << 20  # bytes of a large page of x86-64 and of most arm64 systems


def aligned(nbytes: int, what: str = "activations") -> Tensor:
    """Allocate ``nbytes`` zeroed bytes at a multiple of `ALIGNMENT`, uint8 [nbytes].

    Large allocations begin with a large page, which the system is asked for: a step reads all weights once, and has to
    translate the address of each page. ``what`` names the memory in the error.
    """
    large = nbytes >= LARGE_PAGE
    alignment = LARGE_PAGE if large else ALIGNMENT
    try:
        raw = torch.zeros(nbytes + alignment, dtype=torch.uint8, device="cpu")
    except RuntimeError as e:
        raise BackendError(
            f"backend 'native' needs {nbytes} bytes ({nbytes / 2**30:.1f} GiB) for {what}, which this machine does not "
            "have free; ask for smaller images or a smaller batch_size"
        ) from e
    memory = raw[-raw.data_ptr() % alignment :][:nbytes]
    native = extension()
    if large and native is not None:
        native.prefer_large_pages(memory.numpy())
    return memory


def array(tensor: Tensor) -> Any:
    """Return a tensor's memory as NumPy's array, bfloat16 as int16; of a tensor on "meta" its shape alone.

    PyTorch does not free or move the storage of a tensor that NumPy shares, as `Tensor.resize_` would.
    """
    if tensor.is_meta:
        return tuple(tensor.shape)
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
