"""The network as data: a flat list of fused operations over named buffers.

`fastdiff.core.lower` emits a `Program` for a U-Net and an image size; `native` and `triton` replay it for any number of
rows. A row is one evaluation of the network, of an image or of its conditional or unconditional half. Every buffer is
described per row. Operations name their weights by state-dict key, and each backend packs those in its own layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int, int]

STRIP = 4  # pixel rows that an operation computes at a time, and over which its statistics are taken


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """Named buffer of a program; its shape (H, W, C) is that of a row, (1, 1, C) for a vector.

    With ``statistics`` the operation that writes it also writes the mean and the sum of squared deviations, per row,
    strip of `STRIP` pixel rows and channel. A `Norm` that reads the buffer combines them into its groups.
    """

    name: str
    shape: Shape
    external: bool = False  # provided by the caller, outside the arena; `Program` lists these buffers
    statistics: bool = False

    @property
    def elements(self) -> int:
        """Number of elements in a row."""
        return math.prod(self.shape)

    @property
    def strips(self) -> int:
        """Number of strips in a row; the last one may have fewer pixel rows."""
        return -(-self.shape[0] // STRIP)


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """GroupNorm over the concatenated sources, applied while they are read:

    y = (x - mean) / sqrt(var + eps) * gamma + beta,    then y (1 + scale) + shift,    then silu(y)

    With no groups it is a LayerNorm: mean and variance are those of a pixel's channels, and need no statistics.
    """

    weights: str  # key prefix of gamma and beta
    groups: int  # 0: a LayerNorm
    eps: float
    silu: bool
    modulation: int | None = None  # offset of [scale, shift] in the projections; None if there are none


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """Input of the network: dst = the image in NHWC, 2 x - 1 where ``center``, combined with the class image m.

    ``class_image`` is "add" for x + m, "multiply" for x (1 + m), "concat" for [x, m], or None.
    """

    dst: str
    src: tuple[str, ...]
    center: bool
    class_image: str | None

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Embed:
    """Embedding: dst = silu(sum of ``src``), which is time and class, or the time MLP's second layer alone."""

    dst: str
    src: tuple[str, ...]

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Conv:
    """A convolution (a matrix product where ``kernel`` is 1) with the operations fused into it:

        h   = norm(concatenate(src)),  nearest-doubled where ``upsample``,  padded by (before, after) on each side
        dst = (W h + b + projections[emb : emb + C] + residual) / divide

    The padding is zeros, or where ``circular`` the pixels of the other side.

    With ``geglu`` the first half of W h + b is gated by the second: dst = a gelu(g), [a, g] = W h + b, where gelu is
    the exact one; nothing is added to it. With ``relu`` the result is max(dst, 0).

    ``merged`` is for a W and b that are products of the two layers at ``weights``, computed once (see `Attention`):
    "first transposed", W = W1^T W2, b = W1^T b2; "in turn", W = W1 W2, b = W1 b2 + b1.
    """

    dst: str
    src: tuple[str, ...]
    weights: tuple[str, ...]  # key prefixes of the layers, whose weights are stacked along the output channels
    kernel: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    upsample: bool = False
    norm: Norm | None = None
    emb: int | None = None
    residual: str | None = None  # nearest-doubled where it is half as large as dst
    divide: float = 1.0
    merged: str | None = None
    circular: bool = False
    geglu: bool = False
    relu: bool = False
    bias: bool = True  # whether the layers have biases; elsewhere b is 0


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """Pooling: dst = the mean over 2 x 2 pixels of norm(src)."""

    dst: str
    src: tuple[str, ...]
    norm: Norm | None

    weights = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Attention: dst = softmax(q k^T / sqrt(head_dim)) v over the pixels of a row, for each head.

    src is (qkv,), with [q, k, v] per pixel; or, where ``text``, (q, kv), with [k, v] per token of a text, which are the
    keys and values; or, for one head as wide as x, (q, x) with k = v = norm(x). There the projections merge. With
    h = norm(x), (h Wq^T + bq) (h Wk^T + bk)^T equals (h Wq^T Wk + bq Wk) h^T up to terms that are the same for all
    keys, to which softmax is invariant; and (p (h Wv^T + bv)) Wo^T + bo equals (p h) (Wo Wv)^T + Wo bv + bo.
    """

    dst: str
    src: tuple[str, ...]
    heads: int
    head_dim: int
    norm: Norm | None = None
    text: bool = False

    weights = ()


Op: TypeAlias = "Input | Embed | Conv | Pool | Attention"


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered network. Its external buffers are, per row:

    x             the noisy image (NCHW in memory, as in a `State`; its shape is given as H, W, C all the same)
    class_image   the class encoder's map for the row's label, where the network has one
    time, class   where classes are embedded: the embeddings of timestep and label, which `Embed` adds; with
                  class_before_mlp they are the output of the time MLP's first layer
    projections   elsewhere: every block's projection of the time embedding, concatenated
    <key>.text    the keys and values of the row's text, as [1, tokens, C], for the attention with this key prefix
    given         in place of all of these: what a decoder decodes, or an encoder encodes
    out           the network's output (NCHW in memory)
    """

    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]

    def norm(self, op: Op) -> Norm | None:
        """Return the norm that the operation applies to its sources, if any."""
        return op.norm if isinstance(op, (Conv, Pool, Attention)) else None

    def reads(self, op: Op) -> Iterator[str]:
        """Yield every buffer that the operation reads."""
        yield from op.src
        if isinstance(op, Conv) and op.residual is not None:
            yield op.residual
        norm = self.norm(op)
        if (isinstance(op, Conv) and op.emb is not None) or (norm is not None and norm.modulation is not None):
            yield "projections"

    def channels(self, op: Op) -> tuple[int, int]:
        """Return the number of channels of the concatenated sources, and of the result."""
        return sum(self.buffers[name].shape[2] for name in op.src), self.buffers[op.dst].shape[2]

    def keys(self, op: Attention) -> int:
        """Return the number of keys that each pixel attends to."""
        H, W, _ = self.buffers[op.src[-1]].shape
        return H * W

    def flops(self, op: Op) -> int:
        """Return the FLOP of a row by the direct algorithm: multiplications plus additions of products and attention.

        A backend that uses Winograd's algorithm does fewer.
        """
        H, W, C = self.buffers[op.dst].shape
        if isinstance(op, Conv):
            return 2 * H * W * C * (1 + op.geglu) * self.channels(op)[0] * op.kernel**2
        if isinstance(op, Attention):
            return 2 * 2 * H * W * self.keys(op) * op.heads * op.head_dim
        return 0

    def parameters(self, op: Op) -> int:
        """Return the number of weights that the operation reads: kernel, bias, gamma and beta."""
        norm = self.norm(op)
        count = 0 if norm is None else 2 * self.channels(op)[0]
        if isinstance(op, Conv):
            inputs, outputs = self.channels(op)
            count += outputs * (1 + op.geglu) * (inputs * op.kernel**2 + op.bias)
        return count

    def traffic(self, op: Op) -> int:
        """Return the number of activations that a row reads and writes, each buffer once."""
        elements = self.buffers[op.dst].elements
        for name in self.reads(op):
            elements += 0 if name == "projections" else self.buffers[name].elements
        return elements
