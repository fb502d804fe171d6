"""`Engine`: one network for many callers, whose images share its steps."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import hashlib
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import __version__
from fastdiff.checks import number, one_of, optional, shown, text, whole
from fastdiff.core import process
from fastdiff.core.lower import text_attentions
from fastdiff.core.slots import MOST_ROWS, Slots, Text
from fastdiff.core.turns import reentrant
from fastdiff.errors import (
    BackendError,
    Cancelled,
    DeadlineImpossible,
    DeadlineMissed,
    EngineClosed,
    InvalidArgument,
    NumericsError,
    OutOfMemory,
    QueueFull,
)
from fastdiff.modes import plain_modes
from fastdiff.sampler import Event, SampleOutput, Sampler, choice
from fastdiff.sampler.editing import Inpainting
from fastdiff.sampler.loop import at_first_row, check_numbers, empty, initial_noise
from fastdiff.sampler.options import NetworkInfo, Options
from fastdiff.sampler.request import Request
from fastdiff.serving import scheduler
from fastdiff.serving.job import Job
from fastdiff.serving.lanes import Lanes
from fastdiff.serving.scheduler import Curve, Load, Want
from fastdiff.solvers import StepTable

log = logging.getLogger("fastdiff")

MOST_SLOTS = 64
SLOT_BYTES = 256 << 20  # of all images in flight, with the keys and values of their texts
MOST_TABLES = 256  # whose coefficients are kept
LINGER_S = 1.0  # for which the thread of an engine without jobs waits for one
SLOW_STEP_S = 0.2  # a step that takes longer is measured once
FOLLOW = 0.1  # weight of the last step in the present cost of steps
MOST_CHANGE = 4.0  # by which one step can have been slower or faster: a process may have been stopped meanwhile
AHEAD = 64  # images whose noise is drawn when their job is submitted; that of others while it runs, a few at a time
LARGEST = float(np.finfo(np.float32).max)
CHOSEN = ("solver", "steps", "eta", "variance", "order", "quality")  # what another setting replaces


@dataclasses.dataclass(frozen=True)
class Stats:
    """The present load of an engine, and what it has done.

    Attributes:
        waiting: Jobs whose first step has not begun.
        running: Jobs whose images are in flight.
        queued_s: Seconds of work in all jobs.
        images: Images in flight.
        step_rows: Network rows of the last step.
        steps: Steps so far.
        image_steps: Rows of step tables that images have taken.
        finished: Jobs that were finished.
        failed: Jobs that ended with an error.
        cancelled: Jobs that were cancelled.
        refused: Calls of `Engine.submit` that were refused for lack of time or room.
        previews_dropped: Previews that no one read in time.
        rows: Network rows of all steps so far.
        busy_s: Seconds of all steps so far.
        cap: Network rows of a step of several jobs.
        step_s: Seconds of a step of so many.
        longest_s: Seconds of a step of the most rows.
    """

    waiting: int
    running: int
    queued_s: float
    images: int
    step_rows: int
    steps: int
    image_steps: int
    finished: int
    failed: int
    cancelled: int
    refused: int
    previews_dropped: int
    rows: int
    busy_s: float
    cap: int
    step_s: float
    longest_s: float


class Task:
    """A job on the engine's side."""

    def __init__(self, job: Job, r: Request, arrived: float, deadline: float | None, previews: int):
        self.job, self.request = job, r
        self.arrived = self.served = arrived
        self.deadline = deadline
        self.due = math.inf
        self.width = [1 + (g != 1.0) for g in r.guidance.tolist()]  # of most rows
        guided = sum(1 for row in r.table.rows if row.g)
        self.rows = len(r.table) * r.n + guided * sum(w - 1 for w in self.width)  # network rows that are left
        self.at_once = sum(self.width[: scheduler.TOGETHER])
        self.shows = {len(r.table) * (i + 1) // (previews + 1) - 1 for i in range(previews)} - {-1}
        self.slots: dict[int, int] = {}  # by the position of an image
        self.begun = self.ended = 0  # images
        self.x: list[Tensor] = []  # the images of so many before their first row, those that have begun as well
        self.result: Tensor | None = None
        self.coefficients: Any = None
        self.known: Load | None = None  # the load, until the job takes a step
        self.ready = False  # whether it may take one
        self.degraded = False  # whether its setting was chosen for its deadline

    def load(self, slots: Slots) -> Load:
        """Return what the scheduler sees."""
        if self.known is None:
            wants = [Want((self, i), slots.network_rows([slot]), True) for i, slot in self.slots.items()]
            more = range(self.begun, min(self.begun + scheduler.TOGETHER, self.request.n))
            wants += [Want((self, i), self.width[i], False) for i in more]
            self.known = Load(self, self.arrived, self.due, self.served, wants, self.rows)
        return self.known


class Engine:
    """Draws images for many callers at once with one network, whose steps their images share.

    Images at any steps of any solvers, with and without guidance, join a batch and leave it between two steps. Each
    step, a scheduler chooses the jobs that are due first, so that short jobs do not wait for long ones. With
    determinism "bitwise" an image has the same bits whatever else runs.

    Methods may be called from any thread, and from tasks of asyncio. As a context manager the engine closes itself. It
    works in a thread of its own, which it has only while there are jobs.

    Args:
        model: Name of a built-in model, a path, or a `Sampler`, of which the engine takes a copy: it draws with the
            weights that the network has now.
        max_rows: Network rows of a step at most, at least 1; a guided image has two. None: as many as pay off, by what
            steps cost when the engine is made.
        max_queue_s: Seconds of work that may be queued; jobs beyond are refused.
        determinism: As for `Sampler`, with the backend native; "seed" is needed for others.
        backend: As for `Sampler`; "native" and "eager" can advance the images of a batch separately.
        device: As for `Sampler`.
        dtype: As for `Sampler`.
        max_steps: Rows of a job's step table at most; jobs beyond are refused.
        lanes: Takes turns with the engines of these lanes, step by step, where several share a processor.
        **source: Further options of `Sampler.from_pretrained`.

    Raises:
        InvalidArgument: If a value is not allowed, or options for loading are given with a `Sampler`.
        BackendError: If the backend cannot run the network, or advances whole batches only.
        CheckpointError: If the model cannot be loaded.
    """

    @process.work()
    def __init__(
        self,
        model: str | Path | Sampler,
        *,
        max_rows: int | None = None,
        max_queue_s: float = 30.0,
        determinism: str = "bitwise",
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_steps: int = MOST_ROWS,
        lanes: Lanes | None = None,
        **source: Any,
    ):
        self._max_steps = whole("max_steps", max_steps, 1, MOST_ROWS)
        most = None if max_rows is None else whole("max_rows", max_rows, 1)
        self._max_queue_s = number("max_queue_s", max_queue_s, above=0, need="a positive number of seconds")
        given = {"determinism": (determinism, "bitwise"), "backend": (backend, "auto"), "device": (device, None),
                 "dtype": (dtype, None), **{name: (value, None) for name, value in source.items()}}  # fmt: skip
        if not isinstance(lanes, Lanes | None):
            raise InvalidArgument(f"lanes={shown(lanes)}: fastdiff.serving.Lanes, or None, is needed")
        if isinstance(model, Sampler):
            for name, (value, default) in given.items():
                if value != default:
                    raise InvalidArgument(
                        f"{name}={shown(value)}: a Sampler has its own; give a name or a path instead"
                    )
            self._sampler = copy.deepcopy(model)
        else:
            options = {name: value for name, (value, _) in given.items()}
            self._sampler = Sampler.from_pretrained(model, **options)
        if self._sampler.autoencoder is not None:
            raise InvalidArgument(
                "the network's images are latents, which an Engine does not decode yet; a Sampler does"
            )
        info = self._sampler.info
        if info.size is None:
            raise InvalidArgument("the network's configuration has no sample_size, so the size of images is not known")
        if info.condition:
            raise InvalidArgument(
                f"the network reads a condition image of {info.condition} channels, which an Engine does not give it "
                "yet; a Sampler does"
            )
        self._shape = (info.channels, *info.size)
        self._runners = self._sampler._runners
        self._text = _texts_of(self._sampler.request(1, prompts="", steps=1), 0)[0] if info.text else None
        each = 24 * math.prod(self._shape) + 2 * self._text_bytes()
        capacity = max(2 * scheduler.TOGETHER, min(MOST_SLOTS, SLOT_BYTES // each))
        self._runner = self._runners.stepwise(capacity, self._shape)
        labelled = info.classes is not None or info.null_label is not None
        self._slots = Slots(capacity, self._shape, self._sampler.device, labelled, self._text)
        self._curve = self._measured(most)
        self._most = self._curve.most  # network rows of a step, unless device memory turns out to be short
        self._lane = (Lanes() if lanes is None else lanes).join()
        self._changed = threading.Condition()  # also guards what follows
        self._tasks: dict[Task, None] = {}
        self._tables: collections.OrderedDict[StepTable, Any] = collections.OrderedDict()
        self._counts: Any = collections.Counter()  # of floats, too
        self._refusal = ""  # why no job is taken
        self._closed = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def sampler(self) -> Sampler:
        """The engine's own copy of the sampler."""
        return self._sampler

    @property
    def info(self) -> NetworkInfo:
        """Facts about the network: its images, classes and their names."""
        return self._sampler.info

    # Callers --------------------------------------------------------------------------------------------------------

    @process.work()
    @plain_modes()
    def submit(
        self,
        n: int = 1,
        *,
        deadline_s: float | None = None,
        on_deadline: str = "fail",
        priority: float = 0,
        previews: int = 0,
        request_id: str | None = None,
        **options: Any,
    ) -> Job:
        """Queue a job, and return at once.

        Args:
            n: Number of images, at least 1.
            deadline_s: Seconds from now after which the images are of no use: the job is refused at once if it cannot
                be finished by then, and ends with `DeadlineMissed` if it is not. None for no deadline.
            on_deadline: "fail", or "degrade": a job that cannot be finished in time is drawn with the best setting that
                can, by the model's measurements, in place of its solver and steps.
            priority: A unit of priority makes a job due a second earlier; from -1000 to 1000.
            previews: Number of previews of each image, which ``async for event in job`` yields, from 0 to 1000.
            request_id: The job's name, at most 200 characters; None: one is made.
            **options: Options of `Sampler.sample`. Not possible are batch_size, guide, noise as a function, and another
                size than the network's own.

        Returns:
            The job.

        Raises:
            InvalidArgument: If an option is not allowed; the message says what is.
            QueueFull: If so much work is queued that the job would exceed ``max_queue_s``.
            DeadlineImpossible: If the deadline cannot be kept.
            EngineClosed: If the engine was closed, is draining or has failed, or was made in another process.
        """
        arrived = time.monotonic()
        deadline = None
        if deadline_s is not None:
            deadline = arrived + number("deadline_s", deadline_s, above=0, need="a positive number of seconds")
        one_of("on_deadline", on_deadline, ("fail", "degrade"))
        priority = number("priority", priority, low=-1000, high=1000)
        previews = whole("previews", previews, 0, 1000)
        optional(text)("request_id", request_id)
        if request_id is not None and not 1 <= len(request_id) <= 200:
            raise InvalidArgument(f"request_id={shown(request_id)}: from 1 to 200 characters are needed")
        self._check_open()
        _check_possible(options)
        measured = self._degradable(options) if on_deadline == "degrade" else None
        r = self._checked(n, options)
        job = Job(request_id or f"job-{secrets.token_hex(8)}", self._eta, self._check_outside)

        def planned(r: Request) -> Task:
            task = Task(job, r, arrived, deadline, previews)
            task.result = empty(r)
            task.due = scheduler.due(arrived, self._curve.run_s(task.rows, task.at_once), deadline, priority)
            return task

        task = planned(r)
        try:
            try:
                self._admit(task)
            except DeadlineImpossible as late:
                if measured is None:
                    raise
                task = planned(self._degraded(n, measured, task, late))
                task.degraded = True
                self._admit(task)
            self._prepare(task)
        except BaseException:
            with self._changed:
                self._tasks.pop(task, None)
            raise
        self._start(task)
        return job

    async def generate(self, n: int = 1, **options: Any) -> SampleOutput:
        """Run a job in a task of asyncio; cancelling the task cancels the job.

        Args:
            n: Number of images, at least 1.
            **options: Options of `submit`.

        Returns:
            The images.

        Raises:
            FastdiffError: As `submit` and `Job.result` raise.
        """
        submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, n, **options))
        try:
            job = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
            raise
        try:
            return await job
        except asyncio.CancelledError:
            job.cancel()
            raise

    def stats(self) -> Stats:
        """Return the present load.

        Returns:
            The numbers of jobs and steps, and what they cost.
        """
        with self._changed:
            tasks, counts, curve = list(self._tasks), dict(self._counts), self._curve
            dropped = counts.get("dropped", 0) + sum(task.job.previews_dropped for task in tasks)
        running = [task for task in tasks if task.begun]
        return Stats(
            waiting=len(tasks) - len(running), running=len(running),
            queued_s=sum(task.rows for task in tasks if not task.job.done()) * curve.row_s,
            images=sum(len(task.slots) for task in running),
            previews_dropped=dropped, cap=curve.cap, step_s=curve.seconds(curve.cap), longest_s=curve.longest_s,
            **{name: counts.get(name, 0) for name in
               ("step_rows", "steps", "image_steps", "rows", "busy_s", "finished", "failed", "cancelled", "refused")},
        )  # fmt: skip

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs, and wait until the present ones have ended.

        Args:
            timeout_s: Seconds to wait at most; None for no limit.

        Returns:
            Whether all have ended; those that have not go on.
        """
        if timeout_s is not None:
            number("timeout_s", timeout_s, low=0)
        self._check_outside()
        with self._changed:
            self._refusal = self._refusal or "is draining"
            return self._changed.wait_for(lambda: not self._tasks, timeout_s)

    def close(self) -> None:
        """Cancel all jobs, end the thread and free everything; a step that runs is finished first."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed, self._refusal = True, "is closed"
            tasks, thread = list(self._tasks), self._thread
            self._changed.notify_all()
        for task in tasks:
            task.job.settle(error=Cancelled(f"job {task.job.id} was cancelled: its engine was closed"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._changed:
            for task in list(self._tasks):
                self._forget(task)
        self._lane.close()
        self._sampler.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Admission --------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineClosed("the engine was made in another process, of which this is a fork; make another engine")
        if self._refusal:
            raise EngineClosed(f"the engine {self._refusal}; make another engine")

    def _check_outside(self) -> None:
        """Refuse to wait in the engine's own thread, in a function that it calls."""
        if self._thread is threading.current_thread():
            raise reentrant("the engine")

    def _checked(self, n: int, options: dict[str, Any]) -> Request:
        r = self._sampler.request(n, **options)
        if r.shape != self._shape:
            size, own = ("x".join(map(str, shape[1:])) for shape in (r.shape, self._shape))
            raise InvalidArgument(f"size={size}: an Engine draws images of the network's own size, {own}")
        if len(r.table) > self._max_steps:
            raise InvalidArgument(
                f"{len(r.table)} rows of {r.table.solver}: this Engine runs at most {self._max_steps}; give fewer steps"
            )
        if float(np.abs(r.guidance).max()) > LARGEST:
            raise InvalidArgument(f"guidance={shown(options['guidance'])}: at most {LARGEST:.3g} fits float32")
        if r.prompts is not None and r.prompts.given is not None:
            raise InvalidArgument("texts that were encoded before are not taken: an Engine encodes prompts= itself")
        if r.texts is not None and self._text is not None and r.texts.states.shape[1:] != self._text.states.shape:
            given, needed = list(r.texts.states.shape[1:]), list(self._text.states.shape)
            raise InvalidArgument(f"prompts: the text encoder gives states {given}, and {needed} for an empty text")
        return r

    def _admit(self, task: Task) -> None:
        """Take a task into the queue, or refuse it."""
        with self._changed:
            self._check_open()
            self._check_room(task)
            self._tasks[task] = None
            self._count_queued()

    def _check_room(self, task: Task) -> None:
        """Refuse a task for which there is no room or time. Called with the lock."""
        curve = self._curve
        queued = self._queued()
        queued_s, run_s = sum(t.rows for t in queued) * curve.row_s, task.rows * curve.row_s
        if queued and queued_s + run_s > self._max_queue_s:
            self._counts["refused"] += 1
            raise QueueFull(
                f"{queued_s:.3g} s of work are queued, and {run_s:.3g} s more would exceed {self._max_queue_s:g} s; "
                "try again later, or give the engine a larger max_queue_s",
                max(queued_s + run_s - self._max_queue_s, 0.0),
            )
        if task.deadline is not None:
            run_s, finish_s = self._run_s(task), self._finish_s(task)
            if time.monotonic() + finish_s > task.deadline:
                self._counts["refused"] += 1
                raise DeadlineImpossible(
                    f"deadline_s={task.deadline - task.arrived:.3g} cannot be kept: the job would be finished after "
                    f"about {finish_s:.3g} s, {finish_s - run_s:.3g} s of which it would wait; ask for fewer steps or "
                    "images, or for on_deadline='degrade'"
                )

    def _count_queued(self) -> None:
        """Tell the other lanes how much work there is. Called with the lock."""
        self._lane.queued_s = sum(t.rows for t in self._queued()) * self._curve.row_s

    def _queued(self) -> list[Task]:
        """Return the tasks that still cost something: not those that were cancelled since the last step."""
        return [task for task in self._tasks if not task.job.done()]

    def _run_s(self, task: Task) -> float:
        return self._curve.run_s(task.rows, task.at_once)

    def _finish_s(self, task: Task) -> float:
        """Return the seconds until a task is finished: what is due before it, itself, and other lanes' turns meanwhile.

        Called with the lock.
        """
        return self._lane.finish_s(self._before_s(task) + self._run_s(task))

    def _before_s(self, task: Task) -> float:
        """Return the seconds of this engine's work that is due before a task. Called with the lock."""
        return sum(t.rows for t in self._queued() if t is not task and t.due <= task.due) * self._curve.row_s

    def _eta(self, job: Job) -> float:
        with self._changed:
            task = next((task for task in self._tasks if task.job is job), None)
            return 0.0 if task is None else self._finish_s(task)

    def _degradable(self, options: dict[str, Any]) -> Options:
        """Return the options without a setting; refuse what measurements say nothing about."""
        o = Options.named("submit", {name: value for name, value in options.items() if name not in CHOSEN})
        points, why = choice.comparable(o, self._sampler.measurements())
        if not points:
            raise InvalidArgument(f"on_deadline='degrade' needs measurements of this model for these options: {why}")
        return o

    def _degraded(self, n: int, o: Options, task: Task, late: DeadlineImpossible) -> Request:
        """Return the request with the best measured setting for which there is time."""
        assert task.deadline is not None
        slower = 1 + self._lane.busy_others()  # all of them may have work for as long
        with self._changed:
            waits = slower * self._before_s(task)
        left = task.deadline - time.monotonic() - waits
        row_s = slower * self._curve.run_s(sum(task.width), task.at_once)  # of one row of all images
        if left <= 0.0:
            raise late
        try:
            chosen = choice.in_time(
                dataclasses.replace(o, deadline_s=left), self._sampler.schedule, self._sampler.measurements(), n=n,
                chunks=1, seconds=row_s, elapsed=0.0,
            )  # fmt: skip
        except InvalidArgument as e:
            raise DeadlineImpossible(f"{late}; the shortest measured setting takes too long, too") from e
        r = self._checked(n, vars(chosen))
        log.info("job %s: %s with %d rows, for its deadline", task.job.id, r.table.solver, len(r.table))
        return r

    def _prepare(self, task: Task) -> None:
        """Do what a job needs before its first step, in the caller's thread: its noise and the numbers of its table."""
        r = task.request
        self._draw(task, AHEAD)
        with self._changed:
            known = self._tables.get(r.table)
        coefficients = r.table.coefficients if known is None else known[1]
        with self._changed:
            # The bank of the slots knows tables by identity: equal ones are the same object.
            table, task.coefficients = self._tables.setdefault(r.table, (r.table, coefficients))
            self._tables.move_to_end(table)
            while len(self._tables) > MOST_TABLES:
                self._tables.popitem(last=False)
        task.request = dataclasses.replace(r, table=table)

    def _draw(self, task: Task, images: int) -> None:
        """Make the states before the first row of some more images of a job."""
        r, device, first = task.request, self._sampler.device, len(task.x)
        chunk = range(first, min(first + images, r.n))
        if isinstance(r.noise, Tensor):
            z = r.noise[first : chunk.stop].detach().to(device=device, dtype=torch.float32)
        else:
            z = initial_noise(r.seeds(chunk), r.indices(chunk), r.shape, device)
        image = None if r.image is None else r.image[first : chunk.stop].to(device)
        task.x += at_first_row(r, z, image)

    def _start(self, task: Task) -> None:
        """Hand a prepared task to the thread."""
        with self._changed:
            if task not in self._tasks:
                return
            task.known = None
            task.ready = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="fastdiff engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Take steps while there are jobs. An error that is not one job's ends all of them, and the engine."""
        try:
            while self._has_work():
                self._lane.take()
                with process.work():
                    self._step()
        except BaseException as e:
            log.exception("a step of the engine failed")
            self._fail(e)
            self._lane.leave()

    def _has_work(self) -> bool:
        """Wait for jobs; return False, and forget the thread, if there are none for a while or the engine is closed."""
        with self._changed:
            if not any(task.ready for task in self._tasks) and not self._closed:
                self._lane.leave()
                self._changed.wait(LINGER_S)
            if self._closed or not self._tasks:
                self._lane.leave()  # before another thread can take turns for this engine
                self._thread = None
                return False
            return True

    def _fail(self, e: BaseException) -> None:
        what = f"failed: a step raised {type(e).__name__}: {e}"
        with self._changed:
            self._refusal, self._thread = self._refusal or what, None
            tasks = list(self._tasks)
        for task in tasks:
            error = BackendError(f"job {task.job.id} was ended, because its engine {what}")
            error.__cause__ = e
            task.job.settle(error=error)
        with self._changed:
            for task in tasks:
                self._forget(task)

    @plain_modes()
    def _step(self) -> None:
        """Take one step: end jobs that were cancelled or are late, choose images, advance them, finish jobs."""
        now = time.monotonic()
        with self._changed:
            tasks, curve = [task for task in self._tasks if task.ready], self._curve
        live = []
        for task in tasks:
            if task.deadline is not None and now > task.deadline:
                task.job.settle(error=DeadlineMissed(f"job {task.job.id} was not finished before its deadline"))
            if task.job.done():
                self._retire(task)
            else:
                live.append(task)
        chosen = scheduler.pick(now, [task.load(self._slots) for task in live], curve, len(self._slots.free))
        if not chosen:
            return
        by_task = _by_task(chosen)
        for task, images in by_task.items():
            for i in images:
                if i not in task.slots:
                    self._enter(task, i)
        by_task, rows = self._advance_what_fits(by_task)
        seconds, now = time.monotonic() - now, time.monotonic()
        for task, images in by_task.items():
            task.served, task.known = now, None
            self._leave(task, images)
            if task.ended == task.request.n:
                self._finish(task)
        if not by_task:
            return
        with self._changed:
            curve = self._curve
            slower = min(max(seconds / curve.seconds(rows), 1.0 / MOST_CHANGE), MOST_CHANGE)
            self._curve = dataclasses.replace(curve, scale=curve.scale * (1.0 + FOLLOW * (slower - 1.0)))
            self._counts.update(steps=1, image_steps=sum(map(len, by_task.values())), rows=rows)
            self._counts["busy_s"] += seconds
            self._counts["step_rows"] = rows
            self._count_queued()

    def _enter(self, task: Task, i: int) -> None:
        """Put image i of a job into a slot."""
        r = task.request
        if not task.begun:
            task.job.begin()
        seed = r.seed if isinstance(r.seed, int) else r.seed[i]
        if i >= len(task.x):
            self._draw(task, scheduler.TOGETHER)
        task.slots[i] = self._slots.admit(
            task.x[i], r.table, seed=seed, index=r.index[i],
            label=None if r.labels is None or r.prompts is not None else int(r.labels[i]),
            guidance=float(r.guidance[i]), rescale=r.guidance_rescale, coefficients=task.coefficients,
            texts=None if r.prompts is None else _texts_of(r, i),
        )  # fmt: skip
        # The memory is free once no image that was drawn with it waits.
        task.x[i] = torch.empty(0, dtype=torch.float32, device="cpu")
        task.begun += 1

    def _advance_what_fits(self, by_task: dict[Task, list[int]]) -> tuple[dict[Task, list[int]], int]:
        """Advance images by a row; return which, and the number of network rows.

        Where device memory is short, half of them are advanced, and later steps have no more rows. If it is short for
        these, too, those of the first job are tried alone; if it is short even then, that job ends.
        """
        try:
            return by_task, self._advance(by_task)
        except torch.OutOfMemoryError as e:
            error = e.with_traceback(None)  # whose frames hold memory
        images = [(task, i) for task, own in by_task.items() for i in own]
        half = images[: max(len(images) // 2, 1)]
        first = [(task, i) for task, i in half if task is half[0][0]]
        tried = images
        for fewer in (half, first):
            if len(fewer) == len(tried):
                continue
            tried = fewer
            if self._sampler.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                rows = self._advance(_by_task(fewer))
            except torch.OutOfMemoryError as e:
                error = e.with_traceback(None)
                continue
            log.warning("device memory does not suffice for a step of %d images; steps have fewer now", len(images))
            self._limit_rows(rows)
            return _by_task(fewer), rows
        job = half[0][0].job
        out = OutOfMemory(f"job {job.id} was ended: device memory does not suffice for {len(tried)} of its images")
        out.__cause__ = error
        job.settle(error=out)
        self._limit_rows(self._most)  # the job may have been why earlier steps did not fit
        return {}, 0

    def _limit_rows(self, most: int | None) -> None:
        with self._changed:
            self._curve = dataclasses.replace(self._curve, most=most)

    def _advance(self, by_task: dict[Task, list[int]]) -> int:
        """Advance images by a row, show previews, and return the number of network rows."""
        slots, state = self._slots, self._slots.state
        at = [task.slots[i] for task, images in by_task.items() for i in images]
        taken: dict[Task, int] = {}  # network rows
        known: list[tuple[Task, list[int], Tensor]] = []
        shown: list[tuple[Task, list[int], int]] = []
        for task, images in by_task.items():
            taken[task] = slots.network_rows([task.slots[i] for i in images])
            task.rows -= taken[task]
            if task.request.mask is not None:
                part = state.select(np.array([task.slots[i] for i in images], np.int64))
                known.append((task, images, self._inpainting(task, images).known(part)))
            if task.shows:
                length = len(task.request.table)
                for i in images:
                    row = length - slots.rows_left(task.slots[i])
                    if row in task.shows:
                        shown.append((task, [i], row))
        previews = [task.slots[i] for task, (i,), _ in shown]
        try:
            x0 = slots.step(self._runner, at, previews)
        except torch.OutOfMemoryError:  # no image has changed
            for task, rows in taken.items():
                task.rows += rows
            raise
        for task, images, pixels in known:
            mine = torch.tensor([task.slots[i] for i in images], dtype=torch.int64, device=state.x.device)
            state.x[mine] = torch.where(self._inpainting(task, images).anew, state.x[mine], pixels)
        self._runners.give_back()
        for k, (task, (i,), row) in enumerate(shown):
            assert x0 is not None
            x = state.x[task.slots[i]][None].clone()
            task.job.show(Event(row, len(task.request.table), (task.request.index[i],), x, x0[k][None]))
        return sum(taken.values())

    def _inpainting(self, task: Task, images: Sequence[int]) -> Inpainting:
        r, device = task.request, self._sampler.device
        assert r.image is not None
        assert r.mask is not None
        return Inpainting(r.image[list(images)].to(device), r.mask[list(images)].to(device))

    def _leave(self, task: Task, images: list[int]) -> None:
        """Take images that are finished out of their slots."""
        assert task.result is not None
        for i in images:
            slot = task.slots[i]
            if self._slots.rows_left(slot) == 0:
                task.result[i].copy_(self._slots.state.x[slot])
                self._slots.retire(slot)
                del task.slots[i]
                task.ended += 1

    def _finish(self, task: Task) -> None:
        """Give a job its images, or the error that they are no numbers."""
        r = task.request
        assert task.result is not None
        labels, prompts = (r.labels, None) if r.prompts is None else (None, r.prompts.of_images)
        output = SampleOutput(task.result, r.seed, r.index[0], r.table, r.nfe, labels, r.class_names, r.index, prompts)
        try:
            check_numbers(output, self._sampler.dtype)
        except NumericsError as e:
            task.job.settle(error=e)
        else:
            task.job.settle(output, receipt=self._receipt(task, output))
        self._retire(task)

    def _receipt(self, task: Task, output: SampleOutput) -> dict[str, Any]:
        r, sampler, given = task.request, self._sampler, task.request.prompts
        return {
            "id": task.job.id, "n": r.n, "seed": r.seed, "indices": list(r.index),
            "labels": None if output.labels is None else output.labels.tolist(),
            "prompts": None if given is None else [given.texts[i] for i in given.label.tolist()],
            "negative": None if given is None else [given.texts[i] for i in given.null.tolist()],
            "solver": r.table.solver, "rows": len(r.table), "degraded": task.degraded,
            "table_sha256": hashlib.sha256(r.table.to_json().encode()).hexdigest(), "nfe": r.nfe,
            "guidance": r.guidance.tolist(), "guidance_rescale": r.guidance_rescale, "backend": sampler.backend,
            "dtype": str(sampler.dtype).removeprefix("torch."), "determinism": sampler.determinism,
            "version": __version__, "sha256": hashlib.sha256(output.images.numpy().tobytes()).hexdigest(),
        }  # fmt: skip

    def _retire(self, task: Task) -> None:
        """Take all images of a job that has ended out of their slots."""
        for slot in task.slots.values():
            self._slots.retire(slot)
        task.slots = {}
        with self._changed:
            self._forget(task)

    def _forget(self, task: Task) -> None:
        """Count the outcome of a job that has ended. Called with the lock."""
        if task in self._tasks:
            del self._tasks[task]
            self._counts.update([task.job.state])
            self._counts["dropped"] += task.job.previews_dropped
            self._count_queued()
            self._changed.notify_all()

    def _text_bytes(self) -> int:
        """Return the bytes of the keys and values of a text; 0 for a network that reads none."""
        if self._text is None:
            return 0
        widths = [2 * layer.to_k.out_features for layer in text_attentions(self._sampler.unet).values()]
        return 4 * len(self._text.states) * max(sum(widths), self._text.states.shape[1])

    @plain_modes()
    def _measured(self, most: int | None) -> Curve:
        """Measure what steps cost, on empty slots: twice the rows each time, until a step takes long."""
        points: list[tuple[int, float]] = []
        rows = 1
        while rows <= min(2 * scheduler.TOGETHER, most or 2 * scheduler.TOGETHER):
            best = math.inf
            for repetition in range(4):
                begin = time.perf_counter()
                try:
                    self._slots.step(self._runner, range(rows))
                except torch.OutOfMemoryError as e:
                    if not points:
                        raise OutOfMemory("device memory does not suffice for a step of one image") from e
                    return Curve(tuple(points), most=points[-1][0])
                self._runners.give_back()
                if repetition > 0:
                    best = min(best, time.perf_counter() - begin)
                if repetition > 0 and best > SLOW_STEP_S:
                    break
            points.append((rows, best))
            rows *= 2
        return Curve(tuple(points), most=most)


def _texts_of(r: Request, i: int) -> tuple[Text, Text]:
    """Return the text of image i of a request, and that of its unconditional half."""
    assert r.prompts is not None
    assert r.texts is not None
    numbers, states, pooled = (int(r.prompts.label[i]), int(r.prompts.null[i])), r.texts.states, r.texts.pooled
    own, null = (Text(r.prompts.texts[k], states[k], None if pooled is None else pooled[k]) for k in numbers)
    return own, null


def _by_task(images: Sequence[tuple[Task, int]]) -> dict[Task, list[int]]:
    """Return the images of each job."""
    by_task: dict[Task, list[int]] = {}
    for task, i in images:
        by_task.setdefault(task, []).append(i)
    return by_task


def _check_possible(options: dict[str, Any]) -> None:
    """Refuse options of `Sampler.sample` that would call the caller's code during a step, or have no meaning here."""
    for name, why in (
        ("guide", "it would run the caller's code in every step of everyone's images"),
        ("batch_size", "the engine chooses what runs together"),
        ("callback", "previews= has events without stopping the engine"),
        ("progress", "Job.eta_s says how long it takes"),
    ):
        if options.get(name):
            raise InvalidArgument(f"{name}= cannot be given to an Engine: {why}")
    if callable(options.get("noise")) and not isinstance(options["noise"], Tensor):
        raise InvalidArgument(
            "noise= as a function cannot be given to an Engine: it would run the caller's code in every step of "
            "everyone's images; give a tensor of initial noise"
        )
