"""The beginning of the drawing process: a module that does not import torch, for the process that starts it."""

from __future__ import annotations

from multiprocessing.connection import Connection


def enter(connection: Connection, setup: bytes, parent: int) -> None:
    """Run `fastdiff.serving.worker.main`, which says more."""
    from fastdiff.serving import worker

    worker.main(connection, setup, parent)
