"""GroupNorm over one or two sources (Wu & He 2018), as two operations.

`finalise` turns the statistics of the sources into (centre, scale, shift) of every channel. `apply` normalises the
sources with these, and writes one NHWC tensor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core.program import STRIP
from fastdiff.kernels import sources
from fastdiff.kernels.launch import (
    Config,
    Launch,
    cdiv,
    choose,
    choose_filling,
    device_of,
    name_of,
    operation,
    power_of_two,
    row_vectors,
    wide,
)

# Finalise -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinaliseConfig(Config):
    """Tile size: one group of a row per program, in iterations over about ``elements`` of its statistics."""

    elements: int


FINALISE_CANDIDATES = (
    FinaliseConfig(num_warps=1, num_stages=1, elements=256),
    FinaliseConfig(num_warps=4, num_stages=1, elements=1024),
)


@triton.jit
def _either(first, second, strip, c, mask, C0, C1, TWO: tl.constexpr):
    """Read [strips, channels] from the concatenation of statistics [strips, 2, C0] and [strips, 2, C1].

    This reads means; pointers moved on by C0 and C1 give the squares.
    """
    v = tl.load(first + strip * 2 * C0 + c, mask=mask & (c < C0), other=0.0)
    if TWO:
        v = tl.where(c < C0, v, tl.load(second + strip * 2 * C1 + (c - C0), mask=mask & (c >= C0), other=0.0))
    return v


@triton.jit
def _finalise(
    first, second, gamma, beta, table, entry, norm, height, width, C0, C1, size, total, eps, offset, stride,
    STRIP: tl.constexpr, TWO: tl.constexpr, STRIPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Compute norm of one group of one row, as `finalise` describes it. Grid: (rows, groups).

    total: number of values in a group. table None: there is no modulation; entry None: row i reads entry i.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    C = C0 + C1
    strips = tl.cdiv(height, STRIP)
    first += row * strips * 2 * C0
    if TWO:
        second += row * strips * 2 * C1
    i = tl.arange(0, SIZE)
    c = (group * size + i)[None, :]
    # Means are summed as differences from one of them, so that a large mean costs no precision.
    origin = tl.sum(tl.sum(_either(first, second, 0, c, i[None, :] == 0, C0, C1, TWO), axis=1), axis=0)
    sums = tl.zeros([STRIPS, SIZE], tl.float32)
    for begin in range(0, strips, STRIPS):
        s = (begin + tl.arange(0, STRIPS))[:, None]
        mask = (s < strips) & (i < size)[None, :]
        count = (tl.minimum(STRIP, height - s * STRIP) * width).to(tl.float32)
        mean = _either(first, second, s, c, mask, C0, C1, TWO)
        sums += tl.where(mask, count * (mean - origin), 0.0)
    centre = origin + tl.sum(tl.sum(sums, axis=1), axis=0) / total
    sums = tl.zeros([STRIPS, SIZE], tl.float32)
    for begin in range(0, strips, STRIPS):
        s = (begin + tl.arange(0, STRIPS))[:, None]
        mask = (s < strips) & (i < size)[None, :]
        count = (tl.minimum(STRIP, height - s * STRIP) * width).to(tl.float32)
        d = _either(first, second, s, c, mask, C0, C1, TWO) - centre
        squares = _either(first + C0, second + C1 if TWO else second, s, c, mask, C0, C1, TWO)
        sums += tl.where(mask, squares + count * d * d, 0.0)
    var = tl.sum(tl.sum(sums, axis=1), axis=0) / total

    c = group * size + i
    mask = i < size
    scale = tl.load(gamma + c, mask=mask, other=0.0) / tl.sqrt_rn(var + eps)
    shift = tl.load(beta + c, mask=mask, other=0.0)
    if table is not None:
        at = row
        if entry is not None:
            at = tl.load(entry + row)
        modulation = table + at * stride + offset + c
        more = 1.0 + tl.load(modulation, mask=mask, other=0.0).to(tl.float32)
        scale *= more
        shift = shift * more + tl.load(modulation + C, mask=mask, other=0.0).to(tl.float32)
    at = norm + row * 3 * C + c
    tl.store(at, tl.zeros([SIZE], tl.float32) + centre, mask=mask)
    tl.store(at + C, scale, mask=mask)
    tl.store(at + 2 * C, shift, mask=mask)


@operation
def finalise(
    statistics: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    norm: Tensor,
    *,
    height: int,
    width: int,
    groups: int,
    eps: float,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    config: FinaliseConfig | None = None,
) -> Launch:
    """Compute norm = (mean, gamma / sqrt(var + eps) (1 + m), beta (1 + m) + b) of every channel.

    mean and var are those of the channel's group, which may span both sources of ``height`` by ``width`` pixels, from
    their statistics, float32 [rows, strips, 2, C_i]. norm is float32 [rows, 3, C].

    m and b are the modulation of the row: in table [entries, width] the columns from ``offset`` on have m and then b, C
    numbers each; without a table, both are 0. entry, int64 [rows], is the entry of each row; None: row i reads entry i.
    """
    rows, _, C = norm.shape
    C0 = statistics[0].shape[3]
    C1 = statistics[1].shape[3] if len(statistics) == 2 else 0
    assert C == C0 + C1
    assert C % groups == 0
    size, strips = C // groups, cdiv(height, STRIP)
    key = f"{height}x{width}x{C0}+{C1}/{groups}"
    config = config or choose(
        "norm.finalise", key, device_of(norm), FINALISE_CANDIDATES,
        lambda: FINALISE_CANDIDATES[strips * power_of_two(size) > FINALISE_CANDIDATES[0].elements],
    )  # fmt: skip
    block = power_of_two(size)
    return Launch(
        op="norm.finalise",
        key=key,
        kernel=_finalise,
        grid=(rows, groups),
        arguments={
            "first": statistics[0], "second": statistics[1] if C1 else None, "gamma": gamma, "beta": beta,
            "table": table, "entry": entry, "norm": norm, "height": height, "width": width, "C0": C0, "C1": C1,
            "size": size, "total": float(height * width * size), "eps": eps, "offset": offset,
            "stride": 0 if table is None else table.stride(0),
            "STRIP": STRIP, "TWO": C1 > 0, "STRIPS": min(power_of_two(strips), max(1, config.elements // block)),
            "SIZE": block,
        },
        config=config,
        candidates=FINALISE_CANDIDATES,
        reference=functools.partial(
            finalise_reference, statistics, gamma, beta, norm, height, width, groups, eps, table, entry, offset
        ),
    )  # fmt: skip


def finalise_reference(
    statistics: Sequence[Tensor], gamma: Tensor, beta: Tensor, norm: Tensor, height: int, width: int, groups: int,
    eps: float, table: Tensor | None, entry: Tensor | None, offset: int,
) -> None:  # fmt: skip
    """Compute norm, as `finalise` describes it, in torch."""
    rows, _, C = norm.shape
    mean, squares = torch.cat(list(statistics), dim=3).unflatten(3, (groups, C // groups)).unbind(2)
    count = torch.tensor(
        [min(STRIP, height - y) * width for y in range(0, height, STRIP)], dtype=mean.dtype, device=mean.device
    ).view(1, -1, 1, 1)
    total = height * width * C // groups
    origin = mean[:, :1, :, :1]
    centre = origin + (count * (mean - origin)).sum(dim=(1, 3), keepdim=True) / total
    var = (squares + count * (mean - centre) ** 2).sum(dim=(1, 3), keepdim=True) / total
    centre, rstd = (v.expand(-1, 1, -1, C // groups).reshape(rows, C) for v in (centre, 1 / (var + eps).sqrt()))
    scale, shift = gamma * rstd, beta.expand(rows, -1)
    if table is not None:
        vectors = wide(row_vectors(table, entry, offset))
        scale = scale * (1 + vectors[:, :C])
        shift = shift * (1 + vectors[:, :C]) + vectors[:, C : 2 * C]
    norm.copy_(torch.stack([centre, scale, shift], dim=1))


# Apply ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ApplyConfig(Config):
    """Tile size: ``pixels`` by ``channels`` per program."""

    pixels: int
    channels: int


# Largest tiles first. No tile has fewer than 32 channels: 64 bytes of bfloat16, two sectors of a cache line.
APPLY_CANDIDATES = (
    ApplyConfig(num_warps=8, num_stages=1, pixels=32, channels=256),
    ApplyConfig(num_warps=4, num_stages=1, pixels=32, channels=128),
    ApplyConfig(num_warps=4, num_stages=1, pixels=16, channels=128),
    ApplyConfig(num_warps=4, num_stages=1, pixels=16, channels=64),
    ApplyConfig(num_warps=2, num_stages=1, pixels=8, channels=64),
    ApplyConfig(num_warps=1, num_stages=1, pixels=8, channels=32),
)


@triton.jit
def _apply(
    first, second, norm, dst, pixels, C0, C1,
    TWO: tl.constexpr, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst. Grid: (pixel blocks, channel blocks, rows)."""
    row = tl.program_id(2).to(tl.int64)
    C = C0 + C1
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (p < pixels)[:, None]
    centre, scale, shift = sources.read_norm(norm, row, c, C)
    pixel = row * pixels + p
    x = sources.read(first, second, pixel, c, mask, C0, C1, TWO)
    y = sources.normalised(x, centre, scale, shift, SILU)
    tl.store(dst + pixel[:, None] * C + c[None, :], y.to(dst.dtype.element_ty), mask=mask & (c < C)[None, :])


