"""Operations after a product: `finish` adds bias, embedding and residual, and `combine` merges parts of statistics.

`finish` follows products of a library (`fastdiff.kernels.library`) and products that are split among programs
(`fastdiff.kernels.conv.partial`).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import tiles
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation, power_of_two, wide
from fastdiff.kernels.tiles import Blocks

# Finish ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinishConfig(Config):
    """Tile size: ``pixels`` by ``channels`` per program."""

    pixels: int
    channels: int


# Largest tiles first. A strip of a map of at most 16 columns fits into one tile, so that its statistics need no second
# launch.
FINISH_CANDIDATES = (
    FinishConfig(num_warps=8, num_stages=1, pixels=128, channels=64),
    FinishConfig(num_warps=4, num_stages=1, pixels=64, channels=64),
    FinishConfig(num_warps=4, num_stages=1, pixels=64, channels=32),
)


@triton.jit(do_not_specialize=["rows"])
def _finish(
    sums, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
    SPLITS: tl.constexpr, SHIFT: tl.constexpr, NCHW: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst and its statistics. Grid: (tiles of pixels, blocks of channels)."""
    tile = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, y, x, exists = tiles.pixels(tile, rows, H, W, HEIGHT, WIDTH, SIZE)
    mask = exists[:, None] & (c < N)[None, :]
    at = sums + ((row.to(tl.int64) * H + y) * W + x)[:, None] * N + c[None, :]
    acc = tl.zeros([SIZE, CHANNELS], tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at += rows.to(tl.int64) * H * W * N
    tiles.finish(
        acc, tile, row, y, x, exists, c, 0, dst, bias, table, entry, residual, statistics,
        rows, H, W, N, offset, stride, factor, 1, SHIFT, NCHW, HEIGHT, WIDTH, SIZE, CHANNELS,
    )  # fmt: skip


@operation
def finish(
    sums: Tensor,
    bias: Tensor,
    dst: Tensor,
    *,
    nchw: bool = False,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    residual: Tensor | None = None,
    divide: float = 1.0,
    statistics: Tensor | None = None,
    chosen_for: int | None = None,
    config: FinishConfig | None = None,
) -> Launch:
    """Compute dst = (sum of sums + bias + table[entry, offset:] + residual) / divide.

    sums [n, rows, H, W, N] are added in order; dst may be the first of them. statistics are [rows, strips, parts, 2, N]
    of the `Blocks` of the configuration; without one, a configuration is chosen that has as many parts. The other
    arguments are those of `fastdiff.kernels.conv.conv`.
    """
    splits, rows, H, W, N = sums.shape
    parts = None if statistics is None else statistics.shape[2]
    candidates = tuple(c for c in FINISH_CANDIDATES if parts in (None, Blocks.of(H, W, c.pixels).parts))
    like = chosen_for or rows
    key = f"{splits}x{like}x{H}x{W}x{N}/{parts or 1} {name_of(sums.dtype)} {name_of(dst.dtype)}"

    def programs(config: FinishConfig) -> int:
        blocks = Blocks.of(H, W, config.pixels)
        return cdiv(blocks.count(like), config.pixels // blocks.pixels) * cdiv(N, config.channels)

    config = config or choose_filling(
        "epilogue.finish", key, sums, candidates, programs, lambda config: config.channels < 2 * N
    )
    blocks = Blocks.of(H, W, config.pixels)
    assert statistics is None or statistics.shape == (rows, blocks.strips, blocks.parts, 2, N)
    return Launch(
        op="epilogue.finish",
        key=key,
        kernel=_finish,
        grid=(cdiv(blocks.count(rows), config.pixels // blocks.pixels), cdiv(N, config.channels)),
        arguments={
            "sums": sums, "dst": dst, "rows": rows, "H": H, "W": W, "N": N, "SPLITS": splits,
            "HEIGHT": blocks.height, "WIDTH": blocks.width, "SIZE": config.pixels, "CHANNELS": config.channels,
        }
        | tiles.finish_arguments(bias, H, nchw, table, entry, offset, residual, divide, statistics),
        config=config,
        candidates=candidates,
        reference=lambda: tiles.finish_reference(
            wide(sums).sum(dim=0), bias, dst, nchw, table, entry, offset, residual, divide, statistics, blocks
        ),
    )  # fmt: skip


# Combine --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CombineConfig(Config):
    """Tile size: the parts of one strip by ``channels`` per program."""

    channels: int


COMBINE_CANDIDATES = (
    CombineConfig(num_warps=4, num_stages=1, channels=128),
    CombineConfig(num_warps=1, num_stages=1, channels=32),
)


@triton.jit
def _combine(
    parts, statistics, H, W, C, strips, number,
    PHASES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the parts p of one strip, of n_p pixels each (Chan, Golub & LeVeque 1979):

        mean = m_0 + sum_p n_p (m_p - m_0) / sum_p n_p,    squares = sum_p squares_p + n_p (m_p - mean)^2

    Differences from the first mean keep a large mean from costing precision. Grid: (rows strips, blocks of channels).
    H, W: size of the map or of a phase; number: parts of a strip.
    """
    strip = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PARTS)
    mask = (p < number)[:, None] & (c < C)[None, :]
    height = tl.minimum(HEIGHT, H - strip % strips * HEIGHT)
    count = (tl.minimum(WIDTH, W - p // PHASES * WIDTH) * height).to(tl.float32)[:, None]
    at = parts + strip.to(tl.int64) * number * 2 * C + c[None, :]
    origin = tl.load(at, mask=(c < C)[None, :], other=0.0)
    off = tl.load(at + p[:, None] * 2 * C, mask=mask, other=0.0) - origin
    off = tl.where(mask, off, 0.0)
    squares = tl.load(at + (2 * p[:, None] + 1) * C, mask=mask, other=0.0)
    total = (height * W * PHASES).to(tl.float32)
    mean = tl.sum(tl.where(mask, count * off, 0.0), axis=0) / total
    off = tl.where(mask, off - mean[None, :], 0.0)
    squares = tl.sum(squares + tl.where(mask, count * off * off, 0.0), axis=0)
    to = statistics + strip.to(tl.int64) * 2 * C + c
    tl.store(to, tl.reshape(origin, [CHANNELS]) + mean, mask=c < C)
    tl.store(to + C, squares, mask=c < C)


@operation
def combine(
    parts: Tensor,
    statistics: Tensor,
    *,
    blocks: Blocks,
    chosen_for: int | None = None,
    config: CombineConfig | None = None,
) -> Launch:
    """Merge the parts [rows, strips, n, 2, C] of ``blocks`` into every strip's statistics [rows, strips, 2, C]."""
    rows, strips, number, _, C = parts.shape
    assert statistics.shape == (rows, strips, 2, C)
    assert (strips, number) == (blocks.strips, blocks.parts)
    like = chosen_for or rows
    key = f"{like}x{strips}x{number}x{C}"
    config = config or choose_filling(
        "epilogue.combine", key, parts, COMBINE_CANDIDATES, lambda config: like * strips * cdiv(C, config.channels),
        lambda config: config.channels < 2 * C,
    )  # fmt: skip
    return Launch(
        op="epilogue.combine",
        key=key,
        kernel=_combine,
        grid=(rows * strips, cdiv(C, config.channels)),
        arguments={
            "parts": parts, "statistics": statistics, "H": blocks.H, "W": blocks.W, "C": C, "strips": strips,
            "number": number, "PHASES": blocks.phases, "HEIGHT": blocks.height, "WIDTH": blocks.width,
            "PARTS": power_of_two(number), "CHANNELS": config.channels,
        },
        config=config,
        candidates=COMBINE_CANDIDATES,
        reference=lambda: combine_reference(parts, statistics, blocks),
    )  # fmt: skip


def combine_reference(parts: Tensor, statistics: Tensor, blocks: Blocks) -> None:
    """Merge the parts of every strip's statistics in torch."""
    heights = torch.tensor(
        [min(blocks.height, blocks.H - y) for y in range(0, blocks.H, blocks.height)], dtype=torch.int64, device="cpu"
    )
    widths = torch.tensor(
        [min(blocks.width, blocks.W - x) for x in range(0, blocks.W, blocks.width)], dtype=torch.int64, device="cpu"
    )
    count = (heights[:, None] * widths.repeat_interleave(blocks.phases)).to(parts)[None, :, :, None]
    means, squares = wide(parts).unbind(3)
    origin = means[:, :, :1]
    total = count.sum(dim=2, keepdim=True)
    mean = origin + (count * (means - origin)).sum(dim=2, keepdim=True) / total
    squares = (squares + count * (means - mean) ** 2).sum(dim=2)
    statistics.copy_(torch.stack([mean[:, :, 0], squares], dim=2))
