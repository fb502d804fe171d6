"""Results of sampling: the finished images, and events for the rows before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastdiff.data import pictures
from fastdiff.errors import InvalidArgument
from fastdiff.files import atomic_file
from fastdiff.solvers import StepTable


@dataclasses.dataclass(frozen=True, repr=False)
class Event:
    """A finished row of a run, for the images that are in flight.

    Attributes:
        row: Number of the row, from 0.
        rows: Rows of the step table.
        indices: Global indices of the images, a range unless the caller chose them.
        x: State after the row, float32 [len(indices), C, H, W] on the sampler's device.
        x0: Denoised images that the row computed, likewise.
    """

    row: int
    rows: int
    indices: Sequence[int]
    x: Tensor
    x0: Tensor

    def __repr__(self) -> str:
        return f"Event(row {self.row} of {self.rows}, {len(self.indices)} images {_shape(self.x)})"


@dataclasses.dataclass(frozen=True, repr=False)
class SampleOutput:
    """The images that a call has drawn; a notebook shows them.

    Attributes:
        images: float32 [n, C, H, W] on the CPU, in [-1, 1] where x0 was clipped.
        seed: Seed of the noise; a tuple of seeds, one for each image, where the caller gave several.
        start_index: Global index of the first image.
        table: Step table that was run.
        nfe: Network evaluations per image; a guided row counts two.
        labels: int64 [n], or None for an unconditional network.
        class_names: The names of the model's classes, or None.
        index: Global index of each image; None for ``start_index`` and the following ones.
        prompts: The prompt of each image; None for a network that reads no text.
    """

    images: Tensor
    seed: int | tuple[int, ...]
    start_index: int
    table: StepTable
    nfe: int
    labels: Tensor | None
    class_names: tuple[str, ...] | None = None
    index: Sequence[int] | None = None
    prompts: tuple[str, ...] | None = None

    @property
    def indices(self) -> Sequence[int]:
        """Global indices of the images, a range unless the caller chose them."""
        return range(self.start_index, self.start_index + len(self.images)) if self.index is None else self.index

    def __repr__(self) -> str:
        i = self.indices
        which = f"{i[0]}" if len(i) == 1 else f"{i[0]} to {i[-1]}" if isinstance(i, range) else _few(i)
        seeds = f"seed {self.seed}" if isinstance(self.seed, int) else f"seeds {_few(self.seed)}"
        return (
            f"SampleOutput({len(self.images)} images {_shape(self.images)}, {seeds}, index {which}, "
            f"{self.table.solver}, {len(self.table)} rows, {self.nfe} network evaluations each)"
        )

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows: the images, at most 64; None where they are no pictures."""
        if self.images.shape[1] not in pictures.MODES:
            return None
        return pictures.png(pictures.grid(self.images[:64]))

    def to_pil(self) -> list[Image.Image]:
        """Convert the images to PIL.

        Returns:
            One picture for each image: mode L, LA, RGB or RGBA for one to four channels.

        Raises:
            InvalidArgument: If the images have more channels.
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
                any, labels, class_names and prompts. No suffix: a folder with a PNG for each image, named by its global
                index (behind its seed, or its position, where several have the same).
            columns: Images in a row of the grid.

        Raises:
            InvalidArgument: If the suffix is none of these.
            WriteError: If a file cannot be written; an earlier file of its name is then unchanged.
        """
        path = Path(path)
        if path.suffix.lower() in pictures.PICTURES:
            pictures.save_picture(self.to_pil()[0] if len(self.images) == 1 else self.grid(columns), path)
        elif path.suffix.lower() == ".npz":
            indices = np.array(self.indices, dtype=np.int64)
            arrays: dict[str, Any] = {
                "images": pictures.to_uint8(self.images),
                "seed": np.array(self.seed, dtype=np.uint64)[()],
                "indices": indices,
            }
            if self.labels is not None:
                arrays["labels"] = self.labels.numpy()
                if self.class_names is not None and int(self.labels.max()) < len(self.class_names):
                    arrays["class_names"] = np.array(self.class_names)
            if self.prompts is not None:
                arrays["prompts"] = np.array(self.prompts)
            with atomic_file(path) as file:
                np.savez_compressed(file, **arrays)
        elif not path.suffix:
            names = self._names()
            for i in range(len(self.images)):  # one by one, as all pictures together would take memory again
                picture = pictures.to_pil(self.images[i : i + 1])[0]
                pictures.save_picture(picture, path / f"{names[i]}.png")
        else:
            allowed = ", ".join((*pictures.PICTURES, ".npz"))
            raise InvalidArgument(f"{path}: unknown suffix; allowed: {allowed}, or none for a folder of PNGs")

    def _names(self) -> list[str]:
        """Return a different name for the file of each image."""
        names = [f"{index:06d}" for index in self.indices]
        if len({*names}) < len(names) and not isinstance(self.seed, int):
            names = [f"{seed}-{name}" for seed, name in zip(self.seed, names, strict=True)]
        return names if len({*names}) == len(names) else [f"{i:06d}" for i in range(len(names))]


def _shape(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
