"""One step as a CUDA graph: captured once for a batch size, replayed for every row.

What a kernel needs of a step stands in buffers at fixed addresses: the images, the history, each image's row, table,
seed and label, and the tables themselves, in a bank with room for others. So ONE captured step serves every row of
every table, and a run of 1000 steps is 1000 replays: nothing else reaches the device, and nothing comes back from it.

A `State` that steps moves in: its tensors are copied into the buffers, and from then on they are the buffers. Where
another state steps on the same runner, the former one moves out, with tensors of its own. What only the host can do
(noise that the caller draws, dynamic thresholds) runs between two graphs, as the reference does it.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.backends import Spec
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.solvers.table import COLUMNS

WARM_UPS = 3  # compilation, lazy handles and algorithm choice come before the capture
MOST_GRAPHS = 16  # of a runner; more variants than that are captured anew when they come again

HISTORY = ("m1", "m2", "m3")
CHANGED = ("x", "xs", *HISTORY, "out", "row")  # by a step
BUFFERS = (*CHANGED, "table", "seed", "index", "label", "guidance")


class Steps(Protocol):
    """A step and its two halves, as operations on the device alone: they decide nothing by values."""

    def evaluate(self, state: State, guided: bool) -> None:
        """Network and guidance: sets ``state.out``, in place or anew; ``guided``: 2B network rows."""

    def advance(self, state: State, noisy: bool) -> None:
        """A row of the table for every image, and ``state.row`` += 1; ``noisy``: with noise where rows ask for it."""

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """Both halves. Nobody looks at ``state.out`` in between, nor behind them: it may be left as it was."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What tells one graph of a batch from another; everything else is data. part: "step", "forward" or "update"."""

    part: str
    guided: bool = False
    rescaled: bool = False
    labelled: bool = False
    noisy: bool = False
    history: int = 0
    saves: bool = False

    @classmethod
    def of(cls, part: str, state: State) -> Variant:
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
    """Memory that the graphs of a network share. They take turns: their intermediate results overlap."""

    def __init__(self, cuda: Any):
        self.cuda = cuda
        self.handle = cuda.graph_pool_handle()
        self.lock = threading.Lock()
        self.stream: Any = None

    def replay(self, graph: Any, device: torch.device) -> None:
        """On the current stream, behind what another stream still replays."""
        with self.lock:
            stream = self.cuda.current_stream(device)
            if self.stream is not None and self.stream != stream:
                stream.wait_stream(self.stream)
            self.stream = stream
            graph.replay()


_pools: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


