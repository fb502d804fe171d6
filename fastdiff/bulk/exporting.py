"""`export`, which writes the images of a finished job as other programs read them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastdiff.bulk import job as jobs
from fastdiff.bulk.job import Job
from fastdiff.bulk.loading import read_good
from fastdiff.bulk.shards import METADATA, png, tar
from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument, JobError
from fastdiff.files import atomic_file, atomic_folder


def export(
    source: str | Path,
    *,
    adm: str | Path | None = None,
    folder: str | Path | None = None,
    webdataset: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the images of a finished job in the order of their indices; memory holds a shard at a time.

    Args:
        source: The folder of the job.
        adm: The .npz to write for ADM's evaluator: ``arr_0`` uint8 [N, H, W, 3] (gray images as three equal channels)
            and, where the images have classes, ``arr_1`` int64 [N].
        folder: The folder to write PNGs into, for clean-fid, torch-fidelity and similar programs, with a metadata.jsonl
            as Hugging Face's imagefolder reads it. It must be new or empty.
        webdataset: The folder to write WebDataset's tars into, 000000.tar and so on. It must be new or empty.
        progress: Function (shards written, shards to write) that is called after each one.

    Raises:
        JobError: If a shard is missing or damaged, or ``source`` is no folder of a job.
        InvalidArgument: If no destination is given, or one is not allowed.
        WriteError: If a file cannot be written; nothing is left of it then.
    """
    given = {"adm": adm, "folder": folder, "webdataset": webdataset}
    given = {name: path for name, path in given.items() if path is not None}
    for name, path in given.items():
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise InvalidArgument(f"{name}={shown(path)}: a path is needed")
    if not given:
        raise InvalidArgument("adm=, folder= or webdataset= (a path) is needed: the form in which to export")
    if adm is not None and Path(adm).suffix != ".npz":
        raise InvalidArgument(f"adm={shown(str(adm))}: a file .npz is needed")
    for name in ("folder", "webdataset"):
        _check_new(name, given.get(name))
    job = jobs.read(source)
    missing = len(job.shards) - len(job.finished())
    if missing:
        raise JobError(f"{source}: {missing} of {len(job.shards)} shards are missing; `fastdiff generate` draws them")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(given) * len(job.shards))

    if adm is not None:
        _adm(job, Path(adm), tick)
    if folder is not None:
        _folder(job, Path(folder), tick)
    if webdataset is not None:
        _webdataset(job, Path(webdataset), tick)


def _check_new(name: str, path: str | Path | None) -> None:
    if path is None or not os.path.lexists(path):
        return
    if not Path(path).is_dir() or any(Path(path).iterdir()):
        raise InvalidArgument(f"{name}={shown(str(path))} exists and is no empty folder; give a new one")


def _shards(job: Job, tick: Callable[[], None]) -> Iterator[tuple[range, NDArray[np.uint8]]]:
    """Yield the indices and images of each shard."""
    for shard in job.shards:
        yield job.indices(shard), read_good(job, shard)
        tick()


def _adm(job: Job, path: Path, tick: Callable[[], None]) -> None:
    h, w, c = job.shape
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            _header(member, "|u1", (job.n, h, w, 3))
            for _, pixels in _shards(job, tick):
                member.write(np.repeat(pixels, 3 // c, axis=3).tobytes())
        if job.settings["labels"] is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                _header(member, "<i8", (job.n,))
                for shard in job.shards:
                    member.write(np.asarray(job.labels(job.indices(shard)), "<i8").tobytes())


def _header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def _folder(job: Job, path: Path, tick: Callable[[], None]) -> None:
    with atomic_folder(path) as folder, open(folder / METADATA, "x", encoding="utf-8") as metadata:
        for indices, pixels in _shards(job, tick):
            for k, i in enumerate(indices):
                _put(folder / f"{i:09d}.png", png(pixels[k]))
            metadata.writelines(job.layout.metadata(indices, job.labels(indices)))
        metadata.flush()
        os.fsync(metadata.fileno())


def _webdataset(job: Job, path: Path, tick: Callable[[], None]) -> None:
    with atomic_folder(path) as folder:
        for number, (indices, pixels) in enumerate(_shards(job, tick)):
            members = dict(job.layout.members(pixels, indices, job.labels(indices)))
            _put(folder / f"{number:06d}.tar", tar(members))


def _put(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
