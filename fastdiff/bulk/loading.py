"""Reading the images of a job into memory, for an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdiff.bulk import job as jobs
from fastdiff.bulk.job import Job
from fastdiff.bulk.work import read_shard
from fastdiff.data.arrays import Arrays, check_bytes
from fastdiff.errors import DataError, JobError


def is_job(folder: Path) -> bool:
    """Return whether a folder is one of a job; refuse the folder of its shards, which says too little."""
    if folder.name == "shards" and (folder.parent / jobs.NAME).is_file():
        raise DataError(f"{folder} is part of the job {folder.parent}; give the folder of the job")
    return (folder / jobs.NAME).is_file()


def load(folder: str | Path, n: int | None = None) -> Arrays:
    """Read the images of a job, with their classes and the names of these.

    Args:
        folder: The folder of the job.
        n: How many, from the first on; None for all.

    Returns:
        The images, uint8 [n, H, W, C], and their labels, int64 [n], or None.

    Raises:
        JobError: If a shard of these images is missing or damaged, or the folder is none of a job.
        DataError: If the job has fewer images, or they take too much memory.
    """
    job = jobs.read(folder)
    if n is not None and n > job.n:
        raise DataError(f"{folder} holds {job.n} images, {n} are needed")
    n = n or job.n
    needed = [shard for shard in job.shards if job.indices(shard).start < n]
    _check_finished(job, needed)
    check_bytes(str(folder), f"{n} images", n * int(np.prod(job.shape)), "n= (--n) takes fewer images")
    images = np.empty((n, *job.shape), np.uint8)
    for shard in needed:
        start = job.indices(shard).start
        images[start : start + len(job.indices(shard))] = read_good(job, shard)[: n - start]
    labels = job.labels(range(n))
    names = job.settings["class_names"]
    return Arrays(
        images,
        None if labels is None else np.asarray(labels, np.int64),
        None if names is None or labels is None else tuple(names),
    )


def read_good(job: Job, shard: int) -> np.ndarray:
    """Read a shard, [n, H, W, C]; `JobError` says what is wrong with it, and how to mend it."""
    try:
        return read_shard(job, shard)
    except DataError as e:
        raise JobError(f"{job.path(shard)}: {e}; `fastdiff verify {job.folder} --redraw` mends it") from e


def _check_finished(job: Job, needed: list[int]) -> None:
    """Raise `JobError` if one of these shards is missing."""
    there = job.finished()
    missing = [shard for shard in job.shards if shard not in there]
    if missing and missing[0] in needed:
        first = job.indices(missing[0]).start
        usable = f", and n={first} (--n {first}) judges the images before the first of them" if first else ""
        count = f"{len(missing)} of {len(job.shards)} shards {'is' if len(missing) == 1 else 'are'} missing"
        raise JobError(f"{job.folder}: {count}; `fastdiff generate` draws them{usable}")
