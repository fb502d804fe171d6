"""Backend `triton`: a lowered program as a flat list of Triton launches, and a whole step of them in one CUDA graph.

Runs fastdiff's own U-Net on CUDA. Activations and products are of `Spec.dtype`, sums, statistics, embeddings and the
state of float32. This module owns the buffers that the kernels read and write, and lays the weights out for them;
`fastdiff.kernels` has the kernels, `fastdiff.backends.graph` captures and replays.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import update
from fastdiff.backends import Runner, Spec
from fastdiff.backends.eager import EagerRunner
from fastdiff.backends.graph import GraphRunner
from fastdiff.backends.native import EMBEDDING, alterations
from fastdiff.backends.packing import fingerprint, layer
from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Launch
from fastdiff.lower import embed_classes, embed_timesteps, lower
from fastdiff.plan import STATISTICS, plan
from fastdiff.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.solvers.table import COLUMNS
from fastdiff.state import State, TableBank
from fastdiff.unet import UNet

log = logging.getLogger("fastdiff")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons_against(unet: nn.Module, spec: Spec) -> list[str]:
    """Everything that keeps this backend from running the network; empty where it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    elif spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device) < (8, 0):
        reasons.append("it needs a GPU of compute capability 8.0 (Ampere) or newer")
    if spec.device.type != "cuda":
        reasons.append(f"it runs on CUDA, not on {spec.device}")
    if type(unet) is not UNet:
        reasons.append(f"it runs fastdiff.UNet only, not {type(unet).__name__}")
    else:
        reasons += alterations(unet)
    if spec.dtype not in DTYPES:
        reasons.append(f"it computes in float32, bfloat16 or float16, not in {str(spec.dtype).removeprefix('torch.')}")
    if spec.determinism == "bitwise":
        reasons.append("it chooses launch configurations by the batch, so bits depend on it; use determinism='seed'")
    if spec.fast:
        reasons.append("it has one kind of bfloat16 only; use dtype='bfloat16'")
    return reasons


def prepare(unet: nn.Module, spec: Spec) -> Runner:
    """Raises `BackendError` with every reason why it cannot run.

    Where a kernel cannot be compiled, or triton's cache cannot be used, PyTorch runs the network instead, and a warning
    says so.
    """
    reasons = reasons_against(unet, spec)
    if reasons:
        raise BackendError("backend 'triton' cannot run here: " + "; ".join(reasons))
    assert isinstance(unet, UNet)
    runner = TritonRunner(unet, spec)
    try:
        for launch in runner.steps.trial():
            launch.compile()
    except BackendError as e:
        log.warning("backend triton: %s; PyTorch runs the network instead, more slowly", e)
        eager = EagerRunner(unet.to(spec.dtype), spec)
        return GraphRunner(eager, unet, spec)
    return runner


# Weights --------------------------------------------------------------------------------------------------------------


