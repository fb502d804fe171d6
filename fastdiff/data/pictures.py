"""Conversion of image tensors into pictures: PIL images, grids, files and animations.

Images are tensors [n, C, H, W] with values in [-1, 1], gray (C = 1) or RGB (C = 3), or with an alpha channel (2 or 4).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.files import atomic_file

BLOCK = 1 << 22  # numbers that are converted at a time, which takes several times their memory
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of a picture, by its channels
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Convert images to bytes: round((clip(x, -1, 1) + 1) 127.5).

    Args:
        images: Floating-point images [n, C, H, W] in [-1, 1]; values beyond are clipped, and NaN becomes 0.

    Returns:
        A uint8 array [n, H, W, C] on the CPU.
    """
    n, c, h, w = images.shape
    result = np.empty((n, h, w, c), np.uint8)
    step = max(1, BLOCK // max(c * h * w, 1))
    for i in range(0, n, step):
        x = images[i : i + step].detach().float().clamp(-1.0, 1.0).nan_to_num(nan=-1.0)
        result[i : i + step] = ((x + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return result


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images to PIL images.

    Args:
        images: Images [n, C, H, W] in [-1, 1].

    Returns:
        One PIL image for each image, in mode "L", "LA", "RGB" or "RGBA" for one to four channels.

    Raises:
        InvalidArgument: If the images have more channels.
    """
    return [_pil(array) for array in to_uint8(images)]


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Image.Image:
    """Arrange images in one picture, row by row, on a white background.

    Args:
        images: Images [n, C, H, W] in [-1, 1].
        columns: Images in each row, at least 1; None makes the grid about square, with ceil(sqrt(n)) columns.
        padding: Pixels between the images and around them, at least 0.

    Returns:
        The picture, in mode "L", "LA", "RGB" or "RGBA" for one to four channels.

    Raises:
        InvalidArgument: If there are no images, ``columns`` or ``padding`` is too small, or the images have more than
            four channels.
    """
    array = to_uint8(images)
    n, height, width, channels = array.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or padding < 0:
        raise InvalidArgument(
            f"columns={columns}, padding={padding}: columns of at least 1 and padding of at least 0 are needed"
        )
    rows = math.ceil(n / columns)
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8
    )
    for i, image in enumerate(array):
        y, x = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        canvas[y : y + height, x : x + width] = image
    return _pil(canvas)


def _pil(array: NDArray[np.uint8]) -> Image.Image:
    check_picture(array.shape[-1])
    return Image.fromarray(array[:, :, 0] if array.shape[-1] == 1 else array)


def check_picture(channels: int, path: str | Path = "a.png") -> None:
    """Raise `InvalidArgument` where images of so many channels cannot be written to a picture of this name."""
    if channels not in MODES:
        raise InvalidArgument(
            f"images of {channels} channels are not pictures; 1 (gray) or 3 (RGB), and one more with alpha, are. An "
            ".npz file holds any"
        )
    if channels in (2, 4) and Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise InvalidArgument(f"{path}: a JPEG file has no alpha channel, the images have one; .png and .webp have it")


def png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG.

    Args:
        picture: The picture.

    Returns:
        The bytes of the file.
    """
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture to a file, atomically: a failed write leaves an earlier file as it was.

    Args:
        picture: The picture to write.
        path: The file to write; its suffix names the format: .png, .jpg, .jpeg, .webp or .gif. Missing folders are
            created.

    Raises:
        InvalidArgument: If the suffix is another one.
        WriteError: If the file cannot be written.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise InvalidArgument(f"{path}: unknown picture suffix; allowed: {', '.join(PICTURES)}")
    _write(picture, path)


def animate(frames: Sequence[Image.Image], path: str | Path, seconds: float = 3.0) -> None:
    """Write frames as an animation that repeats for ever, atomically.

    Args:
        frames: The pictures to show, at least one, all of one size.
        path: The file to write, a .gif or .webp. Missing folders are created.
        seconds: How long the frames take together, in seconds, though each takes 20 ms at least; the last frame then
            stays for as long again.

    Raises:
        InvalidArgument: If there are no frames or the suffix is another one.
        WriteError: If the file cannot be written.
    """
    if Path(path).suffix.lower() not in (".gif", ".webp"):
        raise InvalidArgument(f"{path}: an animation is a .gif or .webp file")
    if not frames:
        raise InvalidArgument("an animation needs at least one frame")
    milliseconds = max(int(1000 * seconds / len(frames)), 20)
    durations = [milliseconds] * (len(frames) - 1) + [int(1000 * seconds) + milliseconds]
    # lossless matters for WebP alone, whose lossy compression is at its worst on noise
    _write(frames[0], path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0, lossless=True)


def _write(picture: Image.Image, path: str | Path, **options: Any) -> None:
    check_picture(len(picture.getbands()), path)
    if picture.mode == "LA" and Path(path).suffix.lower() != ".png":
        picture = picture.convert("RGBA")
    # Encoded in memory first: Pillow's errors of writing do not say what the system's are.
    encoded = io.BytesIO()
    picture.save(encoded, Image.registered_extensions()[Path(path).suffix.lower()], **options)
    with atomic_file(path) as file:
        file.write(encoded.getbuffer())
