"""Operations after products of a library (`fastdiff.kernels.library`) or of `fastdiff.kernels.conv.partial`.

`finish` sums them, and adds bias, embedding and residual. `normed` also normalises the result, of small maps. `gather`
adds the columns of a convolution of few outputs.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import norm, overlap, sources, tiles
from fastdiff.kernels.launch import (
    Config,
    Device,
    Launch,
    cdiv,
    choose,
    device_of,
    fill,
    name_of,
    operation,
    power_of_two,
    wide,
)
from fastdiff.kernels.tiles import Blocks

# Sums -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _summed(at, mask, step, SPLITS: tl.constexpr):
    """Return the sum of SPLITS tiles, ``step`` numbers apart, in order.

    The loop is unrolled in fours, so that the loads of many tiles are on their way at once.
    """
    acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, (SPLITS - 1) % 4 + 1):
        acc += tl.load(at + i * step, mask=mask, other=0.0).to(tl.float32)
    at += ((SPLITS - 1) % 4 + 1) * step
    for _ in range((SPLITS - 1) // 4):
        for i in tl.static_range(4):
            acc += tl.load(at + i * step, mask=mask, other=0.0).to(tl.float32)
        at += 4 * step
    return acc


# Finish ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinishConfig(Config):
    """Tile size: ``pixels`` by ``channels`` per program."""

    pixels: int
    channels: int


# Largest tiles first. A thread has 32 numbers of each sum: eight loads of 16 bytes. With fewer, the compiler would let
# fewer loads be on their way at once.
FINISH_CANDIDATES = (
    FinishConfig(num_warps=8, num_stages=1, pixels=128, channels=64),
    FinishConfig(num_warps=4, num_stages=1, pixels=64, channels=64),
    FinishConfig(num_warps=2, num_stages=1, pixels=32, channels=64),
    FinishConfig(num_warps=1, num_stages=1, pixels=32, channels=32),
)


def finish_config(
    splits: int, rows: int, H: int, W: int, N: int, dtype: torch.dtype, device: Device
) -> tuple[str, FinishConfig]:
    """Return the key of `finish` for sums of this shape, and the configuration that is chosen for it."""
    key = f"{splits}x{rows}x{H}x{W}x{N} {name_of(dtype)}"

    def programs(config: FinishConfig) -> int:
        blocks = Blocks.of(H, W, config.pixels)
        return cdiv(blocks.count(rows), config.pixels // blocks.pixels) * cdiv(N, config.channels)

    # A tile that is twice as wide as its map would leave half of its threads idle.
    fitting = tuple(c for c in FINISH_CANDIDATES if c.channels < 2 * N) or FINISH_CANDIDATES[-1:]
    return key, choose("epilogue.finish", key, device, FINISH_CANDIDATES, lambda: fill(fitting, programs, device))


@overlap.overlaps
@triton.jit(do_not_specialize=["rows"])
def _finish(
    sums, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
    SPLITS: tl.constexpr, SHIFT: tl.constexpr, NCHW: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst and its statistics. Grid: (tiles of pixels, blocks of channels)."""
    overlap.wait()
    tile = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, y, x, exists = tiles.pixels(tile, rows, H, W, HEIGHT, WIDTH, SIZE)
    mask = exists[:, None] & (c < N)[None, :]
    at = sums + ((row.to(tl.int64) * H + y) * W + x)[:, None] * N + c[None, :]
    acc = _summed(at, mask, rows.to(tl.int64) * H * W * N, SPLITS)
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
    of the `Blocks` of the configuration. The other arguments are those of `fastdiff.kernels.conv.conv`.
    """
    splits, rows, H, W, N = sums.shape
    key, chosen = finish_config(splits, chosen_for or rows, H, W, N, sums.dtype, device_of(sums))
    config = config or chosen
    blocks = Blocks.of(H, W, config.pixels)
    assert statistics is None or statistics.shape == (rows, blocks.strips, blocks.parts, 2, N)
    candidates = tuple(
        c for c in FINISH_CANDIDATES if statistics is None or Blocks.of(H, W, c.pixels).parts == blocks.parts
    )
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


# Finish and norm ------------------------------------------------------------------------------------------------------

MOST_PIXELS = 256  # of a map that `normed` normalises
MOST_ELEMENTS = 64  # of a tile, per thread


@dataclasses.dataclass(frozen=True)
class NormedConfig(Config):
    """Tile size: ``groups`` groups of a whole map per program."""

    groups: int


# Largest tiles first.
NORMED_CANDIDATES = (
    NormedConfig(num_warps=8, num_stages=1, groups=4),
    NormedConfig(num_warps=8, num_stages=1, groups=1),
    NormedConfig(num_warps=4, num_stages=1, groups=4),
    NormedConfig(num_warps=4, num_stages=1, groups=1),
    NormedConfig(num_warps=2, num_stages=1, groups=4),
    NormedConfig(num_warps=1, num_stages=1, groups=1),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Normed:
    """A norm that `normed` computes of its result, concatenated with ``second``.

    Attributes:
        out: [rows, H, W, N + C1], the normalised tensor.
        gamma, beta: float32 [N + C1].
        groups: number of groups.
        eps: added to the variance.
        silu: whether the result is silu of the norm.
        second: [rows, H, W, C1], or None.
        table, entry, offset: the norm's modulation, as `fastdiff.kernels.norm.finalise` describes it.
    """

    out: Tensor
    gamma: Tensor
    beta: Tensor
    groups: int
    eps: float
    silu: bool
    second: Tensor | None = None
    table: Tensor | None = None
    entry: Tensor | None = None
    offset: int = 0


def normed_elements(H: int, W: int, C: int, groups: int, config: NormedConfig) -> int:
    """Return the number of elements of a tile per thread."""
    tile = power_of_two(H * W) * config.groups * power_of_two(C // groups)
    return cdiv(tile, 32 * config.num_warps)


def can_be_normed(H: int, W: int, C: int, groups: int) -> bool:
    """Return whether a program of `normed` can hold a group of such a map."""
    held = (normed_elements(H, W, C, groups, config) for config in NORMED_CANDIDATES)
    return H * W <= MOST_PIXELS and min(held) <= MOST_ELEMENTS


@overlap.overlaps
@triton.jit(do_not_specialize=["rows"])
def _normed(
    sums, second, dst, out, bias, table, entry, residual, gamma, beta, norm_table, norm_entry,
    rows, H, W, N, C1, total, eps, offset, stride, factor, norm_offset, norm_stride,
    SPLITS: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, size: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Compute some groups of a row. Grid: (rows, blocks of groups).

    The result is in registers from its sums to the end. Means are summed as differences from one of its numbers, so
    that a large mean costs no precision.
    """
    overlap.wait()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    C = N + C1
    c, exists = norm.channels(group, C, size, GROUPS, SIZE)
    own = exists & (c < N)
    p = tl.arange(0, PIXELS)
    here = (p < H * W)[:, None]
    mask, mine = here & exists[None, :], here & own[None, :]
    pixel = row * H * W + p
    place = pixel[:, None] * N + c[None, :]
    acc = _summed(sums + place, mine, rows.to(tl.int64) * H * W * N, SPLITS)
    acc += tl.load(bias + c, mask=own, other=0.0)[None, :]
    if table is not None:
        at = row
        if entry is not None:
            at = tl.load(entry + row)
        acc += tl.load(table + at * stride + offset + c, mask=own, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y, x = p // W, p % W
        at = (row * (H >> SHIFT) + (y >> SHIFT)) * (W >> SHIFT) + (x >> SHIFT)
        acc += tl.load(residual + at[:, None] * N + c[None, :], mask=mine, other=0.0).to(tl.float32)
    acc *= factor
    if dst is not None:
        tl.store(dst + place, acc.to(dst.dtype.element_ty), mask=mine)
    if second is not None:
        at = second + pixel[:, None] * C1 + (c - N)[None, :]
        other = tl.load(at, mask=mask & (c >= N)[None, :], other=0.0).to(tl.float32)
        acc = tl.where((c < N)[None, :], acc, other)
    first = (p == 0)[:, None] & (tl.arange(0, GROUPS * SIZE) % SIZE == 0)[None, :]
    origin = norm.over_groups(tl.where(first, acc, 0.0), GROUPS, SIZE)
    off = tl.where(mask, acc - norm.spread(origin, GROUPS, SIZE)[None, :], 0.0)
    mean = norm.over_groups(off, GROUPS, SIZE) / total
    off = tl.where(mask, off - norm.spread(mean, GROUPS, SIZE)[None, :], 0.0)
    var = norm.over_groups(off * off, GROUPS, SIZE) / total
    rstd = norm.spread(1.0 / tl.sqrt_rn(var + eps), GROUPS, SIZE)
    scale, shift = norm.affine(
        gamma, beta, norm_table, norm_entry, row, c, exists, C, norm_offset, norm_stride, rstd
    )  # fmt: skip
    y = off * scale[None, :] + shift[None, :]
    if SILU:
        y = sources.silu(y)
    tl.store(out + pixel[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=mask)


@operation
def normed(
    sums: Tensor,
    bias: Tensor,
    dst: Tensor | None,
    then: Normed,
    *,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    residual: Tensor | None = None,
    divide: float = 1.0,
    chosen_for: int | None = None,
    config: NormedConfig | None = None,
) -> Launch:
    """Compute dst as `finish` does, and then.out = the norm of dst, before it is rounded, and ``then.second``.

    A program holds whole groups of a map, so neither statistics nor another pass over the map are needed. dst None: it
    is not stored.
    """
    splits, rows, H, W, N = sums.shape
    C = then.out.shape[3]
    C1 = C - N
    assert then.out.shape[:3] == (rows, H, W)
    assert (0 if then.second is None else then.second.shape[3]) == C1
    like, size = chosen_for or rows, C // then.groups
    key = f"{splits}x{like}x{H}x{W}x{N}+{C1}/{then.groups} {name_of(sums.dtype)} {name_of(then.out.dtype)}"
    candidates = tuple(
        c for c in NORMED_CANDIDATES if normed_elements(H, W, C, then.groups, c) <= MOST_ELEMENTS
    )  # fmt: skip
    device = device_of(sums)

    def heuristic() -> NormedConfig:
        """Choose four groups where the processors stay busy, and threads that have about 16 elements each."""
        several = like * cdiv(then.groups, 4) >= 2 * device.processors
        fitting = [c for c in candidates if c.groups == (4 if several else 1)] or list(candidates)
        return min(fitting, key=lambda c: abs(normed_elements(H, W, C, then.groups, c) - 16))

    config = config or choose("epilogue.normed", key, device, candidates, heuristic)
    more = tiles.finish_arguments(bias, H, False, table, entry, offset, residual, divide, None)
    return Launch(
        op="epilogue.normed",
        key=key,
        kernel=_normed,
        grid=(rows, cdiv(then.groups, config.groups)),
        arguments={
            "sums": sums, "second": then.second, "dst": dst, "out": then.out, "gamma": then.gamma, "beta": then.beta,
            "norm_table": then.table, "norm_entry": then.entry, "rows": rows, "H": H, "W": W, "N": N, "C1": C1,
            "total": float(H * W * size), "eps": then.eps, "norm_offset": then.offset,
            "norm_stride": 0 if then.table is None else then.table.stride(0), "SPLITS": splits, "SILU": then.silu,
            "size": size, "GROUPS": config.groups, "SIZE": power_of_two(size), "PIXELS": power_of_two(H * W),
        }
        | {name: value for name, value in more.items() if name not in ("statistics", "NCHW")},
        config=config,
        candidates=candidates,
        reference=lambda: _normed_reference(
            tiles.finished(wide(sums).sum(dim=0), bias, table, entry, offset, residual, divide), dst, then
        ),
    )  # fmt: skip


def _normed_reference(h: Tensor, dst: Tensor | None, then: Normed) -> None:
    """Store h [rows, H, W, N] in dst, and its norm in then.out, in torch."""
    if dst is not None:
        dst.copy_(h)
    x = h if then.second is None else torch.cat([h, wide(then.second)], dim=3)
    groups = x.flatten(1, 2).unflatten(2, (then.groups, -1))  # [rows, pixels, groups, channels of a group]
    origin = groups[:, :1, :, :1]
    centre = origin + (groups - origin).mean(dim=(1, 3), keepdim=True)
    var = ((groups - centre) ** 2).mean(dim=(1, 3))
    vectors = norm.affine_reference(
        centre[:, 0, :, 0], var, wide(then.gamma), wide(then.beta), then.eps, then.table, then.entry, then.offset
    )
    then.out.copy_(sources.normalised_reference([x], vectors, then.silu))


# Gather ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GatherConfig(Config):
    """Tile size: ``pixels`` per program, with all their channels."""

    pixels: int


GATHER_CANDIDATES = (
    GatherConfig(num_warps=4, num_stages=1, pixels=256),
    GatherConfig(num_warps=2, num_stages=1, pixels=64),
)


@overlap.overlaps
@triton.jit
def _gather(sums, dst, bias, H, W, N, padding, KERNEL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Compute a block of pixels of one row. Grid: (pixel blocks, rows)."""
    overlap.wait()
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = p // W, p % W
    c = tl.arange(0, CHANNELS)
    known = (c < N)[None, :]
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        yy, xx = y + (tap // KERNEL - padding), x + (tap % KERNEL - padding)
        inside = (p < H * W) & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
        at = ((row * H + yy) * W + xx) * N * KERNEL * KERNEL + tap * N
        acc += tl.load(sums + at[:, None] + c[None, :], mask=inside[:, None] & known, other=0.0)
    acc += tl.load(bias + c, mask=c < N, other=0.0)[None, :]
    to = dst + (row * N + c[None, :]) * H * W + p[:, None]
    tl.store(to, acc.to(dst.dtype.element_ty), mask=(p < H * W)[:, None] & known)


@operation
def gather(
    sums: Tensor,
    bias: Tensor,
    dst: Tensor,
    *,
    padding: int,
    chosen_for: int | None = None,
    config: GatherConfig | None = None,
) -> Launch:
    """Compute dst[n, y, x] = bias[n] + sum over taps (ky, kx) of sums[y + ky - padding, x + kx - padding, tap, n].

    sums are float32 [rows, H, W, taps N], the products of every pixel with every tap; dst is [rows, N, H, W].
    """
    rows, N, H, W = dst.shape
    kernel = math.isqrt(sums.shape[3] // N)
    assert sums.shape == (rows, H, W, kernel * kernel * N)
    like, device = chosen_for or rows, device_of(sums)
    key = f"{like}x{H}x{W}x{N} {kernel}"
    config = config or choose(
        "epilogue.gather", key, device, GATHER_CANDIDATES,
        lambda: fill(GATHER_CANDIDATES, lambda c: like * cdiv(H * W, c.pixels), device),
    )  # fmt: skip
    return Launch(
        op="epilogue.gather",
        key=key,
        kernel=_gather,
        grid=(cdiv(H * W, config.pixels), rows),
        arguments={
            "sums": sums, "dst": dst, "bias": bias, "H": H, "W": W, "N": N, "padding": padding, "KERNEL": kernel,
            "PIXELS": config.pixels, "CHANNELS": power_of_two(N),
        },
        config=config,
        candidates=GATHER_CANDIDATES,
        reference=lambda: _gather_reference(sums, bias, dst, padding, kernel),
    )  # fmt: skip


def _gather_reference(sums: Tensor, bias: Tensor, dst: Tensor, padding: int, kernel: int) -> None:
    """Compute dst, as `gather` describes it, in torch."""
    _, N, H, W = dst.shape
    after = kernel - 1 - padding
    padded = F.pad(wide(sums), (0, 0, padding, after, padding, after)).unflatten(3, (kernel * kernel, N))
    taps = [
        padded[:, tap // kernel : tap // kernel + H, tap % kernel : tap % kernel + W, tap]
        for tap in range(kernel * kernel)
    ]
    dst.copy_((sum(taps) + wide(bias)).permute(0, 3, 1, 2))
