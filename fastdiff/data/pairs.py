"""Pairs of an image and a condition image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fastdiff.data.base import Batch, ImageData
from fastdiff.data.folder import FolderData
from fastdiff.errors import DataError, InvalidArgument


class ConditionedData(ImageData):
    """Images, each with a condition image of the same size that a network goes by, as channels after the image's own.

    A `Trainer` noises as many channels as its network gives, and feeds the others to it as they are.

    Args:
        images: The images to learn to draw, with their labels if they have any.
        condition: The condition image of each, in the same order.

    Raises:
        DataError: If the two do not have as many images of one size.
    """

    def __init__(self, images: ImageData, condition: ImageData) -> None:
        if len(images) != len(condition) or tuple(images.size) != tuple(condition.size):
            raise DataError(
                f"{len(images)} images of {images.size[0]}x{images.size[1]}, but {len(condition)} condition images of "
                f"{condition.size[0]}x{condition.size[1]}; one of the same size is needed for each"
            )
        self.images, self.condition = images, condition
        self.channels, self.size = images.channels + condition.channels, images.size
        self.num_classes, self.class_names, self.labels = images.num_classes, images.class_names, images.labels
        self.skipped = (*images.skipped, *condition.skipped)
        self.doubts, self.facts, self.look = (*images.doubts, *condition.doubts), images.facts, images.look
        self.options = {**images.options, "condition": dict(condition.options)}
        self.digest = hashlib.sha256(f"{images.digest}/{condition.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        order = self._check(indices)
        while True:
            images, labels = self.images.__getitems__(order)
            condition, _ = self.condition.__getitems__(order)
            # An image that cannot be decoded has been replaced by the next one, and its condition image was not.
            bad = {at for data in (self.images, self.condition) for at in getattr(data, "unreadable", ())}
            readable = [next(at for k in range(len(self)) if (at := (i + k) % len(self)) not in bad) for i in order]
            if readable == order:
                return torch.cat([images, condition], dim=1), labels
            order = readable


def open_pairs(images: ImageData, condition: ImageData) -> ConditionedData:
    """Join two folders of images, of which the files of one name (but for its ending) are a pair.

    An image without a condition image is left out, and so is a condition image without an image.

    Raises `DataError` if there is no pair, or a name has several files, and `InvalidArgument` if one is no folder.
    """
    if not isinstance(images, FolderData) or not isinstance(condition, FolderData):
        raise InvalidArgument("pairs of images are found by their names in two folders of images, not in other data")
    places, others = _by_name(images), _by_name(condition)
    both = [name for name in places if name in others]
    if not both:
        raise DataError(
            f"no file of {condition.root} has the name of a file of {images.root}, but for its ending; the first are "
            f"{next(iter(others))[0]} and {next(iter(places))[0]}"
        )
    pair = ConditionedData(
        images.chosen([places[name] for name in both]), condition.chosen([others[name] for name in both])
    )
    alone = [(images.files[i], condition.root) for name, i in places.items() if name not in others]
    alone += [(condition.files[i], images.root) for name, i in others.items() if name not in places]
    pair.skipped = (*pair.skipped, *((file, f"no file of this name in {root}") for file, root in alone))
    return pair


def _by_name(data: FolderData) -> dict[tuple[str, int], int]:
    """Return the index of each image by the name of its file without the ending, and the number of its frame."""
    found: dict[tuple[str, int], int] = {}
    for i, (file, frame) in enumerate(zip(data.files, data._frames, strict=True)):
        name = file.relative_to(data.root).with_suffix("").as_posix()
        if (name, frame) in found:
            raise DataError(f"{data.root}: {data.files[found[name, frame]].name} and {file.name} have one name, {name}")
        found[name, frame] = i
    return found
