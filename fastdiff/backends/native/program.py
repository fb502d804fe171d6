"""Backend `native`: the C++ engine for CPUs. Runs fastdiff's own U-Net as a lowered program.

Products are of float32, or of bfloat16 with sums in float32; everything between them is float32. bfloat16 has two
kinds: Winograd's F(4x4, 3x3) rounds more than twice as much as F(2x2, 3x3), so only `Spec.fast` has it.

This module owns every buffer that the engine reads and writes and chooses each convolution's algorithm;
`fastdiff.backends.native.packing` has the weights, and `csrc/` does the arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.backends import BITWISE_ROWS, Spec
from fastdiff.backends.native import threads
from fastdiff.backends.native.packing import Weights
from fastdiff.core import update
from fastdiff.core.lower import embed_classes, embed_timesteps, lower
from fastdiff.core.plan import ALIGNMENT, STATISTICS, Plan, plan
from fastdiff.core.program import Attention, Conv, Embed, Input, Norm, Op, Pool, Program
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.solvers.table import COLUMNS, StepTable
from fastdiff.unet import UNet, UNetConfig
from fastdiff.unet.model import ClassProjection


def extension() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    try:
        from fastdiff import _native
    except ImportError:
        return None
    return _native


def isa() -> str:
    """The instruction set that the environment asks for; empty: the best one."""
    return os.environ.get("FASTDIFF_ISA", "")


def reasons_against(unet: nn.Module, spec: Spec) -> list[str]:
    """Everything that keeps this backend from running the network; empty where it can."""
    reasons = []
    native = extension()
    if native is None:
        reasons.append("the extension fastdiff._native is not built (install with a C++ compiler present)")
    elif not native.isas():
        reasons.append("this processor has none of the instruction sets it was built for (x86-64: AVX2 and FMA)")
    elif isa() not in ("", *native.isas()):
        reasons.append(f"FASTDIFF_ISA={isa()!r} is not available; available: {', '.join(native.isas())}")
    if type(unet) is not UNet:
        reasons.append(f"it runs fastdiff.UNet only, not {type(unet).__name__}")
    else:
        reasons += alterations(unet)
    if spec.device.type != "cpu":
        reasons.append(f"it runs on the CPU, not on {spec.device}")
    if spec.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it computes in float32 or bfloat16, not in {str(spec.dtype).removeprefix('torch.')}")
    if spec.dtype == torch.bfloat16 and native is not None and not _multiplies_bf16(native):
        reasons.append("the processor, or FASTDIFF_ISA, has no products of bfloat16 (x86-64: AVX-512 BF16)")
    return reasons


def _multiplies_bf16(native: ModuleType) -> bool:
    return (isa() or next(iter(native.isas()), "")) in native.bf16_isas()


def alterations(unet: UNet) -> list[str]:
    """What of the module the program would not know of."""
    reasons = []
    if _structure(unet) != _described(unet.config):
        reasons.append("modules of the network were replaced, so its configuration does not describe it")
    if any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules()):
        reasons.append("modules of the network have forward hooks, which it would not call")
    return reasons


def _structure(unet: UNet) -> list[tuple[str, object]]:
    """Types of all modules and shapes of all weights: the engine's addresses follow from them."""
    modules: list[tuple[str, object]] = [(name, type(m)) for name, m in unet.named_modules()]
    return modules + [(name, p.shape) for name, p in unet.named_parameters()]


@functools.lru_cache(maxsize=8)
def _described(config: UNetConfig) -> list[tuple[str, object]]:
    with torch.device("meta"):
        return _structure(UNet(config))


def _refuse(unet: nn.Module, spec: Spec) -> None:
    reasons = reasons_against(unet, spec)
    if reasons:
        raise BackendError("backend 'native' cannot run here: " + "; ".join(reasons))


def prepare(unet: nn.Module, spec: Spec) -> NativeRunner:
    """Raises `BackendError` with every reason why it cannot run."""
    _refuse(unet, spec)
    assert isinstance(unet, UNet)
    return NativeRunner(unet, spec)


# The choice of algorithms ---------------------------------------------------------------------------------------------


METHODS = ("winograd4", "winograd2", "direct")


