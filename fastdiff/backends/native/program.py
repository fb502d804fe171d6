"""A lowered program with its buffers, ready for the native engine.

This module allocates every buffer that the engine reads and writes: the arena, in which `fastdiff.core.plan` places the
activations, and the inputs. `fastdiff.backends.native.packing` lays out the weights, `csrc/` does the arithmetic. The
engine keeps a reference to each array that it is given, and checks that they fit each other (`csrc/bind_engine.hpp`).
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.base import Spec
from fastdiff.backends.native import threads
from fastdiff.backends.native.arrays import array
from fastdiff.backends.native.extension import extension, isa
from fastdiff.backends.native.methods import METHODS, choose_methods
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.network import EMBEDDING_PRODUCTS, embedding_width
from fastdiff.core.lower import TOKENS, lower, text_attentions, vector_kind
from fastdiff.core.plan import STATISTICS, Plan, plan
from fastdiff.core.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.unet import UNet, UNetCondition

CACHE_BYTES = 32 << 20  # activations that a third-level cache holds beside the weights that stream through it
TIMES = 64  # timesteps whose embeddings have room from the start


def part_rows(rows: int, row_bytes: int) -> int:
    """Return how many of ``rows`` run at a time: equal parts, as few as keep the arena of a part in the cache.

    Every part reads all weights again, but these are prefetched; activations are not.
    """
    parts = min(-(-rows * row_bytes // CACHE_BYTES), rows)
    return -(-rows // parts)


@dataclasses.dataclass
class ProgramInputs:
    """External buffers of a program; the engine copies each step's images into them.

    ``timestep`` and ``label`` are those of `Engine.run` and `Engine.profile`; a step brings its own.
    """

    x: Tensor  # noisy images, float32 [rows, C, H, W]
    timestep: Tensor  # row of ``times`` for each row, int64 [rows]
    label: Tensor  # row of ``classes`` and ``text`` for each row, int64 [rows]
    times: Tensor  # embeddings of timesteps, float32 [timesteps, features]
    classes: Tensor | None  # embeddings of labels, or of texts, float32 [labels, features], where the network has them
    class_images: Tensor | None  # float32 [rows, H, W, C], where the network has them
    given: Tensor | None = None  # float32 [rows, H, W, padded C], of a decoder or encoder, which reads nothing else
    text: dict[str, Tensor] | None = None  # keys and values by external buffer, float32 [labels, tokens, C]


class NativeProgram:
    """A program for a fixed number of rows, that of ``layout``, whose operations ``engine`` has with their arrays.

    ``arena`` has at least ``layout.size`` bytes at a multiple of `ALIGNMENT`; an empty ``isa`` is the best available
    one. ``methods`` has the algorithm of each convolution by the buffer that it writes; with determinism "bitwise" the
    number of rows does not affect them. ``out`` is the network's output, float32 [rows, H, W, padded C].
    """

    def __init__(
        self, native: ModuleType, program: Program, layout: Plan, arena: Tensor, weights: Weights,
        inputs: ProgramInputs, isa: str, threads: int, spec: Spec,
    ):  # fmt: skip
        self.native = native
        self.program = program
        self.layout = layout
        self.rows = layout.rows
        self.arena = arena
        self.weights = weights
        self.inputs = inputs
        self.spec = spec
        self.isa = isa
        # F(4x4, 3x3) rounds bfloat16 more than twice as much as F(2x2, 3x3), so it must be asked for.
        allowed = METHODS[1:] if spec.dtype == torch.bfloat16 and not spec.fast else METHODS
        counted = None if spec.determinism == "bitwise" else self.rows
        self.methods = choose_methods(program, counted, allowed, spec.dtype.itemsize)
        H, W, C = program.buffers["out"].shape
        self.out = torch.zeros(self.rows, H, W, self._padded(C), dtype=torch.float32, device=arena.device)
        self.engine = native.Engine(
            isa, threads, x=array(inputs.x), out=array(self.out), out_channels=C, timestep=array(inputs.timestep),
            label=array(inputs.label), class_image=None if inputs.class_images is None else array(inputs.class_images),
        )  # fmt: skip
        for op in program.ops:
            self._add(op)

    def buffer(self, name: str) -> Tensor:
        """Return a view of a buffer in the arena, [rows, H, W, padded C]."""
        if name == "given" and self.inputs.given is not None:
            return self.inputs.given
        H, W, C = self.program.buffers[name].shape
        shape = (self.rows, H, W, self._padded(C))
        return self.out if name == "out" else self._view(self.layout.offsets[name], shape)

    def statistics(self, name: str) -> Tensor:
        """Return a view of a buffer's statistics, [rows, strips, 2, padded C]."""
        H, _, C = self.program.buffers[name].shape
        shape = (self.rows, math.ceil(H / self.native.STRIP), 2, self._padded(C))
        return self._view(self.layout.offsets[name + STATISTICS], shape)

    def _view(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        return self.arena[offset : offset + 4 * math.prod(shape)].view(torch.float32).view(shape)

    def _padded(self, channels: int) -> int:
        group: int = self.native.GROUP
        return -(-channels // group) * group

    def _sources(self, op: Op) -> list[Any]:
        return [array(self.buffer(name)) for name in op.src]

    def _projections(self, offset: int) -> Any:
        """Return the vectors that start at ``offset`` in each row's projections."""
        if self.program.buffers["projections"].external:
            return self._times(offset)
        return self._rows("projections", offset)

    def _rows(self, name: str, offset: int = 0) -> Any:
        """Return the vectors that start at ``offset`` in each row of a buffer of vectors."""
        return self.native.RowVectors(array(self.buffer(name).flatten(1)), self.native.By.row, offset)

    def _times(self, offset: int = 0) -> Any:
        """Return the vectors that start at ``offset`` in each row's embedded timestep."""
        return self.native.RowVectors(array(self.inputs.times), self.native.By.timestep, offset)

    def _norm(self, op: Conv | Pool) -> dict[str, Any]:
        if op.norm is None:
            return {"norm": None, "silu": False}
        return {"norm": self._norm_of(op.src, op.norm), "silu": op.norm.silu}

    def _norm_of(self, src: tuple[str, ...], norm: Norm) -> Any:
        gamma, beta = (array(self.weights.vector(f"{norm.weights}.{kind}")) for kind in ("weight", "bias"))
        return self.native.Norm(
            statistics=[array(self.statistics(name)) for name in src if norm.groups],
            channels=[self.program.buffers[name].shape[2] for name in src],
            groups=norm.groups,
            eps=norm.eps,
            gamma=gamma,
            beta=beta,
            modulation=None if norm.modulation is None else self._projections(norm.modulation),
        )

    def _add(self, op: Op) -> None:
        dst = array(self.buffer(op.dst))
        if isinstance(op, Input):
            combine = (None, "add", "multiply", "concat").index(op.class_image)
            self.engine.input(center=op.center, combine=combine, dst=dst)
        elif isinstance(op, Embed):
            first, second = self._embedded(op)
            self.engine.embed(time=first, classes=second, features=self.program.buffers[op.dst].shape[2], dst=dst)
        elif isinstance(op, Conv):
            self._add_conv(op, dst)
        elif isinstance(op, Pool):
            self.engine.pool(src=self._sources(op), **self._norm(op), dst=dst)
        else:
            assert isinstance(op, Attention)
            text = None
            if op.text:
                assert self.inputs.text is not None
                text = array(self.inputs.text[op.src[1]])
            self.engine.attention(
                src=[array(self.buffer(name)) for name in op.src[: 2 - op.text]], heads=op.heads, head_dim=op.head_dim,
                bf16=self.spec.dtype == torch.bfloat16, text=text,
                norm=None if op.norm is None else self._norm_of(op.src[1:], op.norm), dst=dst,
            )  # fmt: skip

    def _embedded(self, op: Embed) -> tuple[Any, Any]:
        """Return the two vectors of each row that `Embed` adds; where it has one source, the second is zero."""
        by = self.native.By
        if len(op.src) == 1:
            channels = self._padded(self.program.buffers[op.src[0]].shape[2])
            zeros = torch.zeros(1, channels, dtype=torch.float32, device=self.arena.device)
            return self._rows(op.src[0]), self.native.RowVectors(array(zeros), by.row)
        assert self.inputs.classes is not None
        return self._times(), self.native.RowVectors(array(self.inputs.classes), by.label)

    def _add_conv(self, op: Conv, dst: Any) -> None:
        buffers = self.program.buffers
        bf16 = self.spec.dtype == torch.bfloat16 and op.dst not in EMBEDDING_PRODUCTS
        method = self.methods[op.dst]
        dtype = torch.bfloat16 if bf16 else torch.float32
        kernel, bias = self.weights.conv(op, tuple(buffers[name].shape[2] for name in op.src), method, dtype, self.isa)
        self.engine.conv(
            src=self._sources(op),
            kernel=op.kernel,
            stride=op.stride,
            padding=op.padding[0],
            circular=op.circular,
            upsample=op.upsample,
            method=getattr(self.native.Method, method),
            **self._norm(op),
            geglu=op.geglu,
            relu=op.relu,
            bf16=bf16,
            weights=array(kernel),
            bias=array(bias),
            emb=None if op.emb is None else self._projections(op.emb),
            emb_channels=buffers[op.dst].shape[2],
            residual=None if op.residual is None else array(self.buffer(op.residual)),
            divide=op.divide,
            dst=dst,
            statistics=array(self.statistics(op.dst)) if buffers[op.dst].statistics else None,
        )


def dry_program(unet: UNet | UNetCondition, spec: Spec, rows: int, tokens: int = TOKENS) -> NativeProgram:
    """Return the program that would run a pass of ``rows`` rows, or one part of it, with sizes and algorithms only.

    It is for two texts of so many ``tokens``, where the network reads one. Its arena and packed weights are on "meta",
    so it takes no memory and cannot run.
    """
    native = extension()
    assert native is not None
    program = lower(unet, spec.shape[1:], tokens)
    rows = part_rows(rows, plan(program, 1, group=native.GROUP).size)
    layout = plan(program, rows, group=native.GROUP)
    C, H, W = spec.shape

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arena = meta(layout.size, dtype=torch.uint8)
    index = meta(rows, dtype=torch.int64)
    text = {name: meta(2, tokens, 2 * m.to_k.out_features) for name, m in text_attentions(unet).items()}
    encoded = isinstance(unet, UNet) and unet.class_encoder is not None
    inputs = ProgramInputs(
        x=meta(rows, C, H, W),
        timestep=index,
        label=index,
        times=meta(TIMES, embedding_width(program)),
        classes=None if vector_kind(unet) is None else meta(1, unet.config.temb_channels),
        class_images=meta(rows, H, W, C) if encoded else None,
        text=text or None,
    )
    weights = Weights.shapes(unet, native)
    return NativeProgram(native, program, layout, arena, weights, inputs, isa(), threads.number(), spec)
