"""One image file to uint8 pixels, and pixels to the size and channels that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdiff.errors import DataError

# Only these decoders run, whatever a file is called: Pillow also knows formats (EPS) that start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 1 << 26  # one image: 8192 x 8192, 256 MiB as RGBA; a decoder thread holds a few copies

Header = tuple[tuple[int, int], int]  # (height, width), 1 or 3 channels


def why(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def misfit(own: tuple[int, int], size: tuple[int, int], fit: str) -> str | None:
    """Why an image of size `own` cannot become `size`, or None."""
    (h, w), (H, W) = own, size
    if fit == "crop" and (h < H or w < W):
        return f'smaller than {H}x{W}, and images are not enlarged (fit="pad" would pad it)'
    if fit == "pad" and (h > H or w > W):
        return f'larger than {H}x{W} (fit="crop" would shrink it)'
    return None


def convert(images: np.ndarray, channels: int) -> np.ndarray:
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


def fit_to(images: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """uint8 [n, h, w, c] -> [n, H, W, c]; `misfit` has said that it can be done."""
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


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not; bombs are refused here."""
    with Image.open(path, formats=FORMATS) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
        yield image


def header(path: Path) -> Header | str:
    """What the file's header says, or why the file cannot be used."""
    try:
        with open_image(path) as image:
            if image.mode == "F":
                return "floating-point pixels, whose range is unknown"
            w, h = image.size
            turned = _orientation(image) >= 5
            return ((w, h) if turned else (h, w)), 1 if image.mode in _GRAY else 3
    except Exception as error:  # decoders meet damaged files with whatever they stumble over
        return "not a readable image" if isinstance(error, UnidentifiedImageError) else why(error)


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


def pixels_of(image: Image.Image) -> np.ndarray:
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
