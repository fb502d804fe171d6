"""Reading of arrays of images and labels from untrusted ``.npz`` and IDX files.

Sizes are read from headers and checked before anything is allocated or decompressed, and no pickle is ever loaded.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from fastdiff import memory
from fastdiff.data.pixels import MAX_PIXELS, why
from fastdiff.errors import DataError

MAX_BYTES = 16 << 30  # of one array in memory; half of the free memory is the limit where that is less
MAX_CLASSES = 1 << 20  # a larger label means a wrong array, and would need an embedding table of as many rows

# Deflate compresses by 1032 at most, so a file that claims more is damaged. An array above BOMB_BYTES that was
# compressed by more than BOMB_RATIO is filled with a constant; MNIST, which is mostly black, is compressed by 5.
DEFLATE_LIMIT = 1032
BOMB_BYTES, BOMB_RATIO = 64 << 20, 200

BLOCK = 16 << 20  # bytes that are read or converted at a time

LAYOUTS = ("NHW", "NHWC", "NCHW")
OWN = "own"  # NHW or NHWC by the number of dimensions, as fastdiff writes its own files
OWN_KEYS = ("seed", "indices")  # arrays that `SampleOutput.save` writes beside images and labels


class Arrays(NamedTuple):
    """The arrays of an ``.npz`` file."""

    images: np.ndarray  # [N, H, W, C]
    labels: np.ndarray | None = None  # [N], integers
    class_names: tuple[str, ...] | None = None
    unused: tuple[str, ...] = ()  # the names of arrays that are none of these


def check_bytes(where: str, what: str, size: int, instead: str = "use a folder") -> None:
    """Refuse an array of more bytes than this machine should hold, by a `DataError`, which says what to do instead."""
    limit = MAX_BYTES
    left = memory.free()
    if left is not None:
        limit = min(limit, left // 2)  # the arrays are converted, and the network needs memory too
    if size > limit:
        raise DataError(f"{where}: {what} would take {size} bytes, more than the {limit} allowed here; {instead}")


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
    """Read exactly ``size`` bytes; it is a `DataError` if the file has fewer or more.

    The array's memory is written, and so really taken, only as far as the file has data.
    """
    data = np.empty(size, np.uint8)
    view = data.data
    done = 0
    while done < size:
        part = file.read(min(BLOCK, size - done))
        if not part:
            raise DataError(f"{where}: the data end after {done} of {size} bytes")
        view[done : done + len(part)] = part
        done += len(part)
    if file.read(1):
        raise DataError(f"{where}: there are more than the {size} bytes that the header declares")
    return data


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read a uint8 array of ``dims`` dimensions (3: images, 1: labels) from an IDX file, gzipped or not.

    The format: two zero bytes, the type (8 for uint8), the number of dimensions, each dimension as a big-endian uint32,
    and the elements.
    """
    magic = bytes((0, 0, 8, dims))
    try:
        packed = path.stat().st_size
        with path.open("rb") as raw, _unzipped(raw) as file:
            zipped = isinstance(file, gzip.GzipFile)
            head = file.read(4 + 4 * dims)
            if head[:4] != magic or len(head) < 4 + 4 * dims:
                kind = "images" if dims == 3 else "labels"
                raise DataError(
                    f"{path}: not an IDX file of uint8 {kind}: it begins with {head[:4].hex()}, not {magic.hex()}"
                )
            shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
            size = math.prod(shape)
            _check_images(str(path), shape)
            # The file's size bounds what it can hold, so a false shape is refused before memory is allocated for it.
            if size > (packed * DEFLATE_LIMIT if zipped else packed - len(head)):
                raise DataError(
                    f"{path} declares shape {shape}, {size} bytes, which a file of {packed} bytes cannot hold"
                )
            if zipped:
                _check_bomb(str(path), size, packed)
            check_bytes(str(path), f"an array of shape {shape}", size)
            data = _read_exactly(str(path), file, size).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"cannot read {path}: {why(error)}") from error
    if dims == 1:
        _check_labels(str(path), data)
    return data


def _unzipped(raw: IO[bytes]) -> IO[bytes]:
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[return-value]  # it has the methods needed


