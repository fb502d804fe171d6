"""A lowered program with addresses, ready for the native engine.

This module owns every buffer that the engine reads and writes: the arena, in which `fastdiff.core.plan` places the
activations, and the inputs. `fastdiff.backends.native.packing` lays out the weights, `csrc/` does the arithmetic.
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
from fastdiff.backends.native.extension import extension, isa
from fastdiff.backends.native.methods import METHODS, choose_method
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.network import EMBEDDING_PRODUCTS, embedding_width
from fastdiff.core.lower import lower
from fastdiff.core.plan import ALIGNMENT, STATISTICS, Plan, plan
from fastdiff.core.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.errors import BackendError
from fastdiff.unet import UNet

CACHE_BYTES = 32 << 20  # activations that a third-level cache holds beside the weights that stream through it
TIMES = 64  # timesteps whose embeddings have room from the start


def part_rows(rows: int, row_bytes: int) -> int:
    """Return how many of ``rows`` run at a time: equal parts, as few as keep the arena of a part in the cache.

    Every part reads all weights again, but these are prefetched; activations are not.
    """
    parts = min(-(-rows * row_bytes // CACHE_BYTES), rows)
    return -(-rows // parts)


def aligned(nbytes: int) -> Tensor:
    """Allocate ``nbytes`` zeroed bytes at a multiple of `ALIGNMENT`, uint8 [nbytes]."""
    try:
        raw = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8)
    except RuntimeError as e:
        raise BackendError(
            f"backend 'native' needs {nbytes} bytes ({nbytes / 2**30:.1f} GiB) for activations, which this machine "
            "does not have free; ask for smaller images or a smaller batch_size"
        ) from e
    return raw[-raw.data_ptr() % ALIGNMENT :][:nbytes]


@dataclasses.dataclass
class ProgramInputs:
    """External buffers of a program, at fixed addresses; the engine copies each step's values into them."""

    x: Tensor  # noisy images, float32 [rows, C, H, W]
    timestep: Tensor  # row of ``times`` for each row, int64 [rows]
    label: Tensor  # row of ``classes`` for each row, int64 [rows]
    times: Tensor  # embeddings of timesteps, float32 [timesteps, features]
    classes: Tensor | None  # embeddings of labels, float32 [labels, features], where the network has them
    class_images: Tensor | None  # float32 [rows, H, W, C], where the network has them


