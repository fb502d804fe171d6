"""The choice between many worker processes of one thread and one process of all threads, by a measurement."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.bulk import job as jobs
from fastdiff.bulk.job import Job
from fastdiff.bulk.local import ignore_interrupts_and_end_with
from fastdiff.errors import FastdiffError
from fastdiff.sampler import Sampler

log = logging.getLogger("fastdiff")

WORTH_S = 600.0  # a measurement takes about ten seconds, so shorter jobs do without
WINDOW_S = 2.0  # of a measurement
LIMIT_S = 120.0  # for starting, loading and measuring

Workers = tuple[int, int]
"""Number of processes, and threads of each."""


def faster(folder: Path, choices: Sequence[Workers]) -> Workers:
    """Measure how fast workers draw rows of a job's images, and return the fastest choice; the first one if in doubt.

    Nothing is written. The images are the same with every choice, as their job is of ``determinism="bitwise"``.
    """
    rates = [measure(folder, *choice) for choice in choices]
    for (workers, threads), rate in zip(choices, rates, strict=True):
        shown = "could not be measured" if rate is None else f"{rate:.4g} img-steps/s"
        log.info("%d processes of %d threads: %s", workers, threads, shown)
    if None in rates:
        return choices[0]
    return choices[max(range(len(choices)), key=lambda i: rates[i] or 0.0)]


def measure(folder: Path, workers: int, threads: int) -> float | None:
    """Return the img-steps/s that so many processes draw together; None if one of them fails or takes too long."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    pipes, processes = [], []
    try:
        for _ in range(workers):
            pipe, other = context.Pipe()
            process = context.Process(target=_run, args=(other, barrier, str(folder), threads))
            process.start()
            other.close()
            pipes.append(pipe)
            processes.append(process)
        end = time.monotonic() + LIMIT_S
        rates: list[float] = []
        for pipe in pipes:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                return None
            rates.append(pipe.recv())
        return sum(rates)
    except (EOFError, OSError):
        return None
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _run(pipe: Any, barrier: Any, folder: str, threads: int) -> None:
    """Measure in a process of its own; an error ends it without an answer."""
    ignore_interrupts_and_end_with(pipe)
    torch.set_num_threads(threads)
    with contextlib.suppress(FastdiffError, threading.BrokenBarrierError):  # a worker that draws will say it
        job = jobs.read(folder)
        with job.sampler() as sampler, contextlib.closing(_rows(job, sampler)) as rows:
            next(rows)  # packs the weights
            barrier.wait(LIMIT_S)
            count, started = 0, time.monotonic()
            while count < 2 or time.monotonic() - started < WINDOW_S:
                count += next(rows)
            pipe.send(count / (time.monotonic() - started))


def _rows(job: Job, sampler: Sampler) -> Generator[int, None, None]:
    """Draw a batch of the job again and again; yield the number of images at each row of the table."""
    batch = job.batches(0)[0]
    while True:
        for _ in sampler.stream(
            len(batch), **job.asks(batch), batch_size=job.call["batch_size"], **job.call["options"]
        ):
            yield len(batch)
