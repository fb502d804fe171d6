"""Convolutions on Hopper's own units: a warp loads boxes of the map by TMA while warp groups multiply them (WGMMA).

`conv` is another kernel for what `fastdiff.kernels.conv.conv` and `partial` compute, in the same blocks and with the
same statistics, for operands of two bytes and stride 1. A tap of a tile is a box of the NHWC map, displaced by the tap;
TMA fills what is outside the map with zeros, so there is neither a mask nor a copy. TMA's im2col mode would divide the
pixels of any map, but Triton's Gluon has it from 3.8 on only; here a tile has to be a box (`box`), as it is where sides
are powers of two. Programs stay: each computes one tile after the other, and loads for the next one begin while one is
finished.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.tiles import Blocks

LOADER_REGISTERS = gl.constexpr(24)  # of a thread of the warp that loads: the least that there may be
PART = gl.constexpr(
    32
)  # channels that are finished at a time, in SIZE x PART float32 of shared memory; 64 would spill registers

# Kernel ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def _place(
    unit, tiles, H, W, N, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, NUMBER: gl.constexpr, CHANNELS: gl.constexpr
):
    """Return (tile, phase, row, y, x, c) of a unit of work: its tile and phase, its first pixel and channel."""
    tiles_c = gl.cdiv(N, CHANNELS)
    tile = unit // tiles_c % tiles
    block = tile * NUMBER
    columns, strips = gl.cdiv(W, WIDTH), gl.cdiv(H, HEIGHT)
    y, x = block // columns % strips * HEIGHT, block % columns * WIDTH
    return tile, unit // tiles_c // tiles, block // (strips * columns), y, x, unit % tiles_c * CHANNELS


@gluon.jit
def _load(
    source, weight, a, b, full, free, count, row, top, left, phase, c,
    C: gl.constexpr, STEPS: gl.constexpr, KERNEL: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    BYTES: gl.constexpr,
):  # fmt: skip
    """Load the boxes of all steps of one source into the stages, and return the number of loads so far."""
    chunks: gl.constexpr = (C + DEPTH - 1) // DEPTH
    for step in range(STEPS):
        tap, k = step // chunks, step % chunks * DEPTH
        stage = count % STAGES
        mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
        arrived = full.index(stage)
        mbarrier.expect(arrived, BYTES)
        at = [row, top + tap // KERNEL, left + tap % KERNEL, k]
        tma.async_copy_global_to_shared(source, at, arrived, a.index(stage))
        # With fewer channels than DEPTH the last of these belong to the next tap; the map has zeros there.
        at = [(phase * KERNEL * KERNEL + tap) * C + k, c]
        tma.async_copy_global_to_shared(weight, at, arrived, b.index(stage))
        count += 1
    return count


@gluon.jit
def _load_all(
    first, second, weight, more_weight, a, b, full, free, tiles, units, H, W, N, padding,
    C0: gl.constexpr, C1: gl.constexpr, KERNEL: gl.constexpr, PHASES: gl.constexpr, STEPS0: gl.constexpr,
    STEPS1: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, NUMBER: gl.constexpr, CHANNELS: gl.constexpr,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Load what the units of this program multiply; run by one warp."""
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _tile, phase, row, y, x, c = _place(unit, tiles, H, W, N, HEIGHT, WIDTH, NUMBER, CHANNELS)
        if PHASES == 4:
            top, left = y + phase // 2 - 1, x + phase % 2 - 1
        else:
            top, left = y - padding, x - padding
        count = _load(
            first, weight, a, b, full, free, count, row, top, left, phase, c, C0, STEPS0, KERNEL, DEPTH, STAGES, BYTES
        )
        if C1 > 0:
            count = _load(
                second, more_weight, a, b, full, free, count, row, top, left, phase, c, C1, STEPS1, KERNEL, DEPTH,
                STAGES, BYTES,
            )  # fmt: skip


