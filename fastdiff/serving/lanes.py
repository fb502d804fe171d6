"""Engines that share a processor take turns, step by step."""

from __future__ import annotations

import os
import threading
import time

from fastdiff.errors import EngineClosed
from fastdiff.serving import scheduler


class Lanes:
    """Turns of several engines on one processor: those that have work get equal time, whatever their steps take.

    ``Engine(model, lanes=lanes)`` adds an engine; without, engines in one process run at the same time and slow each
    other down.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # also guards what follows
        self._members: list[Lane] = []
        self._round: list[tuple[Lane, float]] = []  # the lanes that want a step or take one, with their credit
        self._holder: Lane | None = None  # takes a step
        self._process = os.getpid()

    def join(self) -> Lane:
        """Return a lane for one more engine, which its thread alone uses.

        Returns:
            The lane.

        Raises:
            EngineClosed: If the lanes were made in another process.
        """
        if os.getpid() != self._process:
            raise EngineClosed("these lanes were made in another process, of which this is a fork; make other ones")
        lane = Lane(self)
        with self._changed:
            self._members.append(lane)
        return lane


class Lane:
    """One engine's place among `Lanes`. ``queued_s`` are the seconds of work that the engine has."""

    def __init__(self, lanes: Lanes):
        self.queued_s = 0.0
        self._lanes = lanes
        self._debt = 0.0  # that is left of earlier turns, zero or negative
        self._since = 0.0  # when its turn began

    def take(self) -> None:
        """End the lane's turn, if it has one, and wait until it may take the next step."""
        lanes = self._lanes
        with lanes._changed:
            if lanes._holder is self:
                self._pay()
            else:
                lanes._round.append((self, scheduler.QUANTUM_S + self._debt))
            self._grant()
            while lanes._holder is not self:
                lanes._changed.wait()
            self._since = time.monotonic()

    def leave(self) -> None:
        """End the lane's turn; it wants none until `take`."""
        lanes = self._lanes
        with lanes._changed:
            if lanes._holder is self:
                self._pay()
            self._debt = min([0.0, *(credit for lane, credit in lanes._round if lane is self)])
            lanes._round = [entry for entry in lanes._round if entry[0] is not self]
            if not lanes._round:  # nobody waits, so nobody was put at a disadvantage
                for lane in lanes._members:
                    lane._debt = 0.0
            self._grant()

    def close(self) -> None:
        """Leave for good."""
        self.queued_s = 0.0
        self.leave()
        with self._lanes._changed:
            self._lanes._members = [lane for lane in self._lanes._members if lane is not self]

    def finish_s(self, seconds: float) -> float:
        """Return when so many seconds of this lane's work are done, if the others go on with theirs."""
        return scheduler.shared_s(seconds, [lane.queued_s for lane in self._lanes._members if lane is not self])

    def busy_others(self) -> int:
        """Return how many other lanes have work."""
        return sum(lane.queued_s > 0.0 for lane in self._lanes._members if lane is not self)

    def _pay(self) -> None:
        lanes, spent = self._lanes, time.monotonic() - self._since
        lanes._round = [(lane, credit - spent * (lane is self)) for lane, credit in lanes._round]
        lanes._holder = None

    def _grant(self) -> None:
        lanes = self._lanes
        if lanes._holder is None and lanes._round:
            lanes._round = scheduler.turn(lanes._round)
            lanes._holder = lanes._round[0][0]
            lanes._changed.notify_all()
