"""Work in torch that survives a fork of the process and the end of the interpreter."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

LONGEST_WAIT_S = 5.0  # at the end of the interpreter, for work that has begun


class _PerThread(threading.local):
    call: object | None = None  # the call that runs `work`
    threads: int | None = None  # torch's number of threads, while `work` has set it to one


_per_thread = _PerThread()
_forked = False  # whether this process is a fork of one that had imported this module
_leaving = False  # whether the interpreter is about to end
_begun: set[object | None] = set()  # the calls that work now


def torch_threads() -> int:
    """Return torch's number of threads, as it was before `work` changed it."""
    return _per_thread.threads or torch.get_num_threads()


@contextlib.contextmanager
def work() -> Iterator[None]:
    """Surround a call that works in torch, and within it each piece of at most a row.

    In a forked child torch runs on one thread during the work: those that it had exist in the parent only, and a
    parallel loop would wait for them forever. While the interpreter ends, a thread that leaves torch aborts the
    process: the end waits until the calls of other threads have finished or have reached their next piece.
    """
    outer, threads = _per_thread.call is None, 1
    try:
        if outer:
            _per_thread.call = object()
            _begun.add(_per_thread.call)  # before the flag is read, so that this thread or `_leave` notices the other
        if _leaving and threading.current_thread() is not threading.main_thread():
            _begun.discard(_per_thread.call)
            time.sleep(1.0)  # the interpreter ends during it, unless something still waits for this thread
            _begun.add(_per_thread.call)
        if _forked and _per_thread.threads is None and torch.get_num_threads() > 1:
            _per_thread.threads = threads = torch.get_num_threads()
            torch.set_num_threads(1)
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
            _per_thread.threads = None
        if outer:
            _begun.discard(_per_thread.call)
            _per_thread.call = None


def pieces(generator: Generator[T, None, None]) -> Generator[T, None, None]:
    """Run a generator with every piece up to the next ``yield`` as `work`."""
    with contextlib.closing(generator):
        while True:
            with work():
                try:
                    value = next(generator)
                except StopIteration:
                    return
            yield value


def _in_child() -> None:
    global _forked
    _forked = True
    _per_thread.threads = None
    _begun.clear()


def _leave() -> None:
    global _leaving
    _leaving = True
    end = time.monotonic() + LONGEST_WAIT_S
    while _begun and time.monotonic() < end:
        time.sleep(0.005)


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
