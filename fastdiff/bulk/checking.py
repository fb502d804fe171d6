"""`verify`, which checks the shards of a job, and mends them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fastdiff.bulk import job as jobs
from fastdiff.bulk import shards
from fastdiff.bulk.job import Job
from fastdiff.bulk.work import draw, draw_batch, read_shard, tidy
from fastdiff.checks import boolean, number
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Verified:
    """Result of `verify`.

    Attributes:
        folder: The folder of the job.
        images: Number of images of the job.
        shards: Number of its shards.
        problems: What is wrong with shards, by their number: missing, damaged, or other than drawn anew.
        redrawn: Numbers of the shards that were drawn anew, those of ``problems``.
        compared: Number of images that were drawn again and compared.
    """

    folder: Path
    images: int
    shards: int
    problems: dict[int, str]
    redrawn: tuple[int, ...]
    compared: int

    @property
    def good(self) -> bool:
        """Whether every shard is there and right now."""
        return set(self.redrawn) >= self.problems.keys()


def verify(
    folder: str | Path,
    *,
    fraction: float | None = None,
    redraw: bool = False,
    sampler: Sampler | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Compare every shard of a job with the SHA-256 of its record, of the file and of the pixels.

    Args:
        folder: The folder of the job. Nobody should be drawing there meanwhile.
        fraction: Share of the images, above 0 and at most 1, to draw again besides, chosen by chance in batches, and
            to compare with the files. This needs the model, and finds what no SHA-256 does: wrong images.
        redraw: Whether to draw missing and damaged shards anew, which needs the model.
        sampler: The sampler to draw with; None: the job's model is loaded.
        progress: Function (shards checked, shards) that is called after each one.

    Returns:
        What was found, and done.

    Raises:
        JobError: If the folder is none of a job, or this machine and model would draw other images.
        InvalidArgument: If an argument is not allowed.
        WriteError: If a shard cannot be written.
    """
    boolean("redraw", redraw)
    if fraction is not None:
        number("fraction", fraction, above=0, high=1, need="a number above 0, at most 1,")
    if sampler is not None and not isinstance(sampler, Sampler):
        raise InvalidArgument(f"sampler is a {type(sampler).__name__}; a Sampler or None is needed")
    job = jobs.read(folder)
    with contextlib.ExitStack() as stack:
        if fraction is not None or redraw:
            stack.enter_context(_threads(job.settings.get("threads")))
            if sampler is None:
                sampler = stack.enter_context(job.sampler())
            else:
                job.check(sampler)
        chosen = _chosen(job, fraction)
        problems: dict[int, str] = {}
        compared = 0
        for shard in job.shards:
            try:
                pixels = read_shard(job, shard)
                for batch in chosen.get(shard, []):
                    assert sampler is not None
                    compared += len(batch)
                    first = batch.start - job.indices(shard).start
                    _compare(draw_batch(job, sampler, batch), pixels[first : first + len(batch)], batch)
            except DataError as e:
                problems[shard] = str(e)
            if progress is not None:
                progress(shard + 1, len(job.shards))
        if redraw and sampler is not None:
            for shard in problems:
                _redraw(job, sampler, shard)
            tidy(job)
    return Verified(job.folder, job.n, len(job.shards), problems, tuple(problems) if redraw else (), compared)


def _chosen(job: Job, fraction: float | None) -> dict[int, list[range]]:
    """Choose batches of about this share of the images, by their shards."""
    if fraction is None:
        return {}
    # A batch is found by its number, so that no list of all of them is needed.
    each = -(-len(job.indices(0)) // job.call["batch_size"])
    count = (len(job.shards) - 1) * each + len(job.batches(job.shards[-1]))
    found: dict[int, list[range]] = {}
    for i in sorted(random.SystemRandom().sample(range(count), math.ceil(fraction * count))):
        found.setdefault(i // each, []).append(job.batches(i // each)[i % each])
    return found


def _compare(new: np.ndarray, old: np.ndarray, batch: range) -> None:
    different = np.flatnonzero((new != old).reshape(len(new), -1).any(1))
    if len(different):
        listed = ", ".join(str(batch[int(i)]) for i in different[:8])
        raise DataError(f"{len(different)} of {len(new)} images differ when they are drawn again: {listed}")


def _redraw(job: Job, sampler: Sampler, shard: int) -> None:
    """Draw a shard in place of a damaged one."""
    shards.discard(job.record_path(shard))
    shards.discard(job.path(shard))
    draw(job, sampler, shard)
    read_shard(job, shard)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give torch the number of threads that the job's images were drawn with, if they depend on it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
