"""The process that draws: it has an `Engine` for each model, and one pipe to the process that answers requests.

It ends when that process does: by the end of the pipe, and on Linux at once, by a signal of the kernel. It leaves
SIGINT and SIGTERM, which may be sent to the whole group, to that process.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import hashlib
import logging
import math
import os
import queue
import signal
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from fastdiff.data.pictures import check_picture, to_uint8
from fastdiff.errors import BackendError, FastdiffError, OutOfMemory
from fastdiff.sampler import Event, SampleOutput
from fastdiff.sampler.measured import Measured
from fastdiff.serving import logs, wire
from fastdiff.serving.engine import Engine
from fastdiff.serving.job import Job
from fastdiff.serving.lanes import Lanes
from fastdiff.solvers.registry import SOLVERS

log = logging.getLogger("fastdiff.serving")

BEAT_S = 0.25  # between two signs of life
MOST_PREVIEWS = 256  # that wait to be sent; others are dropped
PR_SET_PDEATHSIG = 1


def main(connection: Connection, setup: bytes, parent: int) -> None:
    """Run the process.

    Args:
        connection: The pipe.
        setup: A `wire.Setup`.
        parent: The number of the process that answers requests.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    _end_with(parent)
    given = wire.decode_setup(setup)
    logs.configure(given.log_format)
    _check_cache()
    try:
        lanes = Lanes()
        engines = {name: _engine(model, given, lanes) for name, model in given.models.items()}
    except (FastdiffError, OSError) as e:
        connection.send_bytes(wire.encode(wire.Broken(str(e))))
        return
    asyncio.run(Worker(connection, engines).run())


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _check_cache() -> None:
    """Name another folder for compiled kernels where torch could not make its own.

    Nothing is compiled here, but parts of torch that are imported later make the folder, and fail where they cannot.
    """
    try:
        os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(), exist_ok=True)
    except OSError as e:
        log.warning("the folder of compiled kernels cannot be used, and is not needed: %s", e)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.sep


def _engine(model: str, given: wire.Setup, lanes: Lanes) -> Engine:
    engine = Engine(
        model, max_rows=given.max_rows, max_queue_s=given.max_queue_s, max_steps=given.max_steps,
        backend=given.backend, determinism=given.determinism, lanes=lanes,
    )  # fmt: skip
    check_picture(engine.info.channels)
    return engine


