"""Training images: a folder, an ``.npz`` file or an IDX (MNIST) file as a map-style torch dataset of uint8 images.

    data = load_data("photos", size=64)                       # sub-folder names are the classes
    images, labels = data.__getitems__([3, 1, 4])             # uint8 [3, C, H, W], int64 [3] or None

Nothing here is random: augmentation and shuffling are the trainer's. Files are untrusted: sizes are read from headers
and checked before anything is allocated or decompressed, and no pickle is ever loaded.
"""

from __future__ import annotations

import gzip
import logging
import math
import operator
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from fastdiff.errors import DataError, InvalidArgument

log = logging.getLogger("fastdiff")

# A file's suffix decides whether it is looked at, its content what it is. Only these decoders run: Pillow also knows
# formats (EPS) that start other programs.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 1 << 26  # one image: 8192 x 8192, 256 MiB as RGBA; a decoder thread holds a few copies
MAX_BYTES = 16 << 30  # one array in memory; half of the machine's memory where that is less
MAX_CLASSES = 1 << 20  # a label beyond this is a wrong array, and would become an embedding table of that many rows

# Deflate cannot exceed 1032:1, so a larger claim is false. Above BOMB_BYTES a ratio beyond BOMB_RATIO is constant
# filling, not images (MNIST, mostly black, packs by 5).
DEFLATE_LIMIT = 1032
BOMB_BYTES, BOMB_RATIO = 64 << 20, 200

_BLOCK = 16 << 20  # bytes per read
_FITS = ("crop", "pad")
Batch = tuple[torch.Tensor, torch.Tensor | None]
Header = tuple[tuple[int, int], int]  # (height, width), 1 or 3 channels


class ImageData(Dataset[Batch]):
    """Images of one size and channel count, with or without class labels."""

    channels: int
    size: tuple[int, int]  # H, W
    num_classes: int | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """uint8 [B, C, H, W] and int64 [B] (None where the data has no labels), in the order of `indices`."""
        raise NotImplementedError

    def _check(self, indices: Sequence[int]) -> list[int]:
        order = [operator.index(index) for index in indices]
        for index in order:
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
        return order

    def __getitem__(self, index: int) -> Batch:
        """One image [C, H, W] and its label []."""
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
    """Open a folder of images, an ``.npz`` file or an IDX file (``.gz`` or not).

    path      folder: searched recursively; where every image lies in a sub-folder, the first-level sub-folders' names,
              sorted, are the classes. ``.npz``: uint8 [N,H,W], [N,H,W,C] or [N,C,H,W] under ``images``, ``x`` or
              ``arr_0``, labels under ``labels`` or ``y`` (``arr_1`` beside ``arr_0``). IDX: the MNIST format.
    labels    the IDX label file of an IDX image file.
    size      H = W, or (H, W); None keeps the data's own size, which must then be one.
    channels  1 or 3; None keeps the data's own (a folder with any colour image is colour). Colour becomes luma
              (ITU-R 601), gray is repeated, and alpha is composited over white.
    fit       "crop": the centre with the target's aspect, downscaled with Lanczos; smaller images are skipped.
              "pad": centred in black (0); larger images are skipped.

    Skipped and unreadable files are named on the "fastdiff" logger; data without a usable image is a `DataError`.
    """
    path = Path(path)
    target = _check_size(size)
    if channels is not None and (isinstance(channels, bool) or channels not in (1, 3)):
        raise InvalidArgument(f"channels must be 1, 3 or None, not {channels!r}")
    if fit not in _FITS:
        raise InvalidArgument(f"fit must be one of {', '.join(map(repr, _FITS))}, not {fit!r}")
    kind = _kind(path)
    if labels is not None and kind != "idx":
        raise InvalidArgument(
            f"labels= is the label file of an IDX image file, but {path} is {_KINDS[kind]}, which holds its own"
        )
    if kind == "folder":
        return FolderData(path, target, channels, fit)
    if kind == "npz":
        images, classes = _read_npz(path)
    else:
        images = _read_idx(path, 3)[..., None]
        classes = None if labels is None else _read_idx(Path(labels), 1)
        if classes is not None and len(classes) != len(images):
            raise DataError(f"{labels} holds {len(classes)} labels, but {path} holds {len(images)} images")
    return ArrayData(path, images, classes, target, channels, fit)


