"""Images in memory as a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastdiff.data.arrays import BLOCK, check_bytes
from fastdiff.data.base import LOOKS, Batch, ImageData, cpus
from fastdiff.data.doubts import ALPHA_DOUBT, Look, digest_of, gap_doubts, options_of
from fastdiff.data.pixels import DEFAULT, Reading, convert, fit_to, misfit, to_bytes
from fastdiff.errors import DataError


class ArrayData(ImageData):
    """Images in memory, as one tensor, already converted and fitted; made from arrays by `load_data` or directly.

    Args:
        path: What messages call the data.
        images: uint8 images [N, H, W, C] with 1, 3 or 4 channels; other numbers if ``reading`` has their range.
        labels: Integer class labels [N], from 0, or None.
        size: The size (H, W) to fit the images to; None keeps theirs.
        channels: The number of channels to convert the images to, 1 or 3; None keeps theirs.
        fit: "crop" or "pad", as for `load_data`.
        reading: The choices of `load_data` that files leave open.
        class_names: The name of each label from 0 on, or None.

    Attributes:
        images: The images, a uint8 tensor [N, C, H, W].
        labels: The labels, an int64 tensor [N], or None.

    Raises:
        DataError: If the images cannot be fitted to ``size``, lie beyond the declared range, or would take too much
            memory.
    """

    def __init__(
        self,
        path: Path,
        images: np.ndarray,
        labels: np.ndarray | None,
        size: tuple[int, int] | None,
        channels: int | None,
        fit: str,
        reading: Reading = DEFAULT,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        n, h, w, c = images.shape
        self.size = size or (h, w)
        self.channels = channels or (1 if c == 1 else 3)
        if reason := misfit((h, w), self.size, fit):
            raise DataError(f"{path}: every image is {h}x{w}: {reason}")
        shape = (n, self.channels, *self.size)
        check_bytes(str(path), f"images fitted to {self.size[0]}x{self.size[1]}", math.prod(shape))
        self.images = torch.empty(shape, dtype=torch.uint8, device="cpu")
        view = self.images.numpy()

        def put(start: int) -> tuple[float, float]:  # blocks bound the memory of the conversion
            block = images[start : start + step]
            extremes = float(block.min()), float(block.max())
            if reading.value_range is not None:
                block = to_bytes(block, reading.value_range)
            block = convert(block, self.channels, reading.alpha)
            view[start : start + step] = fit_to(block, self.size, fit).transpose(0, 3, 1, 2)
            return extremes

        step = max(1, BLOCK // (h * w * max(c, self.channels) * images.itemsize))
        try:
            with ThreadPoolExecutor(cpus()) as pool:
                extremes = list(pool.map(put, range(0, n, step)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes, self.class_names = None, class_names
        if labels is not None:
            self.num_classes = max(int(labels.max()) + 1, len(class_names or ()))
            if class_names is not None and len(class_names) < self.num_classes:
                raise DataError(f"{path}: label {self.num_classes - 1} has no name; there are {len(class_names)} names")
        self.look, self.options = Look(), options_of(reading, fit)
        self.look.add(str(images.dtype), min(low for low, _ in extremes), max(high for _, high in extremes))
        digests = [digest_of(view[i * n // min(n, LOOKS)]) for i in range(min(n, LOOKS))]
        for digest in digests:
            self.look.add_digest(digest)
        numbers = b"" if self.labels is None else self.labels.numpy().tobytes()
        self.digest = digest_of(np.frombuffer(numbers + b"".join(digests), np.uint8)).hex()
        self.doubts = (
            *self.look.doubts(reading),
            *(["an alpha channel " + ALPHA_DOUBT] if c == 4 and reading.alpha is None else []),
            *gap_doubts(self.labels, self.num_classes, class_names),
        )
        self.facts = [f"all {h}x{w}"] if (h, w) == self.size else [f"{h}x{w}, fitted by {fit}"]
        if c != self.channels:
            self.facts.append(f"{c} channels, converted to {self.channels}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        at = torch.tensor(self._check(indices), dtype=torch.int64, device="cpu")
        return self.images[at], None if self.labels is None else self.labels[at]
