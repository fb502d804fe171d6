"""Locks for objects that several threads use, which neither a fork nor a signal handler leaves taken for ever."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fastdiff.errors import ReentrantCall

P = ParamSpec("P")
R = TypeVar("R")

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
    """Runs one piece of work at a time: other threads wait, and a call from within the work raises.

    ``what`` names the work in the error.
    """

    def __init__(self, what: str):
        super().__init__()
        self.what = what
        self._working = False

    def take(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Run ``work`` and return its result.

        `ReentrantCall` is raised in a function that the work itself calls: a hook of the network, or a signal handler.
        """
        with self.held:  # does not wait in the thread that has it, whose call is refused by the next line
            if self._working:
                raise ReentrantCall(
                    f"{self.what} was called from within a step of the same object: from a forward hook, or from a "
                    "signal handler that interrupted the step. Use another object there, or make the call after the "
                    "step, from a callback for example; cancel() and close() work anywhere"
                )
            try:
                self._working = True
                return work(*arguments, **options)
            finally:
                self._working = False


def _renew() -> None:
    """Free the locks of threads that a forked child does not have; those of the forking thread stay as they are."""
    for lock in list(_locks):
        if lock.held.acquire(blocking=False):
            lock.held.release()
        else:
            lock.held = threading.RLock()
            if isinstance(lock, Turns):
                lock._working = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
