"""The drawing process as the answering process sees it: started, watched, replaced when it ends, and closed.

Everything here runs in one event loop, except two threads that read and write the pipe, so that neither a slow drawing
process nor one that was stopped can hold up the loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from fastdiff.serving import wire
from fastdiff.serving.entry import enter

log = logging.getLogger("fastdiff.serving")

MOST_JOBS = 1024  # at a time; requests beyond are refused
MOST_PREVIEWS = 64  # of a job that wait for a slow reader; the oldest are dropped
SILENT_S = 1.25  # after which a process that gives no sign of life is not ready
STUCK_S = 1.25  # without a step, while there is work; and so many steps' time
STUCK_STEPS = 5
HUNG_S = 60.0  # after which a process that is not ready is replaced; and so many steps' time
HUNG_STEPS = 100
RESTART_S = (0.1, 10.0)  # pause before a process is started again, at first and at most: it doubles
LOST = "EngineLost"


class Failure(Exception):
    """A job has no images; ``error`` is the name of the class of the error that ended it, ``ran`` whether it ran."""

    def __init__(self, error: str, message: str, retry_after_s: float | None = None, ran: bool = False):
        super().__init__(message)
        self.error, self.retry_after_s, self.ran = error, retry_after_s, ran


class Remote:
    """A job in the drawing process."""

    def __init__(self, message: wire.Submit, owner: bytes):
        self.id, self.message, self.owner = message.id, message, owner
        self.accepted: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.outcome: asyncio.Future[wire.Done] = asyncio.get_running_loop().create_future()
        self.previews: collections.deque[wire.Preview] = collections.deque()
        self.news = asyncio.Event()  # a preview, or the outcome
        self.dropped = 0
        self.streams = False  # whether its client reads events
        self.looks: list[asyncio.Future[wire.Looked]] = []
        futures: tuple[asyncio.Future[Any], ...] = (self.accepted, self.outcome)
        for future in futures:  # that nobody may wait for
            future.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    def show(self, preview: wire.Preview) -> None:
        """Keep a preview for the reader."""
        self.previews.append(preview)
        if len(self.previews) > MOST_PREVIEWS:
            self.previews.popleft()
            self.dropped += 1
        self.news.set()

    def settle(self, outcome: wire.Done | Failure) -> None:
        """Give the job its one outcome."""
        if self.outcome.done():
            return
        for looked in self.looks:
            looked.cancel()
        if isinstance(outcome, wire.Done):
            self.outcome.set_result(outcome)
        else:
            self.outcome.set_exception(outcome)
            if not self.accepted.done():
                self.accepted.set_exception(outcome)
        self.news.set()


class Pulse:
    """The signs of life of a process: a function of the times at which they came."""

    def __init__(self, now: float):
        self.started = self.heard = now
        self.ready = False
        self.moved: dict[str, tuple[float, float]] = {}  # steps of each model, and since when they are so many
        self.stats: dict[str, dict[str, float]] = {}

    def beat(self, stats: dict[str, dict[str, float]], now: float) -> None:
        """Note a sign of life."""
        self.heard, self.stats = now, stats
        for name, s in stats.items():
            steps, _ = self.moved.get(name, (math.nan, now))
            idle = not s["waiting"] + s["running"]
            if idle or steps != s["steps"]:
                self.moved[name] = (s["steps"], now)

    def trouble(self, now: float) -> tuple[str, float]:
        """Return why the process is not ready, and for how many allowances of `HUNG_S` that has been so."""
        if not self.ready:
            return "its models are being loaded", 0.0
        if now - self.heard > SILENT_S:
            return f"it gave no sign of life for {now - self.heard:.1f} s", (now - self.heard) / HUNG_S
        # Models take turns, so one may wait while each other one takes a long step.
        step_s = sum(s["longest_s"] for s in self.stats.values())
        for name, (_, since) in self.moved.items():
            still = now - since
            if still > max(STUCK_S, STUCK_STEPS * step_s):
                return f"{name} took no step for {still:.1f} s", still / max(HUNG_S, HUNG_STEPS * step_s)
        return "", 0.0


class Supervisor:
    """Keeps one drawing process running, and hands it jobs.

    Args:
        setup: What the process is started with.
    """

    def __init__(self, setup: wire.Setup):
        self.models: dict[str, wire.Model] = {}
        self.jobs: dict[str, Remote] = {}
        self.restarts = 0
        self.dropped = 0  # previews
        self.totals: dict[str, collections.Counter[str]] = {}  # of all processes that there have been, by model
        self.draining = self.closed = False
        self.pulse = Pulse(time.monotonic())
        self.setup = setup
        self.process: Any = None
        self._last: dict[str, dict[str, float]] = {}
        self._last_dropped = 0
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._broken = ""

    async def run(self) -> str:
        """Run processes until `close`, or until the first one says that it cannot serve; return its message."""
        pause = RESTART_S[0]
        while not self.closed:
            ended = self._start()
            watch = asyncio.get_running_loop().create_task(self._watch(self.process))
            await ended.wait()
            watch.cancel()
            self.process.kill()
            await asyncio.to_thread(self.process.join)
            was_ready, self.pulse = self.pulse.ready, Pulse(time.monotonic())
            if self._broken and not self.models:
                return self._broken
            if self.closed:
                break
            self.restarts += 1
            why = self._broken or f"code {self.process.exitcode}"
            log.error("the drawing process ended with %s; another is started", why)
            self._lose("the process that draws has ended; it is being replaced", pause)
            pause = RESTART_S[0] if was_ready else min(2 * pause, RESTART_S[1])
            await asyncio.sleep(pause)
        return ""

    def _start(self) -> asyncio.Event:
        """Start a process; the event is set when its end of the pipe is closed."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=enter, args=(theirs, wire.encode(self.setup), os.getpid()), name="fastdiff draws", daemon=True
        )
        # Blocked signals stay blocked in the new process until it ignores them. The process ends with the thread that
        # starts it, so that must be this one, not one of a pool.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.process, self._out = process, queue.SimpleQueue()
        self._last, self._last_dropped = {}, 0
        self.pulse = Pulse(time.monotonic())
        threading.Thread(target=_write, args=(ours, self._out), name="fastdiff writes", daemon=True).start()
        arguments = (ours, loop, self._handle, self._out, ended.set)
        threading.Thread(target=_read, args=arguments, name="fastdiff reads", daemon=True).start()
        return ended

    async def _watch(self, process: Any) -> None:
        """End a process that hangs."""
        while True:
            await asyncio.sleep(1.0)
            why, share = self.pulse.trouble(time.monotonic())
            if share > 1.0:
                log.error("the drawing process hangs: %s", why)
                process.kill()
                return

    def close(self) -> None:
        """End the process, and all jobs."""
        self.closed = True
        if self.process is not None:
            self.process.kill()
        self._lose("the server is shutting down", None)

    def _lose(self, message: str, retry_after_s: float | None) -> None:
        for job in list(self.jobs.values()):
            self._settle(job.id, Failure(LOST, message, retry_after_s))

    # Jobs -------------------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """Why images cannot be drawn now; empty if they can."""
        if self.draining:
            return "the server is shutting down"
        if self._broken and not self.pulse.ready:
            return "its models cannot be loaded again; the log says why"
        return self.pulse.trouble(time.monotonic())[0]

    @property
    def alive(self) -> bool:
        """Whether images are drawn, or the models are being loaded for that: what systemd's watchdog asks for."""
        return not self.pulse.ready or not self.pulse.trouble(time.monotonic())[0]

    def submit(self, message: wire.Submit, owner: bytes) -> Remote:
        """Hand over a job."""
        job = self.jobs[message.id] = Remote(message, owner)
        self._out.put(wire.encode(message))
        return job

    def cancel(self, job: Remote) -> None:
        """End a job before its next step, unless it has its outcome."""
        self._out.put(wire.encode(wire.Cancel(job.id)))

    def look(self, job: Remote) -> asyncio.Future[wire.Looked]:
        """Ask for a job's state."""
        looked: asyncio.Future[wire.Looked] = asyncio.get_running_loop().create_future()
        job.looks.append(looked)
        self._out.put(wire.encode(wire.Look(job.id)))
        return looked

    def _settle(self, name: str, outcome: wire.Done | Failure) -> None:
        job = self.jobs.pop(name, None)
        if job is not None:
            self.dropped += job.dropped
            job.settle(outcome)

    def _handle(self, m: wire.FromWorker) -> None:
        if isinstance(m, wire.Beat):
            self._count(m)
            self.pulse.beat(m.stats, time.monotonic())
        elif isinstance(m, wire.Ready):
            self.models, self._broken = {model.name: model for model in m.models}, ""
            self.pulse.heard, self.pulse.ready = time.monotonic(), True
        elif isinstance(m, wire.Broken):
            self._broken = m.message
        elif isinstance(m, wire.Done):
            self._settle(m.id, m)
        elif isinstance(m, wire.Failed):
            self._settle(m.id, Failure(m.error, m.message, m.retry_after_s, m.ran))
        elif (job := self.jobs.get(m.id)) is None:
            pass  # it has its outcome
        elif isinstance(m, wire.Accepted):
            if not job.accepted.done():
                job.accepted.set_result(m.eta_s)
        elif isinstance(m, wire.Preview):
            job.show(m)
        else:
            for looked in job.looks:
                if not looked.done():
                    looked.set_result(m)
            job.looks = []

    def _count(self, m: wire.Beat) -> None:
        """Add up what grows in a process, over the processes."""
        for name, stats in m.stats.items():
            last, totals = self._last.get(name, {}), self.totals.setdefault(name, collections.Counter())
            for key in ("steps", "image_steps", "rows", "busy_s", "previews_dropped"):
                totals[key] += stats[key] - last.get(key, 0)  # type: ignore[assignment]  # a float
        self.dropped += m.dropped - self._last_dropped
        self._last, self._last_dropped = m.stats, m.dropped


def _write(connection: Connection, out: queue.SimpleQueue[bytes | None]) -> None:
    """Write messages until None comes, and close the pipe, which no other thread uses by then."""
    while (message := out.get()) is not None:
        with contextlib.suppress(OSError):  # the process has ended, which the reader notices
            connection.send_bytes(message)
    connection.close()


def _read(
    connection: Connection,
    loop: asyncio.AbstractEventLoop,
    handle: Callable[[wire.FromWorker], None],
    out: queue.SimpleQueue[bytes | None],
    end: Callable[[], None],
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is interested
        try:
            while True:
                loop.call_soon_threadsafe(handle, wire.decode_from_worker(connection.recv_bytes()))
        except (EOFError, OSError):
            loop.call_soon_threadsafe(end)
    out.put(None)
