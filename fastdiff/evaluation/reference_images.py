"""Real images that samples are measured against: finding them, and fitting them to the samples' shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from fastdiff.data.datasets import load_data
from fastdiff.errors import DataError

DATA = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
MIN_IMAGES = 20

Shape = tuple[int, int, int]  # C, H, W


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Real images."""

    images: Tensor  # to measure against, uint8 [M, C, H, W]
    held_out: Tensor | None  # others that the model was not trained on
    labels: Tensor | None  # the classes of the held-out images, int64

    @classmethod
    def load(cls, data: Path, held_out: str | Path | None, shape: Shape, fit: str) -> RealImages:
        """Load the images of ``data``, and of ``held_out``, by default the test images of MNIST's four files.

        Both are anything that `load_images` takes; ``data`` may also be a folder with MNIST's four files.
        """
        mnist = _mnist(data)
        images, _ = load_images(data if mnist is None else mnist["train-images-idx3"], shape, fit)
        if len(images) < MIN_IMAGES:
            raise DataError(f"{data} holds {len(images)} images, at least {MIN_IMAGES} are needed")
        if held_out is None and mnist is not None and "t10k-images-idx3" in mnist:
            return cls(images, *load_images(mnist["t10k-images-idx3"], shape, fit, mnist.get("t10k-labels-idx1")))
        if held_out is None:
            return cls(images, None, None)
        others, _ = load_images(Path(held_out), shape, fit)
        if len(others) < MIN_IMAGES:
            raise DataError(f"{held_out} holds {len(others)} images, at least {MIN_IMAGES} are needed")
        return cls(images, others, None)


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


def load_images(path: Path, shape: Shape | None, fit: str, labels: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """Load all images of a source that `load_data` takes: uint8 [N, *shape] and labels, int64 [N] or None.

    With ``shape`` None, the images keep their own shape.
    """
    channels, size = (None, None) if shape is None else (shape[0], shape[1:])
    data = load_data(path, labels=labels, size=size, channels=channels, fit=fit)
    return data.__getitems__(range(len(data)))


def _mnist(folder: Path) -> dict[str, Path] | None:
    """Find MNIST's four files in a folder, gzipped or not; None if it has no training images."""
    found: dict[str, Path] = {}
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        for path in (folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte"):
            if path.is_file():
                found.setdefault(name, path)
    return found if "train-images-idx3" in found else None
