"""One step as a CUDA graph: captured once for a batch size, replayed for every row.

A graph reads static buffers, at fixed addresses: the images, the history, each image's row, table, seed and label, and
the tables themselves, in a bank with room for others. One captured step therefore serves every row of every table, and
a run of 1000 steps is 1000 replays; nothing else is sent to the device, and nothing is read back from it.

On its first step a `State` is attached: its tensors are copied into the static buffers, which it then aliases. When
another state steps on the same runner, the previous one is detached and gets copies back. Work of the host (noise drawn
by the caller, dynamic thresholds) runs between two graphs, in the reference implementation.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.backends.base import Spec
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.modes import plain_modes
from fastdiff.solvers.table import COLUMNS

WARM_UPS = 3  # runs before a capture, in which kernels are compiled, handles created and algorithms chosen
MOST_GRAPHS = 16  # graphs of a runner; when another is needed, all are dropped

HISTORY = ("m1", "m2", "m3")
CHANGED = ("x", "xs", *HISTORY, "out", "row")  # fields of a state that a step changes
BUFFERS = (*CHANGED, "table", "seed", "index", "label", "guidance")  # fields that live in static buffers


class DeviceStep(Protocol):
    """A step and its two halves, as operations on the device alone, none of which depends on values read from it."""

    def take_labels(self, state: State) -> None:
        """Compute what depends on labels alone: they have changed, and the steps to come have these."""

    def evaluate(self, state: State, guided: bool) -> None:
        """Evaluate the network, with guidance on 2B rows if ``guided``, and set ``state.out``, in place or not."""

    def advance(self, state: State, noisy: bool) -> None:
        """Apply a row of the table to every image and increment ``state.row``; ``noisy``: rows may add noise."""

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """Do both. ``state.out`` is not read in between or afterwards, so it need not be set."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Properties of a step that need a graph of their own; everything else is data."""

    part: str  # "step", "forward" or "update"
    guided: bool = False  # the network runs on 2B rows
    rescaled: bool = False  # guidance is rescaled
    labelled: bool = False  # the network has labels
    noisy: bool = False  # a table has rows that add noise
    history: int = 0  # number of history buffers in use
    saves: bool = False  # a table has rows that save x

    @classmethod
    def of(cls, part: str, state: State) -> Variant:
        """Return the variant of a part of a step that ``state`` needs next."""
        forward, advance = part != "update", part != "forward"
        guided = forward and bool(state.guided_host.any())
        return cls(
            part,
            guided=guided,
            rescaled=guided and bool(state.guidance_rescale),
            labelled=forward and state.label is not None,
            noisy=advance and state.bank.noisy,
            history=sum(getattr(state, name) is not None for name in HISTORY) if advance else 0,
            saves=advance and state.xs is not None,
        )


class Pool:
    """Memory of all graphs of a network on a device. They must run one after the other, as intermediates overlap.

    Memory belongs to the stream on which it is allocated, so all captures use the same side stream.
    """

    def __init__(self, cuda: Any):
        self.cuda = cuda
        self.lock = threading.RLock()  # a signal handler that interrupts a replay may replay another graph
        self.stream: Any = None  # the stream that used the pool last
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handle: Any = None
        self._side: Any = None

    @contextlib.contextmanager
    def entered(self, device: torch.device) -> Iterator[None]:
        """Make ``device`` the current one, and its current stream wait for what other streams did with the pool.

        All that reads or writes memory of graphs happens within, copies into their buffers included.
        """
        with self.lock, self.cuda.device(device):
            stream = self.cuda.current_stream(device)
            if self.stream is not None and self.stream != stream:
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    def handle(self) -> Any:
        """Return the handle for the next capture.

        PyTorch gives a pool up with its last graph, and a capture with the old handle would then fail an assertion.
        """
        if not self.graphs:
            self._handle = self.cuda.graph_pool_handle()
        return self._handle

    def side(self) -> Any:
        """Return the stream of all captures, which follows the current one from now on."""
        self._side = self._side or self.cuda.Stream()
        self._side.wait_stream(self.stream)
        return self._side


_pools: weakref.WeakKeyDictionary[nn.Module, dict[torch.device, Pool]] = weakref.WeakKeyDictionary()


