"""Data sets of training images: a folder, an ``.npz`` file or an IDX (MNIST) file as a map-style torch `Dataset`.

    data = load_data("photos", size=64)                       # sub-folder names are the classes
    images, labels = data.__getitems__([3, 1, 4])             # uint8 [3, C, H, W], int64 [3] or None

Nothing here is random: the trainer shuffles and augments. Files are untrusted: sizes are read from headers and checked
before anything is allocated or decompressed, and no pickle is ever loaded.
"""

from __future__ import annotations

import logging
import operator
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastdiff.checks import is_whole, one_of, shown, whole
from fastdiff.data import parquet, tars
from fastdiff.data.arrays import LAYOUTS, Arrays, read_idx, read_npz
from fastdiff.data.doubts import check_names, options_of
from fastdiff.data.folder import FolderData
from fastdiff.data.in_memory import ArrayData
from fastdiff.data.pixels import DEFAULT, MAX_PIXELS, Reading, why
from fastdiff.errors import DataError, InvalidArgument, printable
from fastdiff.files import other_kind

log = logging.getLogger("fastdiff")


def load_data(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    fit: str = "crop",
    value_range: tuple[float, float] | None = None,
    frames: str | None = None,
    alpha: str | None = None,
    profile: str | None = None,
    layout: str | None = None,
    class_depth: int | None = None,
    class_names: Sequence[str] | None = None,
    captions: str | None = None,
) -> ArrayData | FolderData:
    """Open a folder of images, an ``.npz``, ``.tar``, Parquet or IDX file (``.gz`` or not) as a data set.

    Files of a folder that are unreadable or do not fit are left out, and the "fastdiff" logger names each. It also
    warns of everything else about the data that is doubtful, and names the argument below that settles it.

    Args:
        path: The data. A folder is searched recursively; if every image lies in a sub-folder, the sorted names of the
            first level's sub-folders are the classes. An ``.npz`` file holds uint8 images [N, H, W], [N, H, W, C] or
            [N, C, H, W] under ``images``, ``x`` or ``arr_0``, and may hold integer labels [N] under ``labels`` or ``y``
            (or ``arr_1`` beside ``arr_0``) and their names under ``class_names``. IDX is the format of MNIST. A
            ``.tar`` file, or a folder of nothing else, is as WebDataset has it: ``000012.png``, ``000012.cls``. A
            Parquet file, or a folder of nothing else, is as Hugging Face has it: a column ``image`` of {bytes, path},
            and ``label``; pyarrow is needed.
        labels: The IDX file of labels that belongs to an IDX file of images.
        size: The images' size: an int for H = W, or (H, W). None keeps the size of the data, whose images must then
            all have the same.
        channels: 1 (gray) or 3 (RGB). None keeps the channels of the data; a folder with one colour image is colour.
            Colour becomes luma (ITU-R 601), and gray is repeated.
        fit: How images of another size are fitted. "crop" takes the centre with the aspect of ``size`` and shrinks it
            by Lanczos resampling; smaller images are left out. "pad" centres the image on black (0); larger images are
            left out.
        value_range: The values (black, white) of the data, such as (0, 4095) for 12 bits in 16-bit files; values beyond
            it are refused. None: the whole range of 8- or 16-bit integers. Files of 32-bit or floating-point pixels,
            and arrays that are not uint8, need it.
        frames: Which pages or frames of a file are images: "first" or "all". None: the first.
        alpha: What shows through where images are transparent: "white", "black", or "drop" for the colours that the
            file has there. None: white.
        profile: Colour profiles other than sRGB: "ignore" keeps the values of the file, "srgb" converts them. None
            ignores the profiles.
        layout: The layout of an array whose shape does not tell it: "NHWC", "NCHW" or "NHW".
        class_depth: How many levels of sub-folders name the class of an image; 0 ignores all labels, of an array as
            well. None: 1 where every image lies in a sub-folder, else 0.
        class_names: The classes in the order of their numbers: for arrays a name for every label from 0 on, for a
            folder the names of its sub-folders. None: the names in the data, if it has any.
        captions: Where the captions of a folder's images are: "txt" for a text file beside each image, of its name with
            that ending, or the name of a file in the folder, such as "metadata.jsonl", of JSON lines with "file_name"
            and "text". None reads no captions.

    Returns:
        The data set: a `FolderData` for a folder, else an `ArrayData`.

    Raises:
        DataError: If the data cannot be read, have no usable image, or may be read in several ways.
        InvalidArgument: If an argument is out of range, or is given for data of a kind to which it does not apply.
    """
    reading = Reading(value_range, frames, alpha, profile)
    data = open_data(
        path, reading, labels=labels, size=size, channels=channels, fit=fit, layout=layout, class_depth=class_depth,
        class_names=class_names, captions=captions,
    )  # fmt: skip
    for file, reason in data.skipped:
        log.warning("skipped %s: %s", printable(file), reason)
    for doubt in data.doubts:
        log.warning("%s: %s", printable(path), doubt)
    return data


