"""A program as Triton launches: the buffers that they read and write, and the weights as they read them.

Activations are of one dtype, NHWC, in an arena; embeddings, statistics, x and ``out`` are float32. A norm in front of a
convolution is a launch of its own, which makes one tensor of one or two sources; everything behind a convolution is
done by the launch that makes it, or, where its products are shared out, by the one that adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.native.packing import fingerprint, layer
from fastdiff.backends.native.runner import EMBEDDING
from fastdiff.core.lower import embed_classes
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
    """A network's weights as the kernels read them. They keep their addresses, which graphs hold, when they change."""

    def __init__(self, unet: UNet, device: torch.device):
        self.unet = unet
        self.device = device
        self.made: dict[Any, tuple[Callable[[], Sequence[Tensor]], tuple[Tensor, ...]]] = {}
        self.fingerprint = fingerprint(unet)
        self.tensors = _tensors(unet)

    def follow(self) -> bool:
        """Lay out anew what the network has now; whether it had changed."""
        now = fingerprint(self.unet)
        if now == self.fingerprint:
            return False
        self.fingerprint, self.tensors = now, _tensors(self.unet)
        for make, tensors in self.made.values():
            for tensor, new in zip(tensors, make(), strict=True):
                tensor.copy_(new)
        return True

    def conv(
        self, op: Conv, channels: Sequence[int], dtype: torch.dtype, config: conv.LayerConfig
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Kernels of each source, of ``channels``, in ``dtype`` as ``config`` takes them, and the bias in float32."""

        def kernels() -> Sequence[Tensor]:
            W = layer(op, self.tensors)[0]
            if config == LIBRARY:
                return library.pack(W, channels, dtype, op.padding)
            return conv.pack(W, channels, dtype, op.upsample)

        kernel = self._once((op.weights, op.upsample, tuple(channels), dtype, config == LIBRARY), kernels)
        (bias,) = self._once((op.weights, "bias"), lambda: (layer(op, self.tensors)[1].float(),))
        return kernel, bias

    def classes(self) -> Tensor:
        """The embedding of every label."""
        return self._once("classes", lambda: (embed_classes(self.unet).float().contiguous(),))[0]

    def vector(self, name: str) -> Tensor:
        return self._once((name,), lambda: (self.tensors[name].float(),))[0]

    def _once(self, key: Any, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Copies with the strides that ``make`` gave them."""
        if key not in self.made:
            self.made[key] = make, tuple(t.to(self.device, copy=True) for t in make())
        return self.made[key][1]


def _tensors(unet: UNet) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}


# Buffers and operations -----------------------------------------------------------------------------------------------


class Buffers:
    """What a program's operations read and write, for ``rows`` rows.

    timestep: where in the table of timesteps a row stands; label: its label; norm, workspace: of one operation.
    """

    def __init__(self, program: Program, rows: int, dtype: torch.dtype, device: torch.device):
        self.program = program
        self.rows = rows
        self.dtype = dtype
        self.layout = plan(program, rows, itemsize=dtype.itemsize)
        self.arena = torch.zeros(self.layout.size, dtype=torch.uint8, device=device)
        self.timestep = torch.zeros(rows, dtype=torch.int64, device=device)
        self.label = torch.zeros(rows, dtype=torch.int64, device=device)
        self.embedding = {
            op.dst: torch.zeros(rows, *program.buffers[op.dst].shape, device=device)
            for op in program.ops
            if isinstance(op, Embed) or op.dst in EMBEDDING
        }
        H, W, C = program.buffers["out"].shape
        self.net = torch.zeros(rows, C, H, W, device=device)
        self.space = {
            name: torch.zeros(0, dtype=kind, device=device)
            for name, kind in (("normalised", dtype), ("norm", torch.float32), ("workspace", torch.float32))
        }

    def __getitem__(self, name: str) -> Tensor:
        """[rows, H, W, C]"""
        if name in self.embedding:
            return self.embedding[name]
        return self._view(name, self.dtype, self.program.buffers[name].shape)

    def statistics(self, name: str) -> Tensor:
        """float32 [rows, strips, 2, C]"""
        buffer = self.program.buffers[name]
        return self._view(name + STATISTICS, torch.float32, (buffer.strips, 2, buffer.shape[2]))

    def channels(self, names: Sequence[str]) -> int:
        return sum(self.program.buffers[name].shape[2] for name in names)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Room that the next operation takes over."""
        if self.space[name].numel() < math.prod(shape):
            self.space[name] = self.space[name].new_zeros(math.prod(shape))
        return self.space[name][: math.prod(shape)].view(shape)

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        offset, size = self.layout.offsets[name], self.rows * math.prod(shape) * dtype.itemsize
        return self.arena[offset : offset + size].view(dtype).view(self.rows, *shape)


class Launches:
    """A program's operations as launches, in order: from the images of ``state`` to ``out`` float32 [rows, C, H, W].

    Rows past the images are the images once more, with other labels. entries: int64 [tables, rows], where in ``times``
    each row's timestep is. classes: embeddings of labels, class_images: float32 [rows, H, W, C]; where there are any.
    chosen_for: the number of rows that configurations are chosen for; None: those of ``buffers``.
    """

    def __init__(
        self, buffers: Buffers, weights: Weights, state: State, out: Tensor, entries: Tensor, times: Tensor,
        classes: Tensor | None, class_images: Tensor | None, chosen_for: int | None = None,
    ):  # fmt: skip
        self.buffers = buffers
        self.weights = weights
        self.state = state
        self.out = out
        self.entries = entries
        self.times = times
        self.classes = classes
        self.class_images = class_images
        self.chosen_for = chosen_for
        self.list: list[Launch] = []
        for op in buffers.program.ops:
            self._add(op)
        # The first of a step is the one that finds the rows' places in the table.
        self.list.sort(key=lambda launch: launch.op != "input")

    def _add(self, op: Op) -> None:
        b = self.buffers
        if isinstance(op, Input):
            self.list.append(
                input.input(
                    self.state.x, b[op.dst], center=op.center, combine=op.class_image, class_image=self.class_images,
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
            assert self.classes is not None
            launch = embed.embed(self.times, b.timestep, self.classes, b.label, dst)
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
        else:  # the library's choices are its own, and may depend on the batch
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
            return {"table": self.times, "entry": b.timestep, "offset": offset}
        return {"table": b["projections"].flatten(1), "offset": offset}

    def _normalised(self, src: tuple[str, ...], norm: Norm | None) -> list[Tensor]:
        """The sources, or the one tensor that the norm makes of them."""
        b = self.buffers
        sources = [b[name] for name in src]
        if norm is None:
            return sources
        rows, H, W, _ = sources[0].shape
        dst = b.scratch("normalised", rows, H, W, b.channels(src))
        finalised = self._finalised(src, norm)
        self.list.append(kernel_norm.apply(sources, finalised, dst, silu=norm.silu, chosen_for=self.chosen_for))
        return [dst]

    def _finalised(self, src: tuple[str, ...], norm: Norm) -> Tensor:
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
