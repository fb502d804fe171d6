"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and the standard normals made of its words.

`normals` is a function for other kernels, `noise` an operation. The reference is `fastdiff.core.noise`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core import noise as reference
from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, operation

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
UPDATE = tl.constexpr(reference.UPDATE)


@triton.jit
def _multiply(m: tl.constexpr, c):
    """Return the high and the low 32 bits of the product of two unsigned 32-bit numbers, by one wide multiplication."""
    product = c.to(tl.uint64) * m
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, index, row, k, STREAM: tl.constexpr):
    """Compute the words w0..w3 of the counters ``k``, as uint32. seed, index, row: int64 scalars of one image.

    Ten rounds compute the following, and add (W0, W1) to the key (k0, k1):

        (hi0, lo0) = M0 c0;  (hi1, lo1) = M1 c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    """
    c0 = k.to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1 = zero + (row | (STREAM << 24)).to(tl.uint32)
    c2 = zero + index.to(tl.uint32)
    c3 = zero + (index >> 32).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = _multiply(M0, c0)
        hi1, lo1 = _multiply(M1, c2)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def _uniform(w):
    """Return u = ((w >> 9) + 1/2) 2^-23, which is exact in float32."""
    return ((w >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _log(u):
    """Return ln u within about 1 ulp for normal numbers u.

    With u = 2^e m, m from sqrt(1/2) to sqrt(2), and f = m - 1: ln u = e ln 2 + f + f^2 (f P(f) - 1/2).
    """
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32)
    p = tl.full(u.shape, 7.0376836292e-2, tl.float32)
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    q = p * f - 0.5
    return n * 0.693359375 + ((f + n * -2.12194440e-4) + f * f * q)


@triton.jit
def _cos_sin_turns(v):
    """Return (cos, sin)(2 pi v) for v in [0, 1]. v = q/4 + b with |b| <= 1/8 is exact, unlike 2 pi v.

    sin(2 pi b) = b (2 pi + b^2 S(b^2));  cos(2 pi b) = 1 + b^2 C(b^2);  a quarter turn: (cos, sin) -> (-sin, cos)
    """
    q = (v * 4.0 + 0.5).to(tl.int32)
    b = v - q.to(tl.float32) * 0.25
    square = b * b
    s = tl.full(v.shape, 41.5895421487, tl.float32)
    s = s * square - 76.7012858949
    s = s * square + 81.6052349923
    s = s * square - 41.3417022334
    s = b * (6.28318548 + (s * square - 1.74845553e-7))
    c = tl.full(v.shape, 59.4241059818, tl.float32)
    c = c * square - 85.4488200897
    c = c * square + 64.9393690514
    c = c * square - 19.73920879
    c = c * square + 1.0
    odd = (q & 1) != 0
    first = tl.where(odd, s, c)
    second = tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) != 0, -first, first), tl.where((q & 2) != 0, -second, second)


@triton.jit
def _box_muller(u, v):
    """Return the two normals sqrt(-2 ln u) (cos, sin)(2 pi v) (Box & Muller 1958)."""
    r = tl.sqrt_rn(-2.0 * _log(u))
    c, s = _cos_sin_turns(v)
    return r * c, r * s


@triton.jit
def normals(seed, index, row, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Return float32 [BLOCK], the standard normals of elements 4 first, 4 first + 1, ... of an image."""
    w0, w1, w2, w3 = philox(seed, index, row, first + tl.arange(0, BLOCK // 4), STREAM)
    z0, z1 = _box_muller(_uniform(w0), _uniform(w1))
    z2, z3 = _box_muller(_uniform(w2), _uniform(w3))
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@dataclasses.dataclass(frozen=True)
class NoiseConfig(Config):
    """Tile size: ``elements`` of an image per program."""

    elements: int


CANDIDATES = (
    NoiseConfig(num_warps=4, num_stages=1, elements=1024),
    NoiseConfig(num_warps=2, num_stages=1, elements=256),
)


@overlap.overlaps
@triton.jit
def _noise(
    seed, index, row, dst, size, STREAM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute a block of one image. Grid: (blocks, images)."""
    overlap.wait()
    image = tl.program_id(1)
    seed, index, row = tl.load(seed + image), tl.load(index + image), tl.load(row + image)
    first = tl.program_id(0) * (BLOCK // 4)
    if WORDS:
        w0, w1, w2, w3 = philox(seed, index, row, first + tl.arange(0, BLOCK // 4), STREAM)
        z = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int32, bitcast=True)
    else:
        z = normals(seed, index, row, first, STREAM, BLOCK)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + image.to(tl.int64) * size + e, z, mask=e < size)


@operation
def noise(
    seed: Tensor, index: Tensor, row: Tensor, dst: Tensor, *, stream: int, config: NoiseConfig | None = None
) -> Launch:
    """Fill dst [images, ...] with noise: standard normals if it is float32, the bits of Philox's words if it is int32.

    The other arguments are those of `fastdiff.core.noise.normal`.
    """
    images, size = len(dst), math.prod(dst.shape[1:])
    assert dst.is_contiguous()
    key = f"{images}x{size}"
    config = config or choose_filling(
        "noise", key, dst, CANDIDATES, lambda config: images * cdiv(size, config.elements)
    )
    return Launch(
        op="noise",
        key=key,
        kernel=_noise,
        grid=(cdiv(size, config.elements), images),
        arguments={
            "seed": seed, "index": index, "row": row, "dst": dst, "size": size, "STREAM": stream,
            "WORDS": dst.dtype == torch.int32, "BLOCK": config.elements,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(noise_reference, seed, index, row, dst, stream),
    )  # fmt: skip


def noise_reference(seed: Tensor, index: Tensor, row: Tensor, dst: Tensor, stream: int) -> None:
    """Fill dst as `noise` does, in torch; in float64 from the same words."""
    if dst.dtype == torch.float32:
        dst.copy_(reference.normal(seed, index, row, stream, tuple(dst.shape[1:])))
        return
    size = math.prod(dst.shape[1:])
    w = torch.stack(reference.words(seed, index, row, stream, cdiv(size, 4)), dim=-1)
    if dst.dtype == torch.int32:
        dst.copy_(torch.where(w < 1 << 31, w, w - (1 << 32)).flatten(1)[:, :size].view(dst.shape))
        return
    u = ((w >> 9) + 0.5).double().view(*w.shape[:2], 2, 2) / 2**23
    r, a = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * math.pi * u[..., 1]
    z = torch.stack([r * torch.cos(a), r * torch.sin(a)], dim=-1)
    dst.copy_(z.flatten(1)[:, :size].view(dst.shape))
