"""Convolutions and matrix products on NHWC maps as implicit GEMM: 1x1 or 3x3, stride 1 or 2, or upsampled before.

`layer` is what backends use: it computes a convolution by one or two launches. `conv` is the whole of it as one kernel.
`partial` leaves its products as sums, split among programs or not, for `fastdiff.kernels.epilogue.finish` or `normed`
to add. `product_reference` computes the products in torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import epilogue, hopper, library, overlap, tiles
from fastdiff.kernels.launch import Config, Device, Launch, cdiv, choose, device_of, fill, name_of, operation, wide
from fastdiff.kernels.library import LIBRARY, LibraryConfig
from fastdiff.kernels.tiles import Blocks

# Weights --------------------------------------------------------------------------------------------------------------

MULTIPLE = 16  # the columns of packed weights are padded to a multiple of this, so that every row is aligned


def pack(weight: Tensor, channels: Sequence[int], dtype: torch.dtype, upsample: bool = False) -> tuple[Tensor, ...]:
    """Pack weights [N, C, k, k] as [phases, taps, C_i, padded N] for each source.

    A 3x3 convolution after nearest-neighbour doubling equals four 2x2 convolutions of the source, one for each phase
    (p, q) of the result. Their taps are sums, in float64, of the taps that read the same pixel. With i the pixel of the
    phase:

        p = 0: tap 0 at i - 1, taps 1 + 2 at i        p = 1: taps 0 + 1 at i, tap 2 at i + 1        (q likewise)
    """
    N, _, k, _ = weight.shape
    W = weight.double().permute(2, 3, 1, 0)[None]  # [1, ky, kx, C, N]
    if upsample:
        assert k == 3
        fold = torch.tensor(
            [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=W.dtype, device=W.device
        )  # [phase, tap, tap of 3]
        W = torch.einsum("pak,qbl,klcn->pqabcn", fold, fold, W[0]).flatten(0, 1)
    W = F.pad(W.flatten(1, 2), (0, -N % MULTIPLE))
    return tuple(part.to(dtype).contiguous() for part in W.split(list(channels), dim=2))


def pack_columns(weight: Tensor, channels: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Pack weights [N, C, k, k] as those of a matrix product with k k N columns, in the order (tap, output)."""
    return pack(weight.permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None], channels, dtype)


def unpack(weight: Sequence[Tensor], N: int) -> Tensor:
    """Return the weights [phases, N, C, k, k] that `pack` packed."""
    W = torch.cat([wide(part) for part in weight], dim=2)[..., :N]
    kernel = round(W.shape[1] ** 0.5)
    return W.unflatten(1, (kernel, kernel)).permute(0, 4, 3, 1, 2)


# Configurations -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConvConfig(Config):
    """Tile sizes of a convolution: a program computes a tile of ``pixels`` by ``channels``."""

    pixels: int
    channels: int
    depth: int  # products per iteration
    splits: int = 1  # programs that share the products of a tile. If there are several, each stores its own sum.

    def __str__(self) -> str:
        return f"{self.pixels}x{self.channels}x{self.depth}/{self.splits} w{self.num_warps} s{self.num_stages}"


@dataclasses.dataclass(frozen=True)
class ColumnsConfig(ConvConfig):
    """Configuration of a convolution of few outputs whose products of all taps are columns of one matrix product.

    A pixel is read once then, not once for every tap; `epilogue.gather` adds the columns. ``columns`` distinguishes it
    from others in a file.
    """

    columns: int = 1

    def __str__(self) -> str:
        return f"columns of {super().__str__()}"


