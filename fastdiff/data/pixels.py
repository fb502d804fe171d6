"""Decoding of one image file to uint8 pixels, and conversion of pixels to a given size and number of channels."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastdiff.errors import DataError

# Only these decoders run, whatever a file's suffix is: for some formats (EPS) Pillow would start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 1 << 26  # one image: 8192 x 8192, 256 MiB as RGBA; a decoder thread holds a few copies
PIXELS_IN_FLIGHT = 2 * MAX_PIXELS  # of all threads; decoding takes about 16 bytes a pixel, so this is 2 GiB

Header = tuple[tuple[int, int], int]  # (height, width), 1 or 3 channels


def why(error: BaseException) -> str:
    """Describe an exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def misfit(own: tuple[int, int], size: tuple[int, int], fit: str) -> str | None:
    """Say why an image of size ``own`` cannot be fitted to ``size``; None if it can."""
    (h, w), (H, W) = own, size
    if fit == "crop" and (h < H or w < W):
        return f'smaller than {H}x{W}, and images are not enlarged (fit="pad" would pad it)'
    if fit == "pad" and (h > H or w > W):
        return f'larger than {H}x{W} (fit="crop" would shrink it)'
    return None


def convert(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert uint8 images [n, h, w, 1 | 3 | 4] to [n, h, w, channels], for 1 or 3 channels.

    Alpha is composited over white, and colour becomes luma with the weights of ITU-R 601:

        c' = round((c a + 255 (255 - a)) / 255)
        y = (19595 r + 38470 g + 7471 b + 2^15) / 2^16
    """
    if images.shape[3] == 4:
        a = images[..., 3:].astype(np.uint16)
        images = ((images[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)
    if images.shape[3] == 3 and channels == 1:
        r, g, b = (images[..., i : i + 1].astype(np.uint32) for i in range(3))
        return ((19595 * r + 38470 * g + 7471 * b + (1 << 15)) >> 16).astype(np.uint8)
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 and channels == 3 else images


def fit_to(images: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """Fit uint8 images [n, h, w, c] to [n, H, W, c], by cropping and shrinking or by padding.

    The sizes must be ones for which `misfit` returns None.
    """
    (h, w), (H, W) = images.shape[1:3], size
    if (h, w) == (H, W):
        return images
    if fit == "pad":
        top, left = (H - h) // 2, (W - w) // 2
        return np.pad(images, ((0, 0), (top, H - h - top), (left, W - w - left), (0, 0)))
    # The margin is cropped in whole pixels, so that an image that needs no scaling is not resampled.
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


class _Unmapped(io.FileIO):
    """A file without a descriptor for Pillow and libtiff, which would map it: one that is cut then ends the process."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels; one that claims more than MAX_PIXELS raises `DataError`.

    Threads wait for each other so that they have at most PIXELS_IN_FLIGHT open.
    """
    with io.BufferedReader(_Unmapped(path)) as file, Image.open(file, formats=FORMATS) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
        with _in_flight.share(w * h):
            yield image


class _InFlight:
    """The number of pixels that all threads have open."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the threads of the parent process after a fork."""
        self._changed, self._pixels = threading.Condition(), 0

    @contextmanager
    def share(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._pixels == 0 or self._pixels + pixels <= PIXELS_IN_FLIGHT)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_in_flight = _InFlight()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_flight.reset)


def header(path: Path) -> Header | str:
    """Read an image's size and channels from its header, or say why the file cannot be used."""
    try:
        with open_image(path) as image:
            if image.mode == "F":
                return "floating-point pixels, whose range is unknown"
            w, h = image.size
            turned = 5 <= _orientation(image) <= 8
            return ((w, h) if turned else (h, w)), 1 if image.mode in _GRAY else 3
    except Exception as error:  # a decoder may raise anything at all for a damaged file
        return "not a readable image" if isinstance(error, UnidentifiedImageError) else why(error)


_GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8 where it is sound, as far as the header has it; 1 is upright."""
    if "exif" not in image.info:  # Pillow turns TIFF by itself; to find EXIF elsewhere a PNG would have to be decoded
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not make the pixels unusable
        return 1


def pixels_of(image: Image.Image) -> np.ndarray:
    """Decode an image to uint8 [h, w, 1 | 3 | 4], turned as its EXIF orientation says.

    16-bit gray becomes round(v 255 / 65535). Of 16-bit colour Pillow gives the high bytes. Colour profiles are ignored.
    """
    image.load()
    if _orientation(image) != 1:
        with suppress(Exception):  # the pixels are turned by the time that damaged metadata can fail to be rewritten
            ImageOps.exif_transpose(image, in_place=True)
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