@gluon.jit
def _finish_part(
    acc, tile, phase, first_c, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
    PHASES: gl.constexpr, SHIFT: gl.constexpr, NCHW: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
    NUMBER: gl.constexpr, SIZE: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Finish ``PART`` channels of a tile, as `fastdiff.kernels.tiles.finish` does."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [WARPS, 1], [1, 0])
    acc = gl.convert_layout(acc, layout)
    i = gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout))
    c = first_c + gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    inner: gl.constexpr = HEIGHT * WIDTH
    columns, strips = gl.cdiv(W, WIDTH), gl.cdiv(H, HEIGHT)
    block = tile * NUMBER + i // inner
    row = block // (strips * columns)
    y = block // columns % strips * HEIGHT + i // WIDTH % HEIGHT
    x = block % columns * WIDTH + i % WIDTH
    exists, known = (row < rows) & (y < H) & (x < W), c < N
    mask = exists[:, None] & known[None, :]
    if bias is not None:
        acc += gl.load(bias + c, mask=known, other=0.0)[None, :]
    wide_row = gl.cast(row, gl.int64)
    if table is not None:
        vector = wide_row
        if entry is not None:
            vector = gl.load(entry + row, mask=exists, other=0)
        e = gl.load(table + (vector[:, None] * stride + offset + c[None, :]), mask=mask, other=0.0)
        acc += gl.cast(e, gl.float32)
    if PHASES == 4:
        H *= 2
        W *= 2
        y = 2 * y + phase // 2
        x = 2 * x + phase % 2
    if residual is not None:
        pixel = (wide_row * (H >> SHIFT) + (y >> SHIFT)) * (W >> SHIFT) + (x >> SHIFT)
        r = gl.load(residual + (pixel[:, None] * N + c[None, :]), mask=mask, other=0.0)
        acc += gl.cast(r, gl.float32)
    acc *= factor
    pixel = (wide_row * H + y) * W + x
    if NCHW:
        at = (pixel + wide_row * (N - 1) * H * W)[:, None] + (c * (H * W))[None, :]
    else:
        at = pixel[:, None] * N + c[None, :]
    gl.store(dst + at, gl.cast(acc, dst.dtype.element_ty), mask=mask)
    if statistics is not None:
        inside = gl.reshape(mask, [NUMBER, inner, PART])
        values = gl.reshape(acc, [NUMBER, inner, PART])
        size = gl.sum(gl.cast(inside, gl.float32), axis=1)
        mean = gl.sum(gl.where(inside, values, 0.0), axis=1) / gl.maximum(size, 1.0)
        off = gl.where(inside, values - gl.expand_dims(mean, 1), 0.0)
        squares = gl.sum(off * off, axis=1)
        flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
        part = tile * NUMBER + gl.arange(0, NUMBER, layout=gl.SliceLayout(1, flat))
        there = part // (strips * columns) < rows
        part = gl.cast(part, gl.int64) * PHASES + phase
        c = first_c + gl.arange(0, PART, layout=gl.SliceLayout(0, flat))
        mask = there[:, None] & (c < N)[None, :]
        to = statistics + (part[:, None] * 2 * N + c[None, :])
        gl.store(to, gl.convert_layout(mean, flat), mask=mask)
        gl.store(to + N, gl.convert_layout(squares, flat), mask=mask)


