"""Images in tar files as WebDataset has them: files of one name up to its first dot are one sample.

The image of a sample is a file such as ``000012.png``, its class a number in ``000012.cls``; other files are not read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastdiff.data.arrays import Arrays, check_bytes
from fastdiff.data.gathered import MAX_FILE, Gathered
from fastdiff.data.pixels import Reading, why
from fastdiff.data.scan import SUFFIXES
from fastdiff.errors import DataError


@dataclasses.dataclass
class Sample:
    """The files of a sample, as places in its archive."""

    archive: Path
    name: str
    image: tarfile.TarInfo | None = None
    label: tarfile.TarInfo | None = None


def archives(path: Path) -> list[Path]:
    """Return the tar files of a folder that has no images besides; none for another folder."""
    inside = sorted(path.iterdir())
    if any(file.suffix.lower() in SUFFIXES or file.is_dir() for file in inside if not file.name.startswith(".")):
        return []
    return [file for file in inside if file.suffix.lower() == ".tar"]


def read_tars(
    paths: Sequence[Path],
    size: tuple[int, int] | None,
    channels: int | None,
    fit: str,
    reading: Reading,
    labelled: bool,
) -> tuple[Arrays, list[tuple[Path, str]], list[str]]:
    """Read all images, fitted to one size, and their labels; what was left out, and what is doubtful.

    Raises `DataError` where a file is no tar file, no image can be used, or only some have labels.
    """
    gathered = Gathered(size, channels, fit, reading)
    doubts: list[str] = []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                samples = [sample for sample in _samples(path, archive) if sample.image is not None]
                if path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                    doubts.append(f"{path.name} has no mark of its end, so that it may be cut; write it anew")
                per_image = math.prod(size or (1, 1)) * (channels or 3)
                check_bytes(str(path), "its images", (len(gathered.images) + len(samples)) * per_image)
                for sample in samples:
                    gathered.add(
                        path / sample.name,
                        functools.partial(_content, archive, sample.image),
                        functools.partial(_label, archive, sample) if labelled else _no_label,
                    )
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{path} is no tar file, or is damaged: {why(error)}") from error
    return gathered.arrays(paths[0], "no .cls file"), gathered.skipped, doubts


def _no_label() -> None:
    return None


def _samples(path: Path, archive: tarfile.TarFile) -> Iterator[Sample]:
    """Yield the samples of an archive, in its order."""
    found: dict[str, Sample] = {}
    for member in archive:
        folder, _, file = member.name.rpartition("/")
        stem, dot, ending = file.partition(".")
        if not member.isfile() or not dot or not stem:
            continue
        name = f"{folder}/{stem}" if folder else stem
        sample = found.setdefault(name, Sample(path, name))
        if f".{ending.lower()}" in SUFFIXES:
            if sample.image is not None:
                raise DataError(f"{path}: the sample {name} has several images, {sample.image.name} and {member.name}")
            sample.image = member
        elif ending.lower() == "cls":
            sample.label = member
    yield from found.values()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    assert member is not None
    if member.size > MAX_FILE:
        raise DataError(f"{member.name} takes {member.size} bytes, more than {MAX_FILE}")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _label(archive: tarfile.TarFile, sample: Sample) -> int | None:
    if sample.label is None:
        return None
    text = _content(archive, sample.label).decode("utf-8", "replace").strip()
    if not text.isdecimal() or len(text) > 9:
        raise DataError(
            f"{sample.archive}: {sample.label.name} holds {text[:40]!r}; a whole number, the class, is needed"
        )
    return int(text)
