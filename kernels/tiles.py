"""Tiles of an NHWC map: which pixels they hold, and how kernels finish them and compute their statistics.

A *block* is ``height`` by ``width`` pixels within one strip (`fastdiff.core.program.STRIP` rows of pixels) of one row
of the batch. A tile is a whole number of blocks. The statistics of a block therefore belong to one row and one strip.
If a block is as wide as the map they are the strip's statistics; otherwise they are a *part* of them. The norm that
reads them merges all blocks of a row (`fastdiff.kernels.norm.moments`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core.program import STRIP
from fastdiff.kernels.launch import cdiv, power_of_two, row_vectors, wide

PHASES = 4  # combinations of even and odd rows and columns of an upsampled map


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Division of a map into blocks; each phase of an upsampled map is divided by itself."""

    H: int  # size of the map, or of one of its phases
    W: int
    height: int  # size of a block
    width: int
    phases: int  # 1, or PHASES of an upsampled map

    @classmethod
    def of(cls, H: int, W: int, pixels: int, upsample: bool = False) -> Blocks:
        """Choose blocks of at most ``pixels`` pixels.

        They are as wide as the map if that is possible. Otherwise their width is the one, of at least 8 columns if
        ``pixels`` allows it, that leaves the fewest pixels outside the map.
        """
        height = min(STRIP // 2 if upsample else STRIP, power_of_two(H), pixels)
        width = min(pixels // height, power_of_two(W))
        if width < power_of_two(W):
            widths = [w for w in (1 << i for i in range(width.bit_length())) if w >= min(8, width)]
            width = min(widths, key=lambda w: (cdiv(W, w) * w, -w))
        return cls(H, W, height, width, PHASES if upsample else 1)

    @property
    def pixels(self) -> int:
        """Number of pixels of a block."""
        return self.height * self.width

    @property
    def strips(self) -> int:
        """Number of strips of the map."""
        return cdiv(self.H, self.height)

    @property
    def columns(self) -> int:
        """Number of blocks side by side."""
        return cdiv(self.W, self.width)

    @property
    def parts(self) -> int:
        """Number of parts of a strip's statistics."""
        return self.columns * self.phases

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole map."""
        scale = 2 if self.phases == PHASES else 1
        return scale * self.H, scale * self.W

    def count(self, rows: int) -> int:
        """Return the number of blocks of each phase in ``rows`` maps."""
        return rows * self.strips * self.columns

    def counts(self, like: Tensor) -> Tensor:
        """Return the number of pixels of every part of every strip, [strips parts], as a tensor like ``like``."""
        height = torch.arange(0, self.H, self.height, dtype=like.dtype, device=like.device)
        width = torch.arange(0, self.W, self.width, dtype=like.dtype, device=like.device)
        height, width = (self.H - height).clamp(max=self.height), (self.W - width).clamp(max=self.width)
        return (height[:, None] * width.repeat_interleave(self.phases)).flatten()


@triton.jit
def pixels(tile, rows, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return (row, y, x, exists) of the ``SIZE`` pixels of a tile, block by block. H, W: size of the map or phase."""
    i = tl.arange(0, SIZE)
    block = tile * (SIZE // (HEIGHT * WIDTH)) + i // (HEIGHT * WIDTH)
    columns, strips = tl.cdiv(W, WIDTH), tl.cdiv(H, HEIGHT)
    row = block // (strips * columns)
    y = block // columns % strips * HEIGHT + i // WIDTH % HEIGHT
    x = block % columns * WIDTH + i % WIDTH
    return row, y, x, (row < rows) & (y < H) & (x < W)


@triton.jit
def finish(
    acc, tile, row, y, x, exists, c, phase,
    dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
    PHASES: tl.constexpr, SHIFT: tl.constexpr, NCHW: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store dst = (acc + bias + table[entry] + residual) factor, and its statistics, block by block.

    acc is float32 [SIZE, CHANNELS]; row, y, x and exists are those of `pixels`; c are the channels. Pixel (y, x) of
    phase p is pixel (2 y + p // 2, 2 x + p % 2) of dst. The statistics [rows, strips, parts, 2, N] are the mean of each
    block and the sum of squared deviations from it, before dst is rounded. Parts are ordered by column, then by phase.
    """
    block: tl.constexpr = HEIGHT * WIDTH
    number: tl.constexpr = SIZE // block
    known = c < N
    acc += tl.load(bias + c, mask=known, other=0.0)[None, :]
    blocks = tile * number + tl.arange(0, number)
    per_row = tl.cdiv(H, HEIGHT) * tl.cdiv(W, WIDTH)
    at = blocks // per_row
    there = (at < rows)[:, None] & known[None, :]
    if table is not None:
        vector = at.to(tl.int64)
        if entry is not None:
            vector = tl.load(entry + at, mask=at < rows, other=0)
        e = tl.load(table + vector[:, None] * stride + offset + c[None, :], mask=there, other=0.0).to(tl.float32)
        e = tl.broadcast_to(tl.reshape(e, [number, 1, CHANNELS]), [number, block, CHANNELS])
        acc += tl.reshape(e, [SIZE, CHANNELS])
    if PHASES == 4:
        H *= 2
        W *= 2
        y = 2 * y + phase // 2
        x = 2 * x + phase % 2
    mask = exists[:, None] & known[None, :]
    if residual is not None:
        pixel = (row.to(tl.int64) * (H >> SHIFT) + (y >> SHIFT)) * (W >> SHIFT) + (x >> SHIFT)
        acc += tl.load(residual + pixel[:, None] * N + c[None, :], mask=mask, other=0.0).to(tl.float32)
    acc *= factor
    pixel = (row.to(tl.int64) * H + y) * W + x
    if NCHW:
        # (row N + c) H W + y W + x
        to = dst + (pixel + row.to(tl.int64) * (N - 1) * H * W)[:, None] + (c * (H * W))[None, :]
    else:
        to = dst + pixel[:, None] * N + c[None, :]
    tl.store(to, acc.to(dst.dtype.element_ty), mask=mask)
    if statistics is not None:
        inside = tl.reshape(exists, [number, block, 1])
        count = tl.sum(inside.to(tl.float32), axis=1)
        values = tl.reshape(acc, [number, block, CHANNELS])
        mean = tl.sum(tl.where(inside, values, 0.0), axis=1) / tl.maximum(count, 1.0)
        off = tl.where(inside, values - tl.reshape(mean, [number, 1, CHANNELS]), 0.0)
        squares = tl.sum(off * off, axis=1)
        part = blocks * PHASES + phase
        to = statistics + part.to(tl.int64)[:, None] * 2 * N + c[None, :]
        tl.store(to, mean, mask=there)
        tl.store(to + N, squares, mask=there)


def finish_arguments(
    bias: Tensor, H: int, nchw: bool, table: Tensor | None, entry: Tensor | None, offset: int,
    residual: Tensor | None, divide: float, statistics: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of `finish` under the names that kernels have for them. H: height of dst."""
    return {
        "bias": bias, "table": table, "entry": entry, "residual": residual, "statistics": statistics,
        "offset": offset, "stride": 0 if table is None else table.stride(0), "factor": 1.0 / divide,
        "SHIFT": int(residual is not None and residual.shape[1] != H), "NCHW": nchw,
    }  # fmt: skip


def finished(
    h: Tensor, bias: Tensor, table: Tensor | None, entry: Tensor | None, offset: int, residual: Tensor | None,
    divide: float,
) -> Tensor:  # fmt: skip
    """Compute (h + bias + table[entry, offset:] + residual) / divide in torch, with h [rows, H, W, N]."""
    h = h + wide(bias)
    if table is not None:
        h = h + wide(row_vectors(table, entry, offset))[:, None, None, : h.shape[3]]
    if residual is not None:
        residual = wide(residual)
        if residual.shape[1] != h.shape[1]:
            residual = residual.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        h = h + residual
    return h / divide


def finish_reference(
    h: Tensor, bias: Tensor, dst: Tensor, nchw: bool, table: Tensor | None, entry: Tensor | None, offset: int,
    residual: Tensor | None, divide: float, statistics: Tensor | None, blocks: Blocks,
) -> None:  # fmt: skip
    """Finish h [rows, H, W, N], which is at least float32, as `finish` does, in torch."""
    h = finished(h, bias, table, entry, offset, residual, divide)
    dst.copy_(h.permute(0, 3, 1, 2) if nchw else h)
    if statistics is None:
        return
    for phase in range(blocks.phases):
        of_phase = h[:, phase // 2 :: 2, phase % 2 :: 2] if blocks.phases == PHASES else h
        for i, strip in enumerate(of_phase.split(blocks.height, dim=1)):
            for j, block in enumerate(strip.split(blocks.width, dim=2)):
                mean = block.mean(dim=(1, 2))
                squares = ((block - mean[:, None, None]) ** 2).sum(dim=(1, 2))
                statistics[:, i, j * blocks.phases + phase] = torch.stack([mean, squares], dim=1)
