"""Runner of the backend `native`: it steps a state by calls into the C++ engine.

Products are of float32, or of bfloat16 with sums in float32; everything between them is float32.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import weakref

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.backends.base import Spec, refuse
from fastdiff.backends.native import threads
from fastdiff.backends.native.arrays import aligned
from fastdiff.backends.native.extension import extension, isa, reasons_against
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.native.program import TIMES, NativeProgram, ProgramInputs, part_rows
from fastdiff.backends.network import EmbeddingTables, TextTables, check_texts, embedding_checksum
from fastdiff.core import update
from fastdiff.core.lower import lower
from fastdiff.core.plan import plan
from fastdiff.core.state import State, Texts
from fastdiff.errors import BackendError
from fastdiff.modes import exact_products, plain_modes
from fastdiff.solvers.table import StepTable
from fastdiff.unet import UNet, UNetCondition

MOST_TIMES = 4096  # timesteps whose embeddings are kept, about 100 MB
MAP_BYTES = 64 << 20  # class images that are kept
TEXT_BYTES = 256 << 20  # keys and values of texts that are kept; those of a text of Stable Diffusion 1.5 take 8 MB
_NONE = np.zeros(0, dtype=np.int64)
PACKINGS = 3  # attempts to pack weights that another thread changes meanwhile


def prepare(unet: nn.Module, spec: Spec) -> NativeRunner:
    """Prepare a `fastdiff.UNet` or `fastdiff.UNetCondition` to run on the native engine.

    Weights are packed at the runner's first step.
    """
    refuse("native", reasons_against(unet, spec))
    assert isinstance(unet, UNet | UNetCondition)
    return NativeRunner(unet, spec)


@dataclasses.dataclass
class StateCache:
    """Lookups that hold for all steps of a `State`."""

    tables: tuple[StepTable, ...]  # those for which ``entries`` was made
    entries: Tensor  # row of the embedded timesteps for each row of each table, int64 [tables, rows]
    images: dict[bool, tuple[Tensor, Tensor]]  # class images, and that of the null label; by whether images are guided
    shown: np.ndarray  # the labels of those class images; of no image before they are made
    texts: Texts | None = None  # those for which ``text_rows`` was made
    text_rows: Tensor | None = None  # row of each text in the tables of texts, int64 [texts]


class NativeRunner:
    """Runner that evaluates a batch in parts whose activations stay in the cache, a guided image as two rows.

    Changed weights are noticed when a state takes its first step.
    """

    def __init__(self, unet: UNet | UNetCondition, spec: Spec):
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
        room = MOST_TIMES if self.spec.frozen else TIMES  # pages of memory that nothing is written to take none
        self.embeddings = EmbeddingTables(self.unet, self.program, torch.device("cpu"), room, MOST_TIMES)
        self.maps: collections.OrderedDict[int, Tensor] = collections.OrderedDict()  # by label, the latest used last
        self.texts: TextTables | None = None  # made at the first step, which brings the number of tokens
        self.states: weakref.WeakKeyDictionary[State, StateCache] = weakref.WeakKeyDictionary()

    @plain_modes()
    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``."""
        self._run(state, advance=False)

    @plain_modes()
    def update(self, state: State) -> None:
        """Apply one row of the table to every image in place, and increment its row."""
        out, v = update.split_output(state)  # checks the number of channels
        taking = None if state.taking is None else torch.from_numpy(state.taking)
        z = update.update_noise(state) if state.noise is not None else None
        update.threshold(state)
        state.x = state.x.contiguous()
        try:
            self.native.update(
                state.x, state.out if v is not None else out.contiguous(), state.bank.values, state.table, state.row,
                seed=state.seed, index=state.index, z=None if z is None else z.contiguous(),
                x0_scale=state.x0_scale, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3, images=taking,
                isa=self.isa,
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
        held = {"weights": self.weights.nbytes, "arena": len(self.arena), "space": space}
        if self.texts is not None:
            held["texts"] = sum(bank.nbytes for bank in self.texts.banks.values())
        return held

    def _run(self, state: State, advance: bool) -> None:
        guided = np.flatnonzero(state.guided_host[state.everyone])
        # Algorithms may depend on the number of rows that a program has room for.
        can_be_guided = self.spec.null_label is not None or isinstance(self.unet, UNetCondition)
        room = len(state.x) * (1 + (can_be_guided if self.spec.frozen else len(guided) > 0))
        for _ in range(PACKINGS):
            cache = self._follow(state)
            class_images, null_image = self._class_images(state, cache, len(guided) > 0)
            label, null = self._labels(state, cache, len(guided) > 0)
            program = self._program(part_rows(room, self.row_bytes))
            if program is not None:
                break
        else:
            raise BackendError(
                "the weights change while backend 'native' packs them; another thread may be training the network"
            )
        H, W, C = self.program.buffers["out"].shape
        state.x = state.x.contiguous()
        state.out = torch.empty(len(state.x), C, H, W, dtype=torch.float32, device="cpu")
        rows = len(state.everyone) + len(guided)
        net = torch.empty(rows, *program.out.shape[1:], dtype=torch.float32, device="cpu")
        phi = state.guidance_rescale
        if not isinstance(phi, Tensor):
            rescale = torch.full_like(state.guidance, phi) if phi else None
        else:
            rescale = phi[:, 0].contiguous()
        try:
            program.engine.step(
                x=state.x, row=state.row, table=state.table, entry=cache.entries, images=state.taking, guided=guided,
                label=label, null_label=self.spec.null_label or 0, null=null, class_image=class_images,
                null_image=null_image, net=net, out=state.out, bank=state.bank.values, guidance=state.guidance,
                rescale=rescale, advance_rows=advance, lengths=state.bank.lengths, seed=state.seed, index=state.index,
                xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3,
            )  # fmt: skip
        except (TypeError, ValueError) as e:
            raise BackendError(f"backend 'native' cannot run this step: {e}") from e

    def _class_images(self, state: State, cache: StateCache, guided: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the images' class images [B, H, W, C] and that of the null label, where the network has those."""
        if state.label is None or not isinstance(self.unet, UNet) or self.unet.class_encoder is None:
            return None, None
        null = self.spec.null_label or 0
        if self.spec.determinism != "bitwise" and not self.spec.frozen:
            if guided not in cache.images:
                labels = torch.cat([state.label, state.label.new_tensor([null])]) if guided else state.label
                distinct, place = torch.unique(labels, return_inverse=True)
                images = self._encoded(distinct)[place].contiguous()
                cache.images[guided] = images[: len(state.x)], images[-1]
            return cache.images[guided]
        # PyTorch splits sums by the number of rows, so each label is encoded alone: bits do not depend on other images.
        now = state.label.numpy()
        if not np.array_equal(cache.shown, now):
            if not cache.images:
                null_image = self._map(null)
                blank = torch.zeros(len(now), *null_image.shape, dtype=torch.float32, device="cpu")
                cache.images = dict.fromkeys((False, True), (blank, null_image))
                cache.shown = np.full_like(now, -1)
            for i in np.flatnonzero(cache.shown != now).tolist():
                cache.images[guided][0][i] = self._map(int(now[i]))
            cache.shown = now.copy()
        return cache.images[guided]

    def _map(self, label: int) -> Tensor:
        """Return the class image of a label, [H, W, C]."""
        if label not in self.maps:
            most = max(1, MAP_BYTES // (4 * math.prod(self.spec.shape)))
            while len(self.maps) >= most:
                self.maps.popitem(last=False)
            self.maps[label] = self._encoded(torch.tensor([label], dtype=torch.int64, device="cpu"))[0].contiguous()
        self.maps.move_to_end(label)
        return self.maps[label]

    def _encoded(self, labels: Tensor) -> Tensor:
        """Return the class images of labels, [labels, H, W, C]."""
        assert isinstance(self.unet, UNet)
        assert self.unet.class_encoder is not None
        with exact_products():
            images: Tensor = self.unet.class_encoder(labels, self.spec.shape[1:])
        return images.float().permute(0, 2, 3, 1)

    def _follow(self, state: State) -> StateCache:
        """Notice changes: of the process and the tables at every step, of the network at a state's first step."""
        if self.process != os.getpid():
            self._reset()
        cache = self.states.get(state)
        if cache is None:
            refuse("native", reasons_against(self.unet, self.spec))
            if self.weights is not Weights.of(self.unet, self.native):
                self._reset()
        if cache is None:
            cache = self.states[state] = StateCache((), torch.zeros(0, 0, dtype=torch.int64, device="cpu"), {}, _NONE)
        if cache.tables is not state.bank.tables:
            if not self.spec.frozen:
                cache.images, cache.shown = {}, _NONE
            known = len(self.embeddings.places)
            self._enter(state, cache)
            # New rows of the table of timesteps must be of the same weights as the others.
            new = len(self.embeddings.places) != known
            if new and not self.spec.frozen and embedding_checksum(self.unet) != self.embedded_from:
                self._reset()
                cache = self.states[state] = StateCache((), cache.entries[:0], {}, _NONE)
                self._enter(state, cache)
        if isinstance(self.unet, UNetCondition) and (cache.texts is None or cache.texts is not state.texts):
            self._enter_texts(self.unet, state, cache)
        return cache

    def _enter_texts(self, unet: UNetCondition, state: State, cache: StateCache) -> None:
        """Find the rows of the state's texts, whose keys and values are computed now where they are new."""
        texts = check_texts(unet, state.texts)
        tokens = texts.states.shape[1]
        if self.texts is None or self.texts.tokens != tokens:
            self.texts = TextTables(unet, tokens, torch.device("cpu"), TEXT_BYTES)
            self.program = lower(unet, self.spec.shape[1:], tokens)
            self.programs.clear()
            self._forget_others(state, cache)
        banks, places = self.texts.banks, self.texts.places
        if texts.names is None:
            cache.text_rows = self.texts.entries(texts)
            overwritten = self.texts.places is not places
        else:
            overwritten = self.texts.follow(texts)
            cache.text_rows = torch.arange(len(texts), dtype=torch.int64, device="cpu")
        cache.texts = texts
        if overwritten:
            self._forget_others(state, cache)
        if self.texts.banks is not banks:
            self.programs.clear()  # they hold the addresses of the former tensors

    def _forget_others(self, state: State, cache: StateCache) -> None:
        """Have every other state look up everything again at its next step."""
        self.states.clear()
        self.states[state] = cache

    def _labels(self, state: State, cache: StateCache, guided: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return each image's label and that of its unconditional half: of texts, their rows in the tables of texts."""
        given = {"label": state.label, "null": state.null if guided or cache.text_rows is None else None}
        found: list[Tensor | None] = []
        for name, labels in given.items():
            if cache.text_rows is None or (name == "null" and not guided):
                found.append(None if labels is None else labels.contiguous())
            elif labels is None or not bool(((labels >= 0) & (labels < len(cache.text_rows))).all()):
                raise BackendError(f"this network needs the number of a text for each image ({name})")
            else:
                found.append(cache.text_rows[labels])
        return found[0], found[1]

    def _enter(self, state: State, cache: StateCache) -> None:
        """Find the embedded timesteps of the tables that are new, and set ``cache.entries``."""
        times, places, bank = self.embeddings.times, self.embeddings.places, state.bank
        same = cache.entries.shape == bank.host.shape[:2]
        new = [i for i, table in enumerate(bank.tables) if not (same and cache.tables[i] is table)]
        entries = self.embeddings.entries(bank, new)
        if self.embeddings.places is not places:
            self._forget_others(state, cache)
            entries, new = self.embeddings.entries(bank), list(range(len(bank.tables)))
        if self.embeddings.times is not times:
            self.programs.clear()  # they hold the address of the former tensor
        if len(new) == len(bank.tables):
            cache.entries = entries
        else:
            cache.entries[new] = entries
        cache.tables = bank.tables

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
            class_images=None,
        )
        if self.texts is not None:
            inputs.classes, inputs.text = self.texts.classes, self.texts.banks
        elif isinstance(self.unet, UNet) and self.unet.class_encoder is not None:
            inputs.class_images = x.new_zeros(rows, H, W, C)

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
