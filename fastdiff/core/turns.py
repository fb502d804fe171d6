"""Locks for objects that several threads use, which no fork, signal handler or end of the interpreter makes hang."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fastdiff.errors import ReentrantCall

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_STEP = 30.0  # seconds that the end of the interpreter waits

# Every `Lock` of this process, for `_renew`.
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A lock, ``held``, to be used as ``with lock.held:``; the thread that has it may take it again.

    In a forked child it is free, even if a thread of the parent had it. ``held`` is a lock of C: a signal handler that
    raises cannot come between the moment at which it is taken and the block of the ``with``.
    """

    def __init__(self) -> None:
        self.held = threading.RLock()
        _locks.add(self)


class Turns(Lock):
    """Runs one piece of work at a time: other threads wait, and a call from within the work raises."""

    def __init__(self) -> None:
        super().__init__()
        self._working = False

    def take(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Run ``work`` and return its result.

        `ReentrantCall` is raised in a function that the work itself calls: a hook of the network, or a signal handler.
        """
        with self.held:  # does not wait in the thread that has it, whose call is refused by the next line
            if self._working:
                raise reentrant("the sampler")
            try:
                self._working = True
                return work(*arguments, **options)
            finally:
                self._working = False


def reentrant(what: str) -> ReentrantCall:
    """Make the error for a call of an object, ``what``, from within one of its own steps."""
    return ReentrantCall(
        f"{what} was used from within one of its own steps, which would wait for itself: in a forward hook, or in a "
        "signal handler that interrupted the step. Use it between the steps, from a callback for example, or use "
        "another Sampler"
    )


def _renew() -> None:
    """Free the locks of threads that a forked child does not have; those of the forking thread stay as they are."""
    for lock in list(_locks):
        if lock.held.acquire(blocking=False):
            lock.held.release()
        else:
            lock.held = threading.RLock()
            if isinstance(lock, Turns):
                lock._working = False


def _end() -> None:
    """Wait until no thread is within a piece of work, and let none begin another.

    The interpreter ends a daemon thread where it next needs Python, and in C++ that aborts the process.
    """
    end = time.monotonic() + LONGEST_STEP
    for lock in list(_locks):
        if isinstance(lock, Turns):
            lock.held.acquire(timeout=max(0.0, end - time.monotonic()))


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
