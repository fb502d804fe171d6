"""The search of a table's row for a timestep: where each image of a batch is in a run of `Scheduler`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdiff.errors import InvalidArgument
from fastdiff.integrations.states import indices_of, listed, same
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.given import ANY_TIMESTEP
from fastdiff.solvers.paths import looks_back


class Place(NamedTuple):
    """Where an image is in a run."""

    row: int  # of the table; its length where the image is finished
    start: int = 0  # the row at which the image started, if a solver's history depends on it
    alone: float | None = None  # a timestep that is not one of the run, in a table of its own


@dataclasses.dataclass(frozen=True)
class Search:
    """Search of the rows at which the images of a batch go on in a run, or start one."""

    name: str  # of the scheduler
    table: Callable[..., StepTable]  # the run's table; with ``start`` or ``alone`` another one, as `Place` has them
    after: Sequence[Place | None] | None  # the place of each image after its last step; None before the first step
    begin: int | None  # the row that starts a run, whatever the timestep

    def places(self, timestep: Any, B: int) -> list[Place]:
        """Find each image's place: the next one if it has the image's timestep, else one at which a run can start."""
        table, times, after = self.table(), listed(timestep, B), self.after
        if after is not None and len(after) != B:
            keeps = table.history > 0 or any(row.as_ for row in table.rows)  # a row reads what an earlier one kept
            if keeps and not all(same(t, table.rows[0].t) for t in times):
                raise InvalidArgument(
                    f"{B} images, but the history is of {len(after)}: a run of {table.solver} keeps its batch"
                )
            after = None
        return [self._place(table, t, place) for t, place in zip(times, after or [None] * B, strict=True)]

    def rows(self, timestep: Any, B: int) -> list[int]:
        """Find the rows of a batch that may have several images for each one of the run, as for guidance."""
        table, times, after = self.table(), listed(timestep, B), self.after or [None]
        after = [*after] * (B // len(after)) if B % len(after) == 0 else [after[0]] * B
        return [self._row(table, t, place) for t, place in zip(times, after, strict=True)]

    def _place(self, table: StepTable, t: float, after: Place | None) -> Place:
        if _continues(table, t, after):
            assert after is not None
            return after
        if after is not None and self._repeats(table, t, after):
            return Place(after.row - 1, after.start - 1)
        if self.name in ANY_TIMESTEP and t >= 0 and t.is_integer() and not any(t == row.t for row in table.rows):
            self.table(alone=t)  # which refuses timesteps beyond the schedule's
            return Place(0, alone=t)
        row = self._row(table, t, after)
        if row == len(table) or not looks_back(table, row):
            return Place(row)
        if looks_back(self.table(start=row), row):
            raise InvalidArgument(
                f"timestep {t:g} (row {row}) is within a step of {table.solver}, which needs the rows before it; start "
                "at the step's first timestep"
            )
        return Place(row, start=row)

    def _repeats(self, table: StepTable, t: float, after: Place) -> bool:
        """Return whether PNDM's first step is repeated, in a run that starts at the earlier of two equal timesteps.

        The first step's timestep does not tell which of the two it is, and its result does not depend on it.
        """
        first = after.start
        return (
            self.name == "PNDMScheduler" and after.row == first + 1 and first > 1
            and same(t, table.rows[first].t) and same(t, table.rows[first - 1].t)
        )  # fmt: skip

    def _row(self, table: StepTable, t: float, after: Place | None) -> int:
        """Return the row of an image: the next one, or the one at which its timestep starts a run."""
        if not math.isfinite(t):
            raise InvalidArgument(f"timestep {t} is not one of this run's {len(table)}")
        if t == -1 and not table.continuous:
            return len(table)
        if _continues(table, t, after):
            assert after is not None
            return after.row
        if self.after is None and self.begin is not None:
            return self.begin
        known = indices_of(t, table.timesteps)
        if not known:
            raise InvalidArgument(
                f"timestep {t:g} is not one of this run's {len(table)}, {table.rows[0].t:g} .. {table.rows[-1].t:g}"
            )
        # diffusers starts at the second of two equal timesteps; the first of a run starts it all the same.
        return known[0] if known[0] == 0 else known[min(1, len(known) - 1)]


def _continues(table: StepTable, t: float, after: Place | None) -> bool:
    return after is not None and after.row < len(table) and same(t, table.rows[after.row].t)


def replaces(config: Mapping[str, Any], table: StepTable, place: Place) -> bool:
    """Return whether a row goes on from the sample that the scheduler computed, whatever the caller made of it.

    UniPC's corrector computes the sample anew from the last step's start, and the second stage of DPM++ SDE from the
    first one's, so that diffusers reads the caller's sample there for the prediction of x_0 alone.
    """
    if config["_class_name"] == "UniPCMultistepScheduler":
        corrected = place.row - 1 not in (config["disable_corrector"] or ())
        return place.start < place.row < len(table) and corrected
    second = place.row < len(table) and bool(table.rows[place.row].stage)
    return config["_class_name"] == "DPMSolverSDEScheduler" and second
