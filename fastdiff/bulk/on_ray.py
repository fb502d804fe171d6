"""Workers on a Ray cluster: actors that draw shards and write them to the folder, which all machines share.

Nothing but counts goes through Ray. An actor that dies or hangs is replaced by another one, as a process is. Ray's own
restarts are off: they have no end where an actor cannot start, and do not apply to errors of the application.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdiff.backends.native import threads as native_threads
from fastdiff.bulk import watching
from fastdiff.bulk.watching import LOOK_S, Counts, Message
from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument, WorkerError

ADDRESS = r"local|auto|([\w.\-]+|\[[\da-fA-F:]+\]):\d{1,5}"
ANSWER_S = 10.0  # in which the head of a cluster has to answer
OBJECTS = 80 << 20  # bytes of the object store of a Ray of this machine, which holds counts; Ray needs 75 MiB


def check(address: Any) -> None:
    """Check the address of a cluster, and that Ray is installed, before anything heavy runs."""
    if not isinstance(address, str) or not re.fullmatch(ADDRESS, address):
        raise InvalidArgument(
            f"ray={shown(address)}: 'local', 'auto' or an address as '10.0.0.1:6379' is needed. Addresses ray://... "
            "are not supported: run the command on a machine of the cluster, as by `ray job submit`"
        )
    _package()


def _package() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as e:
        raise InvalidArgument("ray= needs Ray, which is not installed: pip install 'fastdiff[ray]'") from e


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster, or start one of this machine alone ("local"), for the block.

    A connection that the process has already is used, and stays.
    """
    ray = _package()
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": native_threads.number(), "include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        if ":" in address:  # Ray would wait for minutes where nobody answers
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError, OverflowError, AssertionError) as e:
        raise WorkerError(f"ray={address}: there is no connection ({type(e).__name__}: {str(e)[:300]})") from e
    try:
        yield
    finally:
        ray.shutdown()
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own


def number(workers: int | None, gpu: bool) -> int:
    """Return how many workers the cluster has processors for now, or GPUs; more than these are refused.

    An actor for which there is no processor waits for ever.
    """
    kind = "GPU" if gpu else "CPU"
    ray = _package()
    free, there = (int(found.get(kind, 0)) for found in (ray.available_resources(), ray.cluster_resources()))
    if free < (workers or 1):
        raise InvalidArgument(
            f"workers={workers}: the cluster has {there} {kind}s, of which {free} are free; each worker needs one"
        )
    return workers or free


class _Drawer:
    """A worker, as an actor; `counts` answers while `work` runs."""

    def __init__(self) -> None:
        self._counts = [0, 0, 0]

    def work(self, folder: str, rank: int, world: int, threads: int, patience_s: float) -> Message:
        """Work on a job, as `fastdiff.bulk.watching.serve` does."""

        def drawn(images: int, published: bool) -> None:
            self._counts[0] += 1
            self._counts[1 + published] += images

        return watching.serve(folder, rank, world, threads, patience_s, drawn)

    def counts(self) -> tuple[str, int, list[int]]:
        """Return the node and the process of this worker, and its counts."""
        return _package().get_runtime_context().get_node_id(), os.getpid(), self._counts


class _Actor(watching.Place):
    """A place for an actor."""

    def __init__(self, number: int, patience_s: float, make: Callable[[], Any], arguments: tuple[Any, ...]):
        super().__init__(number, patience_s)
        self._ray, self._make, self._arguments = _package(), make, arguments
        self._before, self._now = (0, 0, 0), (0, 0, 0)  # the counts of earlier workers, and of this one
        self._where: tuple[str, int] | None = None

    def start(self) -> None:
        beats, _, published = self.counts_now()
        self._before, self._now = (beats, published, published), (0, 0, 0)
        self._end: str | None = None
        self._where = None
        self._actor = self._make()
        self.done = self._actor.work.remote(*self._arguments)
        self._asked = self._actor.counts.remote()

    def message(self) -> Message | None:
        if not self._ray.wait([self.done], timeout=0)[0]:
            return None
        try:
            return self._ray.get(self.done)
        except self._ray.exceptions.RayError as e:
            self._end = f"ended ({type(e).__name__})"
            return None

    def end(self) -> str | None:
        return self._end

    def counts_now(self) -> Counts:
        beats, drawn, published = (a + b for a, b in zip(self._before, self._now, strict=True))
        return beats, drawn, published

    def counts(self) -> Counts:
        if self._ray.wait([self._asked], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):
                node, process, counts = self._ray.get(self._asked)
                self._where, self._now = (node, process), tuple(counts)
                self._asked = self._actor.counts.remote()
        return self.counts_now()

    def kill(self) -> None:
        works = not self._ray.wait([self.done], timeout=0)[0]
        self._ray.kill(self._actor)
        node = self._ray.get_runtime_context().get_node_id()
        if works and self._where is not None and self._where[0] == node:
            with contextlib.suppress(OSError):  # Ray would wait for a stopped process
                os.kill(self._where[1], signal.SIGKILL)


def run(
    folder: Path,
    workers: int,
    gpu: bool,
    threads: int,
    share: tuple[int, int],
    patience_s: float,
    watch: Callable[[int], None],
) -> None:
    """Run actors until the job is finished, each on a processor or a GPU of its own."""
    ray = _package()
    rank, world = share
    actor = ray.remote(_Drawer).options(
        num_cpus=1, num_gpus=int(gpu), max_restarts=0, max_task_retries=0, max_concurrency=2
    )
    places = [
        _Actor(p, patience_s, actor.remote, (str(folder), rank * workers + p, world * workers, threads, patience_s))
        for p in range(workers)
    ]
    watching.run(places, _pause, watch)


def _pause(places: Sequence[_Actor]) -> None:
    _package().wait([place.done for place in places], timeout=LOOK_S)
