"""Runner of the backend `native`: it steps a state by calls into the C++ engine.

Products are of float32, or of bfloat16 with sums in float32; everything between them is float32.
"""

from __future__ import annotations

import dataclasses
import os
import weakref

import torch
from torch import Tensor, nn

from fastdiff.backends.base import Spec, refuse
from fastdiff.backends.native import threads
from fastdiff.backends.native.extension import extension, isa, reasons_against
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.native.program import TIMES, NativeProgram, ProgramInputs, aligned, part_rows
from fastdiff.backends.network import EmbeddingTables, embedding_checksum
from fastdiff.core import update
from fastdiff.core.lower import lower
from fastdiff.core.plan import plan
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.modes import exact_products, plain_modes
from fastdiff.solvers.table import StepTable
from fastdiff.unet import UNet

MOST_TIMES = 4096  # timesteps whose embeddings are kept, about 100 MB
PACKINGS = 3  # attempts to pack weights that another thread changes meanwhile


def prepare(unet: nn.Module, spec: Spec) -> NativeRunner:
    """Prepare a `fastdiff.UNet` to run on the native engine. Weights are packed at the runner's first step."""
    refuse("native", reasons_against(unet, spec))
    assert isinstance(unet, UNet)
    return NativeRunner(unet, spec)


@dataclasses.dataclass
class StateCache:
    """Lookups that hold for all steps of a `State`."""

    tables: tuple[StepTable, ...]  # those for which ``entries`` was made
    entries: Tensor  # row of the embedded timesteps for each row of each table, int64 [tables, rows]
    labels: dict[bool, tuple[Tensor, Tensor | None]]  # labels and class images of the rows, by whether they are guided


