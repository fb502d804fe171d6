"""A lowered program as a list of Triton launches, with the buffers that they read and write and the packed weights.

Activations have one dtype and are NHWC, in an arena; embeddings, statistics, x and ``out`` are float32. Everything that
follows a convolution is done by the launch that computes it or, where its products are split, by the launch that sums
them. On maps of up to 16x16 pixels that launch also computes the norm that is read next (`Launches.fused`). Elsewhere a
norm is one launch, or two where its statistics are many, and reads one or two sources. A LayerNorm is a launch before
the product that reads it. The keys and values of texts are computed before, once (`TextTables`): a row reads those of
its label.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.network import (
    EMBEDDING_PRODUCTS,
    EmbeddingTables,
    TextTables,
    checksum,
    in_memory_order,
    layout_checksum,
    merged_layer,
)
from fastdiff.core.plan import STATISTICS, plan
from fastdiff.core.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.core.state import State
from fastdiff.errors import BackendError
from fastdiff.kernels import attention, conv, embed, epilogue, fingerprint, geglu, input, layer_norm, library, pool
from fastdiff.kernels import norm as kernel_norm
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.library import LIBRARY, LibraryConfig
from fastdiff.kernels.tiles import Blocks
from fastdiff.unet import UNet, UNetCondition

# Weights --------------------------------------------------------------------------------------------------------------

BY_KERNEL = ("cuda",)  # types of devices on which a kernel computes the checksum of weights


class Weights:
    """Packed weights of a network, which all batch sizes share.

    Their addresses stay when the network's weights change, as graphs hold them. ``version`` is the number of changes.
    ``run`` runs a launch.
    """

    def __init__(self, unet: UNet | UNetCondition, device: torch.device, run: Callable[[Launch], None]):
        self.device = device
        self.run = run
        self.made: dict[Any, tuple[Callable[[], Sequence[Tensor]], tuple[Tensor, ...]]] = {}
        self.parts: tuple[list[tuple[int, int]], Tensor, Tensor] | None = None  # of `_fingerprint`
        self.made_from = self.fingerprint(unet)
        self.tensors = _tensors(unet)
        self.version = 0

    @classmethod
    def of(cls, unet: UNet | UNetCondition, device: torch.device, run: Callable[[Launch], None]) -> Weights:
        """Return the packed weights of a network on a device, new ones at the first call."""
        known = _weights.setdefault(unet, {})  # values hold tensors of the network, not the network itself
        return known.get(device) or known.setdefault(device, cls(unet, device, run))

    def fingerprint(self, unet: UNet | UNetCondition) -> int:
        """Compute the network's checksum: on a GPU by one launch, and one copy of its results to the host.

        Where the kernel cannot be compiled, or weights are elsewhere, `checksum` computes it.
        """
        weights = [p.detach() for p in unet.parameters()]
        device = torch.empty(0, dtype=torch.float32, device=self.device).device  # with its index
        if any(w.is_meta for w in weights):
            return 0  # they have no values that could change
        if device.type not in BY_KERNEL or any(w.device != device for w in weights):
            return checksum(unet)
        dense = [in_memory_order(w) for w in weights]
        places = [(t.data_ptr(), t.nbytes) for t in dense]
        # Triton compiles and launches for the current device.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if self.parts is None or self.parts[0] != places:
                table = fingerprint.parts(dense).to(device)
                sums = torch.zeros(len(table), dtype=torch.int64, device=device)
                try:
                    fingerprint.fingerprint(dense, table, sums).compile()
                except BackendError:
                    return checksum(unet)
                self.parts = places, table, sums
            _, table, sums = self.parts
            self.run(fingerprint.fingerprint(dense, table, sums))
            total = int(sums.cpu().numpy().sum())
        return (total + layout_checksum(weights)) % (1 << 64)

    def follow(self, unet: UNet | UNetCondition) -> None:
        """Pack again if the network's weights have changed."""
        now = self.fingerprint(unet)
        if now == self.made_from:
            return
        self.made_from, self.tensors = now, _tensors(unet)
        for make, tensors in self.made.values():
            for tensor, new in zip(tensors, make(), strict=True):
                tensor.copy_(new)
        self.version += 1

    def conv(
        self, op: Conv, channels: Sequence[int], dtype: torch.dtype, config: conv.LayerConfig | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return a convolution's kernel for each source, in ``dtype`` and ``config``'s layout, and its float32 bias.

        A gated layer, whose kernel has one layout, has no such configuration.
        """

        def kernels() -> Sequence[Tensor]:
            W = merged_layer(op, self.tensors)[0]
            if config == LIBRARY:
                return library.pack(W, channels, dtype, op.padding)
            if columns:
                return conv.pack_columns(W, channels, dtype)
            return conv.pack(W, channels, dtype, op.upsample)

        columns = isinstance(config, conv.ColumnsConfig)
        kernel = self._once((op.weights, op.upsample, tuple(channels), dtype, columns, config == LIBRARY), kernels)
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


def _tensors(unet: UNet | UNetCondition) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}


_weights: weakref.WeakKeyDictionary[UNet | UNetCondition, dict[torch.device, Weights]] = weakref.WeakKeyDictionary()

# Buffers and operations -----------------------------------------------------------------------------------------------


class Buffers:
    """Buffers that a program's operations read and write, with activations in ``dtype``.

    ``timestep``, int64 [rows], is the row of the embedded timesteps for each row, ``label`` its class, or the place of
    its text in the tables of texts, ``class_images`` float32 [rows, H, W, C], where the network has them, ``net``,
    float32 [rows, C, H, W], the network's output where guidance follows, ``space`` scratch memory by purpose, for one
    operation at a time.
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
        self.parts: dict[str, Tensor] = {}  # statistics that have several parts for a strip, which the plan has not
        self.space = {
            name: torch.zeros(0, dtype=kind, device=device)
            for name, kind in (("normalised", dtype), ("norm", torch.float32), ("workspace", torch.float32))
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return a buffer, [rows, H, W, C]."""
        if name in self.embedding:
            return self.embedding[name]
        return self._view(name, self.dtype, self.program.buffers[name].shape)

    def statistics(self, name: str, parts: int) -> Tensor:
        """Return a buffer's statistics, float32 [rows, strips, parts, 2, C]."""
        buffer = self.program.buffers[name]
        shape = (buffer.strips, parts, 2, buffer.shape[2])
        if parts == 1:
            return self._view(name + STATISTICS, torch.float32, shape)
        held = self.parts.get(name)
        if held is None or held.shape[1:] != shape:
            held = self.parts[name] = torch.zeros(self.rows, *shape, dtype=torch.float32, device=self.arena.device)
        return held

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


# `epilogue.normed` reads float32 sums where another kernel could have rounded its results before it stored them. That
# costs about 4 bytes more for every element, which at the rate of an H200's L2 cache (5 TB/s) are as long as the two
# launches that it saves (1.3 us each) at 3 million elements.
MOST_FUSED = 1 << 21
# `norm.group_norm` reads all statistics in every program. It saves a launch, which matters in small batches alone.
MOST_BLOCKS = 64
MOST_NORMED = 1 << 22  # elements of a map


class Launches:
    """The launches of a program's operations, in order, from the images of ``state`` to ``out`` [rows, C, H, W].

    Rows of ``buffers`` beyond the number of images are the images again, with other labels. ``entries`` is the row of
    the embedded timesteps for each row of each table, int64 [tables, rows]. Configurations are chosen for
    ``chosen_for`` rows; None: for those of ``buffers``. ``texts`` has what a text-conditioned network reads of them.

    ``fused`` has the sources and the norm that are computed together with a convolution, by the buffer that it writes.
    """

    def __init__(
        self, buffers: Buffers, weights: Weights, state: State, out: Tensor, entries: Tensor,
        embeddings: EmbeddingTables, chosen_for: int | None = None, texts: TextTables | None = None,
    ):  # fmt: skip
        self.buffers = buffers
        self.weights = weights
        self.state = state
        self.out = out
        self.entries = entries
        self.embeddings = embeddings
        self.texts = texts
        self.chosen_for = chosen_for
        self.list: list[Launch] = []
        self.held: tuple[tuple[str, ...], Norm] | None = None  # the sources and norm that "normalised" holds
        self.blocks: dict[str, Blocks] = {}  # of the statistics of a buffer
        self.fused = self._fused()
        self.measured = _measured(buffers.program, self.fused)
        self.read = _read(buffers.program, self.fused)
        for op in buffers.program.ops:
            self._add(op)
        # The input's launch comes first: it also looks up the rows' embedded timesteps.
        self.list.sort(key=lambda launch: launch.op != "input")

    # Norms that are computed with the convolution before them ---------------------------------------------------------

    def _fused(self) -> dict[str, tuple[tuple[str, ...], Norm]]:
        """Choose the norms that are computed with the convolution that writes their first source.

        The result is held in "normalised" until it is read, so no other norm may be between the two. Such a convolution
        writes no statistics, so no norm that needs them may read its result.
        """
        program = self.buffers.program
        found: dict[str, tuple[tuple[str, ...], Norm]] = {}
        written = {op.dst: i for i, op in enumerate(program.ops)}
        last, before = -1, None  # the last operation that read another norm, and the norm before
        for i, op in enumerate(program.ops):
            read = _norm_of(op)
            if read is None or isinstance(op, Pool):
                continue
            src, norm = read
            self._scratch(src)  # makes it as large as it has to be, as it must not move while it is held
            if read != before:
                first = written.get(src[0], -1)
                producer = program.ops[first]
                ready = last <= first and all(written.get(name, -1) < first for name in src[1:])
                if isinstance(producer, Conv) and ready and self._can_fuse(producer, src, norm):
                    found[producer.dst] = read
            last, before = i, read
        while measured := _measured(program, found) & found.keys():
            found = {name: read for name, read in found.items() if name not in measured}
        return found

    def _can_fuse(self, op: Conv, src: tuple[str, ...], norm: Norm) -> bool:
        """Return whether the norm of a convolution's result is to be computed with it."""
        buffers = self.buffers.program.buffers
        H, W, N = buffers[op.dst].shape
        if not norm.groups or op.dst == "out" or not epilogue.can_be_normed(
            H, W, self.buffers.channels(src), norm.groups
        ):  # fmt: skip
            return False
        config = self._chosen(op, self._sources(op))
        split = isinstance(config, LibraryConfig) or config.splits > 1
        return split or (self.chosen_for or self.buffers.rows) * H * W * N <= MOST_FUSED

    # Operations -------------------------------------------------------------------------------------------------------

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
            times, classes = self.embeddings.times, (self.texts or self.embeddings).classes
            assert classes is not None
            launch = embed.embed(times, b.timestep, classes, b.label, dst)
        self.list.append(launch)

    def _add_attention(self, op: Attention) -> None:
        b = self.buffers
        v: Tensor | None = None
        if op.text:
            assert self.texts is not None
            q = b[op.src[0]]
            k, v = self.texts.banks[op.src[1]][:, None].chunk(2, dim=3)
        elif len(op.src) == 1:
            q, k, v = b[op.src[0]].chunk(3, dim=3)
        else:
            q = b[op.src[0]]
            k = b[op.src[1]] if op.norm is None else self._normalised(op.src[1:], op.norm)
        self.list.append(
            attention.attention(
                q, k, v, b[op.dst], heads=op.heads, head_dim=op.head_dim, entry=b.label if op.text else None,
                chosen_for=self.chosen_for,
            )
        )  # fmt: skip

    def _sources(self, op: Conv) -> list[Tensor]:
        """Return what a convolution reads: its sources, or the one tensor that holds their norm."""
        return [self.buffers[name] for name in op.src] if op.norm is None else [self._scratch(op.src)]

    def _chosen(self, op: Conv, src: Sequence[Tensor]) -> conv.LayerConfig:
        problem = conv.Problem.at(
            src, (self.buffers.rows, *self.buffers.program.buffers[op.dst].shape), op.kernel, op.stride, op.upsample
        )
        plain = op.dst == "out" and op.divide == 1.0 and op.emb is None and op.residual is None
        if self.chosen_for is None:
            return problem.choose_layer(plain)
        # Without the library, whose own choices may depend on the batch.
        return problem.like(self.chosen_for).choose(splits=True, plain=plain)

    def _add_conv(self, op: Conv) -> None:
        b = self.buffers
        if op.norm is not None:
            self._normalised(op.src, op.norm)
        src = self._sources(op)
        if op.geglu:
            (gated,), bias = self.weights.conv(op, [src[0].shape[3]], src[0].dtype)
            self.list.append(geglu.geglu(src[0], gated, bias, b[op.dst], chosen_for=self.chosen_for))
            return
        config = self._chosen(op, src)
        weight, bias = self.weights.conv(op, [s.shape[3] for s in src], src[0].dtype, config)
        finish: dict[str, Any] = {"divide": op.divide}
        if op.emb is not None:
            finish |= self._projections(op.emb)
        if op.residual is not None:
            finish["residual"] = b[op.residual]
        shape = (b.rows, *b.program.buffers[op.dst].shape)
        dst: Tensor | None = self.out if op.dst == "out" else b[op.dst]
        then = None
        if op.dst in self.fused:
            self.held = sources, norm = self.fused[op.dst]
            then = epilogue.Normed(
                self._scratch(sources), *self._vectors(norm), norm.groups, norm.eps, norm.silu,
                b[sources[1]] if len(sources) == 2 else None, **self._modulation(norm),
            )  # fmt: skip
            dst = dst if op.dst in self.read else None
        statistics = None
        if op.dst in self.measured:
            problem = conv.Problem.of(src, weight, shape, op.stride).like(self.chosen_for)
            self.blocks[op.dst] = blocks = problem.finished_blocks(config)
            statistics = b.statistics(op.dst, blocks.parts)
        need = conv.workspace(src, weight, shape, stride=op.stride, partial=then is not None, config=config)
        padding = op.padding[1] if config == LIBRARY else op.padding[0]  # on all sides, or in front
        self.list += conv.layer(
            src, weight, bias, dst, workspace=b.scratch("workspace", need), stride=op.stride, padding=padding,
            nchw=op.dst == "out", statistics=statistics, then=then, config=config, chosen_for=self.chosen_for, **finish,
        )  # fmt: skip

    # Norms ------------------------------------------------------------------------------------------------------------

    def _projections(self, offset: int) -> dict[str, Any]:
        b = self.buffers
        if b.program.buffers["projections"].external:
            return {"table": self.embeddings.times, "entry": b.timestep, "offset": offset}
        return {"table": b["projections"].flatten(1), "offset": offset}

    def _modulation(self, norm: Norm) -> dict[str, Any]:
        return {} if norm.modulation is None else self._projections(norm.modulation)

    def _vectors(self, norm: Norm) -> tuple[Tensor, Tensor]:
        return self.weights.vector(f"{norm.weights}.weight"), self.weights.vector(f"{norm.weights}.bias")

    def _scratch(self, src: Sequence[str]) -> Tensor:
        """Return the tensor in which the norm of these buffers is held."""
        H, W, _ = self.buffers.program.buffers[src[0]].shape
        return self.buffers.scratch("normalised", self.buffers.rows, H, W, self.buffers.channels(src))

    def _normalised(self, src: tuple[str, ...], norm: Norm) -> Tensor:
        """Return the tensor that holds the norm of the sources, after launches that compute it."""
        b = self.buffers
        dst = self._scratch(src)
        if self.held == (src, norm):  # an operation before has read or computed it
            return dst
        self.held = src, norm
        sources = [b[name] for name in src]
        if not norm.groups:
            self.list.append(
                layer_norm.layer_norm(
                    sources[0], *self._vectors(norm), dst, eps=norm.eps, chosen_for=self.chosen_for
                )
            )  # fmt: skip
            return dst
        blocks = [self.blocks[name] for name in src]
        elements = dst.numel() // b.rows * (self.chosen_for or b.rows)
        if sum(of.strips * of.parts for of in blocks) <= MOST_BLOCKS and elements <= MOST_NORMED:
            self.list.append(
                kernel_norm.group_norm(
                    sources, self._statistics(src), *self._vectors(norm), dst, blocks=blocks, groups=norm.groups,
                    eps=norm.eps, silu=norm.silu, chosen_for=self.chosen_for, **self._modulation(norm),
                )
            )  # fmt: skip
        else:
            finalised = self._finalised(src, norm)
            self.list.append(kernel_norm.apply(sources, finalised, dst, silu=norm.silu, chosen_for=self.chosen_for))
        return dst

    def _statistics(self, src: Sequence[str]) -> list[Tensor]:
        return [self.buffers.statistics(name, self.blocks[name].parts) for name in src]

    def _finalised(self, src: tuple[str, ...], norm: Norm) -> Tensor:
        """Return the norm's mean, scale and shift of every channel, [rows, 3, C], combined from the statistics."""
        dst = self.buffers.scratch("norm", self.buffers.rows, 3, self.buffers.channels(src))
        self.list.append(
            kernel_norm.finalise(
                self._statistics(src), *self._vectors(norm), dst, blocks=[self.blocks[name] for name in src],
                groups=norm.groups, eps=norm.eps, **self._modulation(norm),
            )
        )  # fmt: skip
        return dst


def _norm_of(op: Op) -> tuple[tuple[str, ...], Norm] | None:
    """Return the sources and the norm that an operation applies to them; None if there is none."""
    if isinstance(op, Attention):
        return None if op.norm is None else (op.src[1:], op.norm)
    if isinstance(op, Conv | Pool):
        return None if op.norm is None else (op.src, op.norm)
    return None


def _measured(program: Program, fused: Mapping[str, tuple[tuple[str, ...], Norm]]) -> set[str]:
    """Return the buffers whose statistics a norm reads, as those do that are not ``fused``."""
    computed = set(fused.values())
    reads = [_norm_of(op) for op in program.ops]
    return {name for read in reads if read is not None and read not in computed and read[1].groups for name in read[0]}


def _read(program: Program, fused: Mapping[str, tuple[tuple[str, ...], Norm]]) -> set[str]:
    """Return the buffers that operations read themselves, not only by the norm that is computed with them."""
    computed = {read: name for name, read in fused.items()}
    found = set()
    for op in program.ops:
        read = _norm_of(op)
        raw = [name for name in program.reads(op) if read is None or name not in read[0]]
        raw += [op.residual] if isinstance(op, Conv) and op.residual is not None else []
        if read is not None:
            raw += [name for name in read[0] if name != computed.get(read)]
        found.update(raw)
    return found
