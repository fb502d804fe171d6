"""The work of one process on a job: it draws shards until all are finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.bulk import shards
from fastdiff.bulk.claims import Claims
from fastdiff.bulk.job import MAX_JSON, Job
from fastdiff.checkpoints.reading import read_json
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import CheckpointError, DataError
from fastdiff.files import LEFTOVER, write_text
from fastdiff.sampler import Sampler

PAUSE_S = 0.25  # between two looks at shards that other processes draw

Drawn = Callable[[int, bool], None]
"""Function that is called with a number of images, and whether they are published or only drawn; also while waiting."""


def work(
    job: Job, sampler: Sampler, rank: int = 0, world: int = 1, patience_s: float = 600.0, drawn: Drawn | None = None
) -> None:
    """Draw shards until all of the job are finished, by this process or by others.

    The shards rank, rank + world, ... come first, then those that others have left. Where only shards are left that
    others have claimed, the end of each is waited for; one that nobody finishes in ``patience_s``, or in three times
    what the slowest shard took here, is drawn here too: its process hangs.
    """
    with Claims(job.folder) as claims:
        claims.alone()
        waiting: dict[int, float] = {}  # since when a shard was seen to be claimed by another process
        slowest = 0.0
        there = job.finished()
        left = [shard for shard in order(len(job.shards), rank, world) if shard not in there]
        while left:
            for shard in left:
                with claims.claim(shard) as mine:
                    now = time.monotonic()
                    late = now - waiting.setdefault(shard, now) > max(patience_s, 3 * slowest)
                    if (mine or late) and not job.is_finished(shard):
                        draw(job, sampler, shard, drawn)
                        slowest = max(slowest, time.monotonic() - now)
            there = job.finished()
            left = [shard for shard in left if shard not in there]
            if left:
                time.sleep(PAUSE_S)
                if drawn is not None:
                    drawn(0, False)


def order(count: int, rank: int, world: int) -> list[int]:
    """Return the order in which a process looks at the shards.

    Its own come first. Then it takes those that others would take last, so that they seldom want the same.
    """
    return [*range(rank, count, world), *(i for i in reversed(range(count)) if i % world != rank)]


def tidy(job: Job) -> None:
    """Delete the temporary files that killed processes have left, where no other process works on the job."""
    with Claims(job.folder) as claims:
        if claims.alone():
            for folder in (job.folder, job.folder / "shards"):
                for leftover in folder.glob(LEFTOVER):
                    _delete(leftover)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:  # it does no harm
        return


def draw(job: Job, sampler: Sampler, shard: int, drawn: Drawn | None = None) -> None:
    """Draw a shard, write it and then its record; what is there already stays, if it has the same bytes."""
    started = time.monotonic()
    indices = job.indices(shard)
    pixels = np.concatenate(list(_parts(job, sampler, shard, drawn)))
    content = job.layout.encode(pixels, indices, job.labels(indices))
    path = job.path(shard)
    shards.publish(path, content)
    # The file is another one where a process was killed before it wrote the record, or another process was faster. Its
    # bytes are then these, or it is damaged.
    if not _has(path, content, limit(job, shard)):
        shards.discard(job.record_path(shard))
        shards.discard(path)
        shards.publish(path, content)
    record = {
        "start": indices.start,
        "stop": indices.stop,
        "sha256": shards.digest(content),
        "pixels_sha256": hash_pixels(pixels),
        "seconds": round(time.monotonic() - started, 3),
    }
    write_text(job.record_path(shard), json.dumps(record) + "\n", keep=True)
    if drawn is not None:
        drawn(len(indices), True)


def _has(path: Path, content: shards.Content, most: int) -> bool:
    try:
        return shards.load(path, most) == content
    except DataError:
        return False


def _parts(job: Job, sampler: Sampler, shard: int, drawn: Drawn | None) -> Iterator[NDArray[np.uint8]]:
    for batch in job.batches(shard):
        yield draw_batch(job, sampler, batch)
        if drawn is not None:
            drawn(len(batch), False)


def draw_batch(job: Job, sampler: Sampler, batch: range) -> NDArray[np.uint8]:
    """Draw the images of some indices, uint8 [n, H, W, C]."""
    call = job.call
    output = sampler.sample(
        len(batch), start_index=batch.start, **job.asks(batch), batch_size=call["batch_size"], **call["options"]
    )
    return to_uint8(output.images)


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Compute the SHA-256 of the bytes of images [n, H, W, C]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def limit(job: Job, shard: int) -> int:
    """Return more bytes than the file of a shard can have."""
    h, w, c = job.shape
    return len(job.indices(shard)) * (2 * h * w * c + 8192) + (1 << 20)


def record(job: Job, shard: int) -> dict[str, Any]:
    """Read the record of a shard; `DataError` says what is wrong with it."""
    path, indices = job.record_path(shard), job.indices(shard)
    if not path.is_file():
        raise DataError("it was not drawn yet" if not job.path(shard).exists() else "it has no record")
    try:
        found = read_json(path, MAX_JSON)
    except CheckpointError as e:
        raise DataError(f"its record is damaged ({e})") from e
    if (found.get("start"), found.get("stop")) != (indices.start, indices.stop):
        raise DataError("its record is one of other images")
    if not all(isinstance(found.get(key), str) for key in ("sha256", "pixels_sha256")):
        raise DataError("its record has no SHA-256")
    return found


def read_shard(job: Job, shard: int) -> NDArray[np.uint8]:
    """Read the images of a finished shard, [n, H, W, C], compared with its record; `DataError` says what is wrong."""
    expected = record(job, shard)
    content = shards.load(job.path(shard), limit(job, shard))
    if shards.digest(content) != expected["sha256"]:
        raise DataError("its SHA-256 is not that of its record")
    pixels = job.layout.decode(content, job.indices(shard))
    if hash_pixels(pixels) != expected["pixels_sha256"]:
        raise DataError("the SHA-256 of its pixels is not that of its record")
    return pixels