class Weights:
    """A network's weights as the kernels read them. They keep their addresses, which graphs hold, when they change."""

    def __init__(self, unet: UNet, device: torch.device):
        self.unet = unet
        self.device = device
        self.made: dict[Any, tuple[Callable[[], Sequence[Tensor]], tuple[Tensor, ...]]] = {}
        self.fingerprint = fingerprint(unet)

    def follow(self) -> bool:
        """Lay out anew what the network has now; whether it had changed."""
        now = fingerprint(self.unet)
        if now == self.fingerprint:
            return False
        self.fingerprint = now
        for make, tensors in self.made.values():
            for tensor, new in zip(tensors, make(), strict=True):
                tensor.copy_(new)
        return True

    def conv(self, op: Conv, channels: Sequence[int], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        """Kernels of each source, of ``channels``, in ``dtype``, and the bias in float32."""
        from fastdiff.kernels import conv

        def kernels() -> Sequence[Tensor]:
            return conv.pack(layer(op, self.state())[0], channels, dtype, op.upsample)

        kernel = self._once((op.weights, op.upsample, tuple(channels), dtype), kernels)
        (bias,) = self._once((op.weights, "bias"), lambda: (layer(op, self.state())[1].float(),))
        return kernel, bias

    def vector(self, name: str) -> Tensor:
        return self._once((name,), lambda: (self.state()[name].float(),))[0]

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.unet.state_dict().items()}

    def _once(self, key: Any, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        if key not in self.made:
            self.made[key] = make, tuple(t.to(self.device, copy=True).contiguous() for t in make())
        return self.made[key][1]


# Buffers and operations -----------------------------------------------------------------------------------------------


class Buffers:
    """What a program's operations read and write, for ``rows`` rows."""

    def __init__(self, program: Program, rows: int, dtype: torch.dtype, device: torch.device):
        self.program = program
        self.rows = rows
        self.dtype = dtype
        self.layout = plan(program, rows, itemsize=dtype.itemsize)
        self.arena = torch.zeros(self.layout.size, dtype=torch.uint8, device=device)
        self.entry = torch.zeros(rows, dtype=torch.int64, device=device)  # where in the table of timesteps a row is
        self.label = torch.zeros(rows, dtype=torch.int64, device=device)
        self.vectors = {
            name: torch.zeros(rows, *program.buffers[name].shape, device=device)
            for name in VECTORS
            if name in program.buffers and not program.buffers[name].external
        }
        H, W, C = program.buffers["out"].shape
        self.net = torch.zeros(rows, C, H, W, device=device)
        normed = [op for op in program.ops if program.norm(op) is not None and not isinstance(op, Pool)]
        shapes = [(*program.buffers[source(op)[0]].shape[:2], self.channels(source(op))) for op in normed]
        self.scratch = torch.zeros(rows * max(map(math.prod, shapes), default=0), dtype=dtype, device=device)
        most = max((program.channels(op)[0] for op in program.ops if program.norm(op) is not None), default=0)
        self.norm = torch.zeros(rows * 3 * most, device=device)

    def __getitem__(self, name: str) -> Tensor:
        """[rows, H, W, C]"""
        if name in self.vectors:
            return self.vectors[name]
        return self._view(name, self.dtype, self.program.buffers[name].shape)

    def statistics(self, name: str) -> Tensor:
        buffer = self.program.buffers[name]
        return self._view(name + STATISTICS, torch.float32, (buffer.strips, 2, buffer.shape[2]))

    def channels(self, names: Sequence[str]) -> int:
        return sum(self.program.buffers[name].shape[2] for name in names)

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        offset, size = self.layout.offsets[name], self.rows * math.prod(shape) * dtype.itemsize
        return self.arena[offset : offset + size].view(dtype).view(self.rows, *shape)


def source(op: Op) -> tuple[str, ...]:
    """What the operation's norm is of."""
    return op.src[-1:] if isinstance(op, Attention) else op.src


class Launches:
    """A program's operations as launches, in order, from x [images, C, H, W] to ``out``.

    out: float32 [rows, C, H, W]. Rows past the images are the images once more, without their labels.
    """

    def __init__(
        self, buffers: Buffers, weights: Weights, x: Tensor, out: Tensor, times: Tensor, classes: Tensor | None,
        class_images: Tensor | None,
    ):  # fmt: skip
        self.buffers = buffers
        self.weights = weights
        self.x = x
        self.out = out
        self.times = times
        self.classes = classes
        self.class_images = class_images
        self.list: list[Launch] = []
        for op in buffers.program.ops:
            self._add(op)

    def _add(self, op: Op) -> None:
        from fastdiff.kernels import attention, elementwise

        b = self.buffers
        if isinstance(op, Input):
            self.list.append(
                elementwise.input(self.x, b[op.dst], center=op.center, image=self.class_images, combine=op.class_image)
            )
        elif isinstance(op, Embed):
            assert self.classes is not None
            self.list.append(elementwise.embed(self.times, b.entry, self.classes, b.label, b[op.dst]))
        elif isinstance(op, Conv):
            self._add_conv(op)
        elif isinstance(op, Pool):
            norm = None if op.norm is None else self._finalised(op.src, op.norm)
            silu = op.norm is not None and op.norm.silu
            self.list.append(elementwise.pool([b[name] for name in op.src], norm, b[op.dst], silu=silu))
        else:
            assert isinstance(op, Attention)
            q = b[op.src[0]]
            if len(op.src) == 1:
                q, k, v = q.chunk(3, dim=3)
            else:
                k = v = self._normalised(op.src[1:], op.norm)[0]
            self.list.append(attention.attention(q, k, v, b[op.dst], heads=op.heads))

    def _add_conv(self, op: Conv) -> None:
        from fastdiff.kernels import conv

        b, program = self.buffers, self.buffers.program
        H, W, C = program.buffers[op.dst].shape
        src = self._normalised(op.src, op.norm)
        weight, bias = self.weights.conv(op, [s.shape[3] for s in src], src[0].dtype)
        nchw = op.dst == "out"
        emitted = program.buffers[op.dst].statistics
        shape = {"stride": op.stride}
        finish: dict[str, Any] = {"divide": op.divide}
        if op.emb is not None:
            finish |= self._projections(op.emb)
        if op.residual is not None:
            finish["residual"] = b[op.residual]
        need = conv.workspace(src, weight, (b.rows, H, W, C), statistics=emitted, **shape)
        self.list += conv.layer(
            src, weight, bias, self.out if nchw else b[op.dst], padding=op.padding[0], nchw=nchw,
            workspace=torch.empty(need, device=bias.device) if need else None,
            statistics=b.statistics(op.dst) if emitted else None, **shape, **finish,
        )  # fmt: skip

    def _projections(self, offset: int) -> dict[str, Any]:
        b = self.buffers
        if b.program.buffers["projections"].external:
            return {"table": self.times, "entry": b.entry, "offset": offset}
        return {"table": b["projections"].flatten(1), "entry": None, "offset": offset}

    def _normalised(self, src: tuple[str, ...], norm: Norm | None) -> list[Tensor]:
        """The sources, or the one tensor that the norm makes of them."""
        from fastdiff.kernels import norm as kernels

        b = self.buffers
        sources = [b[name] for name in src]
        if norm is None:
            return sources
        rows, H, W, _ = sources[0].shape
        shape = (rows, H, W, b.channels(src))
        dst = b.scratch[: math.prod(shape)].view(shape)
        self.list.append(kernels.apply(sources, self._finalised(src, norm), dst, silu=norm.silu))
        return [dst]

    def _finalised(self, src: tuple[str, ...], norm: Norm) -> Tensor:
        from fastdiff.kernels import norm as kernels

        b = self.buffers
        H, W, _ = b.program.buffers[src[0]].shape
        C = b.channels(src)
        dst = b.norm[: b.rows * 3 * C].view(b.rows, 3, C)
        modulation = {} if norm.modulation is None else self._projections(norm.modulation)
        self.list.append(
            kernels.finalise(
                [b.statistics(name) for name in src], self.weights.vector(f"{norm.weights}.weight"),
                self.weights.vector(f"{norm.weights}.bias"), dst, height=H, width=W, groups=norm.groups, eps=norm.eps,
                **modulation,
            )
        )  # fmt: skip
        return dst


# Steps ----------------------------------------------------------------------------------------------------------------


class TritonSteps:
    """The halves of a step, see `fastdiff.backends.graph.Steps`.

    run: how a launch is run; tests without a GPU have its reference computed.
    """

    def __init__(self, unet: UNet, spec: Spec, run: Callable[[Launch], None] = Launch.__call__):
        self.unet = unet
        self.spec = spec
        self.run = run
        self.program = lower(unet, spec.shape[1:])
        self.weights = Weights(unet, spec.device)
        self.buffers: dict[int, Buffers] = {}
        self.bank: TableBank | None = None
        self.entries = torch.zeros(spec.tables, spec.rows + 1, dtype=torch.int64, device=spec.device)
        width = self.program.buffers["projections" if unet.class_embedding is None else "time"].shape[2]
        self.times = torch.zeros(spec.rows + 1, width, device=spec.device)
        self.arrived = torch.zeros(spec.batch, dtype=torch.int32, device=spec.device)

    def follow(self, state: State, fresh: bool) -> bool:
        """Notice other tables and, where the run is ``fresh``, other weights. Whether addresses have changed."""
        changed = False
        if fresh:
            changed = self.weights.follow()
            if changed:
                self.bank = None
        moved = False
        if self.bank is not state.bank:
            self.bank = state.bank
            t, inverse = np.unique(state.bank.host[..., COLUMNS.index("t")], return_inverse=True)
            places = torch.from_numpy(inverse.reshape(state.bank.host.shape[:2]).astype(np.int64))
            times = embed_timesteps(self.unet, torch.from_numpy(t).float().to(self.spec.device)).float()
            tables, rows = places.shape
            if len(times) > len(self.times) or tables > self.entries.shape[0] or rows > self.entries.shape[1]:
                room = [max(held, need) for held, need in zip(self.entries.shape, places.shape, strict=True)]
                self.entries = self.entries.new_zeros(room)
                self.times = self.times.new_zeros(max(len(times), len(self.times)), times.shape[1])
                moved = True
            self.entries[:tables, :rows].copy_(places)
            self.times[: len(times)].copy_(times)
        return moved

    def evaluate(self, state: State, guided: bool) -> None:
        """Network and guidance: sets ``state.out``."""
        from fastdiff.kernels import guidance

        rows = len(state.x) * (1 + guided)
        b = self._buffers(rows)
        C = self.program.buffers["out"].shape[2]
        if state.out is None:
            state.out = torch.zeros(len(state.x), C, *state.x.shape[2:], device=state.x.device)
        for launch in self.network(state, guided, b.net if guided else state.out):
            self.run(launch)
        if guided and (isinstance(state.guidance_rescale, Tensor) or state.guidance_rescale):
            c, u = b.net.chunk(2)
            w = 1.0 + state.column("g") * (state.guidance - 1.0)
            state.out.copy_(update.guide(c, u, w, state.x.shape[1], state.guidance_rescale))
        elif guided:
            self.run(
                guidance.guide(
                    b.net, state.out, bank=state.bank.values, table=state.table, row=state.row,
                    guidance=state.guidance, channels=state.x.shape[1],
                )
            )  # fmt: skip

    def network(self, state: State, guided: bool, out: Tensor) -> list[Launch]:
        """The launches from ``state.x`` to ``out`` [rows, C, H, W]; what a row's table entry and label are, is set."""
        b = self._buffers(len(out))
        images = len(state.x)
        entry = self.entries[state.table, state.row]
        for half in b.entry.split(images):
            half.copy_(entry)
        class_images = classes = None
        if state.label is not None:
            b.label[:images].copy_(state.label)
            b.label[images:].fill_(self.spec.null_label or 0)
            embedding = self.unet.class_embedding
            if isinstance(embedding, nn.Embedding):
                classes = self.weights.vector("class_embedding.weight")
            if self.unet.class_encoder is not None:
                class_images = self.unet.class_encoder(b.label, self.spec.shape[1:]).permute(0, 2, 3, 1).contiguous()
        return Launches(b, self.weights, state.x, out, self.times, classes, class_images).list

    def advance(self, state: State, noisy: bool) -> None:
        """A row of the table for every image; ``noisy`` needs no asking, as rows that draw no noise compute none."""
        from fastdiff.kernels import update as kernels

        assert state.out is not None, "evaluate comes before advance"
        self.run(
            kernels.update(
                state.x, state.out, state.bank.values, state.table, state.row, state.bank.lengths, state.seed,
                state.index, self.arrived, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3,
                x0_scale=state.x0_scale,
            )
        )  # fmt: skip

    def _buffers(self, rows: int) -> Buffers:
        if rows not in self.buffers:
            self.buffers[rows] = Buffers(self.program, rows, self.spec.dtype, self.spec.device)
        return self.buffers[rows]

    def trial(self) -> list[Launch]:
        """The launches of an unguided step and of a guided one, to be compiled."""
        images = torch.zeros(self.spec.batch, *self.spec.shape, device=self.spec.device)
        conditional = self.unet.config.conditional
        state = State.create(
            images, TableBank([solvers.ddpm(NoiseSchedule(), 1)], images.device), label=[0] * len(images) if conditional else None
        )
        launches = []
        for guided in (False, True)[: 1 + (conditional and self.spec.null_label is not None)]:
            ...
        return launches


# The runner -----------------------------------------------------------------------------------------------------------


class TritonRunner:
    """Replays graphs of steps; follows the tables and, from run to run, the weights. cuda: as for `GraphRunner`."""

    def __init__(self, unet: UNet, spec: Spec, cuda: Any = torch.cuda):
        self.unet = unet
        self.spec = spec
        self.steps = TritonSteps(unet, spec)
        self.graphs = GraphRunner(self.steps, unet, spec, cuda)
        self.known: weakref.WeakSet[State] = weakref.WeakSet()

    def forward(self, state: State) -> None:
        self._follow(state)
        self.graphs.forward(state)

    def update(self, state: State) -> None:
        self.graphs.update(state)

    def step(self, state: State) -> None:
        self._follow(state)
        self.graphs.step(state)
