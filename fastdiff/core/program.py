"""The network as data: a flat list of fused operations over named buffers, which the native backends replay.

A `Program` is what `fastdiff.core.lower` makes of a U-Net, for one image size and any number of rows (a row is one
evaluation of the network: one image, or its conditional or unconditional half). Every buffer is described per row.
Operations name their weights by state-dict key; how a backend packs those is its own affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int, int]

STRIP = 4  # pixel rows: what an operation makes at a time, and what its statistics are of


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """``shape`` = (H, W, C) of a row, channels last; a vector is (1, 1, C).

    external: the caller's, not in the arena (`Program` lists them).
    statistics: the operation that writes it also emits, per row, strip of `STRIP` pixel rows and channel, the mean and
    the sum of squared deviations, which every `Norm` that reads it combines into its groups.
    """

    name: str
    shape: Shape
    external: bool = False
    statistics: bool = False

    @property
    def elements(self) -> int:
        """Numbers in a row."""
        H, W, C = self.shape
        return H * W * C

    @property
    def strips(self) -> int:
        return -(-self.shape[0] // STRIP)


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """GroupNorm over the (concatenated) sources, applied while they are read:

        y = (x - mean) / sqrt(var + eps) * gamma + beta,    then y (1 + scale) + shift,    then silu(y)

    weights: key prefix of gamma and beta. modulation: where [scale, shift] begin in the projections; None: neither.
    """

    weights: str
    groups: int
    eps: float
    silu: bool
    modulation: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """dst = the image in NHWC: 2 x - 1 where ``center``; + m, * (1 + m), or [., m] with the class image m."""

    dst: str
    src: tuple[str, ...]
    center: bool
    class_image: str | None

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Embed:
    """dst = silu(the sum of one or two vectors): of time and class, or of the time MLP's second layer."""

    dst: str
    src: tuple[str, ...]

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Conv:
    """A convolution, or a matrix product where ``kernel`` is 1, with what stands before and behind it:

        h   = norm(concatenate(src)),  nearest-doubled where ``upsample``,  zero-padded by (before, after) on each side
        dst = (W h + b + projections[emb : emb + C] + residual) / divide

    weights: key prefixes, stacked along the output channels. A residual of half dst's size is nearest-doubled.
    merged: W and b are products of the two layers at ``weights``, computed once (see `Attention`): "first transposed",
    W = W1^T W2, b = W1^T b2; "in turn", W = W1 W2, b = W1 b2 + b1.
    """

    dst: str
    src: tuple[str, ...]
    weights: tuple[str, ...]
    kernel: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    upsample: bool = False
    norm: Norm | None = None
    emb: int | None = None
    residual: str | None = None
    divide: float = 1.0
    merged: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """dst = the mean over 2 x 2 pixels of norm(src)."""

    dst: str
    src: tuple[str, ...]
    norm: Norm | None

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """dst = softmax(q k^T / sqrt(head_dim)) v over the pixels of a row, head by head.

    src: (qkv,), which holds [q, k, v] per pixel; or (q, x) with k = v = norm(x), for one head as wide as x. There the
    projections merge. With h = norm(x), (h Wq^T + bq) (h Wk^T + bk)^T is (h Wq^T Wk + bq Wk) h^T but for terms that are
    equal for all keys, which softmax does not hear; and (p (h Wv^T + bv)) Wo^T + bo = (p h) (Wo Wv)^T + Wo bv + bo.
    """

    dst: str
    src: tuple[str, ...]
    heads: int
    head_dim: int
    norm: Norm | None = None

    weights = ()


Op: TypeAlias = "Input | Embed | Conv | Pool | Attention"


@dataclasses.dataclass(frozen=True)
class Program:
    """The operations in order, and every buffer they name. External ones, per row:

    x             the noisy image (NCHW in memory, as a `State` keeps it; shape is still told as H, W, C)
    class_image   the class encoder's map for the row's label, where the network has one
    time          what classes are added to, of the row's timestep: the time embedding, or (class_before_mlp) the first
                  layer of its MLP; class: what is added, of the row's label
    projections   otherwise: every block's projection of the time embedding, one after the other
    out           the network's output (NCHW in memory)
    """

    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]

    def norm(self, op: Op) -> Norm | None:
        return op.norm if isinstance(op, (Conv, Pool, Attention)) else None

    def reads(self, op: Op) -> Iterator[str]:
        """Every buffer that the operation reads."""
        yield from op.src
        if isinstance(op, Conv) and op.residual is not None:
            yield op.residual
        norm = self.norm(op)
        if (isinstance(op, Conv) and op.emb is not None) or (norm is not None and norm.modulation is not None):
            yield "projections"

    def channels(self, op: Op) -> tuple[int, int]:
        """Of the concatenated sources, and of the result."""
        return sum(self.buffers[name].shape[2] for name in op.src), self.buffers[op.dst].shape[2]

    def flops(self, op: Op) -> int:
        """Of a row, a multiplication and an addition each counting one; only convolutions, products and attention.

        Of the direct algorithm: a backend that transforms does fewer.
        """
        H, W, C = self.buffers[op.dst].shape
        if isinstance(op, Conv):
            return 2 * H * W * C * self.channels(op)[0] * op.kernel**2
        if isinstance(op, Attention):
            return 2 * 2 * (H * W) ** 2 * op.heads * op.head_dim
        return 0

    def parameters(self, op: Op) -> int:
        """Numbers among the weights that the operation reads: kernel, bias, gamma and beta."""
        norm = self.norm(op)
        count = 0 if norm is None else 2 * self.channels(op)[0]
        if isinstance(op, Conv):
            inputs, outputs = self.channels(op)
            count += outputs * (inputs * op.kernel**2 + 1)
        return count

    def traffic(self, op: Op) -> int:
        """Numbers of activations that a row reads and writes, each buffer once."""
        elements = self.buffers[op.dst].elements
        for name in self.reads(op):
            elements += 0 if name == "projections" else self.buffers[name].elements
        return elements
