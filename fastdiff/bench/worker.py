"""An engine in a process of its own, which works when its turn comes and sleeps otherwise.

So an engine's memory and first call are its own, its thread pool is idle (and not spinning) in the turns of others, and
if it crashes the others go on. Workers are spawned, not forked: they begin with nothing of this process.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.bench import networks
from fastdiff.bench.peers import Engine, Inputs, Steps, import_all
from fastdiff.errors import FastdiffError

SETTLING_S = 0.02  # work before a turn is timed: threads wake up, caches fill


@dataclasses.dataclass(frozen=True)
class Task:
    """What all engines of a batch do: ``what`` is "step" or "network" (no update); guidance is w of a guided step."""

    model: str
    batch: int
    what: str
    threads: int
    device: str
    guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Ready:
    """An engine that ran: what it made of two images, the first and the last, and what that cost.

    out: the network's output at the first row [2, ...]; x: after one step. first_call_s: until the first output,
    without importing libraries and loading weights. peak_mib: see `Worker`.
    """

    out: np.ndarray
    x: np.ndarray
    first_call_s: float
    peak_mib: float | None


@dataclasses.dataclass(frozen=True)
class Absent:
    """An engine that cannot run here, and why."""

    reason: str
    crashed: bool = False


class Worker:
    """A process with an engine. ``start`` makes it ready, ``turn`` times it, ``stop`` ends it.

    Its peak memory is the most that the process held at a time, over what it held with libraries and weights loaded:
    resident pages on a CPU (Linux: VmHWM - VmRSS), else what torch.cuda allocated.
    """

    def __init__(self, engine: Engine, task: Task):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, engine, task))
        self.process.start()
        other.close()

    def start(self) -> Ready | Absent:
        """Wait until it has made its first step, or failed to."""
        return self._receive()

    def turn(self, seconds: float) -> tuple[float, float | None] | Absent:
        """Seconds a step, the mean over at least ``seconds`` and two steps; and its peak memory so far."""
        try:
            self.pipe.send(seconds)
        except OSError:
            return self._crashed()
        return self._receive()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return self._crashed()

    def _crashed(self) -> Absent:
        self.process.join(5)
        code = self.process.exitcode
        reason = f"its process ended with exit code {code}"
        if code == -9:
            reason += ", as where memory runs out: fewer --engines at a time, and --save, which the next run adds to"
        return Absent(reason, crashed=True)


def _work(pipe: Any, engine: Engine, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that prints; this one ends with its pipe
    torch.set_num_threads(task.threads)
    warnings.simplefilter("ignore")  # what exporters and compilers say of the network is not the user's business,
    logging.disable(logging.WARNING)  # and would drown the progress
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # a first call is one that finds nothing compiled
        try:
            steps, memory, ready = _prepare(engine, task)
        except Exception as e:
            line = (str(e).strip().splitlines() or [""])[0]
            pipe.send(Absent(line if isinstance(e, FastdiffError) else f"{type(e).__name__}: {line}"))
            return
        pipe.send(ready)
        run = steps.step if task.what == "step" else steps.forward
        while True:
            try:
                seconds = pipe.recv()
            except (EOFError, ConnectionResetError):  # the latter where what it was sent before was never read
                return
            _time(run, SETTLING_S, 1, task.device)
            pipe.send((_time(run, seconds, 2, task.device), memory.peak_mib()))


def _prepare(engine: Engine, task: Task) -> tuple[Steps, Memory, Ready]:
    import_all(engine.needs)
    model = networks.load(task.model)
    inputs = Inputs.of(model, task.batch, task.device, task.guidance)
    memory = Memory(task.device)
    started = time.perf_counter()
    steps = engine.make(model, inputs)
    out = _picked(steps.forward())
    seconds = time.perf_counter() - started
    return steps, memory, Ready(out, _picked(steps.step()), seconds, memory.peak_mib())


def _picked(x: Tensor) -> np.ndarray:
    return np.asarray(x[[0, -1]].detach().float().cpu().contiguous().numpy()).copy()


def _time(run: Callable[[], Any], seconds: float, least: int, device: str) -> float:
    """Seconds of a call: the mean over at least so many calls and seconds."""
    started = time.perf_counter()
    calls = 0
    while calls < least or time.perf_counter() - started < seconds:
        run()
        calls += 1
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


class Memory:
    """What a process holds beyond what it held when this was made."""

    def __init__(self, device: str):
        self.device = device
        self.before: int | None
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.before = _status("VmRSS")

    def peak_mib(self) -> float | None:
        """The most so far, None where the system does not tell."""
        peak = _status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return None if peak is None or self.before is None else round((peak - self.before) / 2**20, 1)


def _status(key: str) -> int | None:
    """Bytes that Linux's /proc/self/status gives."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)
