"""What a batch of images carries from step to step, as flat arrays that every backend reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.core.noise import as_int64
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import COLUMNS, StepTable

Noise = Callable[[int], Tensor]
"""A source of update noise: row -> [B, C, H, W], asked for each row at which an image needs some. None: Philox."""


class TableBank:
    """The coefficients of several tables on a device: ``values`` [tables, rows + 1, columns], float64 on the ``host``.

    Short tables are padded with identity rows.
    """

    def __init__(self, tables: Sequence[StepTable], device: torch.device, dtype: torch.dtype = torch.float32):
        self.tables = tuple(tables)
        rows = max(len(table) for table in tables)
        arrays = [table.coefficients for table in tables]
        self.host = np.stack([np.concatenate([a, np.repeat(a[-1:], rows + 1 - len(a), axis=0)]) for a in arrays])
        self.values = torch.from_numpy(self.host).to(device=device, dtype=dtype)
        self.lengths_host = np.array([len(table) for table in tables])
        self.lengths = torch.from_numpy(self.lengths_host).to(device)
        self.thresholds = any(table.threshold is not None for table in tables)
        self.noisy = any(table.stochastic for table in tables)
        self.learned = any(table.learned_variance for table in tables)


@dataclasses.dataclass(eq=False)  # a batch is itself alone, so backends can remember what they know of it
class State:
    """A batch in flight. B images, each at its own row of its own table.

    x, xs, m1..m3: float32 [B, C, H, W] (xs and m's only where a table uses them); out: the network's output after
    guidance, [B, C or 2C, H, W], from `Runner.forward` until the update; a whole step need not leave it. table, row,
    seed, index, label: int64 [B]; seed is the two's complement of an unsigned number; index is the image's global
    number; label is None for an unconditional network. guidance: float32 [B], 1 = off. x0_scale: float32 [B], 1/q of
    dynamic thresholding, set between forward and update; None where no table asks for it. row_host mirrors row, so that
    no step ever asks the device. guidance_rescale: a number, or what `fastdiff.core.update.guide` takes in its place.
    """

    x: Tensor
    bank: TableBank
    table: Tensor
    row: Tensor
    seed: Tensor
    index: Tensor
    label: Tensor | None
    guidance: Tensor
    table_host: np.ndarray
    row_host: np.ndarray
    guidance_host: np.ndarray
    guidance_rescale: float | Tensor = 0.0
    noise: Noise | None = None
    out: Tensor | None = None
    x0_scale: Tensor | None = None
    xs: Tensor | None = None
    m1: Tensor | None = None
    m2: Tensor | None = None
    m3: Tensor | None = None

    @classmethod
    def create(
        cls,
        x: Tensor,
        bank: TableBank,
        *,
        seed: int | Sequence[int] = 0,
        index: Sequence[int] | None = None,
        table: Sequence[int] | None = None,
        label: Sequence[int] | Tensor | None = None,
        guidance: Sequence[float] | float = 1.0,
        guidance_rescale: float = 0.0,
        noise: Noise | None = None,
    ) -> State:
        """A batch that stands at row 0, from the initial x [B, C, H, W]."""
        B, device = len(x), x.device

        def whole(values: Sequence[int]) -> Tensor:
            if len(values) != B:
                raise InvalidArgument(f"{len(values)} values for a batch of {B} images")
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        seeds = [seed] * B if isinstance(seed, int) else seed
        guidance_host = np.broadcast_to(np.asarray(guidance, dtype=np.float64), (B,)).copy()
        table_host = np.zeros(B, dtype=np.int64) if table is None else np.asarray(table, dtype=np.int64)
        state = cls(
            x=x,
            bank=bank,
            table=whole(table_host.tolist()),
            row=torch.zeros(B, dtype=torch.int64, device=device),
            seed=whole([as_int64(s) for s in seeds]),
            index=whole(range(B) if index is None else index),
            label=None if label is None else torch.as_tensor(label, dtype=torch.int64).to(device),
            guidance=torch.from_numpy(guidance_host).to(device=device, dtype=x.dtype),
            table_host=table_host,
            row_host=np.zeros(B, dtype=np.int64),
            guidance_host=guidance_host,
            guidance_rescale=guidance_rescale,
            noise=noise,
        )
        if any(row.save for t in bank.tables for row in t.rows):
            state.xs = torch.zeros_like(x)
        depth = max(t.history for t in bank.tables)
        for name in ("m1", "m2", "m3")[:depth]:
            setattr(state, name, torch.zeros_like(x))
        return state

    def column(self, name: str) -> Tensor:
        """One coefficient of every image's current row: [B]."""
        return self.bank.values[self.table, self.row, COLUMNS.index(name)]

    def column_host(self, name: str) -> np.ndarray:
        """The same on the host, float64 [B]."""
        return self.bank.host[self.table_host, self.row_host, COLUMNS.index(name)]

    @property
    def guided_host(self) -> np.ndarray:
        """bool [B]: whose current row evaluates the network twice (w = 1 + g (guidance - 1) is not 1)."""
        return self.column_host("g") * (self.guidance_host - 1.0) != 0.0

    def advance(self) -> None:
        """row += 1, on the device and in the mirror; a finished image stays at its table's identity row."""
        self.advance_device()
        self.advance_host()

    def advance_device(self) -> None:
        self.row = torch.minimum(self.row + 1, self.bank.lengths[self.table])

    def advance_host(self) -> None:
        self.row_host = np.minimum(self.row_host + 1, self.bank.lengths_host[self.table_host])

    def idle(self, images: Sequence[int]) -> None:
        """Send images to the identity row: cancelled, or padding that no one asked for."""
        self.row_host[list(images)] = self.bank.lengths_host[self.table_host[list(images)]]
        self.row = torch.from_numpy(self.row_host.copy()).to(self.row.device)

    @property
    def done(self) -> bool:
        """Whether every image has finished."""
        return bool((self.row_host == self.bank.lengths_host[self.table_host]).all())
