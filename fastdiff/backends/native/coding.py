"""The decoder or encoder of an autoencoder, run by the native engine."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastdiff.backends.base import Spec
from fastdiff.backends.native import threads
from fastdiff.backends.native.arrays import aligned
from fastdiff.backends.native.extension import extension, isa
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.native.program import NativeProgram, ProgramInputs, part_rows
from fastdiff.core.lower import Coder, lower_coder
from fastdiff.core.plan import plan
from fastdiff.errors import BackendError
from fastdiff.modes import plain_modes

MOST_SIZES = 8  # programs that are kept: tiling has four sizes of tiles
PACKINGS = 3  # attempts to pack weights that another thread changes meanwhile


class NativeCoder:
    """Decoder or encoder whose calls the engine runs, for any size, a batch in parts that stay in the cache.

    Weights are packed at the first call, and again where they have changed since the last one. It is for one thread at
    a time.
    """

    def __init__(self, coder: Coder):
        native = extension()
        assert native is not None
        self.native = native
        self.coder = coder
        self._reset(None)

    def _reset(self, weights: Weights | None) -> None:
        self.weights = weights
        self.process = os.getpid()
        self.programs: dict[tuple[int, int, int], NativeProgram] = {}  # by rows, height and width of what is given
        self.arena = aligned(0)

    @plain_modes()
    def __call__(self, x: Tensor) -> Tensor:
        """Decode latents or encode images, float32 [B, in_channels, H, W] on the CPU, as the module does."""
        x = self.coder.prepared(x)
        program = self._ready(x)
        B, C = x.shape[:2]
        rows, given = program.rows, program.inputs.given
        assert given is not None
        height, width, channels = program.program.buffers["out"].shape
        coded = torch.empty(B, channels, height, width, dtype=torch.float32, device="cpu")
        for first in range(0, B, rows):
            part = x[first : first + rows]
            given[: len(part), :, :, :C].copy_(part.permute(0, 2, 3, 1))
            program.engine.run(0, len(program.engine))
            coded[first : first + rows] = program.out[: len(part), :, :, :channels].permute(0, 3, 1, 2)
        return self.coder.finished(coded)

    def _ready(self, x: Tensor) -> NativeProgram:
        """Return the program for a part of the batch, made of the weights that the module has now."""
        for _ in range(PACKINGS):
            weights = Weights.of(self.coder, self.native)
            if weights is not self.weights or self.process != os.getpid():
                self._reset(weights)
            program = self._program(weights, x)
            if program is not None:
                return program
        raise BackendError("the autoencoder's weights change while they are packed; another thread may be training it")

    def _program(self, weights: Weights, x: Tensor) -> NativeProgram | None:
        """Return the program; None if the weights have changed meanwhile."""
        B, C, H, W = x.shape
        lowered = lower_coder(self.coder, (H, W))
        rows = part_rows(B, plan(lowered, 1, group=self.native.GROUP).size)
        if (rows, H, W) in self.programs:
            return self.programs[rows, H, W]
        layout = plan(lowered, rows, group=self.native.GROUP)
        if len(self.arena) < layout.size or len(self.programs) >= MOST_SIZES:
            self.programs.clear()  # they use the former arena
            self.arena = aligned(layout.size)
        height, width, _ = lowered.buffers["out"].shape
        group: int = self.native.GROUP

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cpu")

        index = zeros(rows, dtype=torch.int64)
        inputs = ProgramInputs(
            x=zeros(rows, 1, height, width),  # not read, but the engine takes the size of its output from it
            timestep=index,
            label=index,
            times=zeros(1, group),
            classes=None,
            class_images=None,
            given=zeros(rows, H, W, -(-C // group) * group),
        )
        spec = Spec(rows, (C, H, W), torch.float32, torch.device("cpu"))

        def build() -> NativeProgram:
            return NativeProgram(
                self.native, lowered, layout, self.arena, weights, inputs, isa(), threads.number(), spec
            )

        try:
            program = weights.unless_changed(self.coder, build)
        except (TypeError, ValueError) as e:
            raise BackendError(f"backend 'native' cannot run an autoencoder for {tuple(x.shape)}: {e}") from e
        if program is not None:
            self.programs[rows, H, W] = program
        return program
