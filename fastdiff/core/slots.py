"""A batch that lives on while images come and go between its steps, each with its own table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.core import update
from fastdiff.core.noise import as_int64
from fastdiff.core.state import State, TableBank
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import COLUMNS, Row, StepTable

if TYPE_CHECKING:
    from fastdiff.backends.base import Runner

ROWS = 1024  # rows per table that have room from the start
MOST_ROWS = 4096  # each place has room for as many as the longest table
# The table of a slot that no image is in: it changes nothing.
EMPTY = StepTable("empty", 1, (Row(t=0.0, abar=0.5, abar_next=0.5, kx=0.0, ko=0.0, ax=1.0, g=0.0),))


class SharedBank(TableBank):
    """A bank to which tables are added while others are in use. Place 0 always has `EMPTY`.

    A table that is added again, the same object, shares its place; `release` gives up one use. Places whose tables are
    not in use are given to others, those that were released first before the others.
    """

    def __init__(self, places: int, device: torch.device, rows: int = ROWS):
        super().__init__([EMPTY] * (places + 1), device)
        self._grow(rows)
        self._uses = [1, *[0] * places]
        self._idle = dict.fromkeys(range(1, places + 1))  # places that are not in use, the first released first
        self._place: dict[int, int] = {}  # by the identity of a table that has one

    def add(self, table: StepTable, coefficients: np.ndarray | None = None) -> int:
        """Return the place of a table, whose ``coefficients`` may be given, and count one more use of it."""
        place = self._place.get(id(table))
        if place is None:
            if not self._idle:
                raise InvalidArgument(f"all {len(self.tables) - 1} places of tables are in use")
            place = next(iter(self._idle))
            self._place.pop(id(self.tables[place]), None)
            self._set(place, table, table.coefficients if coefficients is None else coefficients)
            self._place[id(table)] = place
        self._uses[place] += 1
        self._idle.pop(place, None)
        self._describe()
        return place

    def release(self, place: int) -> None:
        """Give up one use of the table at a place."""
        self._uses[place] -= 1
        if self._uses[place] == 0:
            self._idle[place] = None
        self._describe()

    @property
    def used(self) -> int:
        """Number of tables in use, without `EMPTY`."""
        return len(self.tables) - 1 - len(self._idle)

    def _set(self, place: int, table: StepTable, coefficients: np.ndarray) -> None:
        if len(coefficients) > self.host.shape[1]:
            self._grow(max(len(coefficients), 2 * self.host.shape[1]))
        self.host[place, : len(coefficients)] = coefficients
        self.host[place, len(coefficients) :] = coefficients[-1]
        self.values[place] = torch.from_numpy(self.host[place]).to(self.values.device, self.values.dtype)
        self.lengths_host[place] = self.lengths[place] = len(table)
        self.tables = (*self.tables[:place], table, *self.tables[place + 1 :])

    def _grow(self, rows: int) -> None:
        """Make room for tables of so many rows; what a captured step reads moves."""
        held = self.host
        self.host = np.concatenate([held, np.repeat(held[:, -1:], rows - held.shape[1], axis=1)], axis=1)
        self.values = torch.from_numpy(self.host).to(device=self.values.device, dtype=self.values.dtype)

    def _describe(self) -> None:
        used = [table for table, uses in zip(self.tables, self._uses, strict=True) if uses]
        self.thresholds = any(table.threshold is not None for table in used)


class Slots:
    """Images in flight on one runner, in a batch of fixed capacity; `step` advances any of them by a row.

    ``state`` is one `State` for the whole life of the batch, so that a runner looks for changes of the weights once.
    The arrays of a slot are written when an image is admitted to it, and a step costs what its own images cost.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int], device: torch.device, labelled: bool):
        self.bank = SharedBank(capacity, device)

        def images() -> Tensor:
            return torch.zeros(capacity, *shape, dtype=torch.float32, device=device)

        self.state = State.create(images(), self.bank, label=[0] * capacity if labelled else None)
        self.state.xs, self.state.m1, self.state.m2, self.state.m3 = images(), images(), images(), images()
        self.state.guidance_rescale = torch.tensor([[0.0, 1.0]] * capacity, dtype=torch.float32, device=device)
        self.state.idle(range(capacity))
        self.free = list(range(capacity - 1, -1, -1))

    def admit(
        self, x: Tensor, table: StepTable, *, seed: int, index: int, label: int | None = None, guidance: float = 1.0,
        rescale: float = 0.0, coefficients: np.ndarray | None = None,
    ) -> int:  # fmt: skip
        """Put an image, its initial noise x [C, H, W], into a free slot at the first row of its table.

        Its table has at most `MOST_ROWS` rows. Returns the slot. `InvalidArgument` is raised where there is no free
        one. What earlier images have left in it is not read: the coefficient of a history that a table has not made
        yet is zero.
        """
        if not self.free:
            raise InvalidArgument(f"all {len(self.state.x)} slots are taken")
        s, place = self.state, self.bank.add(table, coefficients)
        i = self.free.pop()
        s.x[i].copy_(x)
        for held, value in ((s.table, place), (s.row, 0), (s.seed, as_int64(seed)), (s.index, index)):
            held[i] = value
        if s.label is not None:
            s.label[i] = label or 0
        assert isinstance(s.guidance_rescale, Tensor)
        s.guidance[i], s.guidance_rescale[i, 0], s.guidance_rescale[i, 1] = guidance, rescale, 1.0 - rescale
        s.table_host[i], s.row_host[i], s.guidance_host[i] = place, 0, guidance
        return i

    def retire(self, slot: int) -> None:
        """Free a slot, whether its image is finished or not."""
        s, place = self.state, int(self.state.table_host[slot])
        s.table[slot] = s.table_host[slot] = 0
        s.row[slot] = s.row_host[slot] = self.bank.lengths_host[0]
        self.bank.release(place)
        self.free.append(slot)

    def rows_left(self, slot: int) -> int:
        """Return the number of rows that the image of a slot has not taken."""
        return int(self.bank.lengths_host[self.state.table_host[slot]] - self.state.row_host[slot])

    def network_rows(self, slots: Sequence[int]) -> int:
        """Return the number of network rows of a step of these slots: two for each image that is guided in its row."""
        s, i = self.state, np.asarray(slots, dtype=np.int64)
        g = self.bank.host[s.table_host[i], s.row_host[i], COLUMNS.index("g")]
        return len(i) + int(np.count_nonzero(g * (s.guidance_host[i] - 1.0)))

    def step(self, runner: Runner, slots: Sequence[int], previewed: Sequence[int] = ()) -> Tensor | None:
        """Advance the images of some slots by one row.

        Returns the denoised images x0 of the slots in ``previewed``, in their order, as the row computed them and in
        units of the data; None where there are none.
        """
        s, x0 = self.state, None
        s.taking = np.array(sorted(slots), dtype=np.int64)
        if not previewed:
            runner.step(s)
            return None
        runner.forward(s)
        part = s.select(np.array(previewed, dtype=np.int64))
        scale = [self.bank.tables[place].data_scale for place in part.table_host.tolist()]
        x0 = update.predict_x0(part) * torch.tensor(scale, dtype=torch.float32, device=s.x.device).view(-1, 1, 1, 1)
        runner.update(s)
        return x0