class ArrayData(ImageData):
    """Images held as one uint8 tensor [N, C, H, W], already fitted: `images`, and `labels` (int64 [N] or None)."""

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
        if reason := _misfit((h, w), self.size, fit):
            raise DataError(f"{path}: every image is {h}x{w}: {reason}")
        shape = (n, self.channels, *self.size)
        _check_bytes(str(path), f"images fitted to {self.size[0]}x{self.size[1]}", math.prod(shape))
        self.images = torch.empty(shape, dtype=torch.uint8)
        view = self.images.numpy()

        def put(start: int) -> None:  # in blocks: what the conversion needs besides source and result stays small
            block = _convert(images[start : start + step], self.channels)
            view[start : start + step] = _fit(block, self.size, fit).transpose(0, 3, 1, 2)

        step = max(1, _BLOCK // (h * w * max(c, self.channels)))
        with ThreadPoolExecutor(_cpus()) as pool:
            for _ in pool.map(put, range(0, n, step)):
                pass
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.class_names = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        at = torch.tensor(self._check(indices), dtype=torch.int64)
        return self.images[at], None if self.labels is None else self.labels[at]


class FolderData(ImageData):
    """Image files decoded on request by a pool of threads.

    `files` are the usable files in sorted order, `labels` their classes (int64 [N] or None), `skipped` the files that
    were left out and why. A file whose pixels turn out unreadable is named once and stands for the next readable
    file (in the order of `files`, cyclically), so the same index gives the same image in every run.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None, channels: int | None, fit: str) -> None:
        paths = sorted(_image_files(root), key=lambda path: path.relative_to(root).parts)
        if not paths:
            raise DataError(f"{root}: no image files ({' '.join(sorted(SUFFIXES))})")
        with ThreadPoolExecutor(_cpus()) as pool:
            headers = list(pool.map(_header, paths))
        skipped = [(path, header) for path, header in zip(paths, headers, strict=True) if isinstance(header, str)]
        found = [(path, header) for path, header in zip(paths, headers, strict=True) if not isinstance(header, str)]
        if size is None:
            size = _own_size(root, found)
        files: list[Path] = []
        colours = 1
        for path, (own, colour) in found:
            if reason := _misfit(own, size, fit):
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
        batch = torch.empty((len(order), self.channels, *self.size), dtype=torch.uint8)
        view = batch.numpy()
        used = []
        for slot, (index, pixels) in enumerate(self._executor().map(self._load, order)):
            view[slot] = pixels.transpose(2, 0, 1)
            used.append(index)
        return batch, None if self.labels is None else self.labels[torch.tensor(used, dtype=torch.int64)]

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        """The first readable image at or after `index`, and its own index."""
        for step in range(len(self.files)):
            at = (index + step) % len(self.files)
            if at in self._bad:
                continue
            try:
                return at, self._decode(self.files[at])
            except Exception as error:  # decoders meet damaged files with whatever they stumble over
                with self._lock:
                    new = at not in self._bad
                    self._bad.add(at)
                if new:
                    log.warning(
                        "unreadable %s (%s): the next readable image stands for it", self.files[at], _why(error)
                    )
        raise DataError(f"{self.root}: none of {len(self.files)} images can be decoded; the last was {self.files[at]}")

    def _decode(self, path: Path) -> np.ndarray:
        with _open(path) as image:
            pixels = _pixels(image)
        if reason := _misfit((pixels.shape[0], pixels.shape[1]), self.size, self.fit):  # it changed since the scan
            raise DataError(f"it is now {pixels.shape[0]}x{pixels.shape[1]}: {reason}")
        return _fit(_convert(pixels[None], self.channels), self.size, self.fit)[0]

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_owner != os.getpid():  # threads do not survive a fork
                self._pool, self._pool_owner = ThreadPoolExecutor(_cpus(), "fastdiff-decode"), os.getpid()
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _pool=None)


# Arguments ------------------------------------------------------------------------------------------------------------

_KINDS = {"folder": "a folder", "npz": "an .npz file", "idx": "an IDX file"}


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        if isinstance(size, (str, bytes)):
            raise TypeError
        pair = (size, size) if not isinstance(size, Iterable) else tuple(size)
        if len(pair) != 2 or any(isinstance(side, bool) for side in pair):
            raise TypeError
        h, w = (operator.index(side) for side in pair)
    except TypeError:
        raise InvalidArgument(f"size must be an int, (height, width) or None, not {size!r}") from None
    if h < 1 or w < 1 or h * w > MAX_PIXELS:
        raise InvalidArgument(f"size must be at least 1x1 and at most {MAX_PIXELS} pixels, not {h}x{w}")
    return h, w


def _kind(path: Path) -> str:
    """What `path` is, by its first bytes: names such as ``train-images-idx3-ubyte`` have no useful suffix."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "folder"
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is neither a folder nor a regular file")
        with path.open("rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {path}: {_why(error)}") from error
    if magic[:2] == b"PK":
        return "npz"
    if magic[:2] in (b"\x1f\x8b", b"\0\0"):
        return "idx"
    raise DataError(f"{path} is neither a folder of images, an .npz file nor an IDX file (gzipped or not)")


def _cpus() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, 16))


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# Pixels ---------------------------------------------------------------------------------------------------------------


