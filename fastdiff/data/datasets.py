"""Data sets of training images: a folder, an ``.npz`` file or an IDX (MNIST) file as a map-style torch `Dataset`.

    data = load_data("photos", size=64)                       # sub-folder names are the classes
    images, labels = data.__getitems__([3, 1, 4])             # uint8 [3, C, H, W], int64 [3] or None

Nothing here is random: the trainer shuffles and augments. Files are untrusted: sizes are read from headers and checked
before anything is allocated or decompressed, and no pickle is ever loaded.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import operator
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from PIL import ImageFile
from torch.utils.data import Dataset

from fastdiff import memory
from fastdiff.checks import is_whole, one_of, shown, whole
from fastdiff.data import parquet, tars
from fastdiff.data.arrays import BLOCK, LAYOUTS, Arrays, check_bytes, read_idx, read_npz
from fastdiff.data.captions import read_captions
from fastdiff.data.doubts import (
    ALPHA_DOUBT,
    Look,
    check_names,
    digest_of,
    find_classes,
    gap_doubts,
    header_doubts,
    header_facts,
    options_of,
)
from fastdiff.data.pixels import (
    DEFAULT,
    MAX_PIXELS,
    Header,
    Reading,
    convert,
    fit_to,
    headers,
    misfit,
    open_image,
    pixels_of,
    scaled,
    to_bytes,
    values_of,
    why,
)
from fastdiff.data.scan import SUFFIXES, Scan
from fastdiff.errors import DataError, InvalidArgument, printable

log = logging.getLogger("fastdiff")

# Images that are decoded when data are opened: at most so many, and of so many pixels together, which take a second.
LOOKS, LOOK_PIXELS, MIN_LOOKS = 4096, 1 << 26, 16
SHARE_DECODED = 0.25  # of the free memory, for decoded images that are kept

Batch = tuple[torch.Tensor, torch.Tensor | None]


class ImageData(Dataset[Batch]):
    """A data set of images of one size and number of channels, with or without class labels.

    Subclasses define ``__len__`` and ``__getitems__``; a `torch.utils.data.DataLoader` or a `Trainer` uses both.

    Attributes:
        channels: The number of channels C, 1 (gray) or 3 (RGB); more with condition images.
        size: Height and width of the images in pixels, (H, W).
        num_classes: The number of classes; None for data without labels.
        class_names: The names of the classes, where the data has names.
        labels: The class of each image, an int64 tensor [N], or None.
        captions: The caption of each image, N texts, or None. Those of a generator may be computed when asked for.
        skipped: Pairs of a file that was left out and the reason.
        doubts: Sentences about what is doubtful, each with the argument of `load_data` that settles it.
        facts: Sentences about what was done with the images.
        look: The values of the images that were looked at, where the data was looked at.
        options: The arguments of `load_data` that change pixels, ready for JSON.
        digest: A digest by which other data are told apart: of the names of files, or of labels and some images.
    """

    channels: int
    size: tuple[int, int]
    num_classes: int | None
    class_names: tuple[str, ...] | None = None
    labels: torch.Tensor | None = None
    captions: Sequence[str] | None = None
    skipped: tuple[tuple[Path, str], ...] = ()
    doubts: tuple[str, ...] = ()
    facts: Sequence[str] = ()
    look: Look | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    digest: str = ""

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch of images.

        Args:
            indices: B indices from 0 to ``len(self) - 1``, in any order.

        Returns:
            The images, uint8 [B, C, H, W], in the order of ``indices``, and their labels, int64 [B], or None for data
            without labels.

        Raises:
            IndexError: If an index is out of range.
        """
        raise NotImplementedError

    def _check(self, indices: Sequence[int]) -> list[int]:
        order = [operator.index(index) for index in indices]
        for index in order:
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
        return order

    def __getitem__(self, index: int) -> Batch:
        """Return one image, uint8 [C, H, W], and its label, int64 [], or None."""
        images, labels = self.__getitems__([index])
        return images[0], None if labels is None else labels[0]


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


