"""A lowered program as a list of Triton launches, with the buffers that they read and write and the packed weights.

Activations have one dtype and are NHWC, in an arena; embeddings, statistics, x and ``out`` are float32. A norm before a
convolution is a launch of its own, which writes one tensor from one or two sources. Everything that follows a
convolution is done by the launch that computes it or, where its products are split, by the launch that sums them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.network import EMBEDDING_PRODUCTS, EmbeddingTables, checksum, merged_layer
from fastdiff.core.plan import STATISTICS, plan
from fastdiff.core.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.core.state import State
from fastdiff.kernels import attention, conv, embed, input, library, pool
from fastdiff.kernels import norm as kernel_norm
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.library import LIBRARY
from fastdiff.unet import UNet

# Weights --------------------------------------------------------------------------------------------------------------


class Weights:
    """Packed weights of a network, which all batch sizes share.

    Their addresses stay when the network's weights change, as graphs hold them. ``version`` is the number of changes.
    """

    def __init__(self, unet: UNet, device: torch.device):
        self.device = device
        self.made: dict[Any, tuple[Callable[[], Sequence[Tensor]], tuple[Tensor, ...]]] = {}
        self.made_from = checksum(unet)
        self.tensors = _tensors(unet)
        self.version = 0

    @classmethod
    def of(cls, unet: UNet, device: torch.device) -> Weights:
        """Return the packed weights of a network on a device, new ones at the first call."""
        known = _weights.setdefault(unet, {})  # values hold tensors of the network, not the network itself
        return known.get(device) or known.setdefault(device, cls(unet, device))

    def follow(self, unet: UNet) -> None:
        """Pack again if the network's weights have changed."""
        now = checksum(unet)
        if now == self.made_from:
            return
        self.made_from, self.tensors = now, _tensors(unet)
        for make, tensors in self.made.values():
            for tensor, new in zip(tensors, make(), strict=True):
                tensor.copy_(new)
        self.version += 1

    def conv(
        self, op: Conv, channels: Sequence[int], dtype: torch.dtype, config: conv.LayerConfig
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return a convolution's kernel for each source, in ``dtype`` and ``config``'s layout, and its float32 bias."""

        def kernels() -> Sequence[Tensor]:
            W = merged_layer(op, self.tensors)[0]
            if config == LIBRARY:
                return library.pack(W, channels, dtype, op.padding)
            return conv.pack(W, channels, dtype, op.upsample)

        kernel = self._once((op.weights, op.upsample, tuple(channels), dtype, config == LIBRARY), kernels)
        (bias,) = self._once((op.weights, "bias"), lambda: (merged_layer(op, self.tensors)[1].float(),))
        return kernel, bias

    def vector(self, name: str) -> Tensor:
        """Return a parameter in float32."""
        return self._once((name,), lambda: (self.tensors[name].float(),))[0]

    def _once(self, key: Any, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Return copies of what ``make`` returns, with the same strides, made at the first call."""
        if key not in self.made:
            self.made[key] = make, tuple(t.to(self.device, copy=True) for t in make())
        return self.made[key][1]


def _tensors(unet: UNet) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}


_weights: weakref.WeakKeyDictionary[UNet, dict[torch.device, Weights]] = weakref.WeakKeyDictionary()

# Buffers and operations -----------------------------------------------------------------------------------------------


