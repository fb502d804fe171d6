"""The state of a batch of images between steps, as flat arrays that every backend reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.core.noise import as_int64
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import COLUMNS, StepTable

# A caller's source of update noise, row -> [B, C, H, W]. Called once for each row at which an image needs some.
Noise = Callable[[int], Tensor]


class TableBank:
    """Coefficients of several tables, float64 [tables, rows + 1, columns] in ``host``, and on a device in ``values``.

    The last row of each table is the identity; short tables are padded with it.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Encoded texts, by whose numbers the images of a batch are labelled.

    Attributes:
        states: What the network's cross-attention reads, float32 [P, T, C].
        pooled: The vector that enters its time embedding, float32 [P, D]; None for a network without one.
        names: Where texts come and go: what the text at each place is recognised by, None where there is none.
    """

    states: Tensor
    pooled: Tensor | None = None
    names: tuple[Hashable, ...] | None = None

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device) -> Texts:
        """Return the same texts on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return dataclasses.replace(self, states=self.states.to(device), pooled=pooled)


CHANGED = ("x", "xs", "m1", "m2", "m3", "out", "row")  # fields of a state that a step changes
TENSORS = (
    *CHANGED, "table", "seed", "index", "label", "null", "guidance", "x0_scale", "condition",
)  # fmt: skip  # with an entry for each image


@dataclasses.dataclass(eq=False)  # compared and hashed by identity, so that backends can cache by state
class State:
    """A batch of B images during sampling, each at its own row of its own table.

    Fields that end in ``_host`` mirror those on the device, so that no step has to read from it. Images are float32
    [B, C, H, W], and values per image are [B], int64 or float32.
    """

    x: Tensor  # the noisy images
    bank: TableBank
    table: Tensor
    row: Tensor  # a finished image is at the identity row
    seed: Tensor  # the two's complement of an unsigned number
    index: Tensor  # the images' global numbers
    label: Tensor | None  # a class, or a number of ``texts``; None for an unconditional network
    guidance: Tensor  # 1 is off
    table_host: np.ndarray
    row_host: np.ndarray
    guidance_host: np.ndarray  # float64
    guidance_rescale: float | Tensor = 0.0  # phi of `fastdiff.core.update.guide`, or a tensor that it takes instead
    taking: np.ndarray | None = None  # the images that the next step advances, int64, ascending; None for all of them
    noise: Noise | None = None  # None for Philox
    # The network's output after guidance, [B, C or 2C, H, W], set by `Runner.forward` and read by `Runner.update`;
    # undefined after a whole step.
    out: Tensor | None = None
    texts: Texts | None = None  # of a network that reads text
    null: Tensor | None = None  # the label of each image's unconditional half; None for that of the network
    condition: Tensor | None = None  # clean channels [B, K, H, W] that the network reads after those of x
    x0_scale: Tensor | None = None  # 1/q of dynamic thresholding, set between forward and update
    xs: Tensor | None = None  # the saved x; None where no table saves
    m1: Tensor | None = None  # the history, latest first; None where no table has so many entries
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
        """Create a batch at row 0 from the initial noise x, with zeroed buffers for the history that its tables use.

        A seed or guidance is that of all images, or a list has one for each. Without ``index`` the images are numbered
        from 0; without ``table`` they all have the first.
        """
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
            label=None if label is None else torch.as_tensor(label, dtype=torch.int64, device=device),
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
        """Return one coefficient of every image's current row, [B]."""
        return self.bank.values[self.table, self.row, COLUMNS.index(name)]

    def coefficients(self) -> Tensor:
        """Return all coefficients of every image's current row, [B, columns]."""
        return self.bank.values[self.table, self.row]

    def column_host(self, name: str) -> np.ndarray:
        """Return one coefficient of every image's current row from the host's mirror, float64 [B]."""
        return self.bank.host[self.table_host, self.row_host, COLUMNS.index(name)]

    @property
    def guided_host(self) -> np.ndarray:
        """Mask of images that need a conditional and an unconditional evaluation, bool [B]."""
        return self.column_host("g") * (self.guidance_host - 1.0) != 0.0

    @property
    def everyone(self) -> np.ndarray:
        """The images that the next step advances, int64."""
        return np.arange(len(self.x)) if self.taking is None else self.taking

    def select(self, images: np.ndarray) -> State:
        """Return copies of some images, a batch of their own, of which `put` takes over what a step has changed."""
        i = torch.from_numpy(images).to(self.x.device)
        tensors: dict[str, Any] = {
            name: None if held is None else held[i] for name in TENSORS for held in [getattr(self, name)]
        }
        rescale = self.guidance_rescale
        if isinstance(rescale, Tensor) and rescale.ndim == 2:
            rescale = rescale[i]
        hosts: dict[str, Any] = {
            name: getattr(self, name)[images] for name in ("table_host", "row_host", "guidance_host")
        }
        return dataclasses.replace(self, **tensors, **hosts, guidance_rescale=rescale, taking=None)

    def put(self, images: np.ndarray, part: State) -> None:
        """Take over what a step has changed of the images that ``part`` has copies of, and its ``out``."""
        i = torch.from_numpy(images).to(self.x.device)
        if part.out is not None and (self.out is None or self.out.shape[1:] != part.out.shape[1:]):
            self.out = part.out.new_zeros(len(self.x), *part.out.shape[1:])
        for name in CHANGED:
            held, new = getattr(self, name), getattr(part, name)
            if held is not None and new is not None:
                held[i] = new
        self.row_host[images] = part.row_host

    def advance(self) -> None:
        """Increment the rows, on the device and in the mirror; a finished image stays at its table's identity row."""
        self.advance_device()
        self.advance_host()

    def advance_device(self) -> None:
        """Increment the rows on the device."""
        if self.taking is None:
            self.row = torch.minimum(self.row + 1, self.bank.lengths[self.table])
        else:
            i = torch.from_numpy(self.taking).to(self.row.device)
            self.row[i] = torch.minimum(self.row[i] + 1, self.bank.lengths[self.table[i]])

    def advance_host(self) -> None:
        """Increment the rows in the mirror."""
        if self.taking is None:
            self.row_host = np.minimum(self.row_host + 1, self.bank.lengths_host[self.table_host])
        else:
            i = self.taking
            self.row_host[i] = np.minimum(self.row_host[i] + 1, self.bank.lengths_host[self.table_host[i]])

    def idle(self, images: Sequence[int]) -> None:
        """Send images to the identity row: those that were cancelled, or that only pad the batch."""
        self.row_host[list(images)] = self.bank.lengths_host[self.table_host[list(images)]]
        self.row = torch.from_numpy(self.row_host.copy()).to(self.row.device)

    @property
    def done(self) -> bool:
        """Whether every image is at its table's identity row."""
        return bool((self.row_host == self.bank.lengths_host[self.table_host]).all())
