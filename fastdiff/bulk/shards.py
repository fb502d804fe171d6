"""The contents of a shard in each format: encoding, decoding, writing once.

A shard is encoded in memory, so that its SHA-256 is that of the bytes that were meant to be written. Nothing in it
depends on the time or the user: equal images give equal bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import secrets
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, features

from fastdiff.data import pictures
from fastdiff.errors import DataError, WriteError
from fastdiff.files import atomic_file, atomic_folder

# By format, the suffix of a shard; "" for a folder.
SUFFIXES = {"npz": ".npz", "png": "", "webdataset": ".tar", "imagefolder": ""}
METADATA = "metadata.jsonl"  # of an imagefolder

Content = bytes | dict[str, bytes]
"""The bytes of a file, or those of the files of a folder by name."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of a job's files: how images become the bytes of a shard, and bytes images."""

    format: str
    shape: tuple[int, int, int]  # (H, W, C)
    seed: int
    class_names: list[str] | None
    prompts: list[str] | None = None  # which the images take in turns, by their indices

    def encode(self, pixels: NDArray[np.uint8], indices: range, labels: list[int] | None) -> Content:
        """Encode images, uint8 [n, H, W, C], as the file or the folder of a shard."""
        if self.format == "npz":
            return self._npz(pixels, indices, labels)
        members = dict(self.members(pixels, indices, labels))
        if self.format == "webdataset":
            return tar(members)
        if self.format == "png":
            return {name: data for name, data in members.items() if name.endswith(".png")}
        pictures = {name: data for name, data in members.items() if name.endswith(".png")}
        return {**pictures, METADATA: "".join(self.metadata(indices, labels)).encode()}

    def _npz(self, pixels: NDArray[np.uint8], indices: range, labels: list[int] | None) -> bytes:
        arrays: dict[str, Any] = {
            "images": pixels[..., 0] if pixels.shape[-1] == 1 else pixels,
            "seed": np.uint64(self.seed),
            "indices": np.asarray(indices, np.int64),
        }
        if labels is not None:
            arrays["labels"] = np.asarray(labels, np.int64)
            if self.class_names is not None:
                arrays["class_names"] = np.array(self.class_names)
        if self.prompts is not None:
            arrays["prompts"] = np.array([self.prompts[i % len(self.prompts)] for i in indices])
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def members(
        self, pixels: NDArray[np.uint8], indices: range, labels: list[int] | None
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of a WebDataset's files: the key of a sample is its index."""
        for k, i in enumerate(indices):
            yield f"{i:09d}.png", png(pixels[k])
            if labels is not None:
                yield f"{i:09d}.cls", str(labels[k]).encode()
            yield f"{i:09d}.json", json.dumps(self.facts(i, None if labels is None else labels[k])).encode()

    def facts(self, index: int, label: int | None) -> dict[str, Any]:
        """Return what is known about an image, ready for JSON."""
        facts: dict[str, Any] = {"index": index, "seed": self.seed}
        if label is not None:
            facts["label"] = label
            if self.class_names is not None and label < len(self.class_names):
                facts["class_name"] = self.class_names[label]
        if self.prompts is not None:
            facts["prompt"] = self.prompts[index % len(self.prompts)]
        return facts

    def metadata(self, indices: range, labels: list[int] | None) -> Iterator[str]:
        """Yield the lines of an imagefolder's metadata.jsonl."""
        for k, i in enumerate(indices):
            facts = {"file_name": f"{i:09d}.png", **self.facts(i, None if labels is None else labels[k])}
            yield json.dumps(facts) + "\n"

    def decode(self, content: Content, indices: range) -> NDArray[np.uint8]:
        """Return the images of a shard, uint8 [n, H, W, C]; `DataError` says what is wrong with the bytes."""
        try:
            if isinstance(content, bytes) and self.format == "npz":
                return self._decode_npz(content, len(indices))
            members = content if isinstance(content, dict) else untar(content)
            pixels = np.empty((len(indices), *self.shape), np.uint8)
            for k, i in enumerate(indices):
                pixels[k] = self._decode_png(members[f"{i:09d}.png"])
            return pixels
        except (OSError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile, SyntaxError) as e:
            raise DataError(f"it cannot be read ({type(e).__name__}: {str(e)[:200]})") from e

    def _decode_npz(self, content: bytes, n: int) -> NDArray[np.uint8]:
        shape = (n, *self.shape) if self.shape[2] > 1 else (n, *self.shape[:2])
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open("images.npy") as file:
            npy.read_magic(file)
            found = npy.read_array_header_1_0(file)
            if found != (shape, False, np.dtype(np.uint8)):
                raise ValueError(f"images {found[0]} of {found[2]}")
            data = file.read()  # to the end, where the archive's own checksum is compared
        return np.frombuffer(data, np.uint8).reshape(n, *self.shape)

    def _decode_png(self, data: bytes) -> NDArray[np.uint8]:
        h, w, c = self.shape
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != (w, h) or picture.mode != ("L" if c == 1 else "RGB"):
                raise ValueError(f"a picture of {picture.size}, mode {picture.mode}")
            return np.asarray(picture).reshape(self.shape)


def encoder(format: str) -> str | None:
    """Name the libraries, with their versions, that decide the bytes of compressed pictures."""
    if format == "npz":
        return None
    zlib = features.version("zlib_ng") or features.version("zlib")
    return f"Pillow {PIL.__version__}, zlib {zlib}"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode one image, uint8 [H, W, C], gray or RGB."""
    return pictures.png(Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels))


def tar(members: dict[str, bytes]) -> bytes:
    """Pack files as a tar archive that depends on nothing but them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            head = tarfile.TarInfo(name)  # of user 0, and of the time 0
            head.size = len(data)
            archive.addfile(head, io.BytesIO(data))
    return file.getvalue()


def untar(content: bytes) -> dict[str, bytes]:
    """Return the files of a tar archive; none is written anywhere."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        members = {}
        for head in archive:
            file = archive.extractfile(head) if head.isreg() else None
            if file is None:
                raise ValueError(f"{head.name} is no file")
            members[head.name] = file.read()
    return members


def digest(content: Content) -> str:
    """Compute the SHA-256 of a file; of a folder, that of the lines that ``sha256sum *`` prints in it."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(content.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(path: Path, limit: int) -> Content:
    """Read a shard of at most ``limit`` bytes; `DataError` says why that is impossible."""
    try:
        if path.is_symlink() or not path.is_dir():
            return _read(path, limit)
        content: dict[str, bytes] = {}
        for entry in os.scandir(path):
            content[entry.name] = _read(Path(entry), limit)
            limit -= len(content[entry.name])
        return content
    except OSError as e:
        raise DataError(f"it cannot be read ({e.strerror or e})") from e


def _read(path: Path, limit: int) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise DataError(f"it is missing, or {path.name} is no file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError("it is larger than its images can be")
    return data


def publish(path: Path, content: Content) -> None:
    """Write a shard durably; one that is there already stays."""
    if isinstance(content, bytes):
        with atomic_file(path, keep=True) as file:
            file.write(content)
        return
    with atomic_folder(path) as folder:
        for name, data in content.items():
            with open(folder / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


def discard(path: Path) -> None:
    """Move a damaged file or folder, if it is there, out of the way of a new one, to a name that is cleaned up."""
    aside = path.with_name(f".fastdiff-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, aside)
    except OSError as e:
        raise WriteError(f"{path} is damaged and could not be moved away ({e.strerror or e})", e.errno) from e