def _misfit(own: tuple[int, int], size: tuple[int, int], fit: str) -> str | None:
    """Why an image of size `own` cannot become `size`, or None."""
    (h, w), (H, W) = own, size
    if fit == "crop" and (h < H or w < W):
        return f'smaller than {H}x{W}, and images are not enlarged (fit="pad" would pad it)'
    if fit == "pad" and (h > H or w > W):
        return f'larger than {H}x{W} (fit="crop" would shrink it)'
    return None


def _convert(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [n, h, w, 1 | 3 | 4] -> [n, h, w, channels]; alpha over white, luma as in ITU-R 601.

    over white:  c' = round((c a + 255 (255 - a)) / 255)
    luma:        y = (19595 r + 38470 g + 7471 b + 2^15) / 2^16
    """
    if images.shape[3] == 4:
        a = images[..., 3:].astype(np.uint16)
        images = ((images[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)
    if images.shape[3] == 3 and channels == 1:
        r, g, b = (images[..., i : i + 1].astype(np.uint32) for i in range(3))
        return ((19595 * r + 38470 * g + 7471 * b + (1 << 15)) >> 16).astype(np.uint8)
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 and channels == 3 else images


def _fit(images: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """uint8 [n, h, w, c] -> [n, H, W, c]; `_misfit` has said that it can be done."""
    (h, w), (H, W) = images.shape[1:3], size
    if (h, w) == (H, W):
        return images
    if fit == "pad":
        top, left = (H - h) // 2, (W - w) // 2
        return np.pad(images, ((0, 0), (top, H - h - top), (left, W - w - left), (0, 0)))
    # Whole pixels are cropped, so that an image that only loses its margin is not resampled.
    scale = min(h / H, w / W)
    ch, cw = min(h, round(H * scale)), min(w, round(W * scale))
    top, left = (h - ch) // 2, (w - cw) // 2
    images = images[:, top : top + ch, left : left + cw]
    if (ch, cw) == (H, W):
        return images
    out = np.empty((len(images), H, W, images.shape[3]), np.uint8)
    for image, result in zip(images, out, strict=True):
        source = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image[..., 0]))
        result[:] = np.asarray(source.resize((W, H), Image.Resampling.LANCZOS)).reshape(result.shape)
    return out


# Folders --------------------------------------------------------------------------------------------------------------


def _image_files(root: Path) -> Iterator[Path]:
    """Regular files with an image's suffix, hidden names left out; links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        log.warning("skipped %s: %s", error.filename, _why(error))

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
        return 1, 1  # nothing is usable, whatever its size
    first, (size, _) = found[0]
    for path, (other, _) in found:
        if other != size:
            raise DataError(
                f"{root}: the images have several sizes ({first} is {size[0]}x{size[1]}, {path} is "
                f"{other[0]}x{other[1]}); give size="
            )
    return size


def _classes(root: Path, paths: list[Path], files: list[Path]) -> tuple[tuple[str, ...] | None, torch.Tensor | None]:
    """Class names and the class of each of `files`, where every image lies in a sub-folder.

    The names come from all `paths`: that an image is damaged must not renumber the classes.
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
    labels = torch.tensor([number[folder(path)] for path in files], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if empty := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        log.warning("%s: no usable image in class %s", root, ", ".join(empty))
    return names, labels


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not; bombs are refused here."""
    with Image.open(path, formats=FORMATS) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
        yield image


def _header(path: Path) -> Header | str:
    """What the file's header says, or why the file cannot be used."""
    try:
        with _open(path) as image:
            if image.mode == "F":
                return "floating-point pixels, whose range is unknown"
            w, h = image.size
            turned = _orientation(image) >= 5
            return ((w, h) if turned else (h, w)), 1 if image.mode in _GRAY else 3
    except Exception as error:  # decoders meet damaged files with whatever they stumble over
        return "not a readable image" if isinstance(error, UnidentifiedImageError) else _why(error)


_GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
# What undoes each EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:  # TIFF is turned by Pillow itself; PNG would have to be decoded to look further
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata does not make the pixels unusable
        return 1


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 1 | 3 | 4], upright; 16-bit gray is v' = round(v 255 / 65535).

    16-bit colour arrives from Pillow as its high bytes. Colour profiles are ignored.
    """
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        v = np.asarray(image).astype(np.int64)
        if v.min() < 0 or v.max() > 65535:
            raise DataError("32-bit pixels beyond 0..65535, whose range is unknown")
        return ((v * 255 + 32767) // 65535).astype(np.uint8)[..., None]
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


# Arrays ---------------------------------------------------------------------------------------------------------------


def _check_bytes(where: str, what: str, size: int) -> None:
    limit = MAX_BYTES
    with suppress(AttributeError, ValueError, OSError):  # not known on every system
        limit = min(limit, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    if size > limit:
        raise DataError(f"{where}: {what} would take {size} bytes, more than the {limit} allowed here; use a folder")


def _check_images(where: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) == 0:
        raise DataError(f"{where} has shape {shape}: it is empty")
    if math.prod(shape[1:]) > 4 * MAX_PIXELS:
        raise DataError(f"{where} has shape {shape}: images of more than {MAX_PIXELS} pixels")


def _check_labels(where: str, labels: np.ndarray) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{where}: labels range from {low} to {high}; they must lie in 0..{MAX_CLASSES - 1}")


def _check_bomb(where: str, size: int, packed: int) -> None:
    if size > max(BOMB_BYTES, BOMB_RATIO * packed):
        raise DataError(f"{where}: {size} bytes packed into {packed}: a decompression bomb, refused")


def _read_exactly(where: str, file: IO[bytes], size: int) -> np.ndarray:
    """`size` bytes and not one more; memory is touched only as far as the file really goes."""
    data = np.empty(size, np.uint8)
    view = data.data
    done = 0
    while done < size:
        part = file.read(min(_BLOCK, size - done))
        if not part:
            raise DataError(f"{where}: the data end after {done} of {size} bytes")
        view[done : done + len(part)] = part
        done += len(part)
    if file.read(1):
        raise DataError(f"{where}: there are more than the {size} bytes that the header declares")
    return data


_IDX = {3: "images", 1: "labels"}


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """IDX: 0, 0, type (8 = uint8), number of dimensions, each dimension as big-endian uint32, then the elements."""
    magic = bytes((0, 0, 8, dims))
    try:
        packed = path.stat().st_size
        with path.open("rb") as raw, _unzipped(raw) as file:
            zipped = isinstance(file, gzip.GzipFile)
            head = file.read(4 + 4 * dims)
            if head[:4] != magic or len(head) < 4 + 4 * dims:
                raise DataError(
                    f"{path}: not an IDX file of uint8 {_IDX[dims]}: it begins with {head[:4].hex()}, not {magic.hex()}"
                )
            shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
            size = math.prod(shape)
            _check_images(str(path), shape)
            # What the file can hold at most is known before anything is allocated for it.
            if size > (packed * DEFLATE_LIMIT if zipped else packed - len(head)):
                raise DataError(
                    f"{path} declares shape {shape}, {size} bytes, which a file of {packed} bytes cannot hold"
                )
            if zipped:
                _check_bomb(str(path), size, packed)
            _check_bytes(str(path), f"an array of shape {shape}", size)
            data = _read_exactly(str(path), file, size).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"cannot read {path}: {_why(error)}") from error
    if dims == 1:
        _check_labels(str(path), data)
    return data


def _unzipped(raw: IO[bytes]) -> IO[bytes]:
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[return-value]


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images as [N, H, W, C] and labels as [N] or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            key = next((key for key in ("images", "x", "arr_0") if f"{key}.npy" in names), None)
            if key is None:
                held = ", ".join(sorted(names)[:8]) or "nothing"
                raise DataError(f"{path}: no array named images, x or arr_0 (it holds {held})")
            keys = ("labels", "y", "arr_1") if key == "arr_0" else ("labels", "y")
            label_key = next((key for key in keys if f"{key}.npy" in names), None)
            images = _read_npy(path, archive, key, _check_image_header)
            labels = None if label_key is None else _read_npy(path, archive, label_key, _check_label_header)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, RuntimeError, ImportError) as error:
        # RuntimeError: encrypted, or (NotImplementedError) a compression that Python lacks.
        raise DataError(f"cannot read {path}: {_why(error)}") from error
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if labels is not None:
        labels = labels.reshape(len(labels))
        if len(labels) != len(images):
            raise DataError(f"{path}: {label_key} holds {len(labels)} labels, but {key} holds {len(images)} images")
        _check_labels(str(path), labels)
    return images, labels


def _check_image_header(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise DataError(f"{where} is {dtype}; images must be uint8, 0 to 255")
    if not (len(shape) == 3 or (len(shape) == 4 and {shape[1], shape[3]} & {1, 3, 4})):
        raise DataError(f"{where} has shape {shape}; images are [N,H,W], [N,H,W,C] or [N,C,H,W] with C = 1, 3 or 4")
    _check_images(where, shape)


def _check_label_header(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "iu" or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)) or shape[0] == 0:
        raise DataError(f"{where} is {dtype} of shape {shape}; labels must be integers of shape [N]")


_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # later: structured types only


def _read_npy(
    path: Path, archive: zipfile.ZipFile, key: str, check: Callable[[str, tuple[int, ...], np.dtype], None]
) -> np.ndarray:
    """One array of an ``.npz``, after its header and the archive's own record of its size have been checked.

    The bytes are viewed as the declared type: nothing is unpickled.
    """
    member = archive.getinfo(f"{key}.npy")
    where = f"{path}: {key}"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is packed by method {member.compress_type}; .npz files are stored or deflated")
    with archive.open(member) as file:
        try:
            shape, fortran, dtype = _NPY_HEADERS[npy.read_magic(file)](file)
        except Exception as error:  # the header is a Python literal: the parser has many ways to fail
            raise DataError(f"{where} has no usable .npy header ({_why(error)})") from error
        if dtype.hasobject or dtype.itemsize == 0:
            raise DataError(f"{where} holds Python objects, which are never loaded; save plain uint8 arrays")
        if any(side < 0 for side in shape):
            raise DataError(f"{where} has shape {shape}")
        check(where, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        if member.file_size != file.tell() + size:
            raise DataError(f"{where} declares shape {shape}, {size} bytes, but holds {member.file_size - file.tell()}")
        _check_bomb(where, size, member.compress_size)
        _check_bytes(where, f"an array of shape {shape}", size)
        data = _read_exactly(where, file, size).view(dtype)
    return data.reshape(shape[::-1]).T if fortran else data.reshape(shape)