@gluon.jit
def _finish(
    acc, tile, phase, c, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
    PHASES: gl.constexpr, SHIFT: gl.constexpr, NCHW: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
    NUMBER: gl.constexpr, SIZE: gl.constexpr, CHANNELS: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Finish the channels of a tile from ``c`` on, by halves until a half has ``PART`` of them."""
    if CHANNELS == PART:
        _finish_part(
            acc, tile, phase, c, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
            PHASES, SHIFT, NCHW, HEIGHT, WIDTH, NUMBER, SIZE, PART, WARPS,
        )  # fmt: skip
    else:
        half: gl.constexpr = CHANNELS // 2
        low, high = gl.split(gl.permute(gl.reshape(acc, [SIZE, 2, half]), [0, 2, 1]))
        _finish(
            low, tile, phase, c, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
            PHASES, SHIFT, NCHW, HEIGHT, WIDTH, NUMBER, SIZE, half, PART, WARPS,
        )  # fmt: skip
        _finish(
            high, tile, phase, c + half, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride,
            factor, PHASES, SHIFT, NCHW, HEIGHT, WIDTH, NUMBER, SIZE, half, PART, WARPS,
        )  # fmt: skip


@gluon.jit
def _multiply_all(
    a, b, full, free, tiles, units, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride,
    factor, PHASES: gl.constexpr, STEPS: gl.constexpr, SHIFT: gl.constexpr, NCHW: gl.constexpr, HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr, NUMBER: gl.constexpr, SIZE: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr,
    STAGES: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Multiply what is loaded, and finish the tiles. A stage is free when the product after its own has begun."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHANNELS, 16])
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        acc = gl.zeros([SIZE, CHANNELS], gl.float32, layout)
        for step in range(STEPS):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            acc = warpgroup_mma(a.index(stage).reshape([SIZE, DEPTH]), b.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=step > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))
        tile, phase, _row, _y, _x, c = _place(unit, tiles, H, W, N, HEIGHT, WIDTH, NUMBER, CHANNELS)
        _finish(
            acc, tile, phase, c, dst, bias, table, entry, residual, statistics, rows, H, W, N, offset, stride, factor,
            PHASES, SHIFT, NCHW, HEIGHT, WIDTH, NUMBER, SIZE, CHANNELS, PART, WARPS,
        )  # fmt: skip


@overlap.overlaps
@gluon.jit(do_not_specialize=["rows"])
def _conv(
    first, second, weight, more_weight, dst, bias, table, entry, residual, statistics,
    rows, H, W, N, padding, offset, stride, factor,
    C0: gl.constexpr, C1: gl.constexpr, KERNEL: gl.constexpr, PHASES: gl.constexpr, STEPS0: gl.constexpr,
    STEPS1: gl.constexpr, SHIFT: gl.constexpr, NCHW: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
    SIZE: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Compute tiles of dst, and their statistics. Grid: (programs,), of which each has every so many units of work.

    A unit is a tile of ``SIZE`` pixels by ``CHANNELS`` channels of a phase. first, second, weight and more_weight are
    descriptors of tensors, dst and those after it are pointers; bias None: dst are the sums of products alone.
    """
    overlap.wait()
    number: gl.constexpr = SIZE // (HEIGHT * WIDTH)
    tiles = gl.cdiv(rows * gl.cdiv(H, HEIGHT) * gl.cdiv(W, WIDTH), number)
    units = tiles * gl.cdiv(N, CHANNELS) * PHASES
    a = gl.allocate_shared_memory(first.dtype, [STAGES] + first.block_type.shape, first.layout)  # noqa: RUF005
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    loaded: gl.constexpr = 2 * (SIZE + CHANNELS) * DEPTH  # bytes of a stage
    gl.warp_specialize(
        [
            (
                _multiply_all,
                (
                    a, b, full, free, tiles, units, dst, bias, table, entry, residual, statistics, rows, H, W, N,
                    offset, stride, factor, PHASES, STEPS0 + STEPS1, SHIFT, NCHW, HEIGHT, WIDTH, number, SIZE, CHANNELS,
                    DEPTH, STAGES, PART, WARPS,
                ),
            ),
            (
                _load_all,
                (
                    first, second, weight, more_weight, a, b, full, free, tiles, units, H, W, N, padding, C0, C1,
                    KERNEL, PHASES, STEPS0, STEPS1, HEIGHT, WIDTH, number, CHANNELS, DEPTH, STAGES, loaded,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


# Launches -------------------------------------------------------------------------------------------------------------

NAMES = tuple(_conv.arg_names)


def box(blocks: Blocks, pixels: int) -> tuple[int, int, int] | None:
    """Return the rows, height and width of the box of a map that a tile of ``pixels`` pixels is; None: it is none."""
    number = pixels // blocks.pixels
    if number == 1:
        return 1, blocks.height, blocks.width
    if blocks.columns > 1:
        return None
    if blocks.strips % number == 0:
        return 1, number * blocks.height, blocks.width
    if number % blocks.strips == 0:
        return number // blocks.strips, blocks.strips * blocks.height, blocks.width
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class HopperLaunch(Launch):
    """A launch of `_conv`, whose sources and weights are described to TMA. ``units``: of work of all programs."""

    units: int = 0

    @property
    def operands(self) -> dict[str, Any]:
        """The arguments, with descriptors of the sources and weights."""
        a = dict(self.arguments)
        size, channels, depth = a["SIZE"], a["CHANNELS"], a["DEPTH"]
        shape = box(Blocks(a["H"], a["W"], a["HEIGHT"], a["WIDTH"], a["PHASES"]), size)
        assert shape is not None
        for name in ("first", "second"):
            a[name] = described(a[name], [*shape, depth])
        for name in ("weight", "more_weight"):
            a[name] = described(None if a[name] is None else a[name].flatten(0, 2), [depth, channels])
        return a


def described(tensor: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    """Return a descriptor of the tensor for blocks in swizzled shared memory, as warp groups read it."""
    if tensor is None:
        return None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def conv(arguments: dict[str, Any], units: int, programs: int, config: Any, **launch: Any) -> HopperLaunch:
    """Return the launch of a convolution.

    Args:
        arguments: those of `fastdiff.kernels.conv.conv`'s kernel, or of `partial`'s.
        units: tiles of all phases.
        programs: that stay on the GPU at most.
        config: a `fastdiff.kernels.conv.HopperConfig`.
        launch: further fields of the launch.
    """
    held = arguments | {"STAGES": config.num_stages, "WARPS": config.num_warps}
    return HopperLaunch(
        kernel=_conv, grid=(min(units, programs),), arguments={name: held[name] for name in NAMES}, config=config,
        units=units, **launch,
    )  # fmt: skip
