"""Images from the records of tar and Parquet files, decoded one by one and fitted to one size."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from fastdiff.data.arrays import Arrays
from fastdiff.data.pixels import FORMATS, MAX_PIXELS, Reading, convert, fit_to, misfit, pixels_of, why
from fastdiff.data.scan import SUFFIXES
from fastdiff.errors import DataError

MAX_FILE = 1 << 28  # bytes of an image's file


class Gathered:
    """Images and labels that were read so far, and what was left out."""

    def __init__(self, size: tuple[int, int] | None, channels: int | None, fit: str, reading: Reading) -> None:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise DataError(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which makes damaged images look whole; unset it"
            )
        self.size, self.channels, self.fit, self.reading = size, channels, fit, reading
        self.images: list[np.ndarray] = []
        self.labels: list[int | None] = []
        self.skipped: list[tuple[Path, str]] = []

    def add(self, place: Path, content: Callable[[], bytes], label: Callable[[], int | None]) -> None:
        """Decode an image, or note why it is left out; the label of one that is left out is not read."""
        try:
            pixels = self._decoded(content())
            self.size = self.size or (pixels.shape[0], pixels.shape[1])
            reason = misfit((pixels.shape[0], pixels.shape[1]), self.size, self.fit)
        except Exception as error:  # a decoder may raise anything at all for a damaged file
            reason = why(error).splitlines()[0]
        if reason is not None:
            self.skipped.append((place, reason))
            return
        assert self.size is not None
        self.images.append(fit_to(pixels[None], self.size, self.fit)[0])
        self.labels.append(label())

    def _decoded(self, content: bytes) -> np.ndarray:
        """Decode an image to uint8 [h, w, 1 or 3]."""
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise DataError(f"its header says {h}x{w}, more than {MAX_PIXELS} pixels")
            pixels = pixels_of(image, self.reading)
        return convert(pixels[None], self.channels or min(pixels.shape[2], 3), self.reading.alpha)[0]

    def arrays(self, path: Path, no_label: str, class_names: tuple[str, ...] | None = None) -> Arrays:
        """Return all images and their labels; raise `DataError` if there is no image, or some have no label."""
        if not self.images:
            first = f"; the first, {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(f"{path}: no image can be used ({' '.join(sorted(SUFFIXES))}){first}")
        missing = sum(label is None for label in self.labels)
        if 0 < missing < len(self.labels):
            raise DataError(
                f"{path}: {missing} of {len(self.labels)} images have {no_label}; class_depth=0 ignores them"
            )
        most = max(image.shape[2] for image in self.images)
        stacked = np.stack([convert(image[None], most)[0] for image in self.images])
        labels = None if missing else np.array(self.labels, dtype=np.int64)
        return Arrays(stacked, labels, None if labels is None else class_names)
