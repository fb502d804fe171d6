"""Image files of a folder as a data set."""

from __future__ import annotations

import copy
import logging
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import ImageFile

from fastdiff import memory
from fastdiff.data.base import LOOKS, Batch, ImageData, cpus
from fastdiff.data.captions import read_captions
from fastdiff.data.doubts import Look, digest_of, find_classes, header_doubts, header_facts, options_of
from fastdiff.data.pixels import (
    DEFAULT,
    Header,
    Reading,
    convert,
    fit_to,
    headers,
    misfit,
    open_image,
    pixels_of,
    scaled,
    values_of,
    why,
)
from fastdiff.data.scan import SUFFIXES, Scan
from fastdiff.errors import DataError, printable

log = logging.getLogger("fastdiff")

# Images that are decoded when a folder is opened are of at most so many pixels together, which take a second.
LOOK_PIXELS, MIN_LOOKS = 1 << 26, 16
SHARE_DECODED = 0.25  # of the free memory, for decoded images that are kept


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
        with ThreadPoolExecutor(cpus()) as pool:
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
        with ThreadPoolExecutor(cpus()) as pool:
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
                self._pool, self._pool_owner = ThreadPoolExecutor(cpus(), "fastdiff-decode"), os.getpid()
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