class Buffers:
    """Buffers that a program's operations read and write, with activations in ``dtype``.

    ``timestep``, int64 [rows], is the row of the embedded timesteps for each row, ``label`` its class, ``class_images``
    float32 [rows, H, W, C], where the network has them, ``net``, float32 [rows, C, H, W], the network's output where
    guidance follows, ``space`` scratch memory by purpose, for one operation at a time.
    """

    def __init__(self, program: Program, rows: int, dtype: torch.dtype, device: torch.device):
        self.program = program
        self.rows = rows
        self.dtype = dtype
        self.layout = plan(program, rows, itemsize=dtype.itemsize)
        self.arena = torch.zeros(self.layout.size, dtype=torch.uint8, device=device)
        self.timestep = torch.zeros(rows, dtype=torch.int64, device=device)
        self.label = torch.zeros(rows, dtype=torch.int64, device=device)
        self.class_images: Tensor | None = None
        self.embedding = {
            op.dst: torch.zeros(rows, *program.buffers[op.dst].shape, dtype=torch.float32, device=device)
            for op in program.ops
            if isinstance(op, Embed) or op.dst in EMBEDDING_PRODUCTS
        }
        H, W, C = program.buffers["out"].shape
        self.net = torch.zeros(rows, C, H, W, dtype=torch.float32, device=device)
        self.space = {
            name: torch.zeros(0, dtype=kind, device=device)
            for name, kind in (("normalised", dtype), ("norm", torch.float32), ("workspace", torch.float32))
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return a buffer, [rows, H, W, C]."""
        if name in self.embedding:
            return self.embedding[name]
        return self._view(name, self.dtype, self.program.buffers[name].shape)

    def statistics(self, name: str) -> Tensor:
        """Return a buffer's statistics, float32 [rows, strips, 2, C]."""
        buffer = self.program.buffers[name]
        return self._view(name + STATISTICS, torch.float32, (buffer.strips, 2, buffer.shape[2]))

    def channels(self, names: Sequence[str]) -> int:
        """Return the number of channels of several buffers together."""
        return sum(self.program.buffers[name].shape[2] for name in names)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Return scratch memory, which the next operation overwrites."""
        if self.space[name].numel() < math.prod(shape):
            self.space[name] = self.space[name].new_zeros(math.prod(shape))
        return self.space[name][: math.prod(shape)].view(shape)

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        offset, size = self.layout.offsets[name], self.rows * math.prod(shape) * dtype.itemsize
        return self.arena[offset : offset + size].view(dtype).view(self.rows, *shape)


class Launches:
    """The launches of a program's operations, in order, from the images of ``state`` to ``out`` [rows, C, H, W].

    Rows of ``buffers`` beyond the number of images are the images again, with other labels. ``entries`` is the row of
    the embedded timesteps for each row of each table, int64 [tables, rows]. Configurations are chosen for
    ``chosen_for`` rows; None: for those of ``buffers``.
    """

    def __init__(
        self, buffers: Buffers, weights: Weights, state: State, out: Tensor, entries: Tensor,
        embeddings: EmbeddingTables, chosen_for: int | None = None,
    ):  # fmt: skip
        self.buffers = buffers
        self.weights = weights
        self.state = state
        self.out = out
        self.entries = entries
        self.embeddings = embeddings
        self.chosen_for = chosen_for
        self.list: list[Launch] = []
        self.held: tuple[tuple[str, ...], Norm] | None = None  # the sources and norm that "normalised" holds
        for op in buffers.program.ops:
            self._add(op)
        # The input's launch comes first: it also looks up the rows' embedded timesteps.
        self.list.sort(key=lambda launch: launch.op != "input")

    def _add(self, op: Op) -> None:
        b = self.buffers
        assert self.held is None or op.dst not in self.held[0], "a buffer is written once"
        if isinstance(op, Input):
            self.list.append(
                input.input(
                    self.state.x, b[op.dst], center=op.center, combine=op.class_image, class_image=b.class_images,
                    table=self.state.table, row=self.state.row, entries=self.entries, timestep=b.timestep,
                    chosen_for=self.chosen_for,
                )
            )  # fmt: skip
        elif isinstance(op, Embed):
            self._add_embed(op)
        elif isinstance(op, Conv):
            self._add_conv(op)
        elif isinstance(op, Pool):
            src = [b[name] for name in op.src]
            norm = None if op.norm is None else self._finalised(op.src, op.norm)
            silu = op.norm is not None and op.norm.silu
            self.list.append(pool.pool(src, b[op.dst], norm=norm, silu=silu, chosen_for=self.chosen_for))
        else:
            assert isinstance(op, Attention)
            self._add_attention(op)

    def _add_embed(self, op: Embed) -> None:
        b = self.buffers
        dst = b[op.dst].flatten(1)
        if len(op.src) == 1:
            src = b[op.src[0]].flatten(1)
            launch = embed.embed(src, None, torch.zeros_like(src[:1]).expand_as(src), None, dst)
        else:
            times, classes = self.embeddings.times, self.embeddings.classes
            assert classes is not None
            launch = embed.embed(times, b.timestep, classes, b.label, dst)
        self.list.append(launch)

    def _add_attention(self, op: Attention) -> None:
        b = self.buffers
        if len(op.src) == 1:
            q, k, v = b[op.src[0]].chunk(3, dim=3)
        else:
            q, v = b[op.src[0]], None
            (k,) = self._normalised(op.src[1:], op.norm)
        self.list.append(
            attention.attention(
                q, k, v, b[op.dst], heads=op.heads, head_dim=op.head_dim, chosen_for=self.chosen_for
            )
        )  # fmt: skip

    def _add_conv(self, op: Conv) -> None:
        b, buffers = self.buffers, self.buffers.program.buffers
        src = self._normalised(op.src, op.norm)
        statistics = b.statistics(op.dst) if buffers[op.dst].statistics else None
        finish: dict[str, Any] = {"divide": op.divide}
        if op.emb is not None:
            finish |= self._projections(op.emb)
        if op.residual is not None:
            finish["residual"] = b[op.residual]
        shape = (b.rows, *buffers[op.dst].shape)
        problem = conv.Problem.at(src, shape, op.kernel, op.stride, op.upsample)
        if self.chosen_for is None:
            config = problem.choose_layer()
        else:  # without the library, whose own choices may depend on the batch
            config = problem.like(self.chosen_for).choose(splits=True)
        weight, bias = self.weights.conv(op, [s.shape[3] for s in src], src[0].dtype, config)
        need = conv.workspace(src, weight, shape, stride=op.stride, statistics=statistics is not None, config=config)
        padding = op.padding[1] if config == LIBRARY else op.padding[0]  # on all sides, or in front
        self.list += conv.layer(
            src, weight, bias, self.out if op.dst == "out" else b[op.dst], workspace=b.scratch("workspace", need),
            stride=op.stride, padding=padding, nchw=op.dst == "out", statistics=statistics, config=config,
            chosen_for=self.chosen_for, **finish,
        )  # fmt: skip

    def _projections(self, offset: int) -> dict[str, Any]:
        b = self.buffers
        if b.program.buffers["projections"].external:
            return {"table": self.embeddings.times, "entry": b.timestep, "offset": offset}
        return {"table": b["projections"].flatten(1), "offset": offset}

    def _normalised(self, src: tuple[str, ...], norm: Norm | None) -> list[Tensor]:
        """Return the sources, or the one tensor that holds their norm."""
        b = self.buffers
        sources = [b[name] for name in src]
        if norm is None:
            return sources
        rows, H, W, _ = sources[0].shape
        dst = b.scratch("normalised", rows, H, W, b.channels(src))
        if self.held == (src, norm):  # attention reads what the product before it has read
            return [dst]
        self.held = src, norm
        finalised = self._finalised(src, norm)
        self.list.append(kernel_norm.apply(sources, finalised, dst, silu=norm.silu, chosen_for=self.chosen_for))
        return [dst]

    def _finalised(self, src: tuple[str, ...], norm: Norm) -> Tensor:
        """Return the norm's mean, scale and shift of every channel, [rows, 3, C], combined from the statistics."""
        b = self.buffers
        H, W, _ = b.program.buffers[src[0]].shape
        dst = b.scratch("norm", b.rows, 3, b.channels(src))
        self.list.append(
            kernel_norm.finalise(
                [b.statistics(name) for name in src], self.weights.vector(f"{norm.weights}.weight"),
                self.weights.vector(f"{norm.weights}.bias"), dst, height=H, width=W, groups=norm.groups, eps=norm.eps,
                **({} if norm.modulation is None else self._projections(norm.modulation)),
            )
        )  # fmt: skip
        return dst