class GraphRunner:
    """Replays ``steps`` of ``network``. Captures at the first step of a variant, and anew where weights have moved.

    cuda: `torch.cuda`, or what stands in for it in tests.
    """

    def __init__(self, steps: Steps, network: nn.Module, spec: Spec, cuda: Any = torch.cuda):
        self.steps = steps
        self.network = network
        self.spec = spec
        self.cuda = cuda
        if network not in _pools:
            _pools[network] = Pool(cuda)
        self.pool = _pools[network]
        self.graphs: dict[Variant, Any] = {}
        self.buffers: State | None = None
        self.bank: TableBank | None = None  # whose tables the buffers hold
        self.tenant: weakref.ref[State] | None = None
        self.weights: list[Tensor] = []

    @torch.no_grad()
    def forward(self, state: State) -> None:
        self._replay("forward", state)

    @torch.no_grad()
    def update(self, state: State) -> None:
        if state.noise is not None or state.bank.thresholds:
            update.update(state)
        else:
            self._replay("update", state)

    @torch.no_grad()
    def step(self, state: State) -> None:
        if state.noise is not None or state.bank.thresholds:
            self.forward(state)
            self.update(state)
        else:
            self._replay("step", state)

    def capture(self, state: State, part: str = "step") -> None:
        """Have the graph that ``state`` needs next, without a step."""
        variant = Variant.of(part, state)
        with torch.inference_mode(False), torch.no_grad(), self.cuda.device(self.spec.device):
            self._make_room(state)
            if self.tenant is None or self.tenant() is not state:
                self._follow_weights()
            if variant not in self.graphs:
                self._capture(variant)

    def _replay(self, part: str, state: State) -> None:
        variant = Variant.of(part, state)
        if self.tenant is None or self.tenant() is not state or self.bank is not state.bank:
            self.capture(state, part)
        graph = self.graphs.get(variant)
        if graph is None:
            self.capture(state, part)
            graph = self.graphs[variant]
        self._move_in(state)
        if part != "forward" and state.bank.learned:
            update.split_output(state)  # says what is wrong with the channels
        self.pool.replay(graph, self.spec.device)
        if part != "forward":
            state.advance_host()

    # Buffers ----------------------------------------------------------------------------------------------------------

    def _make_room(self, state: State) -> None:
        """Buffers for ``state`` and its tables; larger ones, and no graphs, where it does not fit."""
        b = self.buffers
        tables, rows, _ = state.bank.values.shape
        fits = b is not None and tables <= b.bank.values.shape[0] and rows <= b.bank.values.shape[1]
        if b is None or not fits or b.x.shape != state.x.shape or b.x.dtype != state.x.dtype:
            self._move_out()
            self.graphs.clear()
            room = (max(tables, self.spec.tables), max(rows, self.spec.rows + 1))
            b = self.buffers = _buffers(state, room)
        if b.out is None and state.out is not None:
            b.out = torch.zeros_like(state.out)

    def _move_in(self, state: State) -> None:
        """Copy what is not there yet. A state that has moved in, and that no one edited, copies nothing."""
        b = self.buffers
        assert b is not None
        if self.tenant is None or self.tenant() is not state:
            self._move_out()
            self.tenant = weakref.ref(state)
            if isinstance(b.guidance_rescale, Tensor) and state.guidance_rescale:
                phi = state.guidance_rescale
                b.guidance_rescale.copy_(torch.tensor([phi, 1.0 - phi]))
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

    def _move_out(self) -> None:
        """Give the tenant tensors of its own."""
        tenant = None if self.tenant is None else self.tenant()
        self.tenant = None
        if tenant is not None:
            for name in BUFFERS:
                held = getattr(tenant, name)
                if held is not None and held is getattr(self.buffers, name):
                    setattr(tenant, name, held.clone())

    def _follow_weights(self) -> None:
        """Graphs hold the addresses of weights: where those are others now, no graph is left."""
        weights = [t.detach() for t in (*self.network.parameters(), *self.network.buffers())]
        if [t.data_ptr() for t in weights] != [t.data_ptr() for t in self.weights]:
            self.graphs.clear()
            self.weights = weights  # kept alive as long as graphs read them

    # Capture ----------------------------------------------------------------------------------------------------------

    def _capture(self, variant: Variant) -> None:
        """Warm-ups on a side stream, then the same once more, recorded. They work on the buffers, so no state is there.

        Rows saturate, so that warm-ups read no table beyond its end.
        """
        self._move_out()
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
        cuda, buffers = self.cuda, self.buffers
        assert buffers is not None
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_UPS):
                out = self._run(variant)
        cuda.current_stream().wait_stream(side)
        if buffers.out is None and out is not None:
            buffers.out = torch.zeros_like(out)
        graph = cuda.CUDAGraph()
        try:
            # Other threads may go on with work of their own.
            with cuda.graph(graph, pool=self.pool.handle, stream=side, capture_error_mode="thread_local"):
                self._run(variant)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise BackendError(
                f"the network cannot be captured in a CUDA graph: {str(e).splitlines()[0]}; backend='eager' runs "
                "networks that ask the device for values"
            ) from e
        self.graphs[variant] = graph

    def _run(self, variant: Variant) -> Tensor | None:
        """The part of a step on the buffers. Gives ``out`` where the network ran."""
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
            self.steps.evaluate(state, variant.guided)
        elif variant.part == "update":
            self.steps.advance(state, variant.noisy)
        else:
            self.steps.whole(state, variant.guided, variant.noisy)
        for name in CHANGED:
            new, held = getattr(state, name), getattr(buffers, name)
            if new is not None and held is not None and new is not held:
                held.copy_(new)
        return state.out


def _buffers(state: State, room: tuple[int, int]) -> State:
    """Buffers for batches like ``state``, and for so many tables of so many rows (the identity's included)."""

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
    """Capture the steps of several batch sizes ahead, the largest first: the others then fit into its memory."""
    for runner in sorted(states, key=lambda runner: -runner.spec.batch):
        runner.capture(states[runner])
