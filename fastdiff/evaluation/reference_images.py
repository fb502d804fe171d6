"""Real images that samples are measured against: finding them, and fitting them to the samples' shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.bulk.loading import is_job, load
from fastdiff.checks import one_of
from fastdiff.data.datasets import open_data
from fastdiff.data.folder import FolderData
from fastdiff.data.in_memory import ArrayData
from fastdiff.data.pixels import Reading
from fastdiff.data.summary import describe
from fastdiff.errors import DataError, InvalidArgument

DATA = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
MIN_IMAGES = 20

Shape = tuple[int, int, int]  # C, H, W


READING = tuple(field.name for field in dataclasses.fields(Reading))
DATA_OPTIONS = (*READING, "layout", "channels")  # options of `load_data` that an evaluation passes on


@dataclasses.dataclass(frozen=True)
class Loaded:
    """All images of a source, with what is known about them."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...] | None
    described: dict[str, Any]  # for JSON, by `fastdiff.data.summary.describe`


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Real images."""

    images: Tensor  # to measure against, uint8 [M, C, H, W]
    held_out: Tensor | None  # others that the model was not trained on
    labels: Tensor | None  # the classes of the held-out images, int64
    described: tuple[dict[str, Any], ...] = ()  # the images, and the held-out ones, for JSON

    @classmethod
    def load(
        cls, data: Path, held_out: str | Path | None, shape: Shape, fit: str, options: Mapping[str, Any] | None = None
    ) -> RealImages:
        """Load the images of ``data``, and of ``held_out``, by default the test images of MNIST's four files.

        Both are anything that `load_images` takes; ``data`` may also be a folder with MNIST's four files.
        """
        mnist = _mnist(data)
        real = load_images(data if mnist is None else mnist["train-images-idx3"], shape, fit, options=options)
        if len(real.images) < MIN_IMAGES:
            raise DataError(f"{data} holds {len(real.images)} images, at least {MIN_IMAGES} are needed")
        if held_out is None and (mnist is None or "t10k-images-idx3" not in mnist):
            return cls(real.images, None, None, (real.described,))
        if held_out is None:
            assert mnist is not None
            others = load_images(mnist["t10k-images-idx3"], shape, fit, mnist.get("t10k-labels-idx1"), options)
        else:
            others = load_images(Path(held_out), shape, fit, options=options)
            if len(others.images) < MIN_IMAGES:
                raise DataError(f"{held_out} holds {len(others.images)} images, at least {MIN_IMAGES} are needed")
        labels = others.labels if held_out is None else None
        return cls(real.images, others.images, labels, (real.described, others.described))


def find_data(data: str | Path | None, model: str | Path | None) -> Path:
    """Find the real images: ``data`` if given, else the training images of the built-in model, if they are installed.

    ``model`` is the model whose samples are measured; None if they are of no model.
    """
    if data is not None:
        return Path(data)
    if model is not None and str(model) != "fashion-mnist":
        raise DataError(f"real images are needed, those that {model} was trained on: give --data")
    if not DATA.is_dir():
        raise DataError(
            f"real images are needed: {DATA} is not there. Install Debian's package dataset-fashion-mnist, or give "
            "--data with a folder of Fashion-MNIST's four files (train-images-idx3-ubyte.gz, ...)"
        )
    return DATA


def default_fit(data: Path) -> str:
    """Choose how to fit images: "pad" for MNIST's files, as in the built-in model's training; else "crop"."""
    return "crop" if _mnist(data) is None else "pad"


def load_images(
    path: Path,
    shape: Shape | None,
    fit: str,
    labels: Path | None = None,
    options: Mapping[str, Any] | None = None,
    labelled: bool = False,
    n: int | None = None,
) -> Loaded:
    """Load all images of a source that `load_data` takes, with the labels of ``labels`` or, if asked, of an .npz.

    A folder of `fastdiff.bulk` is a source too, which may be unfinished if its first ``n`` images are there.
    With ``shape`` None, the images keep their own. Otherwise colour is not made gray, nor gray colour, unless
    ``options``, some of `DATA_OPTIONS`, have the channels; `DataError` says so.
    """
    given = dict(options or {})
    unknown = sorted(given.keys() - {*DATA_OPTIONS})
    if unknown:
        raise InvalidArgument(f"data_options: {unknown[0]!r} is unknown; allowed: {', '.join(DATA_OPTIONS)}")
    reading = Reading(**{key: value for key, value in given.items() if key in READING})
    # Folders that name other classes than the labels do are no classes here.
    depth = None if labels is not None or (labelled and path.is_file()) else 0
    size = None if shape is None else shape[1:]
    data: ArrayData | FolderData
    if is_job(path):
        for name in ("frames", "profile", "layout"):
            if given.get(name) is not None:
                raise InvalidArgument(f"{name}={given[name]!r} is for other sources, but {path} is the folder of a job")
        one_of("fit", fit, ("crop", "pad"))
        arrays = load(path, n)
        numbers, names = (arrays.labels, arrays.class_names) if labelled else (None, None)
        data = ArrayData(path, arrays.images, numbers, size, given.get("channels"), fit, reading, names)
    else:
        data = open_data(
            path, reading, labels=labels, size=size, channels=given.get("channels"), fit=fit,
            layout=given.get("layout"), class_depth=depth,
        )  # fmt: skip
    images, classes = data.__getitems__(range(len(data)))
    if isinstance(data, FolderData) and data.unreadable:  # no image counts twice
        keep = [i for i in range(len(data)) if i not in data.unreadable]
        images = images[keep]
    described = describe(data, path)
    if shape is not None:
        images = _in_channels(images, shape[0], path)
    return Loaded(images, classes, data.class_names, {**described, "channels": images.shape[1]})


def _in_channels(images: Tensor, channels: int, path: Path) -> Tensor:
    """Return images with so many channels if that loses nothing; else raise `DataError`."""
    own = images.shape[1]
    if own == channels:
        return images
    if (own, channels) == (3, 1) and bool((images == images[:, :1]).all()):  # gray, stored as colour
        return images[:, :1].contiguous()
    kinds = {1: "gray", 3: "colour"}
    needed = kinds.get(channels, f"{channels}-channel")
    convert = f", or channels={channels} to convert them" if channels in kinds else ""
    raise DataError(f"{path} holds {kinds[own]} images, and {needed} ones are compared; give others{convert}")


def _mnist(folder: Path) -> dict[str, Path] | None:
    """Find MNIST's four files in a folder, gzipped or not; None if it has no training images."""
    found: dict[str, Path] = {}
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        for path in (folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte"):
            if path.is_file():
                found.setdefault(name, path)
    return found if "train-images-idx3" in found else None
