"""Functions with which kernels read one or two sources, concatenated along the channels, and normalise them.

The references are ``torch.cat`` and `normalised_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.launch import wide


@triton.jit
def read(first, second, pixel, c, mask, C0, C1, TWO: tl.constexpr):
    """Read channels ``c`` of the concatenation of first and second at the pixels ``pixel``, as float32.

    pixel: int64 [pixels], counted across all rows; mask: [pixels, 1], the pixels that exist. Channels past those of
    both sources are not read. Returns [pixels, channels].
    """
    p, c = pixel[:, None], c[None, :]
    x = tl.load(first + p * C0 + c, mask=mask & (c < C0), other=0.0).to(tl.float32)
    if TWO:
        inside = (c >= C0) & (c < C0 + C1)
        x = tl.where(c < C0, x, tl.load(second + p * C1 + (c - C0), mask=mask & inside, other=0.0).to(tl.float32))
    return x


@triton.jit
def read_norm(norm, row, c, C):
    """Read (centre, scale, shift), each [1, channels], of channels ``c`` from norm [rows, 3, C]."""
    at = norm + row.to(tl.int64) * 3 * C + c
    mask = c < C
    centre = tl.load(at, mask=mask, other=0.0)
    scale = tl.load(at + C, mask=mask, other=0.0)
    shift = tl.load(at + 2 * C, mask=mask, other=0.0)
    return centre[None, :], scale[None, :], shift[None, :]


@triton.jit
def silu(x):
    """Return x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def normalised(x, centre, scale, shift, SILU: tl.constexpr):
    """Return y = (x - centre) scale + shift, or silu(y).

    This is not computed as x scale + (shift - centre scale): if the centre is large, that loses precision, whereas
    x - centre is exact for x near the centre.
    """
    y = (x - centre) * scale + shift
    if SILU:
        y = silu(y)
    return y


def normalised_reference(src: Sequence[Tensor], norm: Tensor | None, act: bool) -> Tensor:
    """Concatenate the sources [rows, H, W, C_i] and normalise them with norm [rows, 3, C], at least in float32."""
    x = torch.cat([wide(s) for s in src], dim=3)
    if norm is not None:
        centre, scale, shift = norm[:, :, None, None].unbind(1)
        x = (x - centre) * scale + shift
    return F.silu(x) if act else x
