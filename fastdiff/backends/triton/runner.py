"""Runner of the backend `triton`: a step is a flat list of Triton launches in one CUDA graph.

`fastdiff.backends.triton.launches` builds the list from a lowered program, `fastdiff.backends.graph` captures and
replays it. With determinism "bitwise", launch configurations are chosen for `BITWISE_ROWS` rows, whatever the batch,
and PyTorch's part of a step runs one image at a time, because its kernels split work by the batch. It has never run on
a GPU so far: tests interpret its launches, compile them, and replay them with a substitute for CUDA.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.backends.base import BITWISE_ROWS, Runner, Spec, refuse
from fastdiff.backends.eager import EagerRunner
from fastdiff.backends.graph import GraphRunner
from fastdiff.backends.network import EmbeddingTables, TextTables, check_texts, program_reasons
from fastdiff.core import update
from fastdiff.core.lower import lower
from fastdiff.core.state import State, TableBank, Texts
from fastdiff.errors import BackendError
from fastdiff.modes import plain_modes
from fastdiff.unet import UNet, UNetCondition

if TYPE_CHECKING:
    from fastdiff.backends.triton.launches import Buffers
    from fastdiff.kernels.launch import Launch

log = logging.getLogger("fastdiff")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_IMAGES = 32767  # CUDA's limit along a grid's second and third axis, for two rows per image
TEXT_BYTES = 256 << 20  # keys and values of texts that are kept; those of a text of Stable Diffusion 1.5 take 8 MB
MOST_TABLES = 4  # full tables whose embedded timesteps are kept, so that so many samples can take turns


def reasons_against(unet: nn.Module, spec: Spec) -> list[str]:
    """List every reason why `triton` cannot run the network; empty where it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not has_kernels():
        reasons.append(
            "this checkout has no fastdiff/kernels, a symbolic link to kernels/: enable links, or use a wheel"
        )
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    elif spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device) < (8, 0):
        reasons.append("it needs a GPU of compute capability 8.0 (Ampere) or newer")
    if spec.device.type != "cuda":
        reasons.append(f"it runs on CUDA, not on {spec.device}")
    reasons += program_reasons(unet, spec.shape)
    if getattr(getattr(unet, "config", None), "padding_mode", "zeros") != "zeros":
        reasons.append("its convolutions pad with zeros, not as padding_mode='circular'")
    if spec.dtype not in DTYPES:
        reasons.append(f"it computes in float32, bfloat16 or float16, not in {str(spec.dtype).removeprefix('torch.')}")
    if spec.fast:
        reasons.append("it has one kind of bfloat16 only; use dtype='bfloat16'")
    if spec.batch > MOST_IMAGES:
        reasons.append(f"it runs at most {MOST_IMAGES} images at a time, not {spec.batch}; use a smaller batch_size")
    return reasons


def has_kernels() -> bool:
    """Return whether the kernels can be imported; without symbolic links a checkout has a text file in their place."""
    try:
        return importlib.util.find_spec("fastdiff.kernels.launch") is not None
    except ModuleNotFoundError:
        return False


def prepare(unet: nn.Module, spec: Spec) -> TritonRunner:
    """Prepare a `fastdiff.UNet` or `fastdiff.UNetCondition` to run on Triton kernels, compiled at the first step."""
    refuse("triton", reasons_against(unet, spec))
    assert isinstance(unet, UNet | UNetCondition)
    return TritonRunner(unet, spec)


