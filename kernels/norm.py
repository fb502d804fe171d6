"""GroupNorm over one or two sources (Wu & He 2018) from statistics that the kernels before it have written.

`group_norm` is the whole of it as one kernel, for maps whose statistics are few enough to be read by every program.
`finalise` turns the statistics of the sources into (centre, scale, shift) of every channel, with which `apply`
normalises the sources, and `fastdiff.kernels.pool` what it pools. All but `finalise` write one NHWC tensor.
`fastdiff.kernels.epilogue.normed` normalises small maps without statistics.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap, sources
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
from fastdiff.kernels.tiles import Blocks

# Moments of groups ----------------------------------------------------------------------------------------------------


@triton.jit
def spread(v, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return v [GROUPS] for each of the SIZE channels of its group, [GROUPS SIZE]."""
    return tl.reshape(tl.broadcast_to(tl.reshape(v, [GROUPS, 1]), [GROUPS, SIZE]), [GROUPS * SIZE])


@triton.jit
def over_groups(x, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return the sums of x [pixels, GROUPS SIZE] over pixels and the channels of each group, [GROUPS]."""
    return tl.sum(tl.reshape(tl.sum(x, axis=0), [GROUPS, SIZE]), axis=1)


@triton.jit
def channels(group, C, size: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return the channels of ``GROUPS`` groups of ``size``, from ``group`` on, and whether each of them exists.

    SIZE is size, rounded up to a power of two.
    """
    i = tl.arange(0, GROUPS * SIZE)
    c = (group + i // SIZE) * size + i % SIZE
    exists = c < C
    if size != SIZE:
        exists = exists & (i % SIZE < size)
    return c, exists


@triton.jit
def _sums(
    statistics, row, c, mask, C, about, H, W, parts, number,
    SQUARES: tl.constexpr, PHASES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return sum_b n_b (mean_b - about), or with SQUARES sum_b squares_b + n_b (mean_b - about)^2, of every channel.

    b are the ``number`` blocks of a row, ``parts`` to a strip, of n_b pixels each; statistics are [rows, number, 2, C].
    """
    sums = tl.zeros([BLOCKS, CHANNELS], tl.float32)
    statistics += row * number * 2 * C
    # Triton 3.7 fails to compile `_group_norm` if these are given another axis within the loop.
    about, mask, c = about[None, :], mask[None, :], c[None, :]
    for begin in range(0, number, BLOCKS):
        b = begin + tl.arange(0, BLOCKS)
        there = (b < number)[:, None] & mask
        height = tl.minimum(HEIGHT, H - b // parts * HEIGHT)
        width = tl.minimum(WIDTH, W - b % parts // PHASES * WIDTH)
        n = (height * width).to(tl.float32)[:, None]
        at = statistics + b[:, None] * 2 * C + c
        off = tl.load(at, mask=there, other=0.0) - about
        if SQUARES:  # noqa: SIM108 - decided at compile time
            value = tl.load(at + C, mask=there, other=0.0) + n * off * off
        else:
            value = n * off
        sums += tl.where(there, value, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def moments(
    first, second, row, group, C0, C1, total, H0, W0, parts0, number0, H1, W1, parts1, number1,
    size: tl.constexpr, TWO: tl.constexpr, PHASES0: tl.constexpr, HEIGHT0: tl.constexpr, WIDTH0: tl.constexpr,
    PHASES1: tl.constexpr, HEIGHT1: tl.constexpr, WIDTH1: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Return mean and variance, [GROUPS], of groups of both sources' channels, from ``group`` on, each over ``total``.

    Blocks are merged as in Chan, Golub & LeVeque (1979). Means are summed as differences from one of them, so that a
    large mean costs no precision.
    """
    c, exists = channels(group, C0 + C1, size, GROUPS, SIZE)
    head = (group + tl.arange(0, GROUPS)) * size
    origin = tl.load(first + row * number0 * 2 * C0 + head, mask=head < C0, other=0.0)
    if TWO:
        at = second + row * number1 * 2 * C1 + (head - C0)
        origin = tl.where(head < C0, origin, tl.load(at, mask=(head >= C0) & (head < C0 + C1), other=0.0))
    centre = origin
    var = origin
    for squares in tl.static_range(2):
        about = spread(centre, GROUPS, SIZE)
        sums = _sums(
            first, row, c, exists & (c < C0), C0, about, H0, W0, parts0, number0, squares, PHASES0, HEIGHT0, WIDTH0,
            BLOCKS, GROUPS * SIZE,
        )  # fmt: skip
        if TWO:
            sums += _sums(
                second, row, c - C0, exists & (c >= C0), C1, about, H1, W1, parts1, number1, squares, PHASES1, HEIGHT1,
                WIDTH1, BLOCKS, GROUPS * SIZE,
            )  # fmt: skip
        mean = tl.sum(tl.reshape(sums, [GROUPS, SIZE]), axis=1) / total
        if squares:
            var = mean
        else:
            centre = origin + mean
    return centre, var


@triton.jit
def affine(gamma, beta, table, entry, row, c, exists, C, offset, stride, rstd):
    """Return (scale, shift) = (gamma rstd (1 + m), beta (1 + m) + b) of channels ``c`` (see `finalise`)."""
    scale = tl.load(gamma + c, mask=exists, other=0.0) * rstd
    shift = tl.load(beta + c, mask=exists, other=0.0)
    if table is not None:
        at = row
        if entry is not None:
            at = tl.load(entry + row)
        modulation = table + at * stride + offset + c
        more = 1.0 + tl.load(modulation, mask=exists, other=0.0).to(tl.float32)
        scale *= more
        shift = shift * more + tl.load(modulation + C, mask=exists, other=0.0).to(tl.float32)
    return scale, shift


def moments_arguments(
    statistics: Sequence[Tensor], blocks: Sequence[Blocks], size: int, elements: int, groups: int
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of `moments` under the names that kernels have for them.

    A program reads the statistics of about ``elements`` blocks and channels at a time.
    """
    result: dict[str, Any] = {"size": size, "GROUPS": groups, "SIZE": power_of_two(size), "TWO": len(statistics) == 2}
    for i in range(2):
        held, of = (statistics[i], blocks[i]) if i < len(statistics) else (None, Blocks(1, 1, 1, 1, 1))
        number = of.strips * of.parts
        assert held is None or held.shape[1:3] == (of.strips, of.parts)
        result |= {f"statistics{i}": held, f"H{i}": of.H, f"W{i}": of.W, f"parts{i}": of.parts, f"number{i}": number}
        result |= {f"PHASES{i}": of.phases, f"HEIGHT{i}": of.height, f"WIDTH{i}": of.width}
    most = max(of.strips * of.parts for of in blocks)
    height, width = blocks[0].size
    return result | {
        "total": float(height * width * size),
        "BLOCKS": min(power_of_two(most), max(1, elements // (groups * power_of_two(size)))),
    }


def moments_reference(statistics: Sequence[Tensor], blocks: Sequence[Blocks], groups: int) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of every group, each [rows, groups], in torch."""
    found = []
    for held, of in zip(statistics, blocks, strict=True):
        n = of.counts(held)[None, :, None]
        means, squares = held.flatten(1, 2).unbind(2)  # [rows, number, C_i]
        origin = means[:, :1]
        mean = origin + (n * (means - origin)).sum(dim=1, keepdim=True) / n.sum()
        found.append(torch.stack([mean[:, 0], (squares + n * (means - mean) ** 2).sum(dim=1)]))
    means, squares = torch.cat(found, dim=2).unflatten(2, (groups, -1))  # [rows, groups, channels of a group]
    pixels = blocks[0].size[0] * blocks[0].size[1]
    origin = means[:, :, :1]
    centre = origin + (means - origin).mean(dim=2, keepdim=True)
    var = (squares + pixels * (means - centre) ** 2).sum(dim=2) / (pixels * means.shape[2])
    return centre[:, :, 0], var


def affine_reference(
    centre: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float, table: Tensor | None, entry: Tensor | None,
    offset: int,
) -> Tensor:  # fmt: skip
    """Return (centre, scale, shift) of every channel, [rows, 3, C], from the moments of groups, in torch."""
    rows, C = len(centre), len(gamma)
    centre, rstd = (v.repeat_interleave(C // v.shape[1], dim=1) for v in (centre, 1 / (var + eps).sqrt()))
    scale, shift = gamma * rstd, beta.expand(rows, -1)
    if table is not None:
        vectors = wide(row_vectors(table, entry, offset))
        scale = scale * (1 + vectors[:, :C])
        shift = shift * (1 + vectors[:, :C]) + vectors[:, C : 2 * C]
    return torch.stack([centre, scale, shift], dim=1)


# Finalise -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinaliseConfig(Config):
    """Tile size: one group of a row per program, in iterations over about ``elements`` of its statistics."""

    elements: int


FINALISE_CANDIDATES = (
    FinaliseConfig(num_warps=1, num_stages=1, elements=256),
    FinaliseConfig(num_warps=4, num_stages=1, elements=1024),
    FinaliseConfig(num_warps=8, num_stages=1, elements=4096),
)


@overlap.overlaps
@triton.jit
def _finalise(
    statistics0, statistics1, gamma, beta, table, entry, norm, C0, C1, total, eps, offset, stride,
    H0, W0, parts0, number0, H1, W1, parts1, number1,
    size: tl.constexpr, TWO: tl.constexpr, PHASES0: tl.constexpr, HEIGHT0: tl.constexpr, WIDTH0: tl.constexpr,
    PHASES1: tl.constexpr, HEIGHT1: tl.constexpr, WIDTH1: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Compute norm of some groups of one row, as `finalise` describes it. Grid: (rows, blocks of groups).

    table None: there is no modulation; entry None: row i reads entry i.
    """
    overlap.wait()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    C = C0 + C1
    centre, var = moments(
        statistics0, statistics1, row, group, C0, C1, total, H0, W0, parts0, number0, H1, W1, parts1, number1,
        size, TWO, PHASES0, HEIGHT0, WIDTH0, PHASES1, HEIGHT1, WIDTH1, BLOCKS, GROUPS, SIZE,
    )  # fmt: skip
    c, exists = channels(group, C, size, GROUPS, SIZE)
    rstd = spread(1.0 / tl.sqrt_rn(var + eps), GROUPS, SIZE)
    scale, shift = affine(gamma, beta, table, entry, row, c, exists, C, offset, stride, rstd)
    at = norm + row * 3 * C + c
    tl.store(at, spread(centre, GROUPS, SIZE), mask=exists)
    tl.store(at + C, scale, mask=exists)
    tl.store(at + 2 * C, shift, mask=exists)


@operation
def finalise(
    statistics: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    norm: Tensor,
    *,
    blocks: Sequence[Blocks],
    groups: int,
    eps: float,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    config: FinaliseConfig | None = None,
) -> Launch:
    """Compute norm = (mean, gamma / sqrt(var + eps) (1 + m), beta (1 + m) + b) of every channel.

    mean and var are those of the channel's group, which may span both sources, from the statistics of each source's
    ``blocks``, float32 [rows, strips, parts, 2, C_i]. norm is float32 [rows, 3, C].

    m and b are the modulation of the row: in table [entries, width] the columns from ``offset`` on have m and then b, C
    numbers each; without a table, both are 0. entry, int64 [rows], is the entry of each row; None: row i reads entry i.
    """
    rows, _, C = norm.shape
    C0, C1 = statistics[0].shape[4], statistics[1].shape[4] if len(statistics) == 2 else 0
    assert C == C0 + C1
    assert C % groups == 0
    size = C // groups
    number = sum(of.strips * of.parts for of in blocks)
    (height, width), parts = blocks[0].size, "+".join(str(of.parts) for of in blocks)
    key = f"{height}x{width}x{C0}+{C1}/{groups} {parts}"

    def heuristic() -> FinaliseConfig:
        """Choose as many threads as there are four statistics for each."""
        enough = [config for config in FINALISE_CANDIDATES if number * power_of_two(size) <= config.elements]
        return enough[0] if enough else FINALISE_CANDIDATES[-1]

    config = config or choose("norm.finalise", key, device_of(norm), FINALISE_CANDIDATES, heuristic)
    return Launch(
        op="norm.finalise",
        key=key,
        kernel=_finalise,
        grid=(rows, groups),
        arguments={
            "gamma": gamma, "beta": beta, "table": table, "entry": entry, "norm": norm, "C0": C0, "C1": C1,
            "eps": eps, "offset": offset, "stride": 0 if table is None else table.stride(0),
        }
        | moments_arguments(statistics, blocks, size, config.elements, groups=1),
        config=config,
        candidates=FINALISE_CANDIDATES,
        reference=functools.partial(
            finalise_reference, statistics, blocks, gamma, beta, norm, groups, eps, table, entry, offset
        ),
    )  # fmt: skip


def finalise_reference(
    statistics: Sequence[Tensor], blocks: Sequence[Blocks], gamma: Tensor, beta: Tensor, norm: Tensor, groups: int,
    eps: float, table: Tensor | None, entry: Tensor | None, offset: int,
) -> None:  # fmt: skip
    """Compute norm, as `finalise` describes it, in torch."""
    moments = moments_reference(statistics, blocks, groups)
    norm.copy_(affine_reference(*moments, gamma, beta, eps, table, entry, offset))


# Statistics to result -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupNormConfig(Config):
    """Tile size: ``pixels`` by ``groups`` groups per program, which reads all statistics of these groups."""

    pixels: int
    groups: int


GROUP_NORM_ELEMENTS = 1024  # of statistics that a program reads at a time
# Largest tiles first.
GROUP_NORM_CANDIDATES = (
    GroupNormConfig(num_warps=4, num_stages=1, pixels=64, groups=8),
    GroupNormConfig(num_warps=4, num_stages=1, pixels=32, groups=8),
    GroupNormConfig(num_warps=4, num_stages=1, pixels=32, groups=4),
)


@overlap.overlaps
@triton.jit
def _group_norm(
    first, second, statistics0, statistics1, gamma, beta, table, entry, dst, pixels, C0, C1, total, eps, offset, stride,
    H0, W0, parts0, number0, H1, W1, parts1, number1,
    size: tl.constexpr, TWO: tl.constexpr, SILU: tl.constexpr, PHASES0: tl.constexpr, HEIGHT0: tl.constexpr,
    WIDTH0: tl.constexpr, PHASES1: tl.constexpr, HEIGHT1: tl.constexpr, WIDTH1: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst. Grid: (pixel blocks, blocks of groups, rows)."""
    overlap.wait()
    row, group = tl.program_id(2).to(tl.int64), tl.program_id(1) * GROUPS
    C = C0 + C1
    centre, var = moments(
        statistics0, statistics1, row, group, C0, C1, total, H0, W0, parts0, number0, H1, W1, parts1, number1,
        size, TWO, PHASES0, HEIGHT0, WIDTH0, PHASES1, HEIGHT1, WIDTH1, BLOCKS, GROUPS, SIZE,
    )  # fmt: skip
    c, exists = channels(group, C, size, GROUPS, SIZE)
    rstd = spread(1.0 / tl.sqrt_rn(var + eps), GROUPS, SIZE)
    scale, shift = affine(gamma, beta, table, entry, row, c, exists, C, offset, stride, rstd)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    mask = (p < pixels)[:, None] & exists[None, :]
    pixel = row * pixels + p
    x = sources.read(first, second, pixel, c, mask, C0, C1, TWO)
    y = sources.normalised(x, spread(centre, GROUPS, SIZE)[None, :], scale[None, :], shift[None, :], SILU)
    tl.store(dst + pixel[:, None] * C + c[None, :], y.to(dst.dtype.element_ty), mask=mask)


@operation
def group_norm(
    src: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    dst: Tensor,
    *,
    blocks: Sequence[Blocks],
    groups: int,
    eps: float,
    silu: bool,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    chosen_for: int | None = None,
    config: GroupNormConfig | None = None,
) -> Launch:
    """Compute what `finalise` and `apply` compute one after the other, with their arguments, in one launch.

    Every program merges the statistics of its groups, so there should be few of these.
    """
    rows, H, W, C = dst.shape
    C0, C1 = src[0].shape[3], src[1].shape[3] if len(src) == 2 else 0
    assert C == C0 + C1
    assert C % groups == 0
    assert all(of.size == (H, W) for of in blocks)
    size, like = C // groups, chosen_for or rows
    parts = "+".join(str(of.parts) for of in blocks)
    key = f"{like}x{H}x{W}x{C0}+{C1}/{groups} {parts} {name_of(src[0].dtype)} {name_of(dst.dtype)}"
    candidates = tuple(
        c for c in GROUP_NORM_CANDIDATES if c.pixels * c.groups * power_of_two(size) <= 2048 * c.num_warps
    ) or GROUP_NORM_CANDIDATES[-1:]  # fmt: skip
    config = config or choose_filling(
        "norm.group_norm", key, dst, candidates,
        lambda config: like * cdiv(H * W, config.pixels) * cdiv(groups, config.groups),
        lambda config: config.groups < 2 * groups,
    )  # fmt: skip
    return Launch(
        op="norm.group_norm",
        key=key,
        kernel=_group_norm,
        grid=(cdiv(H * W, config.pixels), cdiv(groups, config.groups), rows),
        arguments={
            "first": src[0], "second": src[1] if C1 else None, "gamma": gamma, "beta": beta, "table": table,
            "entry": entry, "dst": dst, "pixels": H * W, "C0": C0, "C1": C1, "eps": eps, "offset": offset,
            "stride": 0 if table is None else table.stride(0), "SILU": silu, "PIXELS": config.pixels,
        }
        | moments_arguments(statistics, blocks, size, GROUP_NORM_ELEMENTS, config.groups),
        config=config,
        candidates=candidates,
        reference=lambda: apply_reference(
            src,
            affine_reference(*moments_reference(statistics, blocks, groups), gamma, beta, eps, table, entry, offset),
            dst,
            silu,
        ),
    )  # fmt: skip


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


@overlap.overlaps
@triton.jit
def _apply(
    first, second, norm, dst, pixels, C0, C1,
    TWO: tl.constexpr, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst. Grid: (pixel blocks, channel blocks, rows)."""
    overlap.wait()
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
