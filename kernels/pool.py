"""The operation `fastdiff.core.program.Pool`: the mean over 2 x 2 pixels of norm(src)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap, sources
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation


@dataclasses.dataclass(frozen=True)
class PoolConfig(Config):
    """Tile size: ``pixels`` by ``channels`` of the result per program."""

    pixels: int
    channels: int


CANDIDATES = (
    PoolConfig(num_warps=8, num_stages=1, pixels=16, channels=128),  # with 4 warps Triton 3.6 spills in float32
    PoolConfig(num_warps=4, num_stages=1, pixels=16, channels=64),
    PoolConfig(num_warps=1, num_stages=1, pixels=8, channels=32),
)


@overlap.overlaps
@triton.jit
def _pool(
    first, second, norm, dst, height, width, C0, C1,
    TWO: tl.constexpr, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst, which has ``height`` by ``width`` pixels. Grid: (pixel blocks, channel blocks, rows)."""
    overlap.wait()
    row = tl.program_id(2).to(tl.int64)
    C = C0 + C1
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (p < height * width)[:, None]
    if norm is not None:
        centre, scale, shift = sources.read_norm(norm, row, c, C)
    corner = (row * 2 * height + p // width * 2) * 2 * width + p % width * 2
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for i in tl.static_range(4):
        x = sources.read(first, second, corner + (i // 2) * 2 * width + i % 2, c, mask, C0, C1, TWO)
        if norm is not None:
            x = sources.normalised(x, centre, scale, shift, SILU)
        total += x
    at = dst + (row * height * width + p)[:, None] * C + c[None, :]
    tl.store(at, (total * 0.25).to(dst.dtype.element_ty), mask=mask & (c < C)[None, :])


@operation
def pool(
    src: Sequence[Tensor],
    dst: Tensor,
    *,
    norm: Tensor | None = None,
    silu: bool = False,
    chosen_for: int | None = None,
    config: PoolConfig | None = None,
) -> Launch:
    """Compute dst = means over 2 x 2 pixels of the sources, which are normalised before.

    One or two sources [rows, 2 H, 2 W, C_i] are concatenated. norm is float32 [rows, 3, C] of
    `fastdiff.kernels.norm.finalise`; None: no norm.
    """
    rows, H, W, C = dst.shape
    C0, C1 = src[0].shape[3], src[1].shape[3] if len(src) == 2 else 0
    assert C == C0 + C1
    assert all(s.shape[1:3] == (2 * H, 2 * W) for s in src)
    assert norm is not None or not silu
    like = chosen_for or rows
    key = f"{like}x{H}x{W}x{C0}+{C1} {name_of(src[0].dtype)} {name_of(dst.dtype)}"
    config = config or choose_filling(
        "pool", key, dst, CANDIDATES, lambda config: like * cdiv(H * W, config.pixels) * cdiv(C, config.channels),
        lambda config: config.channels < 2 * C,
    )  # fmt: skip
    return Launch(
        op="pool",
        key=key,
        kernel=_pool,
        grid=(cdiv(H * W, config.pixels), cdiv(C, config.channels), rows),
        arguments={
            "first": src[0], "second": src[1] if C1 else None, "norm": norm, "dst": dst, "height": H, "width": W,
            "C0": C0, "C1": C1, "TWO": C1 > 0, "SILU": silu, "PIXELS": config.pixels, "CHANNELS": config.channels,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(pool_reference, src, dst, norm, silu),
    )  # fmt: skip


def pool_reference(src: Sequence[Tensor], dst: Tensor, norm: Tensor | None, silu: bool) -> None:
    """Compute dst = means over 2 x 2 pixels of silu(norm(src)) in torch."""
    h = sources.normalised_reference(src, norm, silu)
    dst.copy_((h[:, ::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, ::2] + h[:, 1::2, 1::2]) / 4)
