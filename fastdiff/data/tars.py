"""Images in tar files as WebDataset has them: files of one name up to its first dot are one sample.

The image of a sample is a file such as ``000012.png``, its class a number in ``000012.cls``; other files are not read.
"""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from fastdiff.data.arrays import Arrays, check_bytes
from fastdiff.data.pixels import FORMATS, MAX_PIXELS, Reading, convert, fit_to, misfit, pixels_of, why
from fastdiff.data.scan import SUFFIXES
from fastdiff.errors import DataError

MAX_FILE = 1 << 28  # bytes of an image's file


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
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which makes damaged images look whole; unset it")
    images: list[np.ndarray] = []
    labels: list[int | None] = []
    skipped: list[tuple[Path, str]] = []
    doubts: list[str] = []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                samples = [sample for sample in _samples(path, archive) if sample.image is not None]
                if path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                    doubts.append(f"{path.name} has no mark of its end, so that it may be cut; write it anew")
                per_image = math.prod(size or (1, 1)) * (channels or 3)
                check_bytes(str(path), "its images", (len(images) + len(samples)) * per_image)
                for sample in samples:
                    try:
                        pixels = _decoded(archive, sample, channels, reading)
                        size = size or pixels.shape[:2]
                        reason = misfit(pixels.shape[:2], size, fit)
                    except Exception as error:  # a decoder may raise anything at all for a damaged file
                        reason = why(error).splitlines()[0]
                    if reason is None:
                        assert size is not None
                        images.append(fit_to(pixels[None], size, fit)[0])
                        labels.append(_label(archive, sample) if labelled else None)
                    else:
                        skipped.append((path / sample.name, reason))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{path} is no tar file, or is damaged: {why(error)}") from error
    if not images or size is None:
        first = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{paths[0]}: no image can be used ({' '.join(sorted(SUFFIXES))}){first}")
    missing = sum(label is None for label in labels)
    if 0 < missing < len(labels):
        raise DataError(f"{paths[0]}: {missing} of {len(labels)} images have no .cls file; class_depth=0 ignores them")
    most = max(image.shape[2] for image in images)
    stacked = np.stack([convert(image[None], most)[0] for image in images])
    return Arrays(stacked, None if missing else np.array(labels, dtype=np.int64)), skipped, doubts


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


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_FILE:
        raise DataError(f"{member.name} takes {member.size} bytes, more than {MAX_FILE}")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _decoded(archive: tarfile.TarFile, sample: Sample, channels: int | None, reading: Reading) -> np.ndarray:
    """Decode an image to uint8 [h, w, 1 or 3]."""
    assert sample.image is not None
    with Image.open(io.BytesIO(_content(archive, sample.image)), formats=FORMATS) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
        pixels = pixels_of(image, reading)
    return convert(pixels[None], channels or min(pixels.shape[2], 3), reading.alpha)[0]


def _label(archive: tarfile.TarFile, sample: Sample) -> int | None:
    if sample.label is None:
        return None
    text = _content(archive, sample.label).decode("utf-8", "replace").strip()
    if not text.isdecimal() or len(text) > 9:
        raise DataError(
            f"{sample.archive}: {sample.label.name} holds {text[:40]!r}; a whole number, the class, is needed"
        )
    return int(text)
