"""The real images that samples are measured against: which ones, and how they are fitted to the samples' shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from fastdiff.data.datasets import load_data
from fastdiff.errors import DataError

DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
MIN_IMAGES = 20

Shape = tuple[int, int, int]  # C, H, W


@dataclasses.dataclass(frozen=True)
class Real:
    """Real images, uint8 [M, C, H, W]; others that the model never saw, or None, and their labels, or None."""

    images: Tensor
    held_out: Tensor | None
    labels: Tensor | None

    @classmethod
    def load(cls, data: Path, held_out: str | Path | None, shape: Shape, fit: str) -> Real:
        """Those of ``data``, and of ``held_out``, which by default are the test images of MNIST's four files.

        Both as `load_images` takes them, ``data`` also as a folder with MNIST's four files. `DataError` where there are
        fewer than `MIN_IMAGES`.
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
    """Where the real images are: ``data``, or for the built-in model what it was trained on, if that is installed.

    model: whose samples are measured; None: of no model, which are held against the built-in one's images. `DataError`
    where ``data`` has to be given.
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
    """How images of ``data`` get the samples' size: "pad" for MNIST's files, as the built-in model saw them."""
    return "crop" if _mnist(data) is None else "pad"


def load_images(path: Path, shape: Shape | None, fit: str, labels: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """All images of what `load_data` takes, uint8 [N, *shape] (None: of their own shape), and labels, int64 [N]."""
    channels, size = (None, None) if shape is None else (shape[0], shape[1:])
    data = load_data(path, labels=labels, size=size, channels=channels, fit=fit)
    return data.__getitems__(range(len(data)))


def _mnist(folder: Path) -> dict[str, Path] | None:
    """MNIST's four files in a folder, gzipped or not; None where it has no training images."""
    found: dict[str, Path] = {}
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        for path in (folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte"):
            if path.is_file():
                found.setdefault(name, path)
    return found if "train-images-idx3" in found else None
