"""Counter-based Gaussian noise: the normals of an image are a pure function of (seed, index, row, stream).

Philox4x32-10 as in Random123 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):

    key     = (seed low, seed high)
    counter = (e div 4, row | stream << 24, index low, index high)       e: the element's position over C, H, W

The words are the same integers on every device and in every backend. The normals computed from them differ only by the
rounding of ln, sqrt, sin and cos, and are within 2e-6 of the exact values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import is_whole, shown
from fastdiff.errors import InvalidArgument

UPDATE, INITIAL, MASK, TRAIN_NOISE, TRAIN_CHOICE = range(5)  # streams

_LOW = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers, both odd
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_ROUNDS = 10
_CHUNK = 1 << 22  # elements drawn at a time; eager torch needs about 10 bytes of temporaries for each

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int; it is refused, never wrapped, if it is no integer in [0, 2^64)."""
    if not is_whole(seed):
        raise InvalidArgument(f"seed must be an integer from 0 to 2^64 - 1, not {shown(seed)} ({type(seed).__name__})")
    value = int(seed)
    if not 0 <= value < 1 << 64:
        raise InvalidArgument(f"seed must be an integer from 0 to 2^64 - 1, not {shown(value)}")
    return value


def as_int64(seed: int) -> int:
    """Return the two's complement of an unsigned 64-bit number, as an int64 tensor stores a seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Compute Philox4x32-10: ten rounds, between which the key grows by (W0, W1):

        (hi0, lo0) = M0 c0;  (hi1, lo1) = M1 c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0

    All words are int64 tensors with values in [0, 2^32), which broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(_M0, c0)
        hi1, lo1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _multiply(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the 64-bit product m c, for odd m.

        q = m (c - 2^31) + 2^31 = m c - (m div 2) 2^32      hi = (q >> 32) + m div 2      lo = q mod 2^32

    |q| < 2^63, so nothing overflows. m c itself would overflow, and C++ compilers may assume that signed products do
    not; they would remove the masks that correct a wrapped product.
    """
    q = m * (c - (1 << 31)) + (1 << 31)
    return (q >> 32) + (m >> 1), q & _LOW


def words(seed: Tensor, index: Tensor, row: Tensor, stream: int, blocks: int) -> Words:
    """Return the words w0..w3 of the first ``blocks`` counters of each image, four int64 tensors [B, blocks]."""
    k = torch.arange(blocks, dtype=torch.int64, device=seed.device)[None]
    seed, index, row = seed[:, None], index[:, None], row[:, None]
    counter = (k, row | stream << 24, index & _LOW, (index >> 32) & _LOW)
    return philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))


def normal(seed: Tensor, index: Tensor, row: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Draw standard normals, float32 [B, *shape]. Those of an image do not depend on the rest of its batch.

    seed (see `as_int64`), index (the image's global number) and row are int64 [B]. Rows must be below 2^24; that is not
    checked, because the values may be on a device. The stream is a number below 256.
    """
    if not 0 <= stream < 256:
        raise InvalidArgument(f"stream must be from 0 to 255, not {stream}")
    if seed.ndim != 1 or not seed.shape == index.shape == row.shape:
        raise InvalidArgument(
            f"seed, index and row must have one value per image, not shapes "
            f"{tuple(seed.shape)}, {tuple(index.shape)} and {tuple(row.shape)}"
        )
    if torch.compiler.is_compiling():  # the operations are fused, so the words need no memory
        return _normal(seed, index, row, stream, shape)
    images = max(1, _CHUNK // max(1, math.prod(shape)))
    if len(seed) <= images:
        return _normal(seed, index, row, stream, shape)
    parts = zip(seed.split(images), index.split(images), row.split(images), strict=True)
    return torch.cat([_normal(*part, stream, shape) for part in parts])


def _normal(seed: Tensor, index: Tensor, row: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Compute elements 4k..4k+3 from the words w0..w3 of counter k:

    u_i = ((w_i >> 9) + 0.5) 2^-23                                     exact in fp32
    z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1)      z2, z3 the same from u2, u3
    """
    size = math.prod(shape)
    four = words(seed, index, row, stream, (size + 3) // 4)
    u0, u1, u2, u3 = (((w >> 9).to(torch.float32) + 0.5) * 2.0**-23 for w in four)
    z = torch.stack((*_box_muller(u0, u1), *_box_muller(u2, u3)), dim=-1)
    return z.flatten(1)[:, :size].reshape(-1, *shape)


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sqrt(-2 ln u) (cos, sin)(2 pi v), with (cos, sin)(2 pi v) = -(cos, sin)(2 pi (v - 1/2)).

    v - 1/2 is exact and halves the rounding error of the angle, which the root (up to 5.8) amplifies.
    """
    r = -torch.sqrt(-2.0 * torch.log(u))
    a = (2.0 * math.pi) * (v - 0.5)
    return r * torch.cos(a), r * torch.sin(a)