def choose_method(op: Conv, program: Program, rows: int | None, allowed: tuple[str, ...] = METHODS) -> str:
    """The algorithm for a convolution: Winograd's where the kernel is 3x3 at stride 1 and the map has enough tiles.

    A tile costs 36 (F4) or 16 (F2) products per pair of channels for 16 or 4 pixels, against 9 a pixel; but weights
    grow by 4 or 16/9, and reading them is what few tiles cannot hide. rows=None: by the layer's shape alone. Maps of
    one F4 tile never take it: their layers could come to have three packings, for little of a large batch's time.
    """
    if op.kernel != 3 or op.stride != 1 or op.padding != (1, 1):
        return "direct"
    H, W, _ = program.buffers[op.dst].shape
    count = BITWISE_ROWS if rows is None else rows

    def cost(method: str) -> float:
        size, positions = {"direct": (1, 9), "winograd2": (2, 16), "winograd4": (4, 36)}[method]
        items = count * math.ceil(H / size) * math.ceil(W / size)
        # In products: a weight that is read costs about as much as multiplying it by a dozen items.
        return positions * (items + 12)

    return min((m for m in allowed if m != "winograd4" or H * W > 16), key=cost)


# Buffers and operations -----------------------------------------------------------------------------------------------


def aligned(nbytes: int) -> Tensor:
    """Zeroed bytes at a multiple of `ALIGNMENT`. Raises `BackendError` where there are not so many."""
    try:
        raw = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8)
    except RuntimeError as e:
        raise BackendError(
            f"backend 'native' needs {nbytes} bytes ({nbytes / 2**30:.1f} GiB) for activations, which this machine "
            "does not have free; ask for smaller images or a smaller batch_size"
        ) from e
    return raw[-raw.data_ptr() % ALIGNMENT :][:nbytes]


@dataclasses.dataclass
class Inputs:
    """What changes from step to step, at addresses that do not, row by row.

    x: [rows, C, H, W]. timestep: the row's entry in ``times``; label: in ``classes``. class_images: [rows, H, W, C].
    """

    x: Tensor
    timestep: Tensor
    label: Tensor
    times: Tensor
    classes: Tensor | None
    class_images: Tensor | None


