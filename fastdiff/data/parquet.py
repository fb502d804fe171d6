"""Images in Parquet files as Hugging Face's data sets have them: a column ``image`` of {bytes, path}, and ``label``.

The rows are read in small batches, so that no more than a group of rows is in memory undecoded. pyarrow reads the
files; it is the extra ``parquet``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.data.arrays import Arrays, check_bytes
from fastdiff.data.gathered import MAX_FILE, Gathered
from fastdiff.data.pixels import Reading, why
from fastdiff.data.scan import SUFFIXES
from fastdiff.errors import DataError

BATCH = 32  # rows that are decoded at a time
IMAGES, LABELS = ("image", "img", "images"), ("label", "labels", "fine_label")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as train-00000-of-00002


def shards(path: Path) -> list[Path]:
    """Return the Parquet files of a folder that has no images besides; none for another folder."""
    inside = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    if any(file.suffix.lower() in SUFFIXES or file.is_dir() for file in inside):
        return []
    found = [file for file in inside if file.suffix.lower() == ".parquet"]
    splits = sorted({match.group(1) for file in found if (match := SHARD.fullmatch(file.stem))})
    if len(splits) > 1:
        raise DataError(
            f"{path} has the splits {', '.join(splits)}; move the files of one into a folder of their own, or give one "
            "file"
        )
    return found


def read_parquet(
    paths: Sequence[Path],
    size: tuple[int, int] | None,
    channels: int | None,
    fit: str,
    reading: Reading,
    labelled: bool,
) -> tuple[Arrays, list[tuple[Path, str]], list[str]]:
    """Read all images, fitted to one size, and their labels; what was left out, and what is doubtful.

    Raises `DataError` where pyarrow is missing, a file is not as above, no image can be used, or only some have labels.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{paths[0]} is a Parquet file, for which pyarrow is needed: pip install pyarrow") from error
    gathered = Gathered(size, channels, fit, reading)
    names: tuple[str, ...] | None = None
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                image, label, own_names = _columns(path, file.schema_arrow)
                names = names or own_names
                rows = len(gathered.images) + file.metadata.num_rows
                check_bytes(str(path), "its images", rows * math.prod(size or (1, 1)) * (channels or 3))
                _read(file, path, image, label if labelled else None, gathered)
        except DataError:
            raise
        except Exception as error:  # pyarrow has several kinds of errors for a damaged file
            raise DataError(f"{path} is no Parquet file, or is damaged: {why(error).splitlines()[0]}") from error
    return gathered.arrays(paths[0], "no label", names), gathered.skipped, []


def _columns(path: Path, schema: Any) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Return the names of the columns of images and of labels, and the names of the classes if the file has them."""
    image = next((name for name in IMAGES if name in schema.names), None)
    if image is None:
        raise DataError(f"{path} has no column {' or '.join(IMAGES)}; it has {', '.join(schema.names[:8])}")
    kind = str(schema.field(image).type)
    if "binary" not in kind:
        raise DataError(
            f"{path}: the column {image} holds {kind[:60]}; images are binary, or a struct with binary bytes"
        )
    label = next((name for name in LABELS if name in schema.names), None)
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = tuple(str(name) for name in info[label]["names"])
    except (KeyError, TypeError, ValueError):  # written by others, or without classes
        names = ()
    return image, label, names or None


def _read(file: Any, path: Path, image: str, label: str | None, gathered: Gathered) -> None:
    """Add the rows of a file to what was gathered."""
    row = 0
    columns = [image] if label is None else [image, label]
    for batch in file.iter_batches(batch_size=BATCH, columns=columns):
        labels = [None] * len(batch) if label is None else batch.column(label)
        for value, number in zip(batch.column(image), labels, strict=True):
            place = path / f"row {row}"
            gathered.add(place, functools.partial(_content, value), functools.partial(_label, number, place))
            row += 1


def _content(cell: Any) -> bytes:
    """Return the bytes of an image's file."""
    value = cell.as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        other = value.get("path") if isinstance(value, dict) else None
        raise DataError(f"it names the file {other!r} in place of its bytes" if other else "it holds no image")
    if len(content) > MAX_FILE:
        raise DataError(f"it takes {len(content)} bytes, more than {MAX_FILE}")
    return content


def _label(value: Any, place: Path) -> int | None:
    number = None if value is None else value.as_py()
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 10**9:
        raise DataError(f"{place}: label {str(number)[:40]!r}; a whole number from 0 on, the class, is needed")
    return number
