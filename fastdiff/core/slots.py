"""A batch that lives on while images come and go between its steps, each with its own table."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.core import update
from fastdiff.core.noise import as_int64
from fastdiff.core.state import State, TableBank, Texts
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import COLUMNS, Row, StepTable

if TYPE_CHECKING:
    from fastdiff.backends.base import Runner

ROWS = 1024  # rows per table that have room from the start
MOST_ROWS = 4096  # each place has room for as many as the longest table
# The table of a slot that no image is in: it changes nothing.
EMPTY = StepTable("empty", 1, (Row(t=0.0, abar=0.5, abar_next=0.5, kx=0.0, ko=0.0, ax=1.0, g=0.0),))


class Places:
    """Places for things in use, each recognised by a name; one that is added again shares its place.

    The place of a thing that nobody uses any more is given to another one when no other place is free, those that were
    released first before the others.
    """

    def __init__(self, places: range, of: str):
        self._of = of
        self._uses = dict.fromkeys(places, 0)
        self._idle = dict.fromkeys(places)  # the first released first
        self._place: dict[Hashable, int] = {}
        self._name: dict[int, Hashable] = {}

    def add(self, name: Hashable) -> tuple[int, bool]:
        """Return the place for a name, of which one more use is counted, and whether it was not there already."""
        place = self._place.get(name)
        new = place is None
        if place is None:
            if not self._idle:
                raise InvalidArgument(f"all {len(self._uses)} places of {self._of} are in use")
            place = next(iter(self._idle))
            self._place.pop(self._name.get(place), None)
            self._place[name], self._name[place] = place, name
        self._uses[place] += 1
        self._idle.pop(place, None)
        return place, new

    def release(self, place: int) -> None:
        """Give up one use of a place."""
        self._uses[place] -= 1
        if self._uses[place] == 0:
            self._idle[place] = None

    @property
    def used(self) -> list[int]:
        """The places in use."""
        return [place for place, uses in self._uses.items() if uses]


class SharedBank(TableBank):
    """A bank to which tables are added while others are in use. Place 0 always has `EMPTY`.

    A table that is added again, the same object, shares its place; `release` gives up one use.
    """

    def __init__(self, places: int, device: torch.device, rows: int = ROWS):
        super().__init__([EMPTY] * (places + 1), device)
        self._grow(rows)
        self._places = Places(range(1, places + 1), "tables")

    def add(self, table: StepTable, coefficients: np.ndarray | None = None) -> int:
        """Return the place of a table, whose ``coefficients`` may be given, and count one more use of it."""
        place, new = self._places.add(id(table))
        if new:
            self._set(place, table, table.coefficients if coefficients is None else coefficients)
        self._describe()
        return place

    def release(self, place: int) -> None:
        """Give up one use of the table at a place."""
        self._places.release(place)
        self._describe()

    @property
    def used(self) -> int:
        """Number of tables in use, without `EMPTY`."""
        return len(self._places.used)

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
        self.thresholds = any(self.tables[place].threshold is not None for place in self._places.used)


class Text(NamedTuple):
    """An encoded text: a name by which it is recognised, its states [T, C] and its pooled vector [D] or None."""

    name: Hashable
    states: Tensor
    pooled: Tensor | None = None


class SharedTexts:
    """Texts that are added while others are in use; one of the same name shares its place.

    ``now`` are the present ones: another object after each new text, with the same tensors.
    """

    def __init__(self, places: int, like: Text, device: torch.device):
        def room(t: Tensor) -> Tensor:
            return torch.zeros(places, *t.shape, dtype=torch.float32, device=device)

        self._places = Places(range(places), "texts")
        self.now = Texts(room(like.states), None if like.pooled is None else room(like.pooled), (None,) * places)

    def add(self, text: Text) -> int:
        """Return the place of a text, and count one more use of it."""
        place, new = self._places.add(text.name)
        if new:
            assert self.now.names is not None
            self.now.states[place] = text.states
            if self.now.pooled is not None and text.pooled is not None:
                self.now.pooled[place] = text.pooled
            names = (*self.now.names[:place], text.name, *self.now.names[place + 1 :])
            self.now = dataclasses.replace(self.now, names=names)
        return place

    def release(self, place: int) -> None:
        """Give up one use of the text at a place."""
        self._places.release(place)

    @property
    def used(self) -> int:
        """Number of texts in use."""
        return len(self._places.used)


class Slots:
    """Images in flight on one runner, in a batch of fixed capacity; `step` advances any of them by a row.

    ``state`` is one `State` for the whole life of the batch, so that a runner looks for changes of the weights once.
    The arrays of a slot are written when an image is admitted to it, and a step costs what its own images cost.
    For a network that reads text, ``text`` is one, of the shape that all have.
    """

    def __init__(
        self, capacity: int, shape: tuple[int, int, int], device: torch.device, labelled: bool, text: Text | None = None
    ):
        self.bank = SharedBank(capacity, device)
        # Every image has at most two, its own and that of its unconditional half.
        self.texts = None if text is None else SharedTexts(2 * capacity, text, device)
        self._texts_of: dict[int, tuple[int, int]] = {}  # places, by slot

        def images() -> Tensor:
            return torch.zeros(capacity, *shape, dtype=torch.float32, device=device)

        numbered = labelled or text is not None
        self.state = State.create(images(), self.bank, label=[0] * capacity if numbered else None)
        if self.texts is not None:
            self.state.texts = self.texts.now
            self.state.null = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.state.xs, self.state.m1, self.state.m2, self.state.m3 = images(), images(), images(), images()
        self.state.guidance_rescale = torch.tensor([[0.0, 1.0]] * capacity, dtype=torch.float32, device=device)
        self.state.idle(range(capacity))
        self.free = list(range(capacity - 1, -1, -1))

    def admit(
        self, x: Tensor, table: StepTable, *, seed: int, index: int, label: int | None = None, guidance: float = 1.0,
        rescale: float = 0.0, coefficients: np.ndarray | None = None, texts: tuple[Text, Text] | None = None,
    ) -> int:  # fmt: skip
        """Put an image, its initial noise x [C, H, W], into a free slot at the first row of its table.

        Its table has at most `MOST_ROWS` rows. ``texts`` are its own and that of its unconditional half, for a network
        that reads text. Returns the slot. `InvalidArgument` is raised where there is no free one. What earlier images
        have left in it is not read: the coefficient of a history that a table has not made yet is zero.
        """
        if not self.free:
            raise InvalidArgument(f"all {len(self.state.x)} slots are taken")
        s, place = self.state, self.bank.add(table, coefficients)
        i = self.free.pop()
        s.x[i].copy_(x)
        for held, value in ((s.table, place), (s.row, 0), (s.seed, as_int64(seed)), (s.index, index)):
            held[i] = value
        if self.texts is not None:
            assert texts is not None
            assert s.null is not None
            own, null = self._texts_of[i] = self.texts.add(texts[0]), self.texts.add(texts[1])
            label, s.null[i], s.texts = own, null, self.texts.now
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
        if self.texts is not None:
            for text in self._texts_of.pop(slot):
                self.texts.release(text)
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