class Compiled:
    """A program with addresses: for ``rows`` rows, in an arena."""

    def __init__(
        self, native: ModuleType, program: Program, layout: Plan, arena: Tensor, weights: Weights, inputs: Inputs,
        isa: str, team: Any, spec: Spec,
    ):  # fmt: skip
        self.native = native
        self.program = program
        self.layout = layout
        self.rows = layout.rows
        self.arena = arena
        self.weights = weights
        self.inputs = inputs
        self.engine = native.Engine(isa, team, self.rows)
        self.methods: dict[str, str] = {}
        self.spec = spec
        H, W, C = program.buffers["out"].shape
        self.out = torch.zeros(self.rows, H, W, self._padded(C))
        for op in program.ops:
            self._add(op)

    def buffer(self, name: str) -> Tensor:
        """A buffer of the arena, [rows, H, W, padded C]; for tests."""
        H, W, C = self.program.buffers[name].shape
        shape = (self.rows, H, W, self._padded(C))
        return self.out if name == "out" else self._view(self.layout.offsets[name], shape)

    def statistics(self, name: str) -> Tensor:
        """[rows, strips, 2, padded C]; for tests."""
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
        """From ``offset`` on, for every row."""
        width = self.program.buffers["projections"].shape[2]
        if self.program.buffers["projections"].external:
            times = self.inputs.times
            return self.native.RowVectors(
                times.data_ptr() + 4 * offset, self.inputs.timestep.data_ptr(), times.shape[1]
            )
        return self.native.RowVectors(self._at("projections") + 4 * offset, 0, self._padded(width))

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
        """The two vectors of every row that are added; a sum of one has zeros besides."""
        if len(op.src) == 1:
            channels = self._padded(self.program.buffers[op.src[0]].shape[2])
            self.zeros = torch.zeros(channels)
            return (
                self.native.RowVectors(self._at(op.src[0]), 0, channels),
                self.native.RowVectors(self.zeros.data_ptr(), 0, 0),
            )
        times, classes = self.inputs.times, self.inputs.classes
        assert classes is not None
        return (
            self.native.RowVectors(times.data_ptr(), self.inputs.timestep.data_ptr(), times.shape[1]),
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
        bf16 = self.spec.dtype == torch.bfloat16 and op.dst not in EMBEDDING
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


# Products of the embedding, which are small and stay in float32.
EMBEDDING = ("projections", "time_embedding.linear_2")


def described(unet: UNet, spec: Spec, rows: int) -> Compiled:
    """What would run a pass of ``rows`` rows, one part of it, with sizes and choices and no memory: it cannot run.

    Arena and packed weights are on "meta".
    """
    native = extension()
    assert native is not None
    program = lower(unet, spec.shape[1:])
    rows = part(rows, plan(program, 1, group=native.GROUP).size)
    layout = plan(program, rows, group=native.GROUP)
    C, H, W = spec.shape
    config = unet.config
    with torch.device("meta"):
        arena = torch.empty(layout.size, dtype=torch.uint8)
        index = torch.empty(rows, dtype=torch.int64)
        features = program.buffers["projections" if unet.class_embedding is None else "time"].shape[2]
        inputs = Inputs(
            x=torch.empty(rows, C, H, W),
            timestep=index,
            label=index,
            times=torch.empty(TIMES, features),
            classes=None if unet.class_embedding is None else torch.empty(1, config.temb_channels),
            class_images=None if unet.class_encoder is None else torch.empty(rows, H, W, C),
        )
    weights = Weights.shapes(unet, native)
    return Compiled(native, program, layout, arena, weights, inputs, isa(), native.Team(threads.number()), spec)


# What a third-level cache holds of activations, with the weights that pass by.
CACHE_BYTES = 32 << 20


def part(rows: int, row_bytes: int) -> int:
    """How many rows run at a time: all, in as few equal parts as keep a part's arena in the cache.

    Every part reads all weights, but those are prefetched, and activations are not.
    """
    parts = min(-(-rows * row_bytes // CACHE_BYTES), rows)
    return -(-rows // parts)


TIMES, MOST_TIMES = 64, 4096  # distinct timesteps: room from the start, and at most (about 100 MB of embeddings)

# The runner -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a runner has looked up for a `State`: where its timesteps are embedded, and its labels, by ``guided``."""

    tables: tuple[StepTable, ...]
    entry: Tensor
    labels: dict[bool, tuple[Tensor, Tensor | None]]


class NativeRunner:
    """Runs batches of ``spec.batch`` images, a guided one as two rows, in parts whose activations stay in the cache."""

    def __init__(self, unet: UNet, spec: Spec):
        native = extension()
        assert native is not None
        self.native = native
        self.unet = unet
        self.spec = spec
        self.isa = isa()
        self.program = lower(unet, spec.shape[1:])
        self.row_bytes = plan(self.program, 1, group=native.GROUP).size
        self._reset()

    def _reset(self) -> None:
        self.weights = Weights.of(self.unet, self.native)
        self.team = self.native.Team(threads.number())
        self.process = os.getpid()
        self.compiled: dict[int, Compiled] = {}
        self.arena = aligned(0)
        self.times = torch.empty(0, 0)  # embeddings, row by row
        self.places: dict[float, int] = {}  # of a timestep among them
        self.runs: weakref.WeakKeyDictionary[State, Run] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def forward(self, state: State) -> None:
        """Network and guidance: sets ``state.out``."""
        self._run(state, advance=False)

    @torch.no_grad()
    def update(self, state: State) -> None:
        """One row of the table for every image, in place, row += 1."""
        out, v = update.split_output(state)  # says what is wrong with the channels
        z = update.update_noise(state) if state.noise is not None else None
        update.threshold(state)
        state.x = state.x.contiguous()
        self.native.update(
            state.x, state.out if v is not None else out.contiguous(), state.bank.values, state.table, state.row,
            seed=state.seed, index=state.index, z=None if z is None else z.contiguous(),
            x0_scale=state.x0_scale, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3, isa=self.isa,
        )  # fmt: skip
        state.advance()

    @torch.no_grad()
    def step(self, state: State) -> None:
        """Both, in one call of the engine, unless the noise is the caller's or x0 has a dynamic threshold."""
        learned = self.unet.config.out_channels == 2 * state.x.shape[1]
        if state.noise is not None or state.bank.thresholds or (state.column_host("sv").any() and not learned):
            self.forward(state)
            self.update(state)
        else:
            self._run(state, advance=True)
            state.row_host = np.minimum(state.row_host + 1, state.bank.lengths_host[state.table_host])

    def _run(self, state: State, advance: bool) -> None:
        run = self._follow(state)
        guided = bool(state.guided_host.any())
        rows = len(state.x) * (1 + guided)
        label, class_images = self._labels(state, run, guided)
        compiled = self._compiled(part(rows, self.row_bytes))
        inputs = compiled.inputs
        H, W, C = self.program.buffers["out"].shape
        state.x, state.out = state.x.contiguous(), torch.empty(len(state.x), C, H, W)
        compiled.engine.step(
            in_x=inputs.x, in_timestep=inputs.timestep, in_label=inputs.label, in_class_image=inputs.class_images,
            in_out=compiled.out, x=state.x, row=state.row, table=state.table, entry=run.entry, label=label,
            class_image=class_images, net=torch.empty(rows, *compiled.out.shape[1:]), out=state.out,
            bank=state.bank.values, guidance=state.guidance if guided else None, rescale=state.guidance_rescale,
            advance_rows=advance, lengths=state.bank.lengths, seed=state.seed, index=state.index, xs=state.xs,
            m1=state.m1, m2=state.m2, m3=state.m3,
        )  # fmt: skip

    def _labels(self, state: State, run: Run, guided: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of every row: its label, and its class image [H, W, C] where the network has those."""
        if state.label is None:
            return None, None
        if guided not in run.labels:
            label, images = state.label, None
            if guided:
                label = torch.cat([label, torch.full_like(label, self.spec.null_label or 0)])
            if self.unet.class_encoder is not None:
                distinct, place = torch.unique(label, return_inverse=True)
                # PyTorch shares out sums by the number of rows: bits would depend on the labels of others.
                groups = distinct.split(1) if self.spec.determinism == "bitwise" else (distinct,)
                maps = torch.cat([self.unet.class_encoder(labels, self.spec.shape[1:]) for labels in groups])
                images = maps.permute(0, 2, 3, 1)[place].contiguous()
            run.labels[guided] = label.contiguous(), images
        return run.labels[guided]

    def memory(self) -> dict[str, int]:
        """Bytes held: packed weights (of all batch sizes and precisions), activations, working space."""
        space = sum(compiled.engine.space for compiled in self.compiled.values())
        return {"weights": self.weights.nbytes, "arena": len(self.arena), "space": space}

    def _follow(self, state: State) -> Run:
        """Notice what changed: the process, at a run's start the network, and the tables."""
        if self.process != os.getpid():
            _of_the_parent.append((self.team, self.compiled))
            self._reset()
        run = self.runs.get(state)
        if run is None:
            _refuse(self.unet, self.spec)
            if self.weights is not Weights.of(self.unet, self.native):
                self._reset()
        if run is None or run.tables is not state.bank.tables:
            run = self.runs[state] = Run(state.bank.tables, self._entry(state.bank), {})
        return run

    def _entry(self, bank: TableBank) -> Tensor:
        """int64 [tables, rows]: where among ``times`` each row's timestep is, embedded if it was not."""
        t, inverse = np.unique(bank.host[..., COLUMNS.index("t")], return_inverse=True)
        if len(self.places.keys() | set(t.tolist())) > MOST_TIMES:
            self.places.clear()
            self.runs.clear()  # the others come back here at their next step
        new = [v for v in t.tolist() if v not in self.places]
        if new:
            times = embed_timesteps(self.unet, torch.tensor(new))
            held = len(self.places)
            if held + len(new) > len(self.times):
                grown = times.new_empty(max(TIMES, 2 * held, held + len(new)), times.shape[1])
                grown[:held] = self.times[:held] if held else 0.0
                self.times = grown
                self.compiled.clear()  # they have addresses of the old ones
            self.times[held : held + len(new)] = times
            self.places |= {v: held + i for i, v in enumerate(new)}
        places = np.array([self.places[v] for v in t.tolist()], dtype=np.int64)
        return torch.from_numpy(places[inverse.reshape(bank.host.shape[:2])])

    def _compiled(self, rows: int) -> Compiled:
        if rows not in self.compiled:
            self.compiled[rows] = self._compile(rows)
        return self.compiled[rows]

    def _compile(self, rows: int) -> Compiled:
        layout = plan(self.program, rows, group=self.native.GROUP)
        if len(self.arena) < layout.size:
            self.arena = aligned(layout.size)
            self.compiled.clear()  # they have addresses of the old one
        embedding, classes, images = self.unet.class_embedding, None, None
        if isinstance(embedding, (nn.Embedding, ClassProjection)):
            classes = embed_classes(self.unet).detach().float().contiguous()
        C, H, W = self.spec.shape
        if self.unet.class_encoder is not None:
            images = torch.zeros(rows, H, W, C)
        inputs = Inputs(
            x=torch.zeros(rows, C, H, W),
            timestep=torch.zeros(rows, dtype=torch.int64),
            label=torch.zeros(rows, dtype=torch.int64),
            times=self.times,
            classes=classes,
            class_images=images,
        )
        return Compiled(
            self.native, self.program, layout, self.arena, self.weights, inputs, self.isa, self.team, self.spec
        )


# Teams whose threads the parent process kept when it forked: to end them would wait for threads that are not here.
_of_the_parent: list[Any] = []
