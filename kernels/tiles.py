"""Tiles of an NHWC map whose columns have their statistics: where their pixels are, and how they are finished.

A *block* is ``height`` by ``width`` pixels inside one strip of `fastdiff.core.program.STRIP` rows of pixels of one row
of the batch; a tile is as many blocks as it holds. So every sum over a block is of one row and one strip, and where a
block is as wide as the map its statistics are the strip's. Otherwise they are a *part*, which
`fastdiff.kernels.epilogue.combine` merges with the strip's others.
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

PHASES = 4  # of an upsampled map: even and odd rows and columns


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a map of H x W pixels is cut; of an upsampled one, each of its phases, of H x W pixels as well."""

    H: int
    W: int
    height: int
    width: int
    phases: int

    @classmethod
    def of(cls, H: int, W: int, pixels: int, upsample: bool = False) -> Blocks:
        """Blocks of at most ``pixels``: as wide as the map, else as few pixels beside it as 8 or more columns allow."""
        height = min(STRIP // 2 if upsample else STRIP, power_of_two(H), pixels)
        width = min(pixels // height, power_of_two(W))
        if width < power_of_two(W):
            widths = [w for w in (1 << i for i in range(width.bit_length())) if w >= min(8, width)]
            width = min(widths, key=lambda w: (cdiv(W, w) * w, -w))
        return cls(H, W, height, width, PHASES if upsample else 1)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def strips(self) -> int:
        return cdiv(self.H, self.height)

    @property
    def columns(self) -> int:
        return cdiv(self.W, self.width)

    @property
    def parts(self) -> int:
        """Of a strip's statistics."""
        return self.columns * self.phases

    def count(self, rows: int) -> int:
        """Of blocks, in each phase."""
        return rows * self.strips * self.columns


@triton.jit
def pixels(tile, rows, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """(row, y, x, exists) of the tile's ``SIZE`` pixels, block by block; H, W: of the map, or of a phase of it."""
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
    """dst = (acc + bias + table[entry] + residual) factor, and the statistics of that, block by block.

    acc: float32 [SIZE, CHANNELS]. row, y, x, exists: of `pixels`; c: the channels. Of phase p, pixel (y, x) is
    (2 y + p // 2, 2 x + p % 2) of dst. Statistics are of what dst would hold in float32: per block its mean, then the
    sum of squared deviations from that. [rows, strips, parts, 2, N], parts by column and then by phase.
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
    """Arguments of `finish`, as kernels name them; H: of dst."""
    return {
        "bias": bias, "table": table, "entry": entry, "residual": residual, "statistics": statistics,
        "offset": offset, "stride": 0 if table is None else table.stride(0), "factor": 1.0 / divide,
        "SHIFT": int(residual is not None and residual.shape[1] != H), "NCHW": nchw,
    }  # fmt: skip


def finish_reference(
    h: Tensor, bias: Tensor, dst: Tensor, nchw: bool, table: Tensor | None, entry: Tensor | None, offset: int,
    residual: Tensor | None, divide: float, statistics: Tensor | None, blocks: Blocks,
) -> None:  # fmt: skip
    """`finish` of h [rows, H, W, N], which is at least float32."""
    h = h + wide(bias)
    if table is not None:
        h = h + wide(row_vectors(table, entry, offset))[:, None, None, : h.shape[3]]
    if residual is not None:
        residual = wide(residual)
        if residual.shape[1] != h.shape[1]:
            residual = residual.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        h = h + residual
    h = h / divide
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
