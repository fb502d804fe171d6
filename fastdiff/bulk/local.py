"""Worker processes of this machine.

Each is spawned and loads the model itself. It ends when the pipe to its parent does, so none outlives a killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from fastdiff.bulk import watching
from fastdiff.bulk.watching import LOOK_S, Counts, Message
from fastdiff.errors import InvalidArgument

GPU = "CUDA_VISIBLE_DEVICES"
UNGUARDED = 78  # exit code of a worker that was about to start workers itself


class _Process(watching.Place):
    """A place for a process."""

    def __init__(self, number: int, patience_s: float, context: Any, counts: Any, arguments: tuple[Any, ...]):
        super().__init__(number, patience_s)
        self._context, self._counts, self._arguments = context, counts, arguments

    def start(self) -> None:
        self._counts[3 * self.number + 1] = self._counts[3 * self.number + 2]  # what was drawn in vain
        self.pipe, other = self._context.Pipe()
        self.process = self._context.Process(target=_run, args=(other, self._counts, self.number, *self._arguments))
        self.process.start()
        other.close()

    def message(self) -> Message | None:
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            return None

    def end(self) -> str | None:
        if self.process.is_alive():
            return None
        code = self.process.exitcode
        if code == UNGUARDED:
            raise InvalidArgument(
                "generate starts processes, and each of them imports the script that calls it: call it under `if "
                '__name__ == "__main__":`, or with a Sampler in the place of the model, which draws here'
            )
        return f"ended with exit code {code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")

    def counts(self) -> Counts:
        beat, drawn, published = self._counts[3 * self.number : 3 * self.number + 3]
        return beat, drawn, published

    def kill(self) -> None:
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
    gpus: Sequence[str] = (),
) -> None:
    """Run worker processes until the job is finished.

    ``gpus`` are the devices that the workers take in turns, one each, as CUDA_VISIBLE_DEVICES names them. ``watch`` is
    called as by `fastdiff.bulk.watching.run`, which says more.
    """
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3 * workers, lock=False)
    rank, world = share
    places = []
    for p in range(workers):
        environment = {GPU: gpus[p % len(gpus)]} if gpus else {}
        arguments = (environment, str(folder), rank * workers + p, world * workers, threads, patience_s)
        places.append(_Process(p, patience_s, context, counts, arguments))
    watching.run(places, _pause, watch)


def check_guarded() -> None:
    """End this process where it is a worker that is still importing the script of its parent, which calls `generate`.

    It would start workers itself. The parent knows the exit code and says what to do.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(UNGUARDED)


def _pause(places: Sequence[_Process]) -> None:
    wait([end for place in places for end in (place.process.sentinel, place.pipe)], LOOK_S)


def gpus(index: int | None = None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that this process may give to its workers, as CUDA_VISIBLE_DEVICES names them.

    Where torchrun has started several processes on this machine, each has its own part of them. ``index`` chooses one
    of those that are visible, as in the device "cuda:1".
    """
    count = torch.cuda.device_count()
    listed = environment.get(GPU)
    names = [str(i) for i in range(count)] if listed is None else [name.strip() for name in listed.split(",")][:count]
    if index is not None:
        if index >= len(names):
            raise InvalidArgument(f"device=cuda:{index}: {len(names)} GPUs are visible here")
        return [names[index]]
    rank, world = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if not names or not (rank.isdecimal() and world.isdecimal()):
        return names
    return names[int(rank) :: max(int(world), 1)] or [names[int(rank) % len(names)]]


def _run(
    pipe: Any, counts: Any, place: int, environment: Mapping[str, str], folder: str, rank: int, world: int,
    threads: int, patience_s: float,
) -> None:  # fmt: skip
    """Work in a process of its own."""
    os.environ.update(environment)  # before the first call of CUDA, which reads it
    ignore_interrupts_and_end_with(pipe)

    def drawn(images: int, published: bool) -> None:
        counts[3 * place] += 1
        counts[3 * place + 1 + published] += images

    pipe.send(watching.serve(folder, rank, world, threads, patience_s, drawn))


def ignore_interrupts_and_end_with(pipe: Any) -> None:
    """Leave Ctrl-C to the parent, and end this process when the parent has gone, which closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_with(pipe: Any) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)
