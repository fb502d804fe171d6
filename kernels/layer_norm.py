"""LayerNorm (Ba, Kiros & Hinton 2016) over the channels of each pixel, as transformers have it before their products.

`layer_norm` builds the launch, `_layer_norm` is the kernel, and `layer_norm_reference` computes the same in torch.
"""

from __future__ import annotations

import dataclasses
import functools

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation, power_of_two, wide

MOST_ELEMENTS = 64  # of a tile, per thread


@dataclasses.dataclass(frozen=True)
class LayerNormConfig(Config):
    """Tile size: ``pixels`` per program, with all their channels in registers."""

    pixels: int


# Largest tiles first; the last one is for pixels whose channels no other can hold.
CANDIDATES = (
    LayerNormConfig(num_warps=4, num_stages=1, pixels=8),
    LayerNormConfig(num_warps=4, num_stages=1, pixels=4),
    LayerNormConfig(num_warps=2, num_stages=1, pixels=2),
    LayerNormConfig(num_warps=1, num_stages=1, pixels=1),
    LayerNormConfig(num_warps=8, num_stages=1, pixels=1),
)


@overlap.overlaps
@triton.jit(do_not_specialize=["pixels"])
def _layer_norm(src, gamma, beta, dst, pixels, C, number, eps, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Compute some pixels, counted across all rows. Grid: (blocks of pixels,).

    number: C as a float. The mean is summed as differences from the first channel, so that a large mean costs no
    precision, and the variance is that of the deviations.
    """
    overlap.wait()
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    known = c < C
    mask = (p < pixels)[:, None] & known[None, :]
    place = p[:, None] * C + c[None, :]
    x = tl.load(src + place, mask=mask, other=0.0).to(tl.float32)
    origin = tl.load(src + p * C, mask=p < pixels, other=0.0).to(tl.float32)
    off = tl.where(mask, x - origin[:, None], 0.0)
    mean = tl.sum(off, axis=1) / number
    off = tl.where(mask, off - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(off * off, axis=1) / number + eps)
    scale = tl.load(gamma + c, mask=known, other=0.0)
    shift = tl.load(beta + c, mask=known, other=0.0)
    y = off * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(dst + place, y.to(dst.dtype.element_ty), mask=mask)


@operation
def layer_norm(
    src: Tensor,
    gamma: Tensor,
    beta: Tensor,
    dst: Tensor,
    *,
    eps: float,
    chosen_for: int | None = None,
    config: LayerNormConfig | None = None,
) -> Launch:
    """Compute dst = (x - mean) / sqrt(var + eps) gamma + beta, with mean and variance over the channels of a pixel.

    src and dst are [rows, H, W, C], contiguous; gamma and beta are float32 [C].
    """
    rows, H, W, C = dst.shape
    assert src.shape == dst.shape
    assert src.is_contiguous()
    assert dst.is_contiguous()
    like = chosen_for or rows
    key = f"{like}x{H}x{W}x{C} {name_of(src.dtype)} {name_of(dst.dtype)}"
    held = power_of_two(C)
    candidates = tuple(c for c in CANDIDATES if c.pixels * held <= 32 * MOST_ELEMENTS * c.num_warps) or CANDIDATES[-1:]
    config = config or choose_filling(
        "layer_norm", key, dst, candidates, lambda config: cdiv(like * H * W, config.pixels)
    )  # fmt: skip
    return Launch(
        op="layer_norm",
        key=key,
        kernel=_layer_norm,
        grid=(cdiv(rows * H * W, config.pixels),),
        arguments={
            "src": src, "gamma": gamma, "beta": beta, "dst": dst, "pixels": rows * H * W, "C": C, "number": float(C),
            "eps": eps, "PIXELS": config.pixels, "CHANNELS": held,
        },
        config=config,
        candidates=candidates,
        reference=functools.partial(layer_norm_reference, src, gamma, beta, dst, eps),
    )  # fmt: skip


def layer_norm_reference(src: Tensor, gamma: Tensor, beta: Tensor, dst: Tensor, eps: float) -> None:
    """Compute dst, as `layer_norm` describes it, in torch."""
    x = wide(src)
    off = x - x[..., :1]
    off = off - off.mean(dim=3, keepdim=True)
    var = (off * off).mean(dim=3, keepdim=True)
    dst.copy_(off / (var + eps).sqrt() * wide(gamma) + wide(beta))