class ConditionedData(ImageData):
    """Images, each with a condition image of the same size that a network goes by, as channels after the image's own.

    A `Trainer` noises as many channels as its network gives, and feeds the others to it as they are.

    Args:
        images: The images to learn to draw, with their labels if they have any.
        condition: The condition image of each, in the same order.

    Raises:
        DataError: If the two do not have as many images of one size.
    """

    def __init__(self, images: ImageData, condition: ImageData) -> None:
        if len(images) != len(condition) or tuple(images.size) != tuple(condition.size):
            raise DataError(
                f"{len(images)} images of {images.size[0]}x{images.size[1]}, but {len(condition)} condition images of "
                f"{condition.size[0]}x{condition.size[1]}; one of the same size is needed for each"
            )
        self.images, self.condition = images, condition
        self.channels, self.size = images.channels + condition.channels, images.size
        self.num_classes, self.class_names, self.labels = images.num_classes, images.class_names, images.labels
        self.skipped = (*images.skipped, *condition.skipped)
        self.doubts, self.facts, self.look = (*images.doubts, *condition.doubts), images.facts, images.look
        self.options = {**images.options, "condition": dict(condition.options)}
        self.digest = hashlib.sha256(f"{images.digest}/{condition.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        order = self._check(indices)
        while True:
            images, labels = self.images.__getitems__(order)
            condition, _ = self.condition.__getitems__(order)
            # An image that cannot be decoded has been replaced by the next one, and its condition image was not.
            bad = {at for data in (self.images, self.condition) for at in getattr(data, "unreadable", ())}
            readable = [next(at for k in range(len(self)) if (at := (i + k) % len(self)) not in bad) for i in order]
            if readable == order:
                return torch.cat([images, condition], dim=1), labels
            order = readable


class ArrayData(ImageData):
    """Images in memory, as one tensor, already converted and fitted; made from arrays by `load_data` or directly.

    Args:
        path: What messages call the data.
        images: uint8 images [N, H, W, C] with 1, 3 or 4 channels; other numbers if ``reading`` has their range.
        labels: Integer class labels [N], from 0, or None.
        size: The size (H, W) to fit the images to; None keeps theirs.
        channels: The number of channels to convert the images to, 1 or 3; None keeps theirs.
        fit: "crop" or "pad", as for `load_data`.
        reading: The choices of `load_data` that files leave open.
        class_names: The name of each label from 0 on, or None.

    Attributes:
        images: The images, a uint8 tensor [N, C, H, W].
        labels: The labels, an int64 tensor [N], or None.

    Raises:
        DataError: If the images cannot be fitted to ``size``, lie beyond the declared range, or would take too much
            memory.
    """

    def __init__(
        self,
        path: Path,
        images: np.ndarray,
        labels: np.ndarray | None,
        size: tuple[int, int] | None,
        channels: int | None,
        fit: str,
        reading: Reading = DEFAULT,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        n, h, w, c = images.shape
        self.size = size or (h, w)
        self.channels = channels or (1 if c == 1 else 3)
        if reason := misfit((h, w), self.size, fit):
            raise DataError(f"{path}: every image is {h}x{w}: {reason}")
        shape = (n, self.channels, *self.size)
        check_bytes(str(path), f"images fitted to {self.size[0]}x{self.size[1]}", math.prod(shape))
        self.images = torch.empty(shape, dtype=torch.uint8, device="cpu")
        view = self.images.numpy()

        def put(start: int) -> tuple[float, float]:  # blocks bound the memory of the conversion
            block = images[start : start + step]
            extremes = float(block.min()), float(block.max())
            if reading.value_range is not None:
                block = to_bytes(block, reading.value_range)
            block = convert(block, self.channels, reading.alpha)
            view[start : start + step] = fit_to(block, self.size, fit).transpose(0, 3, 1, 2)
            return extremes

        step = max(1, BLOCK // (h * w * max(c, self.channels) * images.itemsize))
        try:
            with ThreadPoolExecutor(_cpus()) as pool:
                extremes = list(pool.map(put, range(0, n, step)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes, self.class_names = None, class_names
        if labels is not None:
            self.num_classes = max(int(labels.max()) + 1, len(class_names or ()))
            if class_names is not None and len(class_names) < self.num_classes:
                raise DataError(f"{path}: label {self.num_classes - 1} has no name; there are {len(class_names)} names")
        self.look, self.options = Look(), options_of(reading, fit)
        self.look.add(str(images.dtype), min(low for low, _ in extremes), max(high for _, high in extremes))
        digests = [digest_of(view[i * n // min(n, LOOKS)]) for i in range(min(n, LOOKS))]
        for digest in digests:
            self.look.add_digest(digest)
        numbers = b"" if self.labels is None else self.labels.numpy().tobytes()
        self.digest = digest_of(np.frombuffer(numbers + b"".join(digests), np.uint8)).hex()
        self.doubts = (
            *self.look.doubts(reading),
            *(["an alpha channel " + ALPHA_DOUBT] if c == 4 and reading.alpha is None else []),
            *gap_doubts(self.labels, self.num_classes, class_names),
        )
        self.facts = [f"all {h}x{w}"] if (h, w) == self.size else [f"{h}x{w}, fitted by {fit}"]
        if c != self.channels:
            self.facts.append(f"{c} channels, converted to {self.channels}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        at = torch.tensor(self._check(indices), dtype=torch.int64, device="cpu")
        return self.images[at], None if self.labels is None else self.labels[at]


class FolderData(ImageData):
    """Image files in a folder, decoded on request by a pool of threads.

    Decoded images are kept, at the size of the data set, in at most a quarter of the memory that is free now.

    Opening the data reads all headers, and decodes as many images, evenly spread, as about a second allows: all of
    them in a small folder. What is unreadable is left out. A file that later turns out to be unreadable is replaced by
    the next readable one, in the order of ``files``, cyclically, so that an index gives the same image in every run;
    the "fastdiff" logger names it once, and more than a hundredth of such files is an error.

    Args:
        root: The folder, searched recursively.
        size: The size (H, W) to fit the images to; None keeps theirs, which must be one.
        channels: The number of channels to convert the images to, 1 or 3; None means 3 if any image has colour.
        fit: "crop" or "pad", as for `load_data`.
        reading: The choices of `load_data` that files leave open.
        class_depth: As for `load_data`.
        class_names: As for `load_data`.
        captions: As for `load_data`.

    Attributes:
        files: The usable files, sorted; a file of several frames that are all used is listed as often.
        labels: The classes of ``files``, an int64 tensor [N], or None.
        skipped: Pairs of a file that was left out and the reason.

    Raises:
        DataError: If no image can be used, ``size`` is None and the images have several sizes, or the sub-folders are
            not those of ``class_names``.
    """

    def __init__(
        self,
        root: Path,
        size: tuple[int, int] | None,
        channels: int | None,
        fit: str,
        reading: Reading = DEFAULT,
        class_depth: int | None = None,
        class_names: tuple[str, ...] | None = None,
        captions: str | None = None,
    ) -> None:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise DataError(
                f"{root}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which makes damaged images look whole; unset it"
            )
        scan = Scan.of(root)
        paths = scan.images
        if not paths:
            raise DataError(f"{root}: no image files ({' '.join(sorted(SUFFIXES))}){scan.instead()}")
        with ThreadPoolExecutor(_cpus()) as pool:
            found = list(pool.map(lambda path: headers(path, reading), paths))
        skipped = [*scan.skipped, *((p, h) for p, h in zip(paths, found, strict=True) if isinstance(h, str))]
        frames = [
            (path, frame, header)
            for path, heads in zip(paths, found, strict=True)
            if not isinstance(heads, str)
            for frame, header in enumerate(heads)
        ]
        self.root, self.fit, self.reading = root, fit, reading
        self.size = size or _own_size(root, frames)
        used = []
        for path, frame, head in frames:
            if reason := misfit(head.size, self.size, fit):
                skipped.append((path, f"it is {head.size[0]}x{head.size[1]}: {reason}"))
            else:
                used.append((path, frame, head))
        self.channels = channels or max((head.channels for _, _, head in used), default=1)
        self.look = Look()
        bad = self._look_at(used, self.look)
        skipped += [(used[at][0], reason) for at, reason in sorted(bad.items())]
        used = [entry for at, entry in enumerate(used) if at not in bad]
        if not used:
            path, reason = skipped[len(scan.skipped)]
            raise DataError(f"{root}: none of {len(paths)} image files can be used; the first, {path}: {reason}")
        self.files, self.skipped = tuple(path for path, _, _ in used), tuple(skipped)
        self._frames = tuple(frame for _, frame, _ in used)
        self.class_names, self.labels, doubts = find_classes(root, scan, self.files, class_depth, class_names)
        self.num_classes = None if self.class_names is None else len(self.class_names)
        texts: Sequence[str] = ()
        if captions is not None:
            texts = read_captions(root, self.files, captions)
            self.captions = _Captions(self, texts)
        self.digest = _digest(root, ((path, frame) for path, frame, _ in used), texts)
        heads = [(path, head) for path, _, head in used]
        self.doubts = (*header_doubts(heads, reading, channels), *self.look.doubts(reading), *doubts)
        self.facts, self.options = [*header_facts(heads, self.size, fit), *scan.facts()], options_of(reading, fit)
        self._bad: set[int] = set()
        self._decoded: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # with the state of the file
        bytes_of_image = self.channels * math.prod(self.size)
        self._room = int((memory.free() or 0) * SHARE_DECODED) // bytes_of_image
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_owner = 0

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, order: Sequence[int]) -> FolderData:
        """Return the same data with some of the images alone.

        Args:
            order: Indices of the images to keep, in their new order.

        Returns:
            The data set of these images.
        """
        new = copy.copy(self)
        new.files, new._frames = tuple(self.files[i] for i in order), tuple(self._frames[i] for i in order)
        new.labels = None if self.labels is None else self.labels[torch.tensor(order, dtype=torch.int64, device="cpu")]
        new._bad = set()
        texts = () if self.captions is None else [self.captions[i] for i in order]
        new.captions = None if self.captions is None else _Captions(new, texts)
        new.digest = _digest(self.root, zip(new.files, new._frames, strict=True), texts)
        return new

    @property
    def unreadable(self) -> frozenset[int]:
        """The indices, so far, of images that could not be decoded and for which others stand."""
        return frozenset(self._bad)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        order = self._check(indices)
        batch = torch.empty((len(order), self.channels, *self.size), dtype=torch.uint8, device="cpu")
        view = batch.numpy()
        used = []
        for slot, (index, pixels) in enumerate(self._executor().map(self._load, order)):
            view[slot] = pixels.transpose(2, 0, 1)
            used.append(index)
        return batch, None if self.labels is None else self.labels[torch.tensor(used, dtype=torch.int64, device="cpu")]

    def _look_at(self, entries: list[tuple[Path, int, Header]], found: Look) -> dict[int, str]:
        """Decode some images, evenly spread, for their values; return the reasons of those that cannot be decoded."""
        pixels = sum(math.prod(head.size) for _, _, head in entries)
        looks = min(len(entries), LOOKS, max(MIN_LOOKS, LOOK_PIXELS * len(entries) // max(pixels, 1)))
        order = sorted({i * len(entries) // looks for i in range(looks)}) if looks else []

        def look(at: int) -> str | tuple[float, float, bytes]:
            path, frame, _ = entries[at]
            try:
                with open_image(path, frame) as image:
                    values = values_of(image, self.reading)
                colours = values[..., :3]  # without alpha
                return float(colours.min()), float(colours.max()), digest_of(scaled(values, self.reading))
            except Exception as error:  # a decoder may raise anything at all for a damaged file
                return str(error) if isinstance(error, DataError) else why(error)

        bad: dict[int, str] = {}
        with ThreadPoolExecutor(_cpus()) as pool:
            for at, seen in zip(order, pool.map(look, order), strict=True):
                if isinstance(seen, str):
                    bad[at] = seen
                else:
                    found.add(entries[at][2].depth, seen[0], seen[1])
                    found.add_digest(seen[2])
        return bad

    def standing_for(self, index: int) -> int:
        """Return the index of the image that `__getitems__` gives for an index: another one's for an unreadable file.

        Args:
            index: The index, from 0 to ``len(self) - 1``.

        Returns:
            The index itself, or that of the next image that is readable so far.
        """
        for step in range(len(self.files)):
            if (index + step) % len(self.files) not in self._bad:
                return (index + step) % len(self.files)
        return index

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        """Decode the first readable image at or after an index; return its own index and its pixels."""
        for step in range(len(self.files)):
            at = (index + step) % len(self.files)
            if at in self._bad:
                continue
            try:
                return at, self._decode(at)
            except Exception as error:  # a decoder may raise anything at all for a damaged file
                with self._lock:
                    new = at not in self._bad
                    self._bad.add(at)
                if new:
                    log.warning(
                        "unreadable %s (%s): the next readable image stands for it",
                        printable(self.files[at]),
                        why(error),
                    )
                if len(self._bad) > max(1, len(self.files) // 100):
                    raise DataError(
                        f"{self.root}: {len(self._bad)} of {len(self.files)} images cannot be decoded, too many for "
                        f"others to stand for them; the last was {self.files[at]}; remove or repair them"
                    ) from error
        raise DataError(f"{self.root}: none of {len(self.files)} images can be decoded; the last was {self.files[at]}")

    def _decode(self, at: int) -> np.ndarray:
        """Return an image's pixels, which are kept while there is room, and as long as the file does not change."""
        found = os.stat(self.files[at])
        file = (found.st_size, found.st_mtime_ns, found.st_ino)
        kept = self._decoded.get(at)
        if kept is not None and kept[0] == file:
            return kept[1]
        pixels = self._decode_file(at)
        if kept is not None or len(self._decoded) < self._room:
            self._decoded[at] = file, pixels
        return pixels

    def _decode_file(self, at: int) -> np.ndarray:
        with open_image(self.files[at], self._frames[at]) as image:
            pixels = pixels_of(image, self.reading)
            if reason := misfit((pixels.shape[0], pixels.shape[1]), self.size, self.fit):  # changed after the scan
                raise DataError(f"it is now {pixels.shape[0]}x{pixels.shape[1]}: {reason}")
            return fit_to(convert(pixels[None], self.channels, self.reading.alpha), self.size, self.fit)[0]

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_owner != os.getpid():  # threads do not survive a fork
                self._pool, self._pool_owner = ThreadPoolExecutor(_cpus(), "fastdiff-decode"), os.getpid()
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_pool", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _pool=None, _decoded={})


class _Captions(Sequence[str]):
    """The captions of a folder's images, of the image that stands for each one."""

    def __init__(self, data: FolderData, texts: Sequence[str]):
        self.data, self.texts = data, texts

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        (checked,) = self.data._check([index])
        return self.texts[self.data.standing_for(checked)]


def _digest(root: Path, frames: Iterable[tuple[Path, int]], captions: Sequence[str] = ()) -> str:
    """Return a digest of the names of files, the numbers of their frames, and their captions."""
    places = "\n".join([*(f"{path.relative_to(root).as_posix()} {frame}" for path, frame in frames), *captions])
    return digest_of(np.frombuffer(places.encode(errors="surrogateescape"), np.uint8)).hex()


def open_pairs(images: ImageData, condition: ImageData) -> ConditionedData:
    """Join two folders of images, of which the files of one name (but for its ending) are a pair.

    An image without a condition image is left out, and so is a condition image without an image.

    Raises `DataError` if there is no pair, or a name has several files, and `InvalidArgument` if one is no folder.
    """
    if not isinstance(images, FolderData) or not isinstance(condition, FolderData):
        raise InvalidArgument("pairs of images are found by their names in two folders of images, not in other data")
    places, others = _by_name(images), _by_name(condition)
    both = [name for name in places if name in others]
    if not both:
        raise DataError(
            f"no file of {condition.root} has the name of a file of {images.root}, but for its ending; the first are "
            f"{next(iter(others))[0]} and {next(iter(places))[0]}"
        )
    pair = ConditionedData(
        images.chosen([places[name] for name in both]), condition.chosen([others[name] for name in both])
    )
    alone = [(images.files[i], condition.root) for name, i in places.items() if name not in others]
    alone += [(condition.files[i], images.root) for name, i in others.items() if name not in places]
    pair.skipped = (*pair.skipped, *((file, f"no file of this name in {root}") for file, root in alone))
    return pair


def _by_name(data: FolderData) -> dict[tuple[str, int], int]:
    """Return the index of each image by the name of its file without the ending, and the number of its frame."""
    found: dict[tuple[str, int], int] = {}
    for i, (file, frame) in enumerate(zip(data.files, data._frames, strict=True)):
        name = file.relative_to(data.root).with_suffix("").as_posix()
        if (name, frame) in found:
            raise DataError(f"{data.root}: {data.files[found[name, frame]].name} and {file.name} have one name, {name}")
        found[name, frame] = i
    return found


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
            head = file.read(263)
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
    raise DataError(f"{path} is neither a folder of images, an .npz, .tar, Parquet nor IDX file (gzipped or not)")


def _cpus() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, 16))


def _own_size(root: Path, found: list[tuple[Path, int, Header]]) -> tuple[int, int]:
    if not found:
        return 1, 1  # the caller will raise, as no file is usable
    first, _, head = found[0]
    for path, _, other in found:
        if other.size != head.size:
            raise DataError(
                f"{root}: the images have several sizes ({first} is {head.size[0]}x{head.size[1]}, {path} is "
                f"{other.size[0]}x{other.size[1]}); give size="
            )
    return head.size
