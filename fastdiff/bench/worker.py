"""A process for each contender, which works during its turns and sleeps otherwise.

Separate processes keep memory and first calls apart, keep thread pools from spinning during the turns of others, and
let the others go on if one crashes. Workers are spawned, not forked, so that they inherit no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.bench import networks, timing
from fastdiff.bench.inputs import Contender, Stepper, Workload, import_all
from fastdiff.errors import FastdiffError

PATIENCE_S = 5.0  # in which a process that was asked to end, does
SETTLING_S = 0.02  # work before a turn is timed, so that threads wake up and caches fill


@dataclasses.dataclass(frozen=True)
class Task:
    """The work that all contenders of a batch do."""

    model: str  # a name or path that `networks.load` takes
    batch: int  # the number of images
    what: str  # "step", or "network" for the network without the update
    threads: int  # of PyTorch
    device: str
    guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Ready:
    """The first results of a contender, for the first and the last image, and their cost."""

    out: np.ndarray  # the network's output at the first row, [2, C or 2C, H, W]
    x: np.ndarray  # the images after one step, [2, C, H, W]
    first_call_s: float  # until the first output, without importing libraries and loading weights
    peak_mib: float | None  # peak memory, see `Worker`


@dataclasses.dataclass(frozen=True)
class Absent:
    """The reason why a contender cannot run here, and whether its process crashed."""

    reason: str
    crashed: bool = False


class Worker:
    """A process that runs a contender. ``start`` makes it ready, ``turn`` times it, ``stop`` ends it.

    Its peak memory is the most that the process held, minus its size with libraries and weights loaded: resident pages
    on a CPU (VmHWM - VmRSS of Linux), memory allocated by torch.cuda on a GPU.
    """

    def __init__(self, contender: Contender, task: Task):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, contender, task))
        self.process.start()
        other.close()

    def start(self) -> Ready | Absent:
        """Wait until the contender has taken its first step or failed."""
        return self._receive()

    def turn(self, seconds: float) -> tuple[float, float | None] | Absent:
        """Measure the seconds of a step, a mean over at least ``seconds`` and two steps, and the peak memory so far."""
        try:
            self.pipe.send(seconds)
        except OSError:
            return self._crashed()
        return self._receive()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return self._crashed()

    def _crashed(self) -> Absent:
        self.process.join(PATIENCE_S)
        code = self.process.exitcode
        reason = f"its process ended with exit code {code}"
        if code == -9:
            reason += ", as where memory runs out: fewer --engines at a time, and --save, which the next run adds to"
        return Absent(reason, crashed=True)


def _work(pipe: Any, contender: Contender, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; this process ends with its pipe
    torch.set_num_threads(task.threads)
    # Exporters and compilers warn about details of the network, which would drown the progress.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that a first call finds nothing compiled
        try:
            stepper, memory, ready = _prepare(contender, task)
        except Exception as e:
            line = (str(e).strip().splitlines() or [""])[0]
            pipe.send(Absent(line if isinstance(e, FastdiffError) else f"{type(e).__name__}: {line}"))
            return
        pipe.send(ready)
        run = stepper.step if task.what == "step" else stepper.forward
        wait = None if task.device == "cpu" else torch.cuda.synchronize
        while True:
            try:
                seconds = pipe.recv()
            except (EOFError, ConnectionResetError):  # the latter if the previous answer was never read
                return
            timing.mean_seconds(run, SETTLING_S, wait=wait)
            pipe.send((timing.mean_seconds(run, seconds, 2, wait=wait), memory.peak_mib()))


def _prepare(contender: Contender, task: Task) -> tuple[Stepper, Memory, Ready]:
    import_all(contender.needs)
    model = networks.load(task.model)
    workload = Workload.of(model, task.batch, task.device, task.guidance)
    memory = Memory(task.device)
    started = time.perf_counter()
    stepper = contender.make(model, workload)
    out = _picked(stepper.forward())
    seconds = time.perf_counter() - started
    return stepper, memory, Ready(out, _picked(stepper.step()), seconds, memory.peak_mib())


def _picked(x: Tensor) -> np.ndarray:
    return np.asarray(x[[0, -1]].detach().float().cpu().contiguous().numpy()).copy()


class Memory:
    """Memory of this process beyond its size when this object was made."""

    def __init__(self, device: str):
        self.device = device
        self.before: int | None
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.before = _status("VmRSS")

    def peak_mib(self) -> float | None:
        """Return the peak so far in MiB; None if the system does not report it."""
        peak = _status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return None if peak is None or self.before is None else round((peak - self.before) / 2**20, 1)


def _status(key: str) -> int | None:
    """Read a size, in bytes, from Linux's /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)
