"""Measure how well a Fashion-MNIST model predicts the image from its noisy version, by timestep.

    python recipes/denoising_error.py [MODEL]                         # a built-in name, a folder or a checkpoint

It prints the mean squared error of x0 over 400 test images, with noise of seed 0. At the last timesteps the input is
almost pure noise, so the best prediction is the mean image of the class, whose error is printed first. A network with a
much larger error there cannot compose an image, however well it draws details.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastdiff import checkpoints
from fastdiff.data.datasets import load_data
from fastdiff.data.in_memory import ArrayData
from fastdiff.solvers.prediction import x0_coefficients

TIMESTEPS = (999, 980, 950, 900, 850, 800, 700, 600, 500, 300, 100)


def split(folder: Path, name: str) -> ArrayData:
    data = load_data(
        folder / f"{name}-images-idx3-ubyte.gz", labels=folder / f"{name}-labels-idx1-ubyte.gz", size=32, fit="pad"
    )
    assert isinstance(data, ArrayData)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="fashion-mnist")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    arguments = parser.parse_args()

    model = checkpoints.load(arguments.model)
    train, test = split(arguments.data, "train"), split(arguments.data, "t10k")
    assert train.labels is not None
    assert test.labels is not None
    x0, labels = test.images[:400].float() / 127.5 - 1, test.labels[:400]
    means = torch.stack([train.images[train.labels == k].float().mean(0) / 127.5 - 1 for k in range(10)])
    print(f"mean image of the class: {((means[labels] - x0) ** 2).mean():.4f}")

    generator = torch.Generator("cpu").manual_seed(0)
    for t in TIMESTEPS:
        steps = torch.full((len(x0),), t, dtype=torch.int64, device="cpu")
        x = model.schedule.add_noise(
            x0, torch.randn(x0.shape, generator=generator, dtype=torch.float32, device="cpu"), steps
        )
        with torch.no_grad():
            out = model.unet(x, steps, labels)
        kx, ko = x0_coefficients(model.scheduler_config["prediction_type"], model.schedule.abar(t))
        print(f"t = {t:3d}  abar = {model.schedule.abar(t):.4f}  {((kx * x + ko * out - x0) ** 2).mean():.4f}")


if __name__ == "__main__":
    main()