@operation
def apply(
    src: Sequence[Tensor],
    norm: Tensor,
    dst: Tensor,
    *,
    silu: bool,
    chosen_for: int | None = None,
    config: ApplyConfig | None = None,
) -> Launch:
    """Compute dst = (x - centre) scale + shift, or silu of that, where x is the concatenation of the sources.

    There are one or two sources [rows, H, W, C_i]; norm is (centre, scale, shift), float32 [rows, 3, C] of `finalise`.
    """
    rows, H, W, C = dst.shape
    C0, C1 = src[0].shape[3], src[1].shape[3] if len(src) == 2 else 0
    assert C == C0 + C1
    assert norm.shape == (rows, 3, C)
    like = chosen_for or rows
    key = f"{like}x{H}x{W}x{C0}+{C1} {name_of(src[0].dtype)} {name_of(dst.dtype)}"
    config = config or choose_filling(
        "norm.apply", key, dst, APPLY_CANDIDATES,
        lambda config: like * cdiv(H * W, config.pixels) * cdiv(C, config.channels),
        lambda config: config.channels < 2 * C,
    )  # fmt: skip
    return Launch(
        op="norm.apply",
        key=key,
        kernel=_apply,
        grid=(cdiv(H * W, config.pixels), cdiv(C, config.channels), rows),
        arguments={
            "first": src[0], "second": src[1] if C1 else None, "norm": norm, "dst": dst, "pixels": H * W, "C0": C0,
            "C1": C1, "TWO": C1 > 0, "SILU": silu, "PIXELS": config.pixels, "CHANNELS": config.channels,
        },
        config=config,
        candidates=APPLY_CANDIDATES,
        reference=functools.partial(apply_reference, src, norm, dst, silu),
    )  # fmt: skip


def apply_reference(src: Sequence[Tensor], norm: Tensor, dst: Tensor, silu: bool) -> None:
    """Compute dst = silu(norm(src)) in torch."""
    dst.copy_(sources.normalised_reference(src, norm, silu))
