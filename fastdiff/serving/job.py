"""A job of an `Engine`, from its submission to its one outcome."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from fastdiff.checks import number
from fastdiff.errors import Cancelled, FastdiffError, JobTimeout
from fastdiff.sampler import Event, SampleOutput

log = logging.getLogger("fastdiff")

MOST_EVENTS = 64  # that a job keeps for a reader who is slow; older ones are dropped


class Job:
    """A call of an `Engine`, which makes it: a future of the images.

    It has exactly one outcome: the images, an error, or `Cancelled`. It may be waited for by any number of threads
    (`result`) and tasks (``await job``); ``async for event in job`` yields its previews, to one reader, and ends with
    the job.

    Attributes:
        id: Its name: the request_id of `Engine.submit`, or one that the engine chose.
    """

    def __init__(self, name: str, eta: Callable[[Job], float], check_outside: Callable[[], None]):
        self.id = name
        self.previews_dropped = 0
        self._eta = eta
        self._check_outside = check_outside
        self._changed = threading.Condition()  # also guards all that follows
        self._made = time.monotonic()
        self._running = False
        self._began = self._ended = math.nan
        self._output: SampleOutput | None = None
        self._error: BaseException | None = None
        self._receipt: dict[str, Any] = {}
        self._callbacks: list[Callable[[Job], object]] = []
        self._events: collections.deque[Event] = collections.deque()
        self._readers: list[Callable[[], object]] = []  # are called once, at the next event or at the end

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.state})"

    @property
    def state(self) -> str:
        """ "waiting", "running" (its first step has begun), "finished", "failed" or "cancelled"."""
        with self._changed:
            if self._output is not None:
                return "finished"
            if self._error is not None:
                return "cancelled" if isinstance(self._error, Cancelled) else "failed"
            return "running" if self._running else "waiting"

    @property
    def waited_s(self) -> float:
        """Seconds from its submission to its first step, or until now; to its end if it had none."""
        return self._until(self._ended if math.isnan(self._began) else self._began)

    @property
    def ran_s(self) -> float:
        """Seconds from its first step to its outcome, or until now; 0 before."""
        return 0.0 if math.isnan(self._began) else self._until(self._ended) - self.waited_s

    def _until(self, moment: float) -> float:
        """Return the seconds from its submission to a moment, or until now where it has not come."""
        return (time.monotonic() if math.isnan(moment) else moment) - self._made

    @property
    def eta_s(self) -> float:
        """Seconds until it will be finished, as far as that can be foreseen; 0 once it is."""
        return 0.0 if self.done() else self._eta(self)

    @property
    def receipt(self) -> dict[str, Any]:
        """The values that decide the images, and the SHA-256 of their pixels; empty until the job is finished.

        A `Sampler` with the same weights, determinism "bitwise" and these options draws the same bits.
        """
        with self._changed:
            return dict(self._receipt)

    def done(self) -> bool:
        """Return whether the job has its outcome."""
        with self._changed:
            return self._done

    def result(self, timeout: float | None = None) -> SampleOutput:
        """Wait for the images.

        Args:
            timeout: Seconds to wait at most; None for no limit.

        Returns:
            The images.

        Raises:
            JobTimeout: If the time is over; the job goes on.
            ReentrantCall: If the engine's own thread, in a function that it calls, would wait.
            Cancelled: If the job was cancelled.
            FastdiffError: Whatever else ended it.
        """
        if timeout is not None:
            number("timeout", timeout, low=0)
        if not self.done():
            self._check_outside()
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise JobTimeout(f"job {self.id} was not finished within {timeout:g} s; it goes on")
        return self._outcome()

    def cancel(self) -> bool:
        """End the job, unless it has its outcome already; its images leave the batch before the next step.

        Returns:
            Whether the job was ended by this call: its outcome is then `Cancelled`.
        """
        return self.settle(error=Cancelled(f"job {self.id} was cancelled"))

    def add_done_callback(self, function: Callable[[Job], object]) -> None:
        """Have a function called with the job once it has its outcome; at once if it has one.

        It is called in the thread that ends the job, which may be the engine's: it should be short. What it raises is
        logged.

        Args:
            function: The function.
        """
        with self._changed:
            if not self._done:
                self._callbacks.append(function)
                return
        self._call(function)

    def __await__(self) -> Generator[Any, None, SampleOutput]:
        """Wait for the images in a task; cancelling that task leaves the job as it is."""
        yield from self._wait(self.add_done_callback).__await__()
        return self._outcome()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the previews as they come; a reader who is slow misses the oldest."""
        while True:
            with self._changed:
                event, done = (self._events.popleft() if self._events else None), self._done
            if event is not None:
                yield event
            elif done:
                return
            else:
                await self._wait(self._read)

    async def _wait(self, subscribe: Callable[[Callable[..., object]], object]) -> None:
        """Wait in a task until the function that ``subscribe`` is given is called, in whatever thread."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()

        def wake(*_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no one waits
                loop.call_soon_threadsafe(lambda: None if waiting.done() else waiting.set_result(None))

        subscribe(wake)
        await waiting

    def _read(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called at the next event or at the end, or at once where there is one."""
        with self._changed:
            if not self._events and not self._done:
                self._readers.append(wake)
                return
        wake()

    @property
    def _done(self) -> bool:
        return self._output is not None or self._error is not None

    def _outcome(self) -> SampleOutput:
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    # The engine's side --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note that the first step begins."""
        with self._changed:
            self._running, self._began = True, time.monotonic()

    def show(self, event: Event) -> None:
        """Hand out a preview; it never waits for its reader."""
        with self._changed:
            self._events.append(event)
            if len(self._events) > MOST_EVENTS:
                self._events.popleft()
                self.previews_dropped += 1
            readers, self._readers = self._readers, []
        for wake in readers:
            wake()

    def settle(
        self,
        output: SampleOutput | None = None,
        error: FastdiffError | None = None,
        receipt: dict[str, Any] | None = None,
    ) -> bool:
        """Give the job its outcome, images or an error. Returns False, and does nothing, if it has one."""
        with self._changed:
            if self._done:
                return False
            self._output, self._error, self._receipt = output, error, receipt or {}
            self._ended = time.monotonic()
            callbacks, self._callbacks = self._callbacks, []
            readers, self._readers = self._readers, []
            self._changed.notify_all()
        for wake in readers:
            wake()
        for function in callbacks:
            self._call(function)
        return True

    def _call(self, function: Callable[[Job], object]) -> None:
        try:
            function(self)
        except Exception:
            log.exception("a function that was to be called at the end of job %s raised", self.id)
