"""Watching the workers of a job: each is replaced when it dies or hangs, and its errors are raised here.

What runs a worker, a process of this machine or an actor of Ray, is a subclass of `Place`.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastdiff import errors
from fastdiff.bulk import job as jobs
from fastdiff.bulk.work import Drawn, work
from fastdiff.errors import FastdiffError, WorkerError, WriteError

log = logging.getLogger("fastdiff")

TRIES = 3  # of a worker that ends without having finished a shard
LOOK_S = 0.5  # between two looks at the workers

Message = tuple[Any, ...]
"""What a worker says at its end: ("done",), or the name, text and number of an error."""
Counts = tuple[int, int, int]
"""Of a place: signs of life, images drawn, images published."""


class Place(abc.ABC):
    """A place for a worker: its number, and what is known of the workers that were there."""

    def __init__(self, number: int, patience_s: float):
        self.number, self.patience_s = number, patience_s
        self._failures, self._published = 0, 0
        self._beat, self._since = -1, 0.0

    @abc.abstractmethod
    def start(self) -> None:
        """Start a worker in this place."""

    @abc.abstractmethod
    def message(self) -> Message | None:
        """Return what the worker has said; None if it has said nothing."""

    @abc.abstractmethod
    def end(self) -> str | None:
        """Return how the worker has ended without a message; None if it runs."""

    @abc.abstractmethod
    def counts(self) -> Counts:
        """Return the counts of all workers that were in this place."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End the worker, however it is."""

    def begin(self) -> None:
        """Start a worker, and the time in which it has to give a sign of life."""
        self.start()
        self._since = time.monotonic()

    def trouble(self) -> str | None:
        """Return why the worker has to be replaced; None if it works."""
        reason = self.end()
        if reason is not None:
            return reason
        beat = self.counts()[0]
        if beat != self._beat:
            self._beat, self._since = beat, time.monotonic()
        if time.monotonic() - self._since <= self.patience_s:
            return None
        reason = f"has drawn nothing in {self.patience_s:.0f} s"
        self.patience_s *= 2  # a slow worker is no hanging one
        return reason

    def replace(self, reason: str) -> None:
        """Start another worker; `WorkerError` if it is one too many without a finished shard."""
        self.kill()
        before, self._published = self._published, self.counts()[2]
        self._failures = 1 if self._published > before else self._failures + 1
        if self._failures >= TRIES:
            raise WorkerError(
                f"worker {self.number} {reason}, the {TRIES}rd time without a finished shard; what is finished is kept."
                " Fewer workers or a smaller batch_size take less memory, and a larger patience_s is for slower ones"
            )
        log.warning("worker %d %s; another one takes its place", self.number, reason)
        self.begin()


P = TypeVar("P", bound=Place)


def run(places: Sequence[P], pause: Callable[[Sequence[P]], None], watch: Callable[[int], None]) -> None:
    """Run a worker in each place until the job is finished.

    ``pause`` waits until something may have happened at the places that it is given, `LOOK_S` at most. ``watch`` is
    then called with the number of images that the workers have drawn but not yet published. Errors of fastdiff in a
    worker are raised here, when all workers have ended.
    """
    running: list[P] = []
    try:
        for place in places:
            running.append(place)
            place.begin()
        while running:
            pause(running)
            watch(sum(drawn - published for _, drawn, published in (place.counts() for place in places)))
            for place in list(running):
                message = place.message()
                if message is not None and message[0] != "done":
                    raise error(*message)
                if message is not None:
                    running.remove(place)
                    place.kill()
                    continue
                reason = place.trouble()
                if reason is not None:
                    place.replace(reason)
    finally:
        for place in running:
            place.kill()


def serve(folder: str, rank: int, world: int, threads: int, patience_s: float, drawn: Drawn) -> Message:
    """Work on a job as a worker does, and return what it says at its end."""
    torch.set_num_threads(threads)
    try:
        job = jobs.read(folder)
        with job.sampler() as sampler:
            drawn(0, False)  # a sign of life, as loading may take long
            work(job, sampler, rank, world, patience_s, drawn)
    except Exception as e:
        known = isinstance(e, FastdiffError)
        name = type(e).__name__
        text = Exception.__str__(e) if known else f"{name}: {e}"
        return name if known else "WorkerError", text, getattr(e, "errno", None)
    return ("done",)


def error(name: str, text: str, number: int | None) -> FastdiffError:
    """Make an error of a worker anew in this process."""
    kind = getattr(errors, name, None)
    if kind is WriteError:
        return WriteError(text, number)
    if isinstance(kind, type) and issubclass(kind, FastdiffError):
        return kind(text)
    return WorkerError(f"{name}: {text}")
