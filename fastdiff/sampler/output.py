"""What sampling gives back: the finished images, and the rows on the way to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastdiff.data import pictures as images
from fastdiff.errors import InvalidArgument
from fastdiff.files import atomic_path
from fastdiff.solvers import StepTable


@dataclasses.dataclass(frozen=True)
class Event:
    """One finished row of a run, for the images ``indices`` (global numbers) that are in flight.

    row counts from 0, rows is the table's length; x is the state after the row and x0 the denoised image that the row
    saw, both float32 [len(indices), C, H, W] on the sampler's device.
    """

    row: int
    rows: int
    indices: range
    x: Tensor
    x0: Tensor


@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """The images of (seed, start_index .. start_index + n - 1).

    images: float32 [n, C, H, W] on the CPU, in [-1, 1] where x0 was clipped; nfe: network evaluations per image (a
    guided row counts two); labels: int64 [n] or None.
    """

    images: Tensor
    seed: int
    start_index: int
    table: StepTable
    nfe: int
    labels: Tensor | None

    def to_pil(self) -> list[Image.Image]:
        """One PIL image each: mode L for one channel, RGB for three."""
        return images.to_pil(self.images)

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one picture, row by row; a square by default."""
        return images.grid(self.images, columns)

    def save(self, path: str | Path, columns: int | None = None) -> None:
        """Write, atomically. The suffix of ``path`` says what:

        a picture's (.png, .jpg, .webp, .gif): the image, or the grid of several;
        ``.npz``: arrays images (uint8 [n, H, W, C]), seed, indices and, where there are any, labels;
        none: a folder with one PNG per image, named by its global index.
        """
        path = Path(path)
        if path.suffix.lower() in images.PICTURES:
            images.save_picture(self.to_pil()[0] if len(self.images) == 1 else self.grid(columns), path)
        elif path.suffix.lower() == ".npz":
            indices = np.arange(self.start_index, self.start_index + len(self.images))
            arrays: dict[str, Any] = {
                "images": images.to_uint8(self.images),
                "seed": np.uint64(self.seed),
                "indices": indices,
            }
            if self.labels is not None:
                arrays["labels"] = self.labels.numpy()
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, **arrays)
        elif not path.suffix:
            for i, picture in enumerate(self.to_pil(), start=self.start_index):
                images.save_picture(picture, path / f"{i:06d}.png")
        else:
            allowed = ", ".join((*images.PICTURES, ".npz"))
            raise InvalidArgument(f"{path}: unknown suffix; allowed: {allowed}, or none for a folder of PNGs")
