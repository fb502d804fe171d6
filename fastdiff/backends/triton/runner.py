"""Backend `triton`: fastdiff's own U-Net on CUDA, as a flat list of Triton launches, a whole step in one CUDA graph.

`fastdiff.backends.triton.launches` makes the list of a lowered program, `fastdiff.backends.graph` captures and replays
it. With determinism "bitwise" launch configurations are chosen for `BITWISE_ROWS` rows, whatever the batch, and what
PyTorch computes of a step runs an image at a time, as its kernels share out their work by the batch. Never run on a GPU
so far: in tests its launches are interpreted, compiled, and replayed by a stand-in for CUDA.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.backends import BITWISE_ROWS, Runner, Spec
from fastdiff.backends.eager import EagerRunner
from fastdiff.backends.graph import GraphRunner
from fastdiff.backends.native.runner import alterations
from fastdiff.core import update
from fastdiff.core.lower import embed_timesteps, lower
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.solvers.table import COLUMNS
from fastdiff.unet import UNet

if TYPE_CHECKING:
    from fastdiff.backends.triton.launches import Buffers
    from fastdiff.kernels.launch import Launch

log = logging.getLogger("fastdiff")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons_against(unet: nn.Module, spec: Spec) -> list[str]:
    """Everything that keeps this backend from running the network; empty where it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not _has_kernels():
        reasons.append(
            "this checkout has no fastdiff/kernels, a symbolic link to kernels/: enable links, or use a wheel"
        )
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
        if unet.config.class_embed_type is not None:
            reasons.append(f"it has no class_embed_type {unet.config.class_embed_type!r}")
    if spec.dtype not in DTYPES:
        reasons.append(f"it computes in float32, bfloat16 or float16, not in {str(spec.dtype).removeprefix('torch.')}")
    if spec.fast:
        reasons.append("it has one kind of bfloat16 only; use dtype='bfloat16'")
    return reasons


def _has_kernels() -> bool:
    """Whether the kernels can be imported; a checkout without symbolic links has a text file in their place."""
    try:
        return importlib.util.find_spec("fastdiff.kernels.launch") is not None
    except ModuleNotFoundError:
        return False


def refuse(unet: nn.Module, spec: Spec) -> None:
    reasons = reasons_against(unet, spec)
    if reasons:
        raise BackendError("backend 'triton' cannot run here: " + "; ".join(reasons))


def prepare(unet: nn.Module, spec: Spec) -> TritonRunner:
    """Raises `BackendError` with every reason why it cannot run. Kernels are compiled at the first step."""
    refuse(unet, spec)
    assert isinstance(unet, UNet)
    return TritonRunner(unet, spec)