class NativeProgram:
    """A program for a fixed number of rows, that of ``layout``, whose operations ``engine`` holds with their addresses.

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
        self.engine = native.Engine(isa, threads, self.rows)
        self.methods: dict[str, str] = {}
        self.spec = spec
        H, W, C = program.buffers["out"].shape
        self.out = torch.zeros(self.rows, H, W, self._padded(C))
        for op in program.ops:
            self._add(op)

    def buffer(self, name: str) -> Tensor:
        """Return a view of a buffer in the arena, [rows, H, W, padded C]; for tests."""
        H, W, C = self.program.buffers[name].shape
        shape = (self.rows, H, W, self._padded(C))
        return self.out if name == "out" else self._view(self.layout.offsets[name], shape)

    def statistics(self, name: str) -> Tensor:
        """Return a view of a buffer's statistics, [rows, strips, 2, padded C]; for tests."""
        H, _, C = self.program.buffers[name].shape
        shape = (self.rows, math.ceil(H / self.native.STRIP), 2, self._padded(C))
        return self._view(self.layout.offsets[name + STATISTICS], shape)

    def _view(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        return self.arena[offset : offset + 4 * math.prod(shape)].view(torch.float32).view(shape)

    def _padded(self, channels: int) -> int:
        group: int = self.native.GROUP
        return -(-channels // group) * group

    def _at(self, name: str) -> int:
        if name == "out":
            return self.out.data_ptr()
        return self.arena.data_ptr() + self.layout.offsets[name]

    def _sources(self, op: Op) -> dict[str, Any]:
        channels = [self._padded(self.program.buffers[name].shape[2]) for name in op.src]
        return {"src": [self._at(name) for name in op.src], "channels": channels}

    def _projections(self, offset: int) -> Any:
        """Return the vectors that start at ``offset`` in each row's projections."""
        buffer = self.program.buffers["projections"]
        if buffer.external:
            return self._times(offset)
        return self.native.RowVectors(self._at("projections") + 4 * offset, 0, self._padded(buffer.shape[2]))

    def _times(self, offset: int = 0) -> Any:
        """Return the vectors that start at ``offset`` in each row's embedded timestep."""
        times = self.inputs.times
        return self.native.RowVectors(times.data_ptr() + 4 * offset, self.inputs.timestep.data_ptr(), times.shape[1])

    def _norm(self, op: Conv | Pool) -> dict[str, Any]:
        if op.norm is None:
            return {"norm": None, "silu": False}
        return {"norm": self._norm_of(op.src, op.norm), "silu": op.norm.silu}

    def _norm_of(self, src: tuple[str, ...], norm: Norm) -> Any:
        H, W, _ = self.program.buffers[src[0]].shape
        gamma, beta = (self.weights.vector(f"{norm.weights}.{kind}") for kind in ("weight", "bias"))
        return self.native.Norm(
            statistics=[self._at(name + STATISTICS) for name in src],
            channels=[self.program.buffers[name].shape[2] for name in src],
            height=H,
            width=W,
            groups=norm.groups,
            eps=norm.eps,
            gamma=gamma.data_ptr(),
            beta=beta.data_ptr(),
            modulation=None if norm.modulation is None else self._projections(norm.modulation),
        )

    def _add(self, op: Op) -> None:
        H, W, C = self.program.buffers[op.dst].shape
        if isinstance(op, Input):
            self._add_input(op)
        elif isinstance(op, Embed):
            first, second = self._embedded(op)
            self.engine.embed(time=first, classes=second, features=C, dst=self._at(op.dst))
        elif isinstance(op, Conv):
            self._add_conv(op)
        elif isinstance(op, Pool):
            self.engine.pool(**self._sources(op), height=H, width=W, **self._norm(op), dst=self._at(op.dst))
        else:
            assert isinstance(op, Attention)
            self._add_attention(op)

    def _embedded(self, op: Embed) -> tuple[Any, Any]:
        """Return the two vectors of each row that `Embed` adds; where it has one source, the second is zero."""
        if len(op.src) == 1:
            channels = self._padded(self.program.buffers[op.src[0]].shape[2])
            self.zeros = torch.zeros(channels)
            return (
                self.native.RowVectors(self._at(op.src[0]), 0, channels),
                self.native.RowVectors(self.zeros.data_ptr(), 0, 0),
            )
        classes = self.inputs.classes
        assert classes is not None
        return (
            self._times(),
            self.native.RowVectors(classes.data_ptr(), self.inputs.label.data_ptr(), classes.shape[1]),
        )

    def _add_attention(self, op: Attention) -> None:
        H, W, inner = self.program.buffers[op.dst].shape
        q = self._at(op.src[0])
        q_stride = self._padded(self.program.buffers[op.src[0]].shape[2])
        if len(op.src) == 1:
            k, v, stride = q + 4 * inner, q + 8 * inner, q_stride
        else:
            k = v = self._at(op.src[1])
            stride = self._padded(inner)
        norm = None if op.norm is None else self._norm_of(op.src[1:], op.norm)
        self.engine.attention(
            queries=q, query_stride=q_stride, keys=k, values=v, key_stride=stride, norm=norm, pixels=H * W,
            heads=op.heads, head_dim=op.head_dim, bf16=self.spec.dtype == torch.bfloat16, dst=self._at(op.dst),
        )  # fmt: skip

    def _add_input(self, op: Input) -> None:
        x, images = self.inputs.x, self.inputs.class_images
        rows = None
        if images is not None:
            rows = self.native.RowVectors(images.data_ptr(), 0, images[0].numel())
        self.engine.input(
            x=x.data_ptr(),
            class_image=rows,
            images=x.shape[0],
            channels=x.shape[1],
            height=x.shape[2],
            width=x.shape[3],
            center=op.center,
            combine=(None, "add", "multiply", "concat").index(op.class_image),
            dst=self._at(op.dst),
        )

    def _add_conv(self, op: Conv) -> None:
        buffers = self.program.buffers
        H, W, C = buffers[op.dst].shape
        bf16 = self.spec.dtype == torch.bfloat16 and op.dst not in EMBEDDING_PRODUCTS
        # F(4x4, 3x3) rounds bfloat16 more than twice as much as F(2x2, 3x3), so it must be asked for.
        allowed = METHODS[1:] if bf16 and not self.spec.fast else METHODS
        rows = None if self.spec.determinism == "bitwise" else self.rows
        method = choose_method(op, self.program, rows, allowed)
        self.methods[op.dst] = method
        dtype = torch.bfloat16 if bf16 else torch.float32
        kernel, bias = self.weights.conv(op, tuple(buffers[name].shape[2] for name in op.src), method, dtype)
        self.engine.conv(
            **self._sources(op),
            src_height=buffers[op.src[0]].shape[0],
            src_width=buffers[op.src[0]].shape[1],
            height=H,
            width=W,
            kernel=op.kernel,
            stride=op.stride,
            padding=op.padding[0],
            upsample=op.upsample,
            method=getattr(self.native.Method, method),
            **self._norm(op),
            bf16=bf16,
            weights=kernel.data_ptr(),
            bias=bias.data_ptr(),
            outputs=self._padded(C),
            emb=None if op.emb is None else self._projections(op.emb),
            emb_channels=C,
            residual=0 if op.residual is None else self._at(op.residual),
            residual_shift=int(op.residual is not None and buffers[op.residual].shape[0] != H),
            divide=op.divide,
            dst=self._at(op.dst),
            statistics=self._at(op.dst + STATISTICS) if buffers[op.dst].statistics else 0,
        )


def dry_program(unet: UNet, spec: Spec, rows: int) -> NativeProgram:
    """Return the program that would run a pass of ``rows`` rows, or one part of it, with sizes and algorithms only.

    Its arena and packed weights are on "meta", so it takes no memory and cannot run.
    """
    native = extension()
    assert native is not None
    program = lower(unet, spec.shape[1:])
    rows = part_rows(rows, plan(program, 1, group=native.GROUP).size)
    layout = plan(program, rows, group=native.GROUP)
    C, H, W = spec.shape
    with torch.device("meta"):
        arena = torch.empty(layout.size, dtype=torch.uint8)
        index = torch.empty(rows, dtype=torch.int64)
        inputs = ProgramInputs(
            x=torch.empty(rows, C, H, W),
            timestep=index,
            label=index,
            times=torch.empty(TIMES, embedding_width(program)),
            classes=None if unet.class_embedding is None else torch.empty(1, unet.config.temb_channels),
            class_images=None if unet.class_encoder is None else torch.empty(rows, H, W, C),
        )
    weights = Weights.shapes(unet, native)
    return NativeProgram(native, program, layout, arena, weights, inputs, isa(), threads.number(), spec)
