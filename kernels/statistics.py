"""Statistics of a tensor whose producer could not emit them: per row, strip of pixel rows and channel."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core.program import STRIP
from fastdiff.kernels.launch import Config, Launch, cdiv, choose, device_of, fill, name_of, operation, wide


@dataclasses.dataclass(frozen=True)
class StatisticsConfig(Config):
    """A program takes a strip of ``channels``, ``pixels`` at a time."""

    pixels: int
    channels: int


# Never below 32 channels: 64 bytes of bfloat16, two sectors of a cache line.
CANDIDATES = (
    StatisticsConfig(num_warps=8, num_stages=2, pixels=32, channels=256),
    StatisticsConfig(num_warps=4, num_stages=2, pixels=32, channels=128),
    StatisticsConfig(num_warps=4, num_stages=2, pixels=64, channels=64),
    StatisticsConfig(num_warps=4, num_stages=2, pixels=64, channels=32),
)


@triton.jit
def _statistics(
    x, statistics, height, width, C, STRIP: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Tile by tile, merged with what came before (Chan, Golub & LeVeque 1979, eqs. 2.1):

        d = mean_t - mean;   mean' = mean + d n_t / (n + n_t);   squares' = squares + squares_t + d^2 n n_t / (n + n_t)

    of differences from the strip's first pixel, so that a large mean costs no digits. Grid: (rows strips, channel
    blocks).
    """
    strips = tl.cdiv(height, STRIP)
    row, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.minimum(STRIP, height - strip * STRIP) * width
    begin = x + (row * height + strip * STRIP).to(tl.int64) * width * C + c[None, :]
    origin = tl.load(begin, mask=(c < C)[None, :], other=0.0).to(tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for done in range(0, count, PIXELS):
        p = (done + tl.arange(0, PIXELS))[:, None]
        mask = (p < count) & (c < C)[None, :]
        tile = tl.where(mask, tl.load(begin + p * C, mask=mask, other=0.0).to(tl.float32) - origin, 0.0)
        here = tl.minimum(PIXELS, count - done).to(tl.float32)
        tile_mean = tl.sum(tile, axis=0) / here
        off = tl.where(mask, tile - tile_mean[None, :], 0.0)
        d = tile_mean - mean
        share = here / (done + here)
        mean += d * share
        squares += tl.sum(off * off, axis=0) + d * d * (done * share)
    at = statistics + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(at, mean + tl.reshape(origin, [CHANNELS]), mask=c < C)
    tl.store(at + C, squares, mask=c < C)


@operation
def statistics(x: Tensor, statistics: Tensor, *, config: StatisticsConfig | None = None) -> Launch:
    """statistics float32 [rows, strips, 2, C] of x [rows, H, W, C].

    The configuration depends on the shape of a row alone, so that a row's bits do not depend on the batch.
    """
    rows, H, W, C = x.shape
    strips = cdiv(H, STRIP)
    assert statistics.shape == (rows, strips, 2, C)
    device = device_of(x)
    key = f"{H}x{W}x{C} {name_of(x.dtype)}"
    config = config or choose(
        "statistics", key, device, CANDIDATES,
        lambda: fill(CANDIDATES, lambda config: strips * cdiv(C, config.channels), device),
    )  # fmt: skip
    return Launch(
        op="statistics",
        key=key,
        kernel=_statistics,
        grid=(rows * strips, cdiv(C, config.channels)),
        arguments={
            "x": x, "statistics": statistics, "height": H, "width": W, "C": C,
            "STRIP": STRIP, "PIXELS": config.pixels, "CHANNELS": config.channels,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(statistics_reference, x, statistics),
    )  # fmt: skip


def statistics_reference(x: Tensor, statistics: Tensor) -> None:
    for i, part in enumerate(wide(x).split(STRIP, dim=1)):
        mean = part.mean(dim=(1, 2))
        squares = ((part - mean[:, None, None]) ** 2).sum(dim=(1, 2))
        statistics[:, i] = torch.stack([mean, squares], dim=1)