class NativeRunner:
    """Runner that evaluates a batch in parts whose activations stay in the cache, a guided image as two rows.

    Changed weights are noticed when a state takes its first step.
    """

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
        self.threads = threads.number()
        self.process = os.getpid()
        self.programs: dict[int, NativeProgram] = {}  # by their number of rows
        self.arena = aligned(0)
        self.embedded_from = embedding_checksum(self.unet)
        self.embeddings = EmbeddingTables(self.unet, self.program, torch.device("cpu"), TIMES, MOST_TIMES)
        self.states: weakref.WeakKeyDictionary[State, StateCache] = weakref.WeakKeyDictionary()

    @plain_modes()
    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``."""
        self._run(state, advance=False)

    @plain_modes()
    def update(self, state: State) -> None:
        """Apply one row of the table to every image in place, and increment its row."""
        out, v = update.split_output(state)  # checks the number of channels
        z = update.update_noise(state) if state.noise is not None else None
        update.threshold(state)
        state.x = state.x.contiguous()
        try:
            self.native.update(
                state.x, state.out if v is not None else out.contiguous(), state.bank.values, state.table, state.row,
                seed=state.seed, index=state.index, z=None if z is None else z.contiguous(),
                x0_scale=state.x0_scale, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3, isa=self.isa,
            )  # fmt: skip
        except (TypeError, ValueError) as e:
            raise BackendError(f"backend 'native' cannot update these images: {e}") from e
        state.advance()

    @plain_modes()
    def step(self, state: State) -> None:
        """Do both in one call of the engine, unless the caller draws the noise or x0 has a dynamic threshold."""
        learned = self.unet.config.out_channels == 2 * state.x.shape[1]
        if state.noise is not None or state.bank.thresholds or (state.column_host("sv").any() and not learned):
            self.forward(state)
            self.update(state)
        else:
            self._run(state, advance=True)
            state.advance_host()

    def memory(self) -> dict[str, int]:
        """Return the bytes held: packed weights (all batch sizes and precisions), activations, working space."""
        space = sum(program.engine.space for program in self.programs.values())
        return {"weights": self.weights.nbytes, "arena": len(self.arena), "space": space}

    def _run(self, state: State, advance: bool) -> None:
        guided = bool(state.guided_host.any())
        rows = len(state.x) * (1 + guided)
        for _ in range(PACKINGS):
            cache = self._follow(state)
            label, class_images = self._labels(state, cache, guided)
            program = self._program(part_rows(rows, self.row_bytes))
            if program is not None:
                break
        else:
            raise BackendError(
                "the weights change while backend 'native' packs them; another thread may be training the network"
            )
        H, W, C = self.program.buffers["out"].shape
        state.x = state.x.contiguous()
        state.out = torch.empty(len(state.x), C, H, W, dtype=torch.float32, device="cpu")
        net = torch.empty(rows, *program.out.shape[1:], dtype=torch.float32, device="cpu")
        try:
            program.engine.step(
                x=state.x, row=state.row, table=state.table, entry=cache.entries, label=label, net=net, out=state.out,
                class_image=class_images, bank=state.bank.values, guidance=state.guidance if guided else None,
                rescale=state.guidance_rescale, advance_rows=advance, lengths=state.bank.lengths, seed=state.seed,
                index=state.index, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3,
            )  # fmt: skip
        except (TypeError, ValueError) as e:
            raise BackendError(f"backend 'native' cannot run this step: {e}") from e

    def _labels(self, state: State, cache: StateCache, guided: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return each row's label, and its class image [H, W, C] where the network has those."""
        if state.label is None:
            return None, None
        if guided not in cache.labels:
            label, images = state.label, None
            if guided:
                label = torch.cat([label, torch.full_like(label, self.spec.null_label or 0)])
            if self.unet.class_encoder is not None:
                distinct, place = torch.unique(label, return_inverse=True)
                # PyTorch splits sums by the number of rows, so bits would depend on the labels of other images.
                groups = distinct.split(1) if self.spec.determinism == "bitwise" else (distinct,)
                with exact_products():
                    maps = torch.cat([self.unet.class_encoder(labels, self.spec.shape[1:]) for labels in groups])
                images = maps.float().permute(0, 2, 3, 1)[place].contiguous()
            cache.labels[guided] = label.contiguous(), images
        return cache.labels[guided]

    def _follow(self, state: State) -> StateCache:
        """Notice changes: of the process and the tables at every step, of the network at a state's first step."""
        if self.process != os.getpid():
            self._reset()
        cache = self.states.get(state)
        if cache is None:
            refuse("native", reasons_against(self.unet, self.spec))
            if self.weights is not Weights.of(self.unet, self.native):
                self._reset()
        if cache is None or cache.tables is not state.bank.tables:
            known = len(self.embeddings.places)
            entries = self._entries(state.bank)
            # New rows of the table of timesteps must be of the same weights as the others.
            if len(self.embeddings.places) != known and embedding_checksum(self.unet) != self.embedded_from:
                self._reset()
                entries = self._entries(state.bank)
            cache = self.states[state] = StateCache(state.bank.tables, entries, {})
        return cache

    def _entries(self, bank: TableBank) -> Tensor:
        times, places = self.embeddings.times, self.embeddings.places
        entries = self.embeddings.entries(bank)
        if self.embeddings.times is not times:
            self.programs.clear()  # they hold the address of the former tensor
        if self.embeddings.places is not places:
            self.states.clear()  # each asks for its entries again at its next step
        return entries

    def _program(self, rows: int) -> NativeProgram | None:
        """Return the program for ``rows`` rows; None, and start anew, if the weights have changed since the first step.

        Their change shows only where weights are packed, as those of a batch size or of guidance that is new in a run.
        """
        if rows in self.programs:
            return self.programs[rows]
        layout = plan(self.program, rows, group=self.native.GROUP)
        if len(self.arena) < layout.size:
            self.arena = aligned(layout.size)
            self.programs.clear()  # they use the former arena
        C, H, W = self.spec.shape
        index = torch.zeros(rows, dtype=torch.int64, device="cpu")
        x = torch.zeros(rows, C, H, W, dtype=torch.float32, device="cpu")
        inputs = ProgramInputs(
            x=x,
            timestep=index,
            label=index,
            times=self.embeddings.times,
            classes=self.embeddings.classes,
            class_images=None if self.unet.class_encoder is None else x.new_zeros(rows, H, W, C),
        )

        def build() -> NativeProgram:
            return NativeProgram(
                self.native, self.program, layout, self.arena, self.weights, inputs, self.isa, self.threads, self.spec
            )

        try:
            program = self.weights.unless_changed(self.unet, build)
        except (TypeError, ValueError) as e:
            raise BackendError(f"backend 'native' cannot run images of {self.spec.shape}: {e}") from e
        if program is None:
            self._reset()
        else:
            self.programs[rows] = program
        return program
