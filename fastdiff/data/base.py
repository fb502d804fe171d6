"""The interface of data sets of images."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Dataset

from fastdiff.data.doubts import Look

LOOKS = 4096  # images of a data set that are looked at when it is opened, at most

Batch = tuple[torch.Tensor, torch.Tensor | None]


class ImageData(Dataset[Batch]):
    """A data set of images of one size and number of channels, with or without class labels.

    Subclasses define ``__len__`` and ``__getitems__``; a `torch.utils.data.DataLoader` or a `Trainer` uses both.

    Attributes:
        channels: The number of channels C, 1 (gray) or 3 (RGB); more with condition images.
        size: Height and width of the images in pixels, (H, W).
        num_classes: The number of classes; None for data without labels.
        class_names: The names of the classes, where the data has names.
        labels: The class of each image, an int64 tensor [N], or None.
        captions: The caption of each image, N texts, or None. Those of a generator may be computed when asked for.
        skipped: Pairs of a file that was left out and the reason.
        doubts: Sentences about what is doubtful, each with the argument of `load_data` that settles it.
        facts: Sentences about what was done with the images.
        look: The values of the images that were looked at, where the data was looked at.
        options: The arguments of `load_data` that change pixels, ready for JSON.
        digest: A digest by which other data are told apart: of the names of files, or of labels and some images.
    """

    channels: int
    size: tuple[int, int]
    num_classes: int | None
    class_names: tuple[str, ...] | None = None
    labels: torch.Tensor | None = None
    captions: Sequence[str] | None = None
    skipped: tuple[tuple[Path, str], ...] = ()
    doubts: tuple[str, ...] = ()
    facts: Sequence[str] = ()
    look: Look | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    digest: str = ""

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError  # each kind of data knows its own

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch of images.

        Args:
            indices: B indices from 0 to ``len(self) - 1``, in any order.

        Returns:
            The images, uint8 [B, C, H, W], in the order of ``indices``, and their labels, int64 [B], or None for data
            without labels.

        Raises:
            IndexError: If an index is out of range.
        """
        raise NotImplementedError  # each kind of data reads its own

    def _check(self, indices: Sequence[int]) -> list[int]:
        order = [operator.index(index) for index in indices]
        for index in order:
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
        return order

    def __getitem__(self, index: int) -> Batch:
        """Return one image, uint8 [C, H, W], and its label, int64 [], or None."""
        images, labels = self.__getitems__([index])
        return images[0], None if labels is None else labels[0]


def cpus() -> int:
    """Return how many threads decode and convert images."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, 16))