class TritonStep:
    """A step and its halves as launches (see `fastdiff.backends.graph.DeviceStep`).

    ``run`` runs a launch; tests compute its reference instead.
    """

    @plain_modes()
    def __init__(self, unet: UNet | UNetCondition, spec: Spec, run: Callable[[Launch], None] = lambda launch: launch()):
        from fastdiff.backends.triton.launches import Weights

        self.unet = unet
        self.spec = spec
        self.run = run
        self.chosen_for = BITWISE_ROWS if spec.determinism == "bitwise" else None
        self.program = lower(unet, spec.shape[1:])
        self.weights = Weights.of(unet, spec.device, run)
        self.version = self.weights.version  # of the weights by which timesteps are embedded
        self.buffers: dict[int, Buffers] = {}
        self.bank: TableBank | None = None
        self.entries = torch.zeros(spec.tables, spec.rows + 1, dtype=torch.int64, device=spec.device)
        most = MOST_TABLES * (spec.rows + 1)
        self.embeddings = EmbeddingTables(unet, self.program, spec.device, spec.rows + 1, most)
        # For each bank in use the `EmbeddingTables.places` and the entries, as samples may take turns.
        self.found: weakref.WeakKeyDictionary[TableBank, tuple[dict[float, int], Tensor]] = weakref.WeakKeyDictionary()
        self.arrived = torch.zeros(spec.batch, dtype=torch.int32, device=spec.device)
        self.texts: TextTables | None = None  # made when the first state brings the number of tokens
        # For each `Texts` in use the `TextTables.places` and the rows that its texts have there.
        self.text_rows: weakref.WeakKeyDictionary[Texts, tuple[dict[bytes, int], Tensor]] = weakref.WeakKeyDictionary()
        self.shown: tuple[Any, ...] | None = None  # what the labels in the buffers were found from

    def follow(self, bank: TableBank, fresh: bool) -> bool:
        """Take over the tables of ``bank`` and changed weights, for which a ``fresh`` state looks.

        Return whether tensors have moved whose addresses graphs may hold.
        """
        if fresh:
            self.weights.follow(self.unet)
        changed = self.version != self.weights.version  # here, or for another batch size
        if self.bank is bank and not changed:
            return False
        if changed:
            self.version = self.weights.version
            self.embeddings.refresh()
            if self.texts is not None:
                self.texts.refresh()
        self.bank = bank
        times, held = self.embeddings.times, self.entries
        places, entries = self.found.get(bank, (None, None))
        if entries is None or places is not self.embeddings.places:
            entries = self.embeddings.entries(bank).to(self.spec.device)
            self.found[bank] = self.embeddings.places, entries
        room = [max(pair) for pair in zip(held.shape, entries.shape, strict=True)]
        if room != list(held.shape):
            self.entries = held.new_zeros(room)
        tables, rows = entries.shape
        self.entries[:tables, :rows].copy_(entries)
        return self.entries is not held or self.embeddings.times is not times

    def follow_texts(self, unet: UNetCondition, state: State) -> None:
        """Take over the state's texts, whose keys and values are computed now where they are new.

        ``texts.banks`` is another dict afterwards if tensors have moved whose addresses graphs may hold.
        """
        if state.null is None and state.guided_host.any():
            raise BackendError("this network needs the number of a text for each image (null)")
        if self.texts is not None and self.shown is not None:
            present = (state.texts, self.texts.places, state.label, state.null)
            if all(a is b for a, b in zip(self.shown, present, strict=True)):
                return
        texts = check_texts(unet, state.texts)
        if self.texts is None or self.texts.tokens != texts.states.shape[1]:
            self.texts = TextTables(unet, texts.states.shape[1], self.spec.device, TEXT_BYTES, self.spec.dtype)
        places, _ = self.text_rows.get(texts, (None, None))
        if texts.names is not None:  # these are in rows of their own numbers
            self.texts.follow(texts)
            rows = torch.arange(len(texts), dtype=torch.int64, device=self.spec.device)
            self.text_rows[texts] = self.texts.places, rows
        elif places is not self.texts.places:
            rows = self.texts.entries(texts).to(self.spec.device)
            self.text_rows[texts] = self.texts.places, rows
        self.take_labels(state)
        self.shown = texts, self.texts.places, state.label, state.null

    def network(self, state: State, guided: bool) -> list[Launch]:
        """Return the launches from ``state.x`` to ``state.out``, or to ``net`` of the 2B-row buffers if ``guided``."""
        from fastdiff.backends.triton.launches import Buffers, Launches

        images, C = len(state.x), self.program.buffers["out"].shape[2]
        rows = images * (1 + guided)
        if rows not in self.buffers:
            self.buffers[rows] = Buffers(self.program, rows, self.spec.dtype, self.spec.device)
            self.take_labels(state)
        b = self.buffers[rows]
        if state.out is None:
            state.out = torch.zeros(images, C, *state.x.shape[2:], dtype=torch.float32, device=state.x.device)
        out = b.net if guided else state.out
        return Launches(
            b, self.weights, state, out, self.entries, self.embeddings, self.chosen_for, self.texts
        ).list  # fmt: skip

    def take_labels(self, state: State) -> None:
        """Set the labels of all rows, and the class images of networks that have them, which no step changes."""
        images, encoder = len(state.x), self.unet.class_encoder if isinstance(self.unet, UNet) else None
        label, null = (state.label, None) if self.texts is None else self._rows_of_texts(self.texts, state)
        for rows in (images, 2 * images):
            b = self.buffers.get(rows)
            if b is None or label is None:
                continue
            b.label[:images].copy_(label)
            if null is None:
                b.label[images:].fill_(self.spec.null_label or 0)
            elif rows > images:
                b.label[images:].copy_(null)
            if encoder is not None:
                maps = self._in_turn(lambda label: encoder(label, self.spec.shape[1:]), b.label)
                maps = maps.permute(0, 2, 3, 1).float().contiguous()
                if b.class_images is None:
                    b.class_images = maps
                b.class_images.copy_(maps)

    def _rows_of_texts(self, texts: TextTables, state: State) -> list[Tensor | None]:
        """Return the rows in the tables of each image's text, and of that of its unconditional half if it has one."""
        assert state.texts is not None
        _, rows = self.text_rows[state.texts]
        found: list[Tensor | None] = []
        for name in ("label", "null"):
            labels = getattr(state, name)
            if labels is None and name == "null":
                found.append(None)
                continue
            fits = labels is not None and labels.shape == (len(state.x),)
            if not fits or not (labels.is_meta or bool(((labels >= 0) & (labels < len(rows))).all())):
                raise BackendError(f"this network needs the number of a text for each image ({name})")
            found.append(rows[labels])
        return found

    def _in_turn(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply ``function`` to all rows at once or, where bits must not depend on their number, to one at a time."""
        if self.chosen_for is None:
            return function(*tensors)
        return torch.cat([function(*row) for row in zip(*(t.split(1) for t in tensors), strict=True)])

    def kernels(self, state: State, guided: bool) -> Iterator[Launch]:
        """Yield a launch of every kernel that a step of ``state`` or its halves run, to be compiled."""
        yield from self.network(state, guided)
        assert state.out is not None
        yield self._update(state, state.out)
        if guided:
            net = self.buffers[2 * len(state.x)].net
            yield self._guide(state, net)
            yield self._update(state, net, state.guidance)

    def evaluate(self, state: State, guided: bool) -> None:
        """Evaluate the network, with guidance on 2B rows if ``guided``, and set ``state.out``."""
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
            self.run(self._guide(state, net))

    def _evaluate(self, state: State, guided: bool) -> Tensor:
        """Evaluate the network alone. Returns its output, with the unconditional half behind it if ``guided``."""
        for launch in self.network(state, guided):
            self.run(launch)
        assert state.out is not None
        return self.buffers[2 * len(state.x)].net if guided else state.out

    def advance(self, state: State, noisy: bool) -> None:
        """Apply a row of the table to every image; ``noisy`` is not needed, as the kernel decides for each row."""
        assert state.out is not None, "evaluate comes before advance"
        self.run(self._update(state, state.out))

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """Evaluate the network, then guide and update in one launch; rescaled guidance has launches of its own."""
        if guided and not rescaled(state):
            self.run(self._update(state, self._evaluate(state, guided), state.guidance))
        else:
            self.evaluate(state, guided)
            self.advance(state, noisy)

    def _guide(self, state: State, net: Tensor) -> Launch:
        from fastdiff.kernels import guidance

        return guidance.guide(
            net, state.out, bank=state.bank.values, table=state.table, row=state.row, guidance=state.guidance,
            channels=state.x.shape[1], chosen_for=self.chosen_for,
        )  # fmt: skip

    def _update(self, state: State, out: Tensor, guidance: Tensor | None = None) -> Launch:
        from fastdiff.kernels import update as kernel_update

        return kernel_update.update(
            state.x, out, state.bank.values, state.table, state.row, state.bank.lengths, state.seed, state.index,
            self.arrived, xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3, guidance=guidance,
            chosen_for=self.chosen_for,
        )  # fmt: skip


def rescaled(state: State) -> bool:
    """Return whether guidance is rescaled: by a number other than 0, or by numbers on the device."""
    return isinstance(state.guidance_rescale, Tensor) or bool(state.guidance_rescale)


class TritonRunner:
    """Runner that replays graphs of a `TritonStep`, after changes of tables and weights have been taken over.

    Where a kernel cannot be compiled or loaded, or triton's cache cannot be used, PyTorch runs the network instead, in
    float32, and one warning says so. With determinism "bitwise", which PyTorch cannot give, a `BackendError` is raised.
    Tests replace ``cuda``, and compute a launch's reference by ``run``.
    """

    def __init__(
        self, unet: UNet | UNetCondition, spec: Spec, cuda: Any = torch.cuda,
        run: Callable[[Launch], None] = lambda launch: launch(),
    ):  # fmt: skip
        self.unet = unet
        self.spec = spec
        self.cuda = cuda
        self.device_step = TritonStep(unet, spec, run)
        self.graphs = GraphRunner(self.device_step, unet, spec, cuda)
        self.kernels_compiled: set[tuple[bool, ...]] = set()  # kinds of steps: guided or not, and what they keep
        self.banks: dict[str, Tensor] | None = None  # of the texts, whose addresses the graphs have
        self.instead: Runner | None = None
        self.known: weakref.WeakSet[State] = weakref.WeakSet()

    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``."""
        with self.graphs.pool.entered(self.spec.device):
            self._runner(state).forward(state)

    def update(self, state: State) -> None:
        """Apply one row of the table to every image, and increment its row."""
        with self.graphs.pool.entered(self.spec.device):
            self._runner(state).update(state)

    def step(self, state: State) -> None:
        """Do both, in one CUDA graph."""
        with self.graphs.pool.entered(self.spec.device):
            self._runner(state).step(state)

    @plain_modes()
    def _runner(self, state: State) -> Runner:
        """Return the runner for ``state``, after taking over its tables and the network's current weights.

        It writes tables and weights that graphs read, and compiles for the current device: the pool is entered before.
        """
        if self.instead is None:
            fresh = state not in self.known
            if fresh:
                refuse("triton", reasons_against(self.unet, self.spec))
                self.known.add(state)
            version = self.device_step.version
            if self.device_step.follow(state.bank, fresh):
                self.graphs.graphs.clear()
            if isinstance(self.unet, UNetCondition):
                self.device_step.follow_texts(self.unet, state)
                assert self.device_step.texts is not None
                if self.device_step.texts.banks is not self.banks:
                    self.graphs.graphs.clear()
                    self.banks = self.device_step.texts.banks
            if self.device_step.version != version:  # class images are computed from weights
                self.device_step.take_labels(state)
            self._compile(state, bool(state.guided_host.any()))
        return self.instead or self.graphs

    def _compile(self, state: State, guided: bool) -> None:
        """Compile every kernel of a step before the first of its kind."""
        kind = (guided, *(held is None for held in (state.xs, state.m1, state.m2, state.m3)))
        if kind in self.kernels_compiled:
            return
        try:
            for launch in self.device_step.kernels(dataclasses.replace(state), guided):
                launch.compile()
        except BackendError as e:
            if self.spec.determinism == "bitwise":
                raise BackendError(f"backend triton: {e}; with determinism='seed' PyTorch runs the network") from e
            log.warning("backend triton: %s; PyTorch runs the network instead, in float32", e)
            spec = dataclasses.replace(self.spec, dtype=torch.float32)
            eager = EagerRunner(self.unet, spec)
            # A graph of these steps would read the texts of the state that it was captured with.
            texts = isinstance(self.unet, UNetCondition)
            self.instead = eager if texts else GraphRunner(eager, self.unet, spec, self.cuda)
        self.kernels_compiled.add(kind)
