"""Results of sampling: the finished images, and events for the rows before them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastdiff.data import pictures
from fastdiff.errors import InvalidArgument
from fastdiff.files import atomic_file
from fastdiff.solvers import StepTable


@dataclasses.dataclass(frozen=True)
class Event:
    """A finished row of a run, for the images that are in flight.

    Attributes:
        row: Number of the row, from 0.
        rows: Rows of the step table.
        indices: Global indices of the images.
        x: State after the row, float32 [len(indices), C, H, W] on the sampler's device.
        x0: Denoised images that the row computed, likewise.
    """

    row: int
    rows: int
    indices: range
    x: Tensor
    x0: Tensor


@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """The images ``start_index`` to ``start_index + n - 1`` of a seed.

    Attributes:
        images: float32 [n, C, H, W] on the CPU, in [-1, 1] where x0 was clipped.
        seed: Seed of the noise.
        start_index: Global index of the first image.
        table: Step table that was run.
        nfe: Network evaluations per image; a guided row counts two.
        labels: int64 [n], or None for an unconditional network.
        class_names: The names of the model's classes, or None.
    """

    images: Tensor
    seed: int
    start_index: int
    table: StepTable
    nfe: int
    labels: Tensor | None
    class_names: tuple[str, ...] | None = None

    def to_pil(self) -> list[Image.Image]:
        """Convert the images to PIL.

        Returns:
            One picture for each image: mode L for one channel, RGB for three.
        """
        return pictures.to_pil(self.images)

    def grid(self, columns: int | None = None) -> Image.Image:
        """Put all images into one picture, row by row.

        Args:
            columns: Images in a row; None: as many as make a square.

        Returns:
            The picture.
        """
        return pictures.grid(self.images, columns)

    def save(self, path: str | Path, columns: int | None = None) -> None:
        """Write the images; files are replaced atomically.

        Args:
            path: Destination; its suffix selects the format. Suffix of a picture (.png, .jpg, .webp, .gif): the image,
                or the grid of several. ``.npz``: arrays images (uint8 [n, H, W, C]), seed, indices and, if there are
                any, labels and class_names. No suffix: a folder with a PNG for each image, named by its global index.
            columns: Images in a row of the grid.

        Raises:
            InvalidArgument: If the suffix is none of these.
            WriteError: If a file cannot be written; an earlier file of its name is then unchanged.
        """
        path = Path(path)
        if path.suffix.lower() in pictures.PICTURES:
            pictures.save_picture(self.to_pil()[0] if len(self.images) == 1 else self.grid(columns), path)
        elif path.suffix.lower() == ".npz":
            indices = np.arange(self.start_index, self.start_index + len(self.images))
            arrays: dict[str, Any] = {
                "images": pictures.to_uint8(self.images),
                "seed": np.uint64(self.seed),
                "indices": indices,
            }
            if self.labels is not None:
                arrays["labels"] = self.labels.numpy()
                if self.class_names is not None and int(self.labels.max()) < len(self.class_names):
                    arrays["class_names"] = np.array(self.class_names)
            with atomic_file(path) as file:
                np.savez_compressed(file, **arrays)
        elif not path.suffix:
            for i in range(len(self.images)):  # one by one, as all pictures together would take memory again
                picture = pictures.to_pil(self.images[i : i + 1])[0]
                pictures.save_picture(picture, path / f"{self.start_index + i:06d}.png")
        else:
            allowed = ", ".join((*pictures.PICTURES, ".npz"))
            raise InvalidArgument(f"{path}: unknown suffix; allowed: {allowed}, or none for a folder of PNGs")
