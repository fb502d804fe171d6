"""Decoding of one image file to uint8 pixels, and conversion of pixels to a given size and number of channels."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastdiff.checks import is_number, one_of
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.files import other_kind

# Only these decoders run, whatever a file's suffix is: for some formats (EPS) Pillow would start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 1 << 26  # one image: 8192 x 8192, 256 MiB as RGBA; a decoder thread holds a few copies
PIXELS_IN_FLIGHT = 2 * MAX_PIXELS  # of all threads; decoding takes about 16 bytes a pixel, so this is 2 GiB

MAX_FRAMES = 1 << 16  # pages or frames of one file


@dataclasses.dataclass(frozen=True)
class Reading:
    """Choices that files leave open; `fastdiff.data.load_data` describes them. None is a default that is warned of."""

    value_range: tuple[float, float] | None = None
    frames: str | None = None
    alpha: str | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        """Check the choices, and make the range a pair of floats."""
        one_of("frames", self.frames, ("first", "all", None))
        one_of("alpha", self.alpha, ("white", "black", "drop", None))
        one_of("profile", self.profile, ("ignore", "srgb", None))
        if self.value_range is None:
            return
        pair = self.value_range
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_number, pair)) or pair[0] >= pair[1]:
            raise InvalidArgument(f"value_range={pair!r}: two numbers (black, white), the first the lower, are needed")
        object.__setattr__(self, "value_range", (float(pair[0]), float(pair[1])))


DEFAULT = Reading()


@dataclasses.dataclass(frozen=True)
class Header:
    """Facts about an image that its file's header has."""

    size: tuple[int, int]  # height and width, upright
    channels: int  # 1 or 3
    depth: str = "8-bit"  # "8-bit", "16-bit", "16-bit colour", "32-bit" or "floating-point"
    frames: int = 1  # pages or frames of the file
    alpha: bool = False
    turned: bool = False  # whether EXIF says that the image is to be turned or mirrored
    profile: str | None = None  # name of a colour profile other than sRGB; "CMYK" for images without one


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


