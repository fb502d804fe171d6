"""The choice of the images that take the next step: a function of the time, the jobs and what steps cost.

It touches neither threads nor clocks, so it is tested, and simulated, with made-up times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

K = TypeVar("K")

TOGETHER = 8  # images of one job that advance together, even where more rows make a step no cheaper
GAIN = 1.05  # by how much twice the rows must raise the rows per second to be worth it
PATIENCE = 3.0  # a job without a deadline is due after so many times its own running time
SLACK_S = 0.05
PRIORITY_S = 1.0  # by which one unit of priority makes a job due earlier
AGEING_S = 2.0  # the longest that a job waits for a step while others go before it
QUANTUM_S = 0.02  # seconds of steps that a lane takes at a time


@dataclasses.dataclass(frozen=True)
class Curve:
    """Seconds of a step by its number of network rows, as measured in this process.

    Attributes:
        points: (rows, seconds), of rising rows.
        scale: Factor by which steps now take longer than when the points were measured.
        most: Network rows of a step at most; None for no limit.
    """

    points: tuple[tuple[int, float], ...]
    scale: float = 1.0
    most: int | None = None

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step of so many rows, between and beyond the points linearly."""
        (k, t), *others = self.points
        if rows <= k or not others:
            return self.scale * t * max(rows / k, 1.0)
        for after, later in others:
            if rows <= after or (after, later) == self.points[-1]:
                return self.scale * (t + (later - t) / (after - k) * (rows - k))
            k, t = after, later
        raise AssertionError("the last point ends the loop")

    @property
    def cap(self) -> int:
        """The number of rows up to which twice as many rows are worth waiting for."""
        cap = self.points[0][0]
        while 2 * cap <= self.points[-1][0] and 2 * self.seconds(cap) >= GAIN * self.seconds(2 * cap):
            cap *= 2
        return cap if self.most is None else min(cap, self.most)

    @property
    def together(self) -> int:
        """The most network rows of a step whose first images are of one job."""
        most = max(self.cap, TOGETHER)
        return most if self.most is None else min(most, self.most)

    def run_s(self, rows: int, at_once: int) -> float:
        """Return the seconds of a job of so many network rows, of which it can take up to ``at_once`` in a step."""
        together = min(at_once, self.together)
        return rows / together * self.seconds(together)

    @property
    def longest_s(self) -> float:
        """Seconds of a step of as many rows as one has: the most of one job, or those of an image that is guided."""
        return self.seconds(max(self.together, 2))

    @property
    def row_s(self) -> float:
        """Seconds of a network row in steps of `cap` rows: what admission counts with."""
        return self.seconds(self.cap) / self.cap


class Want(NamedTuple):
    """An unfinished image: its name, the network rows of its next step, and whether it has a slot already."""

    image: Any
    rows: int
    begun: bool


@dataclasses.dataclass(frozen=True)
class Load:
    """A job as the scheduler sees it.

    Attributes:
        key: Name of the job.
        arrived: Time at which it was submitted.
        due: Time by which it should be finished, see `due`.
        served: Time of its last step; that of its arrival before the first.
        images: Its unfinished images, those that have begun first; more than one step takes need not be listed.
        rows: Network rows that it still needs.
    """

    key: Hashable
    arrived: float
    due: float
    served: float
    images: Sequence[Want]
    rows: int


def due(arrived: float, run_s: float, deadline: float | None, priority: float) -> float:
    """Return the time by which a job of ``run_s`` seconds should be finished: its deadline, or what suits its length.

    Short jobs without a deadline are due soon and go first. A unit of priority is worth `PRIORITY_S` seconds.
    """
    return (arrived + PATIENCE * run_s + SLACK_S if deadline is None else deadline) - PRIORITY_S * priority


def order(now: float, loads: Sequence[Load]) -> list[Load]:
    """Sort jobs by urgency: those that have waited for `AGEING_S`, longest first, then by the time they are due."""
    return sorted(loads, key=lambda j: (0, j.served) if now - j.served >= AGEING_S else (1, j.due))


def pick(now: float, loads: Sequence[Load], curve: Curve, free: int | None = None) -> list[Any]:
    """Choose the images that take the next step.

    The most urgent job has up to `TOGETHER` network rows, and the next ones what is left of the curve's `cap`. An image
    that is guided takes two rows; the first image is chosen whatever it takes.

    Args:
        now: The time.
        loads: The jobs that have unfinished images.
        curve: What steps cost.
        free: Number of images that may begin; None for any number.

    Returns:
        The names of the images.
    """
    chosen: list[Any] = []
    rows = 0
    for load in order(now, loads):
        limit = curve.cap if chosen else curve.together
        for want in load.images:
            if chosen and rows + want.rows > limit:
                break
            if free is not None and not want.begun:
                if free == 0:
                    break
                free -= 1
            chosen.append(want.image)
            rows += want.rows
        if rows >= curve.cap:
            break
    return chosen


def before(loads: Sequence[Load], due: float) -> int:
    """Return the network rows of the jobs that are due earlier, or at the same time."""
    return sum(load.rows for load in loads if load.due <= due)


def turn(lanes: Sequence[tuple[K, float]]) -> list[tuple[K, float]]:
    """Return lanes, each with its seconds of credit, in the order in which they take steps; the first takes the next.

    The first keeps its turn until its steps have used up its credit. Then it gets `QUANTUM_S` for its next turn and
    goes to the end. A step that took longer than was left is paid for in later turns, so lanes that always have work
    get equal time whatever their steps take (deficit round robin: Shreedhar & Varghese 1995, with the cost of a step
    known after it).
    """
    order = list(lanes)
    while order and order[0][1] <= 0.0:
        key, credit = order.pop(0)
        order.append((key, credit + QUANTUM_S))
    return order


def shared_s(seconds: float, others: Sequence[float]) -> float:
    """Return when a lane has done ``seconds`` of work, where others have so many: each takes as much meanwhile."""
    return seconds + sum(min(other, seconds) for other in others)
