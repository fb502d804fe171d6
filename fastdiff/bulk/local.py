"""Worker processes of this machine: they are started, watched, and replaced when they die or hang.

Each is spawned and loads the model itself. It ends when the pipe to its parent does, so none outlives a killed parent.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from fastdiff import errors
from fastdiff.bulk import job as jobs
from fastdiff.bulk.work import work
from fastdiff.errors import FastdiffError, WorkerError, WriteError

log = logging.getLogger("fastdiff")

TRIES = 3  # of a worker that ends without having finished a shard
LOOK_S = 0.5  # between two looks at the workers


class _Worker:
    """A place for a process: its rank, and what is known of the processes that were there."""

    def __init__(self, context: Any, counts: Any, place: int):
        self._context, self._counts, self._place = context, counts, place
        self.failures, self.published = 0, 0
        self.beat, self.since = -1, time.monotonic()

    def start(self, *arguments: Any) -> None:
        """Start a process in this place."""
        self.pipe, other = self._context.Pipe()
        self.process = self._context.Process(target=_run, args=(other, self._counts, self._place, *arguments))
        self.process.start()
        other.close()
        self.since = time.monotonic()

    def look(self) -> float:
        """Return for how many seconds the process has given no sign of life."""
        beat = self._counts[3 * self._place]
        if beat != self.beat:
            self.beat, self.since = beat, time.monotonic()
        return time.monotonic() - self.since

    def message(self) -> Any:
        """Return what the process has sent, ("done",) or an error; None if it has sent nothing."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            return None

    def has_progressed(self) -> bool:
        """Return whether the place has published a shard since the last call."""
        before, self.published = self.published, self._counts[3 * self._place + 2]
        return self.published > before

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(
    folder: Path,
    workers: int,
    threads: int,
    share: tuple[int, int],
    patience_s: float,
    watch: Callable[[int], None],
) -> None:
    """Run workers until the job is finished.

    ``watch`` is called about twice a second with the number of images that the workers have drawn but not yet
    published. Errors of fastdiff in a worker are raised here, when all workers have ended.
    """
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3 * workers, lock=False)  # of each worker: signs of life, images drawn, and published
    rank, world = share
    places = [_Worker(context, counts, place) for place in range(workers)]
    patience = dict.fromkeys(range(workers), patience_s)
    arguments = [(str(folder), rank * workers + p, world * workers, threads, patience_s) for p in range(workers)]
    running: set[int] = set()
    try:
        for place, worker in enumerate(places):
            worker.start(*arguments[place])
            running.add(place)
        while running:
            wait([end for p in running for end in (places[p].process.sentinel, places[p].pipe)], LOOK_S)
            watch(sum(counts[1::3]) - sum(counts[2::3]))
            for place in sorted(running):
                worker = places[place]
                message = worker.message()
                if message is not None and message[0] == "done":
                    worker.process.join()
                    running.discard(place)
                    continue
                if message is not None:
                    raise _error(*message)
                reason = _trouble(worker, patience[place])
                if reason is None:
                    continue
                hung = worker.process.is_alive()
                worker.kill()
                patience[place] *= 1 + hung  # a slow worker is no hanging one
                _count_failure(worker, place, reason)
                log.warning("worker %d %s; another one takes its place", place, reason)
                worker.start(*arguments[place])
    finally:
        for place in running:
            places[place].kill()


def _trouble(worker: _Worker, patience_s: float) -> str | None:
    """Return why a worker has to be replaced; None if it works."""
    if not worker.process.is_alive():
        code = worker.process.exitcode
        return f"ended with exit code {code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    if worker.look() > patience_s:
        return f"has drawn nothing in {patience_s:.0f} s"
    return None


def _count_failure(worker: _Worker, place: int, reason: str) -> None:
    worker.failures = 1 if worker.has_progressed() else worker.failures + 1
    if worker.failures >= TRIES:
        raise WorkerError(
            f"worker {place} {reason}, the {TRIES}rd time without a finished shard; what is finished is kept. Fewer "
            "workers or a smaller batch_size take less memory, and a larger patience_s is for slower ones"
        )


def _error(name: str, text: str, number: int | None) -> FastdiffError:
    """Make an error of a worker anew in this process."""
    kind = getattr(errors, name, None)
    if kind is WriteError:
        return WriteError(text, number)
    if isinstance(kind, type) and issubclass(kind, FastdiffError):
        return kind(text)
    return WorkerError(f"{name}: {text}")


def _run(
    pipe: Any, counts: Any, place: int, folder: str, rank: int, world: int, threads: int, patience_s: float
) -> None:
    """Work in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; this process ends with its pipe
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    torch.set_num_threads(threads)

    def drawn(images: int, published: bool) -> None:
        counts[3 * place] += 1
        counts[3 * place + 1 + published] += images

    try:
        job = jobs.read(folder)
        with job.sampler() as sampler:
            work(job, sampler, rank, world, patience_s, drawn)
    except Exception as e:
        known = isinstance(e, FastdiffError)
        name = type(e).__name__
        text = Exception.__str__(e) if known else f"{name}: {e}"
        pipe.send((name if known else "WorkerError", text, getattr(e, "errno", None)))
    else:
        pipe.send(("done",))


def _end_with(pipe: Any) -> None:
    """End this process when its parent has gone, which closes the pipe."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)