class Worker:
    """Runs the jobs of messages on engines, and answers with messages."""

    def __init__(self, connection: Connection, engines: dict[str, Engine]):
        self._connection, self._engines = connection, engines
        self._jobs: dict[str, Job | None] = {}  # None until the engine has taken it
        self._cancelled: set[str] = set()  # before their engine took them
        self._tasks: set[asyncio.Task[None]] = set()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0

    async def run(self) -> None:
        """Draw an image with each model, say that all is ready, and run jobs until the pipe ends."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._send_all, name="fastdiff sends", daemon=True).start()
        threading.Thread(target=self._receive_all, args=(loop,), name="fastdiff receives", daemon=True).start()
        try:
            for engine in self._engines.values():
                what = {"prompts": ""} if engine.info.text else {"labels": 0 if engine.info.classes else None}
                await engine.generate(1, solver="ddim", steps=1, **what)
        except FastdiffError as e:
            self._send(wire.Broken(str(e)))
            self._out.put(None)
            await asyncio.Event().wait()
        self._send(wire.Ready([_facts(name, engine) for name, engine in self._engines.items()]))
        while True:
            stats = {name: dataclasses.asdict(engine.stats()) for name, engine in self._engines.items()}
            self._send(wire.Beat(stats, self._dropped))
            await asyncio.sleep(BEAT_S)

    # The pipe ---------------------------------------------------------------------------------------------------------

    def _send(self, message: wire.FromWorker) -> None:
        self._out.put(wire.encode(message))

    def _send_all(self) -> None:
        """Send what is queued, in a thread; None ends the process after what was queued before."""
        while (message := self._out.get()) is not None:
            try:
                self._connection.send_bytes(message)
            except OSError:
                break
        os._exit(1)

    def _receive_all(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                message = wire.decode_to_worker(self._connection.recv_bytes())
                loop.call_soon_threadsafe(self._handle, message)
        except (EOFError, OSError):
            os._exit(0)

    # Messages ---------------------------------------------------------------------------------------------------------

    def _handle(self, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Submit):
            self._jobs[message.id] = None
            task = asyncio.get_running_loop().create_task(self._run(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        if message.id not in self._jobs:
            return  # its outcome is on the way
        job = self._jobs[message.id]
        if isinstance(message, wire.Look):
            self._send(wire.Looked(message.id, job.state if job else "waiting", job.eta_s if job else 0.0))
        elif job is None:
            self._cancelled.add(message.id)
        else:
            job.cancel()

    async def _run(self, m: wire.Submit) -> None:
        """Run a job to its outcome, and send that."""
        broken, job = False, None
        try:
            job = await asyncio.to_thread(self._submit, m)
            self._jobs[m.id] = job
            if m.id in self._cancelled:
                job.cancel()
            self._send(wire.Accepted(m.id, job.eta_s))
            first = int(m.options.get("start_index", 0))
            async for event in job:
                self._show(m.id, event, first)
            try:
                output = await job
            except OutOfMemory:  # this job's own
                raise
            except BackendError:  # a step failed: the engine takes no more jobs
                broken = True
                raise
            self._send(await asyncio.to_thread(_done, m.id, job, output))
        except FastdiffError as e:
            ran = job is not None and job.ran_s > 0.0
            self._send(wire.Failed(m.id, type(e).__name__, str(e), getattr(e, "retry_after_s", None), ran))
        except Exception:
            log.exception("job %s ended with an error of fastdiff's own", m.id)
            self._send(wire.Failed(m.id, "Exception", "an error of fastdiff's own; its log says more"))
        finally:
            self._jobs.pop(m.id, None)
            self._cancelled.discard(m.id)
        if broken:
            self._out.put(None)

    def _submit(self, m: wire.Submit) -> Job:
        pictures: dict[str, Any] = {
            name: Image.frombytes(p.mode, (p.width, p.height), p.pixels)
            for name, p in (("image", m.image), ("mask", m.mask))
            if p is not None
        }
        return self._engines[m.model].submit(m.n, request_id=m.id, **m.options, **pictures)

    def _show(self, name: str, event: Event, first: int) -> None:
        """Send a preview, unless too many wait already."""
        if self._out.qsize() >= MOST_PREVIEWS:
            self._dropped += 1
            return
        (index,) = event.indices
        self._send(wire.Preview(name, index - first, event.row, event.rows, to_uint8(event.x0).tobytes()))


def _done(name: str, job: Job, output: SampleOutput) -> wire.Done:
    pixels = to_uint8(output.images)
    receipt = job.receipt
    receipt["pixels_sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    return wire.Done(name, pixels.tobytes(), receipt, job.waited_s, job.ran_s)


def _facts(name: str, engine: Engine) -> wire.Model:
    info, sampler = engine.info, engine.sampler
    assert info.size is not None
    names = None if info.class_names is None else list(info.class_names)
    return wire.Model(
        name=name, width=info.size[1], height=info.size[0], channels=info.channels, classes=info.classes,
        class_names=names, backend=sampler.backend, determinism=sampler.determinism,
        dtype=str(sampler.dtype).removeprefix("torch."),
        solvers=list(SOLVERS), measured=_front(sampler.measurements()), text=info.text,
    )  # fmt: skip


def _front(measured: Measured | None) -> list[wire.Setting]:
    """Return, for each guidance, the settings that are closer to real images than all with fewer evaluations."""
    front: list[wire.Setting] = []
    if measured is None:
        return front
    for guidance in measured.guidances:
        closest = math.inf
        for p in sorted(measured.at(guidance), key=lambda p: (p.nfe, p.distance)):
            if p.distance < closest and not p.eta and p.spacing is None:
                closest = p.distance
                front.append(wire.Setting(p.solver, p.steps, p.guidance, p.nfe, p.distance, p.recall))
    return front
