"""Reading one or two sources as if they were concatenated along the channels, and applying a norm while they are read.

Parts of kernels, not kernels; the references are ``torch.cat`` and `normalised_reference`.
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
    """float32 [pixels, channels]: channels ``c`` of [first, second] at ``pixel`` (counted over all rows, int64).

    mask: [pixels, 1], which exist. Channels past both are not read.
    """
    p, c = pixel[:, None], c[None, :]
    x = tl.load(first + p * C0 + c, mask=mask & (c < C0), other=0.0).to(tl.float32)
    if TWO:
        inside = (c >= C0) & (c < C0 + C1)
        x = tl.where(c < C0, x, tl.load(second + p * C1 + (c - C0), mask=mask & inside, other=0.0).to(tl.float32))
    return x


@triton.jit
def read_norm(norm, row, c, C):
    """(centre, scale, shift), [1, channels] each, of channels ``c`` in norm [rows, 3, C]."""
    at = norm + row.to(tl.int64) * 3 * C + c
    mask = c < C
    centre = tl.load(at, mask=mask, other=0.0)
    scale = tl.load(at + C, mask=mask, other=0.0)
    shift = tl.load(at + 2 * C, mask=mask, other=0.0)
    return centre[None, :], scale[None, :], shift[None, :]


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def normalised(x, centre, scale, shift, SILU: tl.constexpr):
    """y = (x - centre) scale + shift, then silu(y).

    Not x scale + (shift - centre scale): the centre may be large, and the difference is exact where it matters.
    """
    y = (x - centre) * scale + shift
    if SILU:
        y = silu(y)
    return y


def normalised_reference(src: Sequence[Tensor], norm: Tensor | None, act: bool) -> Tensor:
    """The concatenated sources [rows, H, W, C], normalised, at least in float32. norm: [rows, 3, C]."""
    x = torch.cat([wide(s) for s in src], dim=3)
    if norm is not None:
        centre, scale, shift = norm[:, :, None, None].unbind(1)
        x = (x - centre) * scale + shift
    return F.silu(x) if act else x