def read_npz(path: Path, *, any_dtype: bool = False, layout: str | None = None) -> Arrays:
    """Read the images and the labels of an ``.npz`` file.

    Images that are not uint8 are refused unless ``any_dtype`` is set. ``layout`` is one of LAYOUTS, OWN, or None
    where the shape alone must tell it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            key = next((key for key in ("images", "x", "arr_0") if key in names), None)
            if key is None:
                held = ", ".join(sorted(names)[:8]) or "nothing"
                raise DataError(f"{path}: no array named images, x or arr_0 (it holds {held})")
            keys = ("labels", "y", "arr_1") if key == "arr_0" else ("labels", "y")
            label_key = next((key for key in keys if key in names), None)

            def check(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
                _check_image_header(where, shape, dtype, any_dtype, layout)

            images = _read_npy(path, archive, key, check)
            labels = None if label_key is None else _read_npy(path, archive, label_key, _check_label_header)
            has_names = "class_names" in names
            words = _read_npy(path, archive, "class_names", _check_name_header).tolist() if has_names else None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, RuntimeError, ImportError) as error:
        # zipfile raises RuntimeError for encrypted members, and its subclass NotImplementedError for methods of
        # compression that it lacks.
        raise DataError(f"cannot read {path}: {why(error)}") from error
    if images.ndim == 3:
        images = images[..., None]
    elif layout == "NCHW" or (layout is None and images.shape[3] not in (1, 3, 4)):
        images = images.transpose(0, 2, 3, 1)
    if labels is not None:
        labels = labels.reshape(len(labels))
        if len(labels) != len(images):
            raise DataError(f"{path}: {label_key} holds {len(labels)} labels, but {key} holds {len(images)} images")
        _check_labels(str(path), labels)
    unused = names - {key, label_key, "class_names", *OWN_KEYS}
    return Arrays(images, labels, None if words is None else tuple(words), tuple(sorted(unused)))


def _check_image_header(
    where: str, shape: tuple[int, ...], dtype: np.dtype, any_dtype: bool, layout: str | None
) -> None:
    if dtype != np.uint8 and not any_dtype:
        raise DataError(f"{where} is {dtype}, whose range is unknown; images are uint8, or value_range= declares it")
    if dtype.kind not in "uif":
        raise DataError(f"{where} is {dtype}; images must be uint8, or other numbers with value_range=")
    if layout == OWN:
        layout = "NHW" if len(shape) == 3 else "NHWC"
    if layout is not None:
        channels = {"NHW": 1, "NHWC": shape[-1] if shape else 0, "NCHW": shape[1] if len(shape) > 1 else 0}[layout]
        if len(shape) != len(layout) or channels not in (1, 3, 4):
            raise DataError(f"{where} has shape {shape}, which is not [{','.join(layout)}] with C = 1, 3 or 4")
    elif not (len(shape) == 3 or (len(shape) == 4 and {shape[1], shape[3]} & {1, 3, 4})):
        raise DataError(f"{where} has shape {shape}; images are [N,H,W], [N,H,W,C] or [N,C,H,W] with C = 1, 3 or 4")
    elif len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] in (1, 3, 4):
        raise DataError(f'{where} has shape {shape}, which may be NHWC or NCHW; layout="NHWC" or "NCHW" says which')
    elif len(shape) == 3 and shape[2] in (1, 3, 4) and shape[1] not in (0, shape[2]):
        raise DataError(
            f"{where} has shape {shape}: one image [H,W,C], which is stored as [1,H,W,C], or narrow ones [N,H,W], "
            'which layout="NHW" declares'
        )
    _check_images(where, shape)


def _check_label_header(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "iu" or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)) or shape[0] == 0:
        hint = ""
        if dtype.kind in "US":
            hint = "; names belong into the array class_names, a name for each number"
        elif len(shape) == 2:
            hint = "; labels.argmax(1) makes them of one-hot rows"
        raise DataError(f"{where} is {dtype} of shape {shape}; labels must be integers of shape [N]{hint}")


def _check_name_header(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind != "U" or len(shape) != 1 or not 1 <= shape[0] <= MAX_CLASSES:
        raise DataError(f"{where} is {dtype} of shape {shape}; strings of shape [classes] are needed")


# Later versions of the format are for structured types alone.
_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def _read_npy(
    path: Path, archive: zipfile.ZipFile, key: str, check: Callable[[str, tuple[int, ...], np.dtype], None]
) -> np.ndarray:
    """Read one array of an ``.npz``, once its header and the archive's record of its size have been checked.

    The bytes are viewed as the declared type: nothing is unpickled.
    """
    member = archive.getinfo(f"{key}.npy")
    where = f"{path}: {key}"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is packed by method {member.compress_type}; .npz files are stored or deflated")
    with archive.open(member) as file:
        try:
            shape, fortran, dtype = _NPY_HEADERS[npy.read_magic(file)](file)
        except Exception as error:  # the header is parsed as a Python literal, which can fail in many ways
            raise DataError(f"{where} has no usable .npy header ({why(error)})") from error
        if dtype.hasobject or dtype.itemsize == 0:
            raise DataError(f"{where} holds Python objects, which are never loaded; save plain uint8 arrays")
        if any(side < 0 for side in shape):
            raise DataError(f"{where} has shape {shape}")
        check(where, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        if member.file_size != file.tell() + size:
            raise DataError(f"{where} declares shape {shape}, {size} bytes, but holds {member.file_size - file.tell()}")
        _check_bomb(where, size, member.compress_size)
        check_bytes(where, f"an array of shape {shape}", size)
        data = _read_exactly(where, file, size).view(dtype)
    return data.reshape(shape[::-1]).T if fortran else data.reshape(shape)
