"""Backends: ways to run the network and the update.

A backend prepares a network for a `Spec` and returns a `Runner`. `eager` and `compiled` wrap the module itself;
`native` and `triton` run what `fastdiff.core.lower` makes of it.
An explicit backend never falls back: where it cannot run, `prepare` raises one `BackendError` that lists every reason.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import nn

from fastdiff.core.state import State
from fastdiff.errors import InvalidArgument

BACKENDS = ("eager", "compiled", "native", "triton")
BITWISE_ROWS = 8  # that algorithms and launch configurations are chosen for where the batch may not decide


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a runner is prepared for: ``batch`` images of ``shape`` (C, H, W), the network in ``dtype`` on ``device``.

    null_label: the label of the unconditional half of a guided step; None where the network cannot be guided.
    determinism: "seed", or "bitwise" (`native`, `triton`): an image's bits depend on nothing else in the batch.
    tables, rows: room for tables in a CUDA graph; a state that needs more has the graph captured again.
    fast: bfloat16 may round more for speed, where a backend can trade so (`native`).
    """

    batch: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    null_label: int | None = None
    determinism: str = "seed"
    fast: bool = False
    tables: int = 8
    rows: int = 1024


class Runner(Protocol):
    """Advances a `State`, in place."""

    def forward(self, state: State) -> None:
        """Network and guidance: sets ``state.out``."""

    def update(self, state: State) -> None:
        """One row of the table for every image, row += 1."""

    def step(self, state: State) -> None:
        """Both, as one unit. ``state.out`` is left undefined: what needs it takes the halves."""


def choose(unet: nn.Module, spec: Spec) -> str:
    """What "auto" means: `native` where it can run, else `eager`."""
    from fastdiff.backends.native import runner as native

    return "eager" if native.reasons_against(unet, spec) else "native"


def prepare(backend: str, unet: nn.Module, spec: Spec) -> Runner:
    """The runner of a backend by name.

    Raises `InvalidArgument` for an unknown name, `BackendError` with every reason why it cannot run.
    """
    if backend == "eager":
        from fastdiff.backends import eager

        return eager.prepare(unet, spec)
    if backend == "compiled":
        from fastdiff.backends import compiled

        return compiled.prepare(unet, spec)
    if backend == "native":
        from fastdiff.backends.native import runner as native

        return native.prepare(unet, spec)
    if backend == "triton":
        from fastdiff.backends.triton import runner as triton

        return triton.prepare(unet, spec)
    raise InvalidArgument(f"backend={backend!r} is unknown; allowed: auto, {', '.join(BACKENDS)}")