def convert(images: np.ndarray, channels: int, alpha: str | None = None) -> np.ndarray:
    """Convert uint8 images [n, h, w, 1 | 3 | 4] to [n, h, w, channels], for gray (1), RGB (3), or either with alpha.

    Where the result has alpha (2 or 4 channels), it is kept, and opaque where there was none. Else it is composited
    over white or black, or dropped. Colour becomes luma with the weights of ITU-R 601:

        c' = round((c a + back (255 - a)) / 255)
        y = (19595 r + 38470 g + 7471 b + 2^15) / 2^16
    """
    if images.shape[3] == channels:
        return images
    if channels in (2, 4):
        opacity = images[..., 3:] if images.shape[3] == 4 else np.full_like(images[..., :1], 255)
        return np.concatenate([convert(images[..., :3], channels - 1), opacity], axis=3)
    if images.shape[3] == 4 and alpha == "drop":
        images = images[..., :3]
    elif images.shape[3] == 4:
        a, back = images[..., 3:].astype(np.uint16), 0 if alpha == "black" else 255
        images = ((images[..., :3] * a + back * (255 - a) + 127) // 255).astype(np.uint8)
    if images.shape[3] == 3 and channels == 1:
        r, g, b = (images[..., i : i + 1].astype(np.uint32) for i in range(3))
        return ((19595 * r + 38470 * g + 7471 * b + (1 << 15)) >> 16).astype(np.uint8)
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 and channels == 3 else images


def to_bytes(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Scale values in a range (low, high) to bytes, round(255 (v - low) / (high - low)).

    Values that are not finite, or lie beyond the range, raise `DataError`: they are never clipped.
    """
    low, high = value_range
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        raise DataError("it has NaN or infinite values")
    if least < low or most > high:
        raise DataError(f"its values {least:g} to {most:g} go beyond value_range={low:g} to {high:g}")
    return np.floor((values.astype(np.float64) - low) * (255.0 / (high - low)) + 0.5).astype(np.uint8)


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
        # Pillow weighs colours by their alpha.
        source = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
        result[:] = np.asarray(source.resize((W, H), Image.Resampling.LANCZOS)).reshape(result.shape)
    return out


class _Unmapped(io.FileIO):
    """A file without a descriptor for Pillow and libtiff, which would map it: one that is cut then ends the process."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


@contextmanager
def open_image(path: Path, frame: int = 0) -> Iterator[Image.Image]:
    """Open a frame of an image without decoding its pixels; one of more than MAX_PIXELS raises `DataError`.

    Threads wait for each other so that they have at most PIXELS_IN_FLIGHT open.
    """
    with io.BufferedReader(_Unmapped(path)) as file, Image.open(file, formats=FORMATS) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
        if frame:
            with _in_flight.share(w * h):  # some formats decode the frames before it
                seek(image, frame)
        with _in_flight.share(max(w * h, image.width * image.height)):  # the pages of a TIFF differ in size
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


def headers(path: Path, reading: Reading = DEFAULT) -> list[Header] | str:
    """Read the header of an image, or those of all its frames; say why if the file cannot be used."""
    try:
        with open_image(path) as image:
            frames = int(getattr(image, "n_frames", 1))
            if frames > MAX_FRAMES:
                return f"it has {frames} pages or frames, more than {MAX_FRAMES}"
            found = []
            for frame in range(frames if reading.frames == "all" else 1):
                seek(image, frame)
                reason = _unusable(image, reading)
                if reason is not None:
                    return reason
                found.append(_header(image, frames))
            return found
    except Exception as error:  # a decoder may raise anything at all for a damaged file
        return _unreadable(path) if isinstance(error, UnidentifiedImageError) else why(error)


def _unreadable(path: Path) -> str:
    """Say what a file is that no decoder takes."""
    with suppress(OSError), path.open("rb") as file:
        found = other_kind(file.read(512), os.fstat(file.fileno()).st_size)
        if found is not None:
            return found
    return "not a readable image"


def seek(image: Image.Image, frame: int) -> None:
    """Go to a page or frame of an image; one that claims more than MAX_PIXELS raises `DataError`."""
    if frame:
        image.seek(frame)
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise DataError(f"its frame {frame} is {h}x{w}, more than {MAX_PIXELS} pixels")


def _unusable(image: Image.Image, reading: Reading) -> str | None:
    depth = _depth(image)
    if reading.value_range is None and depth in ("floating-point", "32-bit"):
        return f"{depth} pixels, whose range is unknown; value_range= declares it"
    if reading.value_range is not None and depth == "16-bit colour":
        return "16-bit colour, of which the high bytes alone can be read, so that value_range= does not apply"
    return None


def _header(image: Image.Image, frames: int) -> Header:
    w, h = image.size
    orientation = _orientation(image)
    return Header(
        size=(w, h) if 5 <= orientation <= 8 else (h, w),
        channels=1 if image.mode in _GRAY else 3,
        depth=_depth(image),
        frames=frames,
        alpha=image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info,
        turned=orientation != 1,
        profile=_profile_name(image),
    )


_GRAY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def _depth(image: Image.Image) -> str:
    """Return the kind of an image's values, a value of `Header.depth`."""
    if image.mode == "F":
        return "floating-point"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two hold 16 bits, whatever the mode
        return "32-bit"
    if image.mode.startswith("I"):
        return "16-bit"
    # Pillow gives the high bytes of 16-bit colour; only the way in which it will read them shows that there are more.
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    return "16-bit colour" if deep else "8-bit"


def _profile_name(image: Image.Image) -> str | None:
    profile = image.info.get("icc_profile")
    name = _described(profile) if isinstance(profile, bytes) and profile else None
    if image.mode == "CMYK":
        return "CMYK" if name is None else f"CMYK, {name}"
    return None if name is None or "srgb" in name.lower() else name


@lru_cache(maxsize=64)
def _described(profile: bytes) -> str:
    try:
        from PIL import ImageCms

        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip() or "unnamed"
    except Exception:  # a damaged profile, or Pillow without littlecms
        return "unknown"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, as far as the header has it; 1 is upright."""
    if "exif" not in image.info:  # Pillow turns TIFF by itself; to find EXIF elsewhere a PNG would have to be decoded
        return 1
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not make the pixels unusable
        return 1
    return found if 1 <= found <= 8 else 1


def pixels_of(image: Image.Image, reading: Reading = DEFAULT) -> np.ndarray:
    """Decode an image to uint8 [h, w, 1 | 3 | 4], turned as its EXIF orientation says.

    Values become round(255 (v - low) / (high - low)), where (low, high) is the range that ``reading`` declares, or the
    whole range of the file's type. Of 16-bit colour Pillow gives the high bytes.
    """
    return scaled(values_of(image, reading), reading)


def scaled(values: np.ndarray, reading: Reading = DEFAULT) -> np.ndarray:
    """Scale the values of `values_of` to uint8; alpha is not scaled."""
    if reading.value_range is None:
        if values.dtype == np.uint8:
            return values
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise DataError("pixels beyond 0..65535, whose range is unknown; value_range= declares it")
        return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
    if values.shape[2] == 4:
        return np.concatenate([to_bytes(values[..., :3], reading.value_range), values[..., 3:]], axis=2)
    return to_bytes(values, reading.value_range)


def values_of(image: Image.Image, reading: Reading = DEFAULT) -> np.ndarray:
    """Decode an image to the values of its file, [h, w, 1 | 3 | 4]: uint8, int64 for 16 or 32 bits, or float."""
    image.load()
    if _orientation(image) != 1:
        with suppress(Exception):  # the pixels are turned by the time that damaged metadata can fail to be rewritten
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        return np.asarray(image)[..., None]
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64)[..., None]
    if reading.profile == "srgb" and image.info.get("icc_profile"):
        image = _in_srgb(image)
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert an image from its embedded colour profile to sRGB; alpha is kept."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    has_alpha = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    if image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    gray = image.mode == "L"
    found = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert found is not None  # it is None only where the image is changed in place
    if gray:
        found = found.convert("L")
    if alpha is not None:
        found = found.convert("RGBA")
        found.putalpha(alpha)
    found.info.pop("transparency", None)
    return found