def open_data(
    path: str | os.PathLike[str],
    reading: Reading = DEFAULT,
    *,
    labels: str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    fit: str = "crop",
    layout: str | None = None,
    class_depth: int | None = None,
    class_names: Sequence[str] | None = None,
    captions: str | None = None,
) -> ArrayData | FolderData:
    """Open data as `load_data` does, without logging what is skipped or doubtful: the caller reports both."""
    path = Path(path)
    target = _check_size(size)
    if channels is not None and not (is_whole(channels) and channels in (1, 3)):
        raise InvalidArgument(f"channels must be 1, 3 or None, not {channels!r}")
    one_of("fit", fit, ("crop", "pad"))
    one_of("layout", layout, (*LAYOUTS, None))
    if class_depth is not None:
        whole("class_depth", class_depth, 0, 16, but="None")
    names = check_names(class_names)
    kind = _kind(path)
    if labels is not None and kind != "idx":
        raise InvalidArgument(
            f"labels= is the label file of an IDX image file, but {path} is {_KINDS[kind]}, which holds its own"
        )
    if layout is not None and kind != "npz":
        raise InvalidArgument(f"layout={layout!r} is for the array of an .npz file, but {path} is {_KINDS[kind]}")
    for records, files, read in (
        ("tar", tars.archives, tars.read_tars),
        ("parquet", parquet.shards, parquet.read_parquet),
    ):
        shards = files(path) if kind == "folder" else [path] if kind == records else []
        if shards:
            _check_records(records, path, reading, class_depth, captions)
            gathered = read(shards, target, channels, fit, reading, class_depth != 0)
            return _record_data(path, gathered, names, reading, fit)
    if kind == "folder":
        return FolderData(path, target, channels, fit, reading, class_depth, names, captions)
    for name, value in (("frames", reading.frames), ("profile", reading.profile), ("captions", captions)):
        if value is not None:
            raise InvalidArgument(f"{name}={value!r} is for files of images, but {path} is {_KINDS[kind]}")
    if class_depth is not None and class_depth > 1:
        raise InvalidArgument(f"class_depth={class_depth} is for folders, but {path} is {_KINDS[kind]}")
    doubts: list[str] = []
    if kind == "npz":
        arrays = read_npz(path, any_dtype=reading.value_range is not None, layout=layout)
        if arrays.unused and class_depth != 0:
            doubts.append(f"the arrays {', '.join(map(printable, arrays.unused[:8]))} are not used")
    else:
        classes = None if labels is None else read_idx(Path(labels), 1)
        arrays = Arrays(read_idx(path, 3)[..., None], classes)
        if classes is not None and len(classes) != len(arrays.images):
            raise DataError(f"{labels} holds {len(classes)} labels, but {path} holds {len(arrays.images)} images")
        beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        if labels is None and class_depth != 0 and beside != path and beside.exists():
            doubts.append(
                f"no labels, although {printable(beside.name)} is there; labels= uses it, class_depth=0 does not"
            )
    found = None if class_depth == 0 else arrays.labels
    names = names or check_names(arrays.class_names, DataError, f"{path}: class_names")
    if found is None:
        if class_names is not None:
            raise InvalidArgument(f"class_names= needs labels, which {path} does not have")
        names = None
    data = ArrayData(path, arrays.images, found, target, channels, fit, reading, names)
    data.doubts = (*doubts, *data.doubts)
    return data


def _check_records(kind: str, path: Path, reading: Reading, class_depth: int | None, captions: str | None) -> None:
    if captions is not None:
        raise InvalidArgument(f"captions={shown(captions)} is for folders of images, but {path} is {_KINDS[kind]}")
    if reading.frames == "all" or (class_depth or 0) > 1:
        option = "frames='all'" if reading.frames == "all" else f"class_depth={class_depth}"
        raise InvalidArgument(f"{option} is for folders of images, but {path} is {_KINDS[kind]}")


def _record_data(
    path: Path, read: tuple[Arrays, list[tuple[Path, str]], list[str]], names: tuple[str, ...] | None, reading: Reading,
    fit: str,
) -> ArrayData:  # fmt: skip
    """Make a data set of the images of tar or Parquet files, which were read into memory."""
    arrays, skipped, doubts = read
    if names is not None and arrays.labels is None:
        raise InvalidArgument(f"class_names= needs labels, which {path} does not have")
    names = names or check_names(arrays.class_names, DataError, f"{path}: names of classes")
    data = ArrayData(path, arrays.images, arrays.labels, None, None, fit, class_names=names)
    data.skipped, data.doubts, data.options = tuple(skipped), (*doubts, *data.doubts), options_of(reading, fit)
    return data


_KINDS = {
    "folder": "a folder", "npz": "an .npz file", "idx": "an IDX file", "tar": "a .tar file",
    "parquet": "a Parquet file",
}  # fmt: skip


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        pair = (size, size) if not isinstance(size, Iterable) else tuple(size)
        if isinstance(size, (str, bytes)) or len(pair) != 2 or any(isinstance(side, bool) for side in pair):
            raise TypeError
        h, w = (operator.index(side) for side in pair)
    except TypeError:
        raise InvalidArgument(f"size must be an int, (height, width) or None, not {size!r}") from None
    if h < 1 or w < 1 or h * w > MAX_PIXELS:
        raise InvalidArgument(f"size must be at least 1x1 and at most {MAX_PIXELS} pixels, not {h}x{w}")
    return h, w


def _kind(path: Path) -> str:
    """Tell the kind of data at ``path``, a key of _KINDS, by its first bytes: files of MNIST have no suffix."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "folder"
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is neither a folder nor a regular file")
        with path.open("rb") as file:
            head = file.read(512)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {path}: {why(error)}") from error
    if head[:2] == b"PK":
        return "npz"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:2] in (b"\x1f\x8b", b"\0\0"):
        return "idx"
    if head[:4] == b"PAR1":
        return "parquet"
    found = other_kind(head, size)
    if found is not None:
        raise DataError(f"{path}: {found}")
    raise DataError(f"{path} is neither a folder of images, an .npz, .tar, Parquet nor IDX file (gzipped or not)")