class TritonSteps:
    """A step and its halves, see `fastdiff.backends.graph.Steps`. run: how launches run; tests compute references."""

    def __init__(self, unet: UNet, spec: Spec, run: Callable[[Launch], None] = lambda launch: launch()):
        from fastdiff.backends.triton.launches import Weights

        self.unet = unet
        self.spec = spec
        self.run = run
        self.chosen_for = BITWISE_ROWS if spec.determinism == "bitwise" else None
        self.program = lower(unet, spec.shape[1:])
        self.weights = Weights(unet, spec.device)
        self.buffers: dict[int, Buffers] = {}
        self.bank: TableBank | None = None
        self.entries = torch.zeros(spec.tables, spec.rows + 1, dtype=torch.int64, device=spec.device)
        external = "projections" if self.program.buffers["projections"].external else "time"
        width = self.program.buffers[external].shape[2]
        self.times = torch.zeros(spec.rows + 1, width, device=spec.device)
        self.arrived = torch.zeros(spec.batch, dtype=torch.int32, device=spec.device)

    def follow(self, bank: TableBank, fresh: bool) -> bool:
        """Embed the timesteps of other tables; where a run is ``fresh``, notice other weights, too.

        Whether tensors have moved whose addresses graphs may hold.
        """
        changed = fresh and self.weights.follow()
        if self.bank is bank and not changed:
            return False
        self.bank = bank
        t, inverse = np.unique(bank.host[..., COLUMNS.index("t")], return_inverse=True)
        places = torch.from_numpy(inverse.reshape(bank.host.shape[:2]).astype(np.int64))
        times = embed_timesteps(self.unet, torch.from_numpy(t).float().to(self.spec.device)).float()
        room = [max(pair) for pair in zip(self.entries.shape, places.shape, strict=True)]
        moved = room != list(self.entries.shape) or len(times) > len(self.times)
        if moved:
            self.entries = self.entries.new_zeros(room)
            self.times = self.times.new_zeros(max(len(times), len(self.times)), times.shape[1])
        tables, rows = places.shape
        self.entries[:tables, :rows].copy_(places)
        self.times[: len(times)].copy_(times)
        return moved

    def network(self, state: State, guided: bool) -> list[Launch]:
        """The launches from ``state.x`` to ``state.out``, or with guidance to ``net`` of the buffers for 2B rows."""
        from fastdiff.backends.triton.launches import Buffers, Launches

        images, C = len(state.x), self.program.buffers["out"].shape[2]
        rows = images * (1 + guided)
        if rows not in self.buffers:
            self.buffers[rows] = Buffers(self.program, rows, self.spec.dtype, self.spec.device)
        b = self.buffers[rows]
        if state.out is None:
            state.out = torch.zeros(images, C, *state.x.shape[2:], device=state.x.device)
        class_images: Tensor | None = None
        classes: Tensor | None = None
        if state.label is not None:
            b.label[:images].copy_(state.label)
            b.label[images:].fill_(self.spec.null_label or 0)
            encoder = self.unet.class_encoder
            if encoder is None:
                classes = self.weights.classes()
            else:
                maps = self._in_turn(lambda label: encoder(label, self.spec.shape[1:]), b.label)
                class_images = maps.permute(0, 2, 3, 1).float().contiguous()
        out = b.net if guided else state.out
        return Launches(
            b, self.weights, state, out, self.entries, self.times, classes, class_images, self.chosen_for
        ).list

    def _in_turn(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function`` of the tensors' rows: of all together or, where bits must not depend on that, one by one."""
        if self.chosen_for is None:
            return function(*tensors)
        return torch.cat([function(*row) for row in zip(*(t.split(1) for t in tensors), strict=True)])

    def evaluate(self, state: State, guided: bool) -> None:
        """Network and guidance: sets ``state.out``."""
        from fastdiff.kernels import guidance

        net = self._evaluate(state, guided)
        if not guided:
            return
        assert state.out is not None
        if rescaled(state):
            conditional, unconditional = net.chunk(2)
            w = 1.0 + state.column("g") * (state.guidance - 1.0)
            C, phi = state.x.shape[1], state.guidance_rescale
            state.out.copy_(self._in_turn(lambda c, u, w: update.guide(c, u, w, C, phi), conditional, unconditional, w))
        else:
            self.run(
                guidance.guide(
                    net, state.out, bank=state.bank.values, table=state.table, row=state.row, guidance=state.guidance,
                    channels=state.x.shape[1], chosen_for=self.chosen_for,
                )
            )  # fmt: skip

    def _evaluate(self, state: State, guided: bool) -> Tensor:
        """The network alone: its answer, for the images and, with guidance, for the images without their labels."""
        for launch in self.network(state, guided):
            self.run(launch)
        assert state.out is not None
        return self.buffers[2 * len(state.x)].net if guided else state.out

    def advance(self, state: State, noisy: bool) -> None:
        """A row of the table for every image; ``noisy`` changes nothing, as rows that draw no noise compute none."""
        assert state.out is not None, "evaluate comes before advance"
        self._advance(state, state.out)

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """The launches of the network, and one that guides and updates; rescaled guidance stays a step of its own."""
        if guided and not rescaled(state):
            self._advance(state, self._evaluate(state, guided), state.guidance)
        else:
            self.evaluate(state, guided)
            self.advance(state, noisy)

    def _advance(self, state: State, out: Tensor, guidance: Tensor | None = None) -> None:
        from fastdiff.kernels import update as kernel_update

        self.run(
            kernel_update.update(
                state.x, out, state.bank.values, state.table, state.row, state.bank.lengths, state.seed, state.index,
                self.arrived, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3, guidance=guidance,
                chosen_for=self.chosen_for,
            )
        )  # fmt: skip


def rescaled(state: State) -> bool:
    """Whether guidance is rescaled: a number other than 0, or numbers on the device (`State.guidance_rescale`)."""
    return isinstance(state.guidance_rescale, Tensor) or bool(state.guidance_rescale)


class TritonRunner:
    """Follows tables and weights, and replays graphs. cuda: as for `GraphRunner`.

    Where a kernel cannot be compiled, or triton's cache cannot be used, PyTorch runs the network instead, in float32,
    and one warning says so; with determinism "bitwise", which PyTorch cannot give, a `BackendError` does.
    """

    def __init__(
        self, unet: UNet, spec: Spec, cuda: Any = torch.cuda, run: Callable[[Launch], None] = lambda launch: launch()
    ):
        self.unet = unet
        self.spec = spec
        self.cuda = cuda
        self.steps = TritonSteps(unet, spec, run)
        self.graphs = GraphRunner(self.steps, unet, spec, cuda)
        self.compiled: set[bool] = set()  # guided, unguided
        self.instead: GraphRunner | None = None
        self.known: weakref.WeakSet[State] = weakref.WeakSet()

    def forward(self, state: State) -> None:
        self._runner(state).forward(state)

    def update(self, state: State) -> None:
        self._runner(state).update(state)

    def step(self, state: State) -> None:
        self._runner(state).step(state)

    @torch.no_grad()
    def _runner(self, state: State) -> Runner:
        """What steps ``state``, which knows its tables and its network's present weights."""
        if self.instead is None:
            fresh = state not in self.known
            if fresh:
                refuse(self.unet, self.spec)
                self.known.add(state)
            if self.steps.follow(state.bank, fresh):
                self.graphs.graphs.clear()
            self._compile(state, bool(state.guided_host.any()))
        return self.instead or self.graphs

    def _compile(self, state: State, guided: bool) -> None:
        """Every kernel of the network, before it first runs."""
        if guided in self.compiled:
            return
        try:
            for launch in self.steps.network(dataclasses.replace(state), guided):
                launch.compile()
        except BackendError as e:
            if self.spec.determinism == "bitwise":
                raise BackendError(f"backend triton: {e}; with determinism='seed' PyTorch runs the network") from e
            log.warning("backend triton: %s; PyTorch runs the network instead, in float32", e)
            spec = dataclasses.replace(self.spec, dtype=torch.float32)
            self.instead = GraphRunner(EagerRunner(self.unet, spec), self.unet, spec, self.cuda)
        self.compiled.add(guided)
