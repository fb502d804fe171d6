"""The interface of a backend: `Spec`, which it is given, and `Runner`, which it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from fastdiff.core.state import State
from fastdiff.errors import BackendError

BACKENDS = ("eager", "compiled", "native", "triton")
# Backends that advance some images of a batch at the cost of these alone.
STEPWISE = ("native", "eager")
# Batch size for which algorithms and launch configurations are chosen where results must not depend on the batch.
BITWISE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shapes, precision and guarantees that a runner is prepared for.

    Attributes:
        batch: Number of images.
        shape: Shape (C, H, W) of an image.
        dtype: Precision of the network's products.
        device: Device that the network runs on.
        null_label: Label of the unconditional half of a guided step; None for a network that cannot be guided.
        determinism: "seed", or "bitwise" (`native` and `triton` only): an image's bits do not depend on the rest of
            its batch.
        fast: Whether bfloat16 may round more for speed; `native` only.
        frozen: Whether no weight changes from now on, and all batches are `fastdiff.core.slots.Slots` of ``batch``
            images: what a step needs is then allocated once, and changes are not looked for.
        tables: Number of tables for which a CUDA graph reserves memory. A state with more causes another capture.
        rows: Number of rows per table for which a CUDA graph reserves memory.
    """

    batch: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    null_label: int | None = None
    determinism: str = "seed"
    fast: bool = False
    frozen: bool = False
    tables: int = 8
    rows: int = 1024


def refuse(backend: str, reasons: Sequence[str]) -> None:
    """Raise one `BackendError` that lists all reasons why a backend cannot run, if there are any."""
    if reasons:
        raise BackendError(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")


class Runner(Protocol):
    """Network and update of one backend, prepared for a `Spec`; advances a `State` in place."""

    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``.

        Args:
            state: The batch, each image at a row of its table.
        """

    def update(self, state: State) -> None:
        """Apply one row of the table to every image, from ``state.out``, and increment its row.

        Args:
            state: The batch, after `forward`.
        """

    def step(self, state: State) -> None:
        """Do both, as one unit: one native call or one CUDA graph.

        ``state.out`` is undefined afterwards; a caller that needs it calls `forward` and `update`.

        Args:
            state: The batch, each image at a row of its table.
        """
