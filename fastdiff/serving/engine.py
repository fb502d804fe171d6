"""`Engine`: one network for many callers, whose images share its steps."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import number, one_of, optional, shown, text, whole
from fastdiff.core import process
from fastdiff.core.slots import MOST_ROWS
from fastdiff.core.turns import reentrant
from fastdiff.errors import (
    BackendError,
    Cancelled,
    DeadlineImpossible,
    DeadlineMissed,
    EngineClosed,
    InvalidArgument,
    NumericsError,
    QueueFull,
)
from fastdiff.modes import plain_modes
from fastdiff.sampler import SampleOutput, Sampler, choice
from fastdiff.sampler.loop import check_numbers, empty
from fastdiff.sampler.options import NetworkInfo, Options
from fastdiff.sampler.request import Request
from fastdiff.serving import scheduler
from fastdiff.serving.job import Job
from fastdiff.serving.lanes import Lanes
from fastdiff.serving.stepper import Stepper
from fastdiff.serving.task import Task, images_by_task
from fastdiff.solvers import StepTable

log = logging.getLogger("fastdiff")

MOST_TABLES = 256  # whose coefficients are kept
LINGER_S = 1.0  # for which the thread of an engine without jobs waits for one
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
        self._stepper = Stepper(self._sampler)
        self._curve = self._stepper.measured(most)
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
        if r.shape != self._stepper.shape:
            size, own = ("x".join(map(str, shape[1:])) for shape in (r.shape, self._stepper.shape))
            raise InvalidArgument(f"size={size}: an Engine draws images of the network's own size, {own}")
        if len(r.table) > self._max_steps:
            raise InvalidArgument(
                f"{len(r.table)} rows of {r.table.solver}: this Engine runs at most {self._max_steps}; give fewer steps"
            )
        if float(np.abs(r.guidance).max()) > LARGEST:
            raise InvalidArgument(f"guidance={shown(options['guidance'])}: at most {LARGEST:.3g} fits float32")
        if r.prompts is not None and r.prompts.given is not None:
            raise InvalidArgument("texts that were encoded before are not taken: an Engine encodes prompts= itself")
        empty_text = self._stepper.text
        if r.texts is not None and empty_text is not None and r.texts.states.shape[1:] != empty_text.states.shape:
            given, needed = list(r.texts.states.shape[1:]), list(empty_text.states.shape)
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
        self._stepper.draw(task, AHEAD)
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
        slots = self._stepper.slots
        chosen = scheduler.pick(now, [task.load(slots) for task in live], curve, len(slots.free))
        if not chosen:
            return
        step = self._stepper.advance(images_by_task(chosen))
        seconds, now = time.monotonic() - now, time.monotonic()
        if step.short:
            with self._changed:
                # If nothing was advanced, the job that was ended may have been why earlier steps did not fit.
                self._curve = dataclasses.replace(self._curve, most=step.rows or self._most)
        for task, images in step.images.items():
            task.served, task.known = now, None
            self._stepper.leave(task, images)
            if task.ended == task.request.n:
                self._finish(task)
        if not step.images:
            return
        with self._changed:
            curve = self._curve
            slower = min(max(seconds / curve.seconds(step.rows), 1.0 / MOST_CHANGE), MOST_CHANGE)
            self._curve = dataclasses.replace(curve, scale=curve.scale * (1.0 + FOLLOW * (slower - 1.0)))
            self._counts.update(steps=1, image_steps=sum(map(len, step.images.values())), rows=step.rows)
            self._counts["busy_s"] += seconds
            self._counts["step_rows"] = step.rows
            self._count_queued()

    def _finish(self, task: Task) -> None:
        """Give a job its images, or the error that they are no numbers."""
        output = task.output()
        try:
            check_numbers(output, self._sampler.dtype)
        except NumericsError as e:
            task.job.settle(error=e)
        else:
            task.job.settle(output, receipt=task.receipt(self._sampler, output))
        self._retire(task)

    def _retire(self, task: Task) -> None:
        """Take all images of a job that has ended out of their slots."""
        self._stepper.retire(task)
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
