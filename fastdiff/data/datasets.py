"""Data sets of training images: a folder, an ``.npz`` file or an IDX (MNIST) file as a map-style torch `Dataset`.

    data = load_data("photos", size=64)                       # sub-folder names are the classes
    images, labels = data.__getitems__([3, 1, 4])             # uint8 [3, C, H, W], int64 [3] or None

Nothing here is random: the trainer shuffles and augments. Files are untrusted: sizes are read from headers and checked
before anything is allocated or decompressed, and no pickle is ever loaded.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdiff.checks import is_whole, one_of
from fastdiff.data.arrays import BLOCK, check_bytes, read_idx, read_npz
from fastdiff.data.pixels import MAX_PIXELS, Header, convert, fit_to, header, misfit, open_image, pixels_of, why
from fastdiff.errors import DataError, InvalidArgument

log = logging.getLogger("fastdiff")

# The suffix decides whether a file is opened; the format is then read from its content.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"})

Batch = tuple[torch.Tensor, torch.Tensor | None]


class ImageData(Dataset[Batch]):
    """A data set of images of one size and number of channels, with or without class labels.

    Subclasses define ``__len__`` and ``__getitems__``; a `torch.utils.data.DataLoader` or a `Trainer` uses both.

    Attributes:
        channels: The number of channels C, 1 (gray) or 3 (RGB).
        size: Height and width of the images in pixels, (H, W).
        num_classes: The number of classes; None for data without labels.
        class_names: The names of the classes, where the data has names.
    """

    channels: int
    size: tuple[int, int]
    num_classes: int | None
    class_names: tuple[str, ...] | None

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
) -> ArrayData | FolderData:
    """Open a folder of images, an ``.npz`` file or an IDX file (``.gz`` or not) as a data set.

    Files of a folder that are unreadable or do not fit are left out, and the "fastdiff" logger names each.

    Args:
        path: The data. A folder is searched recursively; if every image lies in a sub-folder, the sorted names of the
            first level's sub-folders are the classes. An ``.npz`` file holds uint8 images [N, H, W], [N, H, W, C] or
            [N, C, H, W] under ``images``, ``x`` or ``arr_0``, and may hold integer labels [N] under ``labels`` or ``y``
            (or ``arr_1`` beside ``arr_0``). IDX is the format of MNIST.
        labels: The IDX file of labels that belongs to an IDX file of images.
        size: The images' size: an int for H = W, or (H, W). None keeps the size of the data, whose images must then
            all have the same.
        channels: 1 (gray) or 3 (RGB). None keeps the channels of the data; a folder with one colour image is colour.
            Colour becomes luma (ITU-R 601), gray is repeated, and alpha is composited over white.
        fit: How images of another size are fitted. "crop" takes the centre with the aspect of ``size`` and shrinks it
            by Lanczos resampling; smaller images are left out. "pad" centres the image on black (0); larger images are
            left out.

    Returns:
        The data set: a `FolderData` for a folder, else an `ArrayData`.

    Raises:
        DataError: If the data cannot be read or have no usable image.
        InvalidArgument: If an argument is out of range, or ``labels`` is given for data other than an IDX file.
    """
    path = Path(path)
    target = _check_size(size)
    if channels is not None and not (is_whole(channels) and channels in (1, 3)):
        raise InvalidArgument(f"channels must be 1, 3 or None, not {channels!r}")
    one_of("fit", fit, ("crop", "pad"))
    kind = _kind(path)
    if labels is not None and kind != "idx":
        raise InvalidArgument(
            f"labels= is the label file of an IDX image file, but {path} is {_KINDS[kind]}, which holds its own"
        )
    if kind == "folder":
        return FolderData(path, target, channels, fit)
    if kind == "npz":
        images, classes = read_npz(path)
    else:
        images = read_idx(path, 3)[..., None]
        classes = None if labels is None else read_idx(Path(labels), 1)
        if classes is not None and len(classes) != len(images):
            raise DataError(f"{labels} holds {len(classes)} labels, but {path} holds {len(images)} images")
    return ArrayData(path, images, classes, target, channels, fit)


class ArrayData(ImageData):
    """Images in memory, as one tensor, already converted and fitted; made from arrays by `load_data` or directly.

    Args:
        path: What messages call the data.
        images: uint8 images [N, H, W, C] with 1, 3 or 4 channels.
        labels: Integer class labels [N], from 0, or None.
        size: The size (H, W) to fit the images to; None keeps theirs.
        channels: The number of channels to convert the images to, 1 or 3; None keeps theirs.
        fit: "crop" or "pad", as for `load_data`.

    Attributes:
        images: The images, a uint8 tensor [N, C, H, W].
        labels: The labels, an int64 tensor [N], or None.

    Raises:
        DataError: If the images cannot be fitted to ``size``, or would take too much memory.
    """

    def __init__(
        self,
        path: Path,
        images: np.ndarray,
        labels: np.ndarray | None,
        size: tuple[int, int] | None,
        channels: int | None,
        fit: str,
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

        def put(start: int) -> None:  # blocks bound the memory that the conversion needs besides source and result
            block = convert(images[start : start + step], self.channels)
            view[start : start + step] = fit_to(block, self.size, fit).transpose(0, 3, 1, 2)

        step = max(1, BLOCK // (h * w * max(c, self.channels)))
        with ThreadPoolExecutor(_cpus()) as pool:
            for _ in pool.map(put, range(0, n, step)):
                pass
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.class_names = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        at = torch.tensor(self._check(indices), dtype=torch.int64, device="cpu")
        return self.images[at], None if self.labels is None else self.labels[at]


class FolderData(ImageData):
    """Image files in a folder, decoded on request by a pool of threads.

    Opening the data reads the headers alone. A file whose pixels turn out to be unreadable is replaced by the next
    readable file, in the order of ``files``, cyclically, so that an index gives the same image in every run; the
    "fastdiff" logger names it once.

    Args:
        root: The folder, searched recursively.
        size: The size (H, W) to fit the images to; None keeps theirs, which must be one.
        channels: The number of channels to convert the images to, 1 or 3; None means 3 if any image has colour.
        fit: "crop" or "pad", as for `load_data`.

    Attributes:
        files: The usable files, sorted.
        labels: The classes of ``files``, an int64 tensor [N], or None.
        skipped: Pairs of a file that was left out and the reason.

    Raises:
        DataError: If no image can be used, or ``size`` is None and the images have several sizes.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None, channels: int | None, fit: str) -> None:
        paths = sorted(_image_files(root), key=lambda path: path.relative_to(root).parts)
        if not paths:
            raise DataError(f"{root}: no image files ({' '.join(sorted(SUFFIXES))})")
        with ThreadPoolExecutor(_cpus()) as pool:
            headers = list(pool.map(header, paths))
        skipped = [(path, header) for path, header in zip(paths, headers, strict=True) if isinstance(header, str)]
        found = [(path, header) for path, header in zip(paths, headers, strict=True) if not isinstance(header, str)]
        if size is None:
            size = _own_size(root, found)
        files: list[Path] = []
        colours = 1
        for path, (own, colour) in found:
            if reason := misfit(own, size, fit):
                skipped.append((path, f"it is {own[0]}x{own[1]}: {reason}"))
            else:
                files.append(path)
                colours = max(colours, colour)
        for path, reason in skipped:
            log.warning("skipped %s: %s", path, reason)
        if not files:
            path, reason = skipped[0]
            raise DataError(f"{root}: none of {len(paths)} image files can be used; the first, {path}: {reason}")
        self.root, self.files, self.skipped = root, tuple(files), tuple(skipped)
        self.size, self.channels, self.fit = size, channels or colours, fit
        self.class_names, self.labels = _classes(root, paths, files)
        self.num_classes = None if self.class_names is None else len(self.class_names)
        self._bad: set[int] = set()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_owner = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        order = self._check(indices)
        batch = torch.empty((len(order), self.channels, *self.size), dtype=torch.uint8, device="cpu")
        view = batch.numpy()
        used = []
        for slot, (index, pixels) in enumerate(self._executor().map(self._load, order)):
            view[slot] = pixels.transpose(2, 0, 1)
            used.append(index)
        return batch, None if self.labels is None else self.labels[torch.tensor(used, dtype=torch.int64, device="cpu")]

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        """Decode the first readable image at or after an index; return its own index and its pixels."""
        for step in range(len(self.files)):
            at = (index + step) % len(self.files)
            if at in self._bad:
                continue
            try:
                return at, self._decode(self.files[at])
            except Exception as error:  # a decoder may raise anything at all for a damaged file
                with self._lock:
                    new = at not in self._bad
                    self._bad.add(at)
                if new:
                    log.warning("unreadable %s (%s): the next readable image stands for it", self.files[at], why(error))
        raise DataError(f"{self.root}: none of {len(self.files)} images can be decoded; the last was {self.files[at]}")

    def _decode(self, path: Path) -> np.ndarray:
        with open_image(path) as image:
            pixels = pixels_of(image)
        if reason := misfit((pixels.shape[0], pixels.shape[1]), self.size, self.fit):  # it was changed after the scan
            raise DataError(f"it is now {pixels.shape[0]}x{pixels.shape[1]}: {reason}")
        return fit_to(convert(pixels[None], self.channels), self.size, self.fit)[0]

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_owner != os.getpid():  # threads do not survive a fork
                self._pool, self._pool_owner = ThreadPoolExecutor(_cpus(), "fastdiff-decode"), os.getpid()
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _pool=None)