class GraphRunner:
    """Runner that replays CUDA graphs of ``device_step``, the operations that run ``network``.

    A variant is captured at its first step, and again when weights have moved. Tests replace ``cuda`` by a substitute.
    """

    def __init__(self, device_step: DeviceStep, network: nn.Module, spec: Spec, cuda: Any = torch.cuda):
        self.device_step = device_step
        self.network = network
        self.spec = spec
        self.cuda = cuda
        self.pool = _pools.setdefault(network, {}).setdefault(spec.device, Pool(cuda))  # threads may come here at once
        self.graphs: dict[Variant, Any] = {}
        self.buffers: State | None = None
        self.bank: TableBank | None = None  # the bank whose tables are in the static buffers
        self.attached: weakref.ref[State] | None = None  # the state that aliases the static buffers
        self.stream: Any = None  # the stream on which it stepped last
        self.weights: list[Tensor] = []

    @plain_modes()
    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``."""
        self._replay("forward", state)

    @plain_modes()
    def update(self, state: State) -> None:
        """Apply one row of the table to every image, and increment its row."""
        if state.noise is not None or state.bank.thresholds:
            with self.pool.entered(self.spec.device):
                update.update(state)
        else:
            self._replay("update", state)

    @plain_modes()
    def step(self, state: State) -> None:
        """Do both, in one graph unless the host has work in between."""
        if state.noise is not None or state.bank.thresholds:
            self.forward(state)
            self.update(state)
        else:
            self._replay("step", state)

    def capture(self, state: State, part: str = "step") -> None:
        """Capture the graph that ``state`` needs next, unless it exists. Takes no step."""
        variant = Variant.of(part, state)
        with plain_modes(), self.pool.entered(self.spec.device):
            self._ensure_buffers(state)
            if self.attached is None or self.attached() is not state:
                self._follow_weights()
            if variant not in self.graphs:
                self._capture(variant)

    def _replay(self, part: str, state: State) -> None:
        variant = Variant.of(part, state)
        with self.pool.entered(self.spec.device):
            known = variant in self.graphs and self.bank is state.bank
            if not known or self.attached is None or self.attached() is not state:
                self.capture(state, part)
            self._attach(state)
            if part != "forward" and state.bank.learned:
                update.split_output(state)  # checks the number of channels
            self.graphs[variant].replay()
        if part != "forward":
            state.advance_host()

    # Buffers ----------------------------------------------------------------------------------------------------------

    def _ensure_buffers(self, state: State) -> None:
        """Allocate static buffers for ``state`` and its tables, and drop all graphs, unless the present ones fit."""
        b = self.buffers
        tables, rows, _ = state.bank.values.shape
        fits = b is not None and tables <= b.bank.values.shape[0] and rows <= b.bank.values.shape[1]
        if b is None or not fits or b.x.shape != state.x.shape or b.x.dtype != state.x.dtype:
            self._detach()
            self.graphs.clear()
            room = (max(tables, self.spec.tables), max(rows, self.spec.rows + 1))
            b = self.buffers = _buffers(state, room)
        if b.out is None and state.out is not None:
            b.out = torch.zeros_like(state.out)

    def _attach(self, state: State) -> None:
        """Make ``state`` alias the static buffers. Copies only tensors that are not there yet."""
        b = self.buffers
        assert b is not None
        if self.attached is None or self.attached() is not state:
            self._detach()
            self.attached = weakref.ref(state)
            if isinstance(b.guidance_rescale, Tensor) and state.guidance_rescale:
                phi = state.guidance_rescale
                b.guidance_rescale.copy_(torch.tensor([phi, 1.0 - phi], dtype=torch.float32, device="cpu"))
        self.stream = self.pool.stream
        if self.bank is not state.bank:
            self.bank = state.bank
            tables, rows, _ = state.bank.values.shape
            b.bank.values[:tables, :rows].copy_(state.bank.values)
            b.bank.lengths[:tables].copy_(state.bank.lengths)
        for name in BUFFERS:
            mine, its = getattr(b, name), getattr(state, name)
            if its is not mine and (its is not None or name == "out"):
                if its is not None:
                    mine.copy_(its)
                setattr(state, name, mine)
                if name == "label":
                    self.device_step.take_labels(state)

    def _detach(self) -> None:
        """Give the attached state copies of the static buffers in their place.

        They are made on that state's stream, on which its owner may read them without another wait.
        """
        state = None if self.attached is None else self.attached()
        self.attached = None
        if state is None:
            return
        with self.cuda.stream(self.stream):
            for name in BUFFERS:
                held = getattr(state, name)
                if held is not None and held is getattr(self.buffers, name):
                    setattr(state, name, held.clone())
        if self.stream != self.pool.stream:
            self.pool.stream.wait_stream(self.stream)

    def _follow_weights(self) -> None:
        """Drop all graphs if weights have other addresses now, since graphs hold the former ones."""
        weights = [t.detach() for t in (*self.network.parameters(), *self.network.buffers())]
        if [t.data_ptr() for t in weights] != [t.data_ptr() for t in self.weights]:
            self.graphs.clear()
            self.weights = weights  # kept alive, as graphs read them

    # Capture ----------------------------------------------------------------------------------------------------------

    def _capture(self, variant: Variant) -> None:
        """Capture a graph: warm up on a side stream, then record one more run.

        All of them change the static buffers, so the attached state is detached first. Rows saturate, so warm-ups do
        not read past the end of a table.
        """
        self._detach()
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
        cuda, buffers = self.cuda, self.buffers
        assert buffers is not None
        side = self.pool.side()
        with cuda.stream(side):
            for _ in range(WARM_UPS):
                out = self._run(variant)
        cuda.current_stream().wait_stream(side)
        if buffers.out is None and out is not None:
            buffers.out = torch.zeros_like(out)
        graph = cuda.CUDAGraph()
        try:
            # "thread_local", so that other threads may go on with their own work.
            with cuda.graph(graph, pool=self.pool.handle(), stream=side, capture_error_mode="thread_local"):
                self._run(variant)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise BackendError(
                f"the network cannot be captured in a CUDA graph: {str(e).splitlines()[0]}; backend='eager' runs "
                "networks that ask the device for values"
            ) from e
        self.pool.graphs.add(graph)
        self.graphs[variant] = graph

    def _run(self, variant: Variant) -> Tensor | None:
        """Run a variant on the static buffers. Returns ``out`` where the network ran."""
        buffers = self.buffers
        assert buffers is not None
        state = copy.copy(buffers)
        for i, name in enumerate(HISTORY):
            if i >= variant.history:
                setattr(state, name, None)
        if not variant.saves:
            state.xs = None
        if not variant.labelled:
            state.label = None
        if not variant.rescaled:
            state.guidance_rescale = 0.0
        if variant.part == "forward":
            self.device_step.evaluate(state, variant.guided)
        elif variant.part == "update":
            self.device_step.advance(state, variant.noisy)
        else:
            self.device_step.whole(state, variant.guided, variant.noisy)
        for name in CHANGED:
            new, held = getattr(state, name), getattr(buffers, name)
            if new is not None and held is not None and new is not held:
                held.copy_(new)
        return state.out


def _buffers(state: State, room: tuple[int, int]) -> State:
    """Allocate static buffers for batches like ``state`` and ``room`` = (tables, rows with the identity row)."""

    def image() -> Tensor:
        return torch.zeros_like(state.x, memory_format=torch.contiguous_format)

    def number() -> Tensor:
        return torch.zeros_like(state.row)

    bank = copy.copy(state.bank)
    bank.values = state.bank.values.new_zeros(*room, len(COLUMNS))
    bank.lengths = state.bank.lengths.new_zeros(room[0])
    return dataclasses.replace(
        state,
        x=image(), xs=image(), m1=image(), m2=image(), m3=image(), out=None, x0_scale=None, noise=None, bank=bank,
        row=number(), table=number(), seed=number(), index=number(), label=number(),
        guidance=torch.ones_like(state.guidance), guidance_rescale=torch.zeros_like(state.x[0, 0, 0, :1]).repeat(2),
    )  # fmt: skip


def capture(states: Mapping[GraphRunner, State]) -> None:
    """Capture the steps of several batch sizes ahead, the largest first, so that the others fit into its memory."""
    for runner in sorted(states, key=lambda runner: -runner.spec.batch):
        runner.capture(states[runner])
