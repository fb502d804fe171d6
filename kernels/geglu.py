"""The gated layer of a transformer's MLP as one kernel: dst = a gelu(g), [a, g] = W src + b (Shazeer 2020).

A program sums a tile of the values a and the tile of their gates g side by side, so that neither is stored. `geglu`
builds the launch, `_geglu` is the kernel, and `geglu_reference` computes the same in torch.
"""

from __future__ import annotations

import dataclasses
import functools

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose, device_of, fill, name_of, operation, wide

PRECISION = "tf32x3"  # of float32 products; see `fastdiff.kernels.conv`


@dataclasses.dataclass(frozen=True)
class GegluConfig(Config):
    """Tile sizes: a program computes a tile of ``pixels`` by ``channels``, from twice as many sums."""

    pixels: int
    channels: int
    depth: int  # products per iteration


# Largest tiles first. The sums of a tile take as many registers as those of a convolution's with twice the channels. Of
# the first one, operands of a greater depth would be spilled on GPUs of compute capability 8.0, 8.9 and 12.0.
HALF = (
    GegluConfig(4, 4, pixels=128, channels=64, depth=32),
    GegluConfig(4, 3, pixels=64, channels=64, depth=64),
    GegluConfig(4, 4, pixels=64, channels=32, depth=64),
)
SINGLE = (
    GegluConfig(4, 3, pixels=64, channels=32, depth=32),
    GegluConfig(4, 3, pixels=64, channels=16, depth=32),
)
CANDIDATES = (*HALF, *SINGLE)


@triton.jit
def gelu(x):
    """Return x Phi(x), where Phi is the distribution function of a normal number, by the error function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@overlap.overlaps
@triton.jit(do_not_specialize=["pixels"])
def _geglu(
    src, weight, bias, dst, pixels, N, columns,
    C: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dst. Grid: (tiles of pixels x channels,); pixels are counted across all rows.

    weight is [C, columns]: the columns of the N values come first, those of their gates follow.
    """
    overlap.wait()
    tiles = tl.cdiv(N, CHANNELS)
    p = (tl.program_id(0) // tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, DEPTH)
    here, known = (p < pixels)[:, None], (c < N)[None, :]
    value = tl.zeros([PIXELS, CHANNELS], tl.float32)
    gate = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for first in range(0, C, DEPTH):
        k = first + i
        mask = here
        if C % DEPTH != 0:
            mask = mask & (k < C)[None, :]
        x = tl.load(src + p[:, None] * C + k[None, :], mask=mask, other=0.0)
        mask = known
        if C % DEPTH != 0:
            mask = mask & (k < C)[:, None]
        at = weight + k[:, None] * columns + c[None, :]
        value = tl.dot(x, tl.load(at, mask=mask, other=0.0), value, input_precision=PRECISION)
        gate = tl.dot(x, tl.load(at + N, mask=mask, other=0.0), gate, input_precision=PRECISION)
    value += tl.load(bias + c, mask=c < N, other=0.0)[None, :]
    gate += tl.load(bias + N + c, mask=c < N, other=0.0)[None, :]
    result = value * gelu(gate)
    tl.store(dst + p[:, None] * N + c[None, :], result.to(dst.dtype.element_ty), mask=here & known)


@operation
def geglu(
    src: Tensor,
    weight: Tensor,
    bias: Tensor,
    dst: Tensor,
    *,
    chosen_for: int | None = None,
    config: GegluConfig | None = None,
) -> Launch:
    """Compute dst = a gelu(g), where [a, g] = W src + b, and gelu is the exact one.

    Args:
        src: [rows, H, W, C], contiguous.
        weight: W, the values' outputs before the gates', as `fastdiff.kernels.conv.pack` packs it: [1, 1, C, columns].
        bias: float32 [2 N].
        dst: [rows, H, W, N], contiguous.
        chosen_for: See `fastdiff.kernels.launch.operation`.
        config: Likewise.
    """
    rows, H, W, N = dst.shape
    C, columns = weight.shape[2:]
    assert src.shape == (rows, H, W, C)
    assert src.is_contiguous()
    assert dst.is_contiguous()
    assert len(bias) == 2 * N <= columns
    assert weight.dtype == src.dtype
    like, device = chosen_for or rows, device_of(src)
    key = f"{like}x{H}x{W}x{C}->{N} {name_of(src.dtype)}"
    candidates = HALF if src.dtype.itemsize == 2 else SINGLE

    def programs(config: GegluConfig) -> int:
        return cdiv(like * H * W, config.pixels) * cdiv(N, config.channels)

    config = config or choose("geglu", key, device, candidates, lambda: fill(candidates, programs, device))
    return Launch(
        op="geglu",
        key=key,
        kernel=_geglu,
        grid=(cdiv(rows * H * W, config.pixels) * cdiv(N, config.channels),),
        arguments={
            "src": src, "weight": weight, "bias": bias, "dst": dst, "pixels": rows * H * W, "N": N, "columns": columns,
            "C": C, "PRECISION": PRECISION if src.dtype.itemsize > 2 else "ieee", "PIXELS": config.pixels,
            "CHANNELS": config.channels, "DEPTH": config.depth,
        },
        config=config,
        candidates=candidates,
        reference=functools.partial(geglu_reference, src, weight, bias, dst),
    )  # fmt: skip


def geglu_reference(src: Tensor, weight: Tensor, bias: Tensor, dst: Tensor) -> None:
    """Compute dst = a gelu(g) in torch."""
    N = dst.shape[3]
    value, gate = (wide(src) @ wide(weight[0, 0, :, : 2 * N]) + wide(bias)).chunk(2, dim=3)
    dst.copy_(value * F.gelu(gate))