_KINDS = {"folder": "a folder", "npz": "an .npz file", "idx": "an IDX file"}


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
            magic = file.read(4)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {path}: {why(error)}") from error
    if magic[:2] == b"PK":
        return "npz"
    if magic[:2] in (b"\x1f\x8b", b"\0\0"):
        return "idx"
    raise DataError(f"{path} is neither a folder of images, an .npz file nor an IDX file (gzipped or not)")


def _cpus() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, 16))


def _image_files(root: Path) -> Iterator[Path]:
    """Yield the regular files with an image's suffix, except hidden ones; links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        log.warning("skipped %s: %s", error.filename, why(error))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=failed):
        info = os.stat(folder)
        if os.name != "nt" and (info.st_dev, info.st_ino) in seen:  # a link back to a parent would never end
            subfolders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                yield path


def _own_size(root: Path, found: list[tuple[Path, Header]]) -> tuple[int, int]:
    if not found:
        return 1, 1  # the caller will raise, as no file is usable
    first, (size, _) = found[0]
    for path, (other, _) in found:
        if other != size:
            raise DataError(
                f"{root}: the images have several sizes ({first} is {size[0]}x{size[1]}, {path} is "
                f"{other[0]}x{other[1]}); give size="
            )
    return size


def _classes(root: Path, paths: list[Path], files: list[Path]) -> tuple[tuple[str, ...] | None, torch.Tensor | None]:
    """Return the names of the classes and the class of each of ``files``, if every image lies in a sub-folder.

    The names come from all ``paths``, so that the classes keep their numbers when an image is damaged.
    """
    loose = sum(path.parent == root for path in paths)
    if loose:
        if loose < len(paths):
            log.warning("%s: %d of %d images lie in no sub-folder: no class labels", root, loose, len(paths))
        return None, None

    def folder(path: Path) -> str:
        return path.relative_to(root).parts[0]

    names = tuple(sorted({folder(path) for path in paths}))
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[folder(path)] for path in files], dtype=torch.int64, device="cpu")
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if empty := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        log.warning("%s: no usable image in class %s", root, ", ".join(empty))
    return names, labels