@dataclasses.dataclass(frozen=True)
class HopperConfig(ConvConfig):
    """Configuration of `fastdiff.kernels.hopper.conv`; ``tma`` distinguishes it from others in a file.

    ``num_warps`` multiply, and four more have a share of the registers, of which one loads.
    """

    tma: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler: as many registers a thread as there are for all warps, in eights."""
        return {**super().options, "maxnreg": min(255, 65536 // (32 * (self.num_warps + 4)) // 8 * 8)}

    def __str__(self) -> str:
        return f"TMA {super().__str__()}"


LayerConfig = ConvConfig | LibraryConfig


def _configs(*shapes: tuple[int, ...]) -> tuple[ConvConfig, ...]:
    return tuple(ConvConfig(*shape) for shape in shapes)


# warps, stages, pixels, channels, depth[, splits]; of 4 warps the largest tiles come first. The memory of a
# multiprocessor limits them: at 128x128 and 8 warps a thread has 64 float32 sums in registers, and the operands of all
# stages take 96 KB of shared memory. At 128x256 the sums take 128 registers of each of 256 threads; those of 4 warps
# could not hold them.
HALF = _configs(
    (8, 3, 128, 256, 64),
    (8, 3, 256, 128, 64),
    (8, 3, 128, 128, 64),
    (4, 3, 128, 128, 64),
    (4, 3, 128, 64, 64),
    (4, 4, 64, 64, 64),
    (4, 4, 128, 16, 64),  # for few output channels
)
SINGLE = _configs(
    (8, 3, 128, 64, 32),
    (4, 3, 128, 64, 32),
    (4, 3, 64, 64, 32),
    (4, 3, 64, 16, 32),
)
# A loop over taps like that of `_accumulate` was miscompiled with 8 warps, silently (pytorch #173068). So heuristics
# choose none of these: only tuning does, which compares the results of every shape before it measures.
MOST_WARPS = 4


def spills(config: ConvConfig, capability: int) -> bool:
    """Return whether the loop of a configuration spills registers on GPUs of a compute capability.

    It is what ``make kernel-check`` finds with Triton 3.7. Heuristics choose none of these either.
    """
    if config.depth == HALF[0].depth:
        large = config.pixels * config.channels >= (128 * 128 if config.num_warps == 4 else 256 * 128)
        return large and (capability >= 100 or (config.pixels == 256 and capability < 90))
    return (config.num_warps, config.pixels, config.channels) == (4, 128, 64) and (capability < 90 or capability >= 120)


# For the products of all taps of a 3x3 convolution of up to seven outputs.
HALF_COLUMNS = (
    ColumnsConfig(4, 3, pixels=128, channels=32, depth=64),
    ColumnsConfig(4, 4, pixels=64, channels=32, depth=64),
)
SINGLE_COLUMNS = (
    ColumnsConfig(4, 3, pixels=128, channels=32, depth=32),
    ColumnsConfig(4, 3, pixels=64, channels=32, depth=32),
)
MOST_COLUMNS = 64
# For maps that are so small that reading weights takes most of the time.
HALF_SPLIT = _configs((4, 3, 64, 64, 64, 4), (4, 3, 64, 32, 64, 16))
SINGLE_SPLIT = _configs((4, 2, 64, 64, 32, 4), (4, 3, 64, 32, 32, 16))
FEW = tl.constexpr(16)  # with fewer channels than this, a step covers several taps
# A product of float32 is computed as three products of TF32 numbers, high parts and remainders, which keeps 22 bits of
# the factors. Plain TF32 would keep 11. Those of halves need no such thing, and AMD's compiler does not have it.
PRECISION = "tf32x3"
# Only tuning tries these, and only on Hopper. Their stages fill the shared memory.
HOPPER = (
    HopperConfig(8, 4, pixels=128, channels=256, depth=64),
    HopperConfig(8, 4, pixels=256, channels=128, depth=64),
    HopperConfig(8, 5, pixels=128, channels=128, depth=64),
)
CANDIDATES = (*HALF, *SINGLE)
COLUMNS_CANDIDATES = (*HALF_COLUMNS, *SINGLE_COLUMNS)
SPLIT_CANDIDATES = (*HALF_SPLIT, *SINGLE_SPLIT)

# Kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _accumulate(
    acc, src, weight, begin, end, row, y, x, exists, c, H, W, columns,
    C: tl.constexpr, KERNEL: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + sum over taps of src[row, y + ky, x + kx, :] weight[ky, kx, :, c], over steps ``begin`` to ``end``.

    A step is ``DEPTH`` products of one tap or, with few channels, of several. Pixels outside the map are zeros.
    """
    i = tl.arange(0, DEPTH)
    base = src + ((row.to(tl.int64) * H + y) * W + x) * C
    if C < FEW:
        for step in range(begin, end):
            k = step * DEPTH + i
            tap = k // C
            ky, kx = tap // KERNEL, tap % KERNEL
            yy, xx = y[:, None] + ky[None, :], x[:, None] + kx[None, :]
            mask = exists[:, None] & (k < KERNEL * KERNEL * C)[None, :]
            mask = mask & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
            a = tl.load(base[:, None] + ((ky * W + kx) * C + k % C)[None, :], mask=mask, other=0.0)
            mask = (k < KERNEL * KERNEL * C)[:, None] & (c < columns)[None, :]
            b = tl.load(weight + k[:, None] * columns + c[None, :], mask=mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        chunks: tl.constexpr = (C + DEPTH - 1) // DEPTH
        for step in range(begin, end):
            tap = step // chunks
            k = step % chunks * DEPTH + i
            ky, kx = tap // KERNEL, tap % KERNEL
            mask = exists & (y + ky >= 0) & (y + ky < H) & (x + kx >= 0) & (x + kx < W)
            mask = mask[:, None]
            if C % DEPTH != 0:
                mask = mask & (k < C)[None, :]
            a = tl.load(base[:, None] + ((ky * W + kx) * C + k)[None, :], mask=mask, other=0.0)
            mask = (c < columns)[None, :]
            if C % DEPTH != 0:
                mask = mask & (k < C)[:, None]
            b = tl.load(weight + (tap * C + k)[:, None] * columns + c[None, :], mask=mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@overlap.overlaps
@triton.jit(do_not_specialize=["rows"])
def _conv(
    first, second, weight, more_weight, dst, bias, table, entry, residual, statistics,
    rows, source_H, source_W, H, W, N, columns, padding, offset, stride, factor,
    C0: tl.constexpr, C1: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PHASES: tl.constexpr,
    STEPS0: tl.constexpr, STEPS1: tl.constexpr, SPLITS: tl.constexpr, PARTIAL: tl.constexpr, SHIFT: tl.constexpr,
    NCHW: tl.constexpr, PRECISION: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst. Grid: (tiles of pixels x channels, splits x phases).

    H, W: size of dst or, if it has phases, of one of them. With PARTIAL, dst is float32 [splits, rows, H, W, N], whose
    parts another kernel adds.
    """
    overlap.wait()
    tiles_c = tl.cdiv(N, CHANNELS)
    tile = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * CHANNELS + tl.arange(0, CHANNELS)
    phase = tl.program_id(1) % PHASES
    split = tl.program_id(1) // PHASES
    row, y, x, exists = tiles.pixels(tile, rows, H, W, HEIGHT, WIDTH, SIZE)
    if PHASES == 4:
        top = y + phase // 2 - 1
        left = x + phase % 2 - 1
        weight += phase * KERNEL * KERNEL * C0 * columns
        more_weight = more_weight + phase * KERNEL * KERNEL * C1 * columns if C1 > 0 else more_weight
    else:
        top = y * STRIDE - padding
        left = x * STRIDE - padding
    # Each split has a share of the steps. Those of the second source follow those of the first.
    share: tl.constexpr = (STEPS0 + STEPS1 + SPLITS - 1) // SPLITS
    begin = split * share
    end = begin + share
    acc = tl.zeros([SIZE, CHANNELS], tl.float32)
    acc = _accumulate(
        acc, first, weight, tl.minimum(begin, STEPS0), tl.minimum(end, STEPS0), row, top, left, exists, c,
        source_H, source_W, columns, C0, KERNEL, DEPTH, PRECISION,
    )  # fmt: skip
    if C1 > 0:
        acc = _accumulate(
            acc, second, more_weight, tl.maximum(begin - STEPS0, 0), tl.minimum(end - STEPS0, STEPS1), row, top, left,
            exists, c, source_H, source_W, columns, C1, KERNEL, DEPTH, PRECISION,
        )  # fmt: skip
    if PARTIAL:
        if PHASES == 4:
            H *= 2
            W *= 2
            y = 2 * y + phase // 2
            x = 2 * x + phase % 2
        pixel = ((split * rows + row).to(tl.int64) * H + y) * W + x
        tl.store(dst + pixel[:, None] * N + c[None, :], acc, mask=exists[:, None] & (c < N)[None, :])
    else:
        tiles.finish(
            acc, tile, row, y, x, exists, c, phase, dst, bias, table, entry, residual, statistics,
            rows, H, W, N, offset, stride, factor, PHASES, SHIFT, NCHW, HEIGHT, WIDTH, SIZE, CHANNELS,
        )  # fmt: skip


# Launches -------------------------------------------------------------------------------------------------------------


def candidates(dtype: torch.dtype) -> tuple[tuple[ConvConfig, ...], tuple[ConvConfig, ...]]:
    """Return the configurations for operands of ``dtype``: those without splits, and those with."""
    return (HALF, HALF_SPLIT) if dtype.itemsize == 2 else (SINGLE, SINGLE_SPLIT)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shape of a convolution."""

    rows: int  # of the batch
    source: tuple[int, int]  # height and width of the sources
    H: int  # height of dst or, if it has phases, of one of them; W likewise
    W: int
    channels: tuple[int, int]  # of both sources; 0: there is no second one
    N: int  # output channels
    kernel: int  # size of the kernel, of one phase if there are several
    stride: int
    phases: int  # 1, or 4 if the sources are upsampled
    dtype: torch.dtype  # of the operands
    device: Device

    @classmethod
    def of(cls, src: Sequence[Tensor], weight: Sequence[Tensor], shape: Sequence[int], stride: int) -> Problem:
        """Build the problem of these sources and packed weights. shape: (rows, H, W, N) of dst."""
        phases, taps, _, _ = weight[0].shape
        assert [part.shape[2] for part in weight] == [s.shape[3] for s in src]
        assert all(part.dtype == s.dtype for part, s in zip(weight, src, strict=True))
        return cls.at(src, shape, math.isqrt(taps) + (phases > 1), stride, phases > 1)

    @classmethod
    def at(
        cls, src: Sequence[Tensor], shape: Sequence[int], kernel: int, stride: int, upsample: bool = False
    ) -> Problem:
        """Build the problem of a layer whose weights [N, C, k, k] are not packed yet. kernel: k."""
        rows, H, W, N = shape
        channels = (src[0].shape[3], src[1].shape[3] if len(src) == 2 else 0)
        return cls(
            rows, (src[0].shape[1], src[0].shape[2]), H // (1 + upsample), W // (1 + upsample), channels, N,
            kernel - upsample, stride, tiles.PHASES if upsample else 1, src[0].dtype, device_of(src[0]),
        )  # fmt: skip

    def like(self, rows: int | None) -> Problem:
        """Return the same problem with ``rows`` rows; None: this one."""
        return self if rows is None else dataclasses.replace(self, rows=rows)

    @property
    def key(self) -> str:
        """Key of the tuned configurations."""
        kind = f"{self.kernel}x{self.kernel}/{self.stride}" + "up" * (self.phases > 1)
        return f"{self.rows}x{self.H}x{self.W}x{self.channels[0]}+{self.channels[1]}->{self.N} {kind} " + name_of(
            self.dtype
        )

    def blocks(self, config: ConvConfig) -> Blocks:
        """Return the blocks into which the kernel divides dst."""
        return Blocks.of(self.H, self.W, config.pixels, self.phases > 1)

    def sums(self, config: LayerConfig, partial: bool = False) -> int:
        """Return the number of sums that another kernel has to add; 0: the kernel finishes its results itself.

        partial: whether another kernel finishes them in any case.
        """
        if isinstance(config, LibraryConfig):
            return 1 + (self.channels[1] > 0)
        return config.splits if config.splits > 1 or partial else 0

    def finish(self, config: LayerConfig) -> epilogue.FinishConfig:
        """Return the configuration in which `epilogue.finish` adds the sums of the whole map."""
        up = 1 + (self.phases > 1)
        dtype = self.dtype if isinstance(config, LibraryConfig) else torch.float32
        return epilogue.finish_config(
            self.sums(config), self.rows, up * self.H, up * self.W, self.N, dtype, self.device
        )[1]  # fmt: skip

    def finished_blocks(self, config: LayerConfig) -> Blocks:
        """Return the blocks of the kernel that computes statistics: `conv`, or `epilogue.finish` on the whole map."""
        if isinstance(config, ConvConfig) and config.splits == 1:
            return self.blocks(config)
        up = 1 + (self.phases > 1)
        return Blocks.of(up * self.H, up * self.W, self.finish(config).pixels)

    def tiles(self, config: ConvConfig) -> int:
        """Return the number of tiles, of each phase."""
        blocks = self.blocks(config)
        return cdiv(blocks.count(self.rows), config.pixels // blocks.pixels) * cdiv(self.N, config.channels)

    def steps(self, config: ConvConfig) -> tuple[int, int]:
        """Return the number of steps for each source. A step covers one tap or, with few channels, several."""

        def number(C: int) -> int:
            taps = self.kernel**2
            return cdiv(taps * C, config.depth) if C < FEW else taps * cdiv(C, config.depth)

        return number(self.channels[0]), number(self.channels[1])

    def heuristic(self, splits: bool) -> ConvConfig:
        """Choose the tile with the lowest `cost` that keeps at least three in four multiprocessors busy.

        If there is none, and ``splits`` allows it, products may be split into shares of at least two steps. The choice
        is then the configuration whose number of programs is nearest to that of multiprocessors.
        """
        whole, split = candidates(self.dtype)
        if whole[-1].channels >= self.N:
            return whole[-1]
        usual = [c for c in whole[:-1] if c.num_warps <= MOST_WARPS and not spills(c, self.device.capability)]
        fitting = [config for config in usual if config.channels < 2 * self.N] or usual[-1:]
        best = min(fitting, key=self.cost)
        if 4 * self.tiles(best) * self.phases >= 3 * self.device.processors:
            return best
        useful = [config for config in split if sum(self.steps(config)) >= 2 * config.splits] if splits else []
        return min(
            (*useful, fitting[-1]),
            key=lambda config: abs(math.log(self.tiles(config) * self.phases * config.splits / self.device.processors)),
        )

    def cost(self, config: ConvConfig) -> int:
        """Return waves of programs times the work of one, in multiplications per step and unit of depth.

        A number that is read costs as much as 16 multiplications of tensor cores: about their rate on an H100 over that
        of its L2 cache, in numbers of two bytes.
        """
        waves = cdiv(self.tiles(config) * self.phases, self.device.processors)
        return waves * (config.pixels * config.channels + 16 * (config.pixels + config.channels))

    @property
    def layer_candidates(self) -> tuple[LayerConfig, ...]:
        """Configurations of a layer.

        The library is none of them if the sources are upsampled: it cannot store the interleaved results of four 2x2
        convolutions, and on the doubled map it would compute 9 / 4 of the products.
        """
        whole, split = candidates(self.dtype)
        return (*((LIBRARY,) if self.phases == 1 else ()), *whole, *split, *self.hopper())

    def hopper(self) -> tuple[HopperConfig, ...]:
        """Return the configurations of `fastdiff.kernels.hopper.conv` that can compute this.

        A row of pixels or weights is described to the hardware in units of 16 bytes, and a step has one tap.
        """
        able = self.device.capability == 90 and self.dtype.itemsize == 2 and self.stride == 1
        if not able or any(C % 8 != 0 or 0 < C < FEW for C in self.channels):
            return ()
        return tuple(
            config
            for config in HOPPER
            if config.channels < 2 * self.N and hopper.box(self.blocks(config), config.pixels)
        )

    def columns(self) -> tuple[ColumnsConfig, ...]:
        """Return the configurations in which the products of all taps are columns, if these are few enough."""
        able = self.kernel == 3 and self.stride == self.phases == 1 and self.channels[1] == 0
        able = able and self.source == (self.H, self.W) and self.channels[0] >= 2 * FEW.value
        if not able or 9 * self.N > MOST_COLUMNS:
            return ()
        return HALF_COLUMNS if self.dtype.itemsize == 2 else SINGLE_COLUMNS

    def as_columns(self) -> Problem:
        """Return the problem of the matrix product whose columns are the products of all taps."""
        return dataclasses.replace(self, kernel=1, N=self.kernel**2 * self.N)

    def choose_layer(self, plain: bool = False) -> LayerConfig:
        """Choose a configuration before weights are packed: by `library.pack` for `LIBRARY`, else by `pack`.

        plain: the layer has nothing but a bias and stores NCHW, as the last one of a network does; then the products of
        all its taps may be columns, for `pack_columns`.
        """
        columns = self.columns() if plain else ()

        def heuristic() -> LayerConfig:
            of_product = self.as_columns()
            return fill(columns, of_product.tiles, self.device) if columns else self.heuristic(True)

        return choose("conv.layer", self.key, self.device, (*columns, *self.layer_candidates), heuristic)

    def choose(self, splits: bool, plain: bool = False) -> ConvConfig:
        """Choose a configuration of this module's kernel, by the heuristic if a file names the library."""
        if splits:
            config = self.choose_layer(plain)
            return config if isinstance(config, ConvConfig) else self.heuristic(True)
        whole, _ = candidates(self.dtype)
        return choose("conv.conv", self.key, self.device, whole, lambda: self.heuristic(False))

    def grid(self, config: ConvConfig) -> tuple[int, int]:
        """Return the grid of the kernel."""
        return self.tiles(config), config.splits * self.phases

    def arguments(
        self, config: ConvConfig, src: Sequence[Tensor], weight: Sequence[Tensor], dst: Tensor, padding: int
    ) -> dict[str, Any]:
        """Return the arguments of the kernel, without bias, embedding, residual and statistics."""
        blocks = self.blocks(config)
        steps0, steps1 = self.steps(config)
        return {
            "first": src[0], "second": src[1] if len(src) == 2 else None, "weight": weight[0],
            "more_weight": weight[1] if len(src) == 2 else None, "dst": dst, "bias": None, "table": None,
            "entry": None, "residual": None, "statistics": None, "rows": self.rows, "source_H": self.source[0],
            "source_W": self.source[1], "H": self.H, "W": self.W, "N": self.N, "columns": weight[0].shape[3],
            "padding": padding, "offset": 0, "stride": 0, "factor": 1.0, "C0": self.channels[0],
            "C1": self.channels[1], "KERNEL": self.kernel, "STRIDE": self.stride, "PHASES": self.phases,
            "STEPS0": steps0, "STEPS1": steps1, "SPLITS": config.splits, "PARTIAL": False, "SHIFT": 0, "NCHW": False,
            "PRECISION": PRECISION if self.dtype.itemsize > 2 else "ieee", "HEIGHT": blocks.height,
            "WIDTH": blocks.width, "SIZE": config.pixels,
            "CHANNELS": config.channels, "DEPTH": config.depth,
        }  # fmt: skip

    def launch(self, arguments: dict[str, Any], config: ConvConfig, **fields: Any) -> Launch:
        """Return the launch of a configuration's kernel. fields: those of a launch that depend on the operation."""
        if isinstance(config, HopperConfig):
            units = self.tiles(config) * self.phases
            return hopper.conv(arguments, units, self.device.processors, config, **fields)
        return Launch(kernel=_conv, grid=self.grid(config), arguments=arguments, config=config, **fields)


@operation
def conv(
    src: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor,
    dst: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    nchw: bool = False,
    table: Tensor | None = None,
    entry: Tensor | None = None,
    offset: int = 0,
    residual: Tensor | None = None,
    divide: float = 1.0,
    statistics: Tensor | None = None,
    config: ConvConfig | None = None,
) -> Launch:
    """Compute dst = (W src + bias + table[entry, offset:] + residual) / divide as one kernel.

    Args:
        src: one or two maps [rows, H, W, C_i], which are concatenated.
        weight: weights of `pack`, with four phases if the sources are upsampled first.
        bias: float32 [N].
        dst: [rows, H', W', N], or [rows, N, H', W'] if ``nchw``.
        stride: 1 or 2.
        padding: zeros above and to the left; below and to the right there are as many as the size of dst requires.
        table, entry, offset: row i adds N numbers of table [entries, width], from column ``offset`` of entry[i] on
            (entry None: of entry i). table None: nothing is added.
        residual: [rows, H', W', N], or a map of half that size, which is doubled.
        divide: divisor of the result.
        statistics: float32 [rows, strips, parts, 2, N] of dst before it is rounded, in the blocks of `Problem.blocks`.
    """
    rows, H, _, N = shape = _nhwc(dst, nchw)
    problem = Problem.of(src, weight, shape, stride)
    config = config or problem.choose(splits=False)
    blocks = problem.blocks(config)
    assert config.splits == 1
    assert statistics is None or statistics.shape == (rows, blocks.strips, blocks.parts, 2, N)
    whole = (*candidates(problem.dtype)[0], *(() if nchw else problem.hopper()))
    return problem.launch(
        problem.arguments(config, src, weight, dst, padding)
        | tiles.finish_arguments(bias, H, nchw, table, entry, offset, residual, divide, statistics),
        config,
        op="conv.conv",
        key=problem.key,
        candidates=tuple(c for c in whole if statistics is None or problem.blocks(c).parts == blocks.parts),
        reference=lambda: tiles.finish_reference(
            product_reference(src, weight, shape, stride, padding), bias, dst, nchw, table, entry, offset, residual,
            divide, statistics, blocks,
        ),
    )  # fmt: skip


@operation
def partial(
    src: Sequence[Tensor],
    weight: Sequence[Tensor],
    sums: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    config: ConvConfig | None = None,
) -> Launch:
    """Compute sums[i] = the i-th share of the products of W src, which another kernel adds in order.

    This keeps all multiprocessors busy if maps are small and weights are not. sums: float32 [splits, rows, H', W', N].
    """
    shape = sums.shape[1:]
    problem = Problem.of(src, weight, shape, stride)
    if config is None:
        whole, split = candidates(problem.dtype)
        config = next((c for c in split if c.splits == len(sums)), whole[0])
    assert config.splits == len(sums)
    return problem.launch(
        problem.arguments(config, src, weight, sums, padding) | {"PARTIAL": True},
        config,
        op="conv.partial",
        key=f"{problem.key} {config.splits}",
        candidates=_alike(config, problem.dtype),
        reference=lambda: _partial_reference(src, weight, sums, stride, padding, config.depth),
    )  # fmt: skip


def _alike(config: ConvConfig, dtype: torch.dtype) -> tuple[ConvConfig, ...]:
    """Return the configurations of `partial` that give as many sums; one that does not split is a layer's choice."""
    if isinstance(config, ColumnsConfig):
        return HALF_COLUMNS if dtype.itemsize == 2 else SINGLE_COLUMNS
    return tuple(c for c in candidates(dtype)[1] if c.splits == config.splits) or (config,)


def weight_columns(N: int, weight: Sequence[Tensor]) -> int:
    """Return the number of columns of weights of `pack_columns`, without the padding: all have 3x3 taps."""
    assert weight[0].shape[:2] == (1, 1)
    return 9 * N


def product_reference(
    src: Sequence[Tensor], weight: Sequence[Tensor], shape: Sequence[int], stride: int, padding: int
) -> Tensor:
    """Compute W src [rows, H', W', N] in torch, at least in float32. shape: that of the result."""
    _, H, W, N = shape
    x = torch.cat([wide(s) for s in src], dim=3).permute(0, 3, 1, 2)
    U = unpack(weight, N)
    k = U.shape[3]

    def padded(before: tuple[int, int], H: int, W: int) -> Tensor:
        after = ((v - 1) * stride + k - n - b for v, n, b in zip((H, W), x.shape[2:], before, strict=True))
        down, right = after
        return F.pad(x, (before[1], right, before[0], down))

    if len(U) == 1:
        return F.conv2d(padded((padding, padding), H, W), U[0], stride=stride).permute(0, 2, 3, 1)
    y = x.new_empty(len(x), N, H, W)
    for phase, kernel in enumerate(U):
        p, q = divmod(phase, 2)
        y[:, :, p::2, q::2] = F.conv2d(padded((1 - p, 1 - q), H // 2, W // 2), kernel)
    return y.permute(0, 2, 3, 1)


def _partial_reference(
    src: Sequence[Tensor], weight: Sequence[Tensor], sums: Tensor, stride: int, padding: int, depth: int
) -> None:
    """Compute every share of W src in torch, from the weights of its steps alone."""
    steps: list[Tensor] = []  # the step to which each row of the weights belongs
    count = 0
    for part in weight:
        _, taps, C, _ = part.shape
        k = torch.arange(taps * C, dtype=torch.int64, device=part.device)
        step = k // depth if C < FEW else k // C * cdiv(C, depth) + k % C // depth
        steps.append((step + count).view(taps, C, 1))
        count += cdiv(taps * C, depth) if C < FEW else taps * cdiv(C, depth)
    share = cdiv(count, len(sums))
    for i, part in enumerate(sums):
        own = [torch.where(step // share == i, w, 0.0) for step, w in zip(steps, weight, strict=True)]
        part.copy_(product_reference(src, own, part.shape, stride, padding))


# Layers ---------------------------------------------------------------------------------------------------------------


def layer(
    src: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor,
    dst: Tensor | None,
    *,
    workspace: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    nchw: bool = False,
    statistics: Tensor | None = None,
    then: epilogue.Normed | None = None,
    chosen_for: int | None = None,
    config: LayerConfig | None = None,
    **finish: Any,
) -> tuple[Launch, ...]:
    """Compute a convolution, as `conv` describes it, by one or two launches.

    Products may be split among programs or, with `LIBRARY`, computed by the library; then weights are those of
    `library.pack`, and the padding is on all sides. Without ``config``, one of this module's kernel is chosen.
    ``statistics`` are in the blocks of `Problem.finished_blocks`. ``workspace`` is flat float32 of the size that
    `workspace` returns, or None if that is 0; its contents are not needed after the launches. With ``then``, the result
    is normalised too (`epilogue.normed`), and need not be stored: then dst may be None. ``finish`` has the other
    arguments of `conv`.
    """
    if isinstance(config, ColumnsConfig):
        assert dst is not None
        assert nchw
        assert statistics is None
        assert then is None
        assert set(finish) <= {"divide"}
        assert finish.get("divide", 1.0) == 1.0
        assert workspace is not None
        rows, _, H, W = dst.shape
        columns = weight_columns(len(bias), weight)
        sums = workspace[: rows * H * W * columns].view(1, rows, H, W, columns)
        product = partial(src, weight, sums, config=config)
        return product, epilogue.gather(sums[0], bias, dst, padding=padding, chosen_for=chosen_for)
    if dst is None:
        assert then is not None
        shape: tuple[int, ...] = (*then.out.shape[:3], len(bias))
    else:
        shape = _nhwc(dst, nchw)
    problem = Problem.of(src, weight, shape, stride)
    like = problem.like(chosen_for)
    config = config or like.choose(splits=True)
    number = problem.sums(config, partial=then is not None)
    if number == 0:
        assert isinstance(config, ConvConfig)
        assert dst is not None
        return (
            conv(
                src, weight, bias, dst, stride=stride, padding=padding, nchw=nchw, statistics=statistics, config=config,
                **finish,
            ),
        )  # fmt: skip
    assert workspace is not None
    kind = problem.dtype if isinstance(config, LibraryConfig) else workspace.dtype
    sums = workspace.view(kind)[: number * math.prod(shape)].view(number, *shape)
    if isinstance(config, LibraryConfig):
        product = library.products(src, weight, sums, stride=stride, padding=padding, config=config)
    else:
        product = partial(src, weight, sums, stride=stride, padding=padding, config=config)
    if then is not None:
        assert statistics is None
        assert not nchw
        return product, epilogue.normed(sums, bias, dst, then, chosen_for=chosen_for, **finish)
    assert dst is not None
    return product, epilogue.finish(
        sums, bias, dst, nchw=nchw, statistics=statistics, chosen_for=chosen_for, config=like.finish(config), **finish
    )


def workspace(
    src: Sequence[Tensor],
    weight: Sequence[Tensor],
    shape: Sequence[int],
    *,
    stride: int = 1,
    partial: bool = False,
    config: LayerConfig | None = None,
) -> int:
    """Return how many numbers of workspace `layer` needs. shape: (rows, H', W', N) of dst; partial: with ``then``."""
    if isinstance(config, ColumnsConfig):
        return math.prod(shape[:3]) * weight_columns(shape[3], weight)
    problem = Problem.of(src, weight, shape, stride)
    config = config or problem.choose(splits=True)
    sums = problem.sums(config, partial) * math.prod(shape)
    if isinstance(config, LibraryConfig):  # sums have the dtype of its operands
        sums = cdiv(sums * problem.dtype.itemsize, torch.float32.itemsize)
    return sums


def _nhwc(dst: Tensor, nchw: bool) -> tuple[int, int, int, int]:
    """Return the shape of dst as (rows, H, W, N)."""
    rows, *rest = dst.shape
    N, H, W = rest if nchw else (rest[2], rest[0], rest[1])
    return rows, H, W, N
