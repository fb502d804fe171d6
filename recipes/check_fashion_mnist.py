"""Check the Fashion-MNIST model: its samples have to show the class that was asked for, and to be new.

    python recipes/check_fashion_mnist.py                             # 1,000 samples of the built-in model
    python recipes/check_fashion_mnist.py --samples samples.npz       # images [N, 1, 32, 32] and labels [N]

It writes report.json, closest.png (the 16 samples closest to a training image, each beside that image) and grid.png (a
row per class). The exit code is 1 if the classifier assigns fewer than 85 % of the samples to their class, or if more
of them are near-duplicates of training images than chance explains, and 2 if something cannot be read.

The rule: let d1 be a sample's distance to the nearest training image (root mean square over the pixels) and m the
mean distance to the nearest 50. The sample is a near-duplicate when

    d1 < RATIO * m        RATIO = 1/4

Both sides are small where images lie densely (trousers) and large where they do not (bags), so no class needs a
threshold of its own. A fixed distance would not work: half of the test trousers lie within 0.14 of a training image,
half of the bags within 0.29. Neither would the smallest distance among a class's test images: one test T-shirt equals a
training T-shirt to within 0.005, closer than almost any copy. Measured: 10 of the 10,000 test images are
near-duplicates, as the training images show the same products. So are all of 1,000 training images with added Gaussian
noise of standard deviation 0.02, 97 % with 0.05 (6 of 255 gray levels), 24 % when blurred by half a pixel, and none
when moved by a pixel.

So some new images are near-duplicates, and a single one proves nothing. The samples fail if they contain significantly
more of them than the test images do, by Fisher's exact test, one-sided, at 1 %. With 1,000 random test images as
samples and the others as test images, 0.2 % of the draws fail. With --max-duplicates 0, 65 % of these draws fail.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import fastdiff
from fastdiff.data.datasets import load_data
from fastdiff.data.pictures import save_picture
from fastdiff.errors import DataError, FastdiffError
from fastdiff.evaluation.classifier import CLASS_NAMES, SIZE, Classifier
from fastdiff.files import write_text

DATA = Path("/usr/share/datasets/fashion-mnist")
MIN_ACCURACY = 0.85
RATIO, NEIGHBOURS, SIGNIFICANCE = 1 / 4, 50, 0.01
QUANTILES = {"minimum": 0.0, "0.1 %": 0.001, "1 %": 0.01, "median": 0.5}


@dataclass(frozen=True)
class Images:
    """Images, `pixels`, float32 [N, 1, 32, 32] in [-1, 1], and their classes, `labels`, int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Nearest:
    """The k nearest data of each query, nearest first.

    `index`, int64 [Q, k], are their numbers; `distance`, float32 [Q, k], their root mean square distances.
    """

    index: Tensor
    distance: Tensor

    @property
    def ratio(self) -> Tensor:
        """The ratio d1 / m, [Q]: 0 for a copy, near 1 if the nearest is one of many; 0 / 0 counts as 0."""
        return self.distance[:, 0] / self.distance.mean(1).clamp(min=1e-12)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="fashion-mnist", help="what Sampler.from_pretrained takes")
    parser.add_argument("--samples", type=Path, help="an .npz file to check in place of a model")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with Fashion-MNIST's four IDX files")
    parser.add_argument("--classifier", default="fashion-mnist", help="what Classifier.load takes")
    parser.add_argument("--out", type=Path, default=Path("out/check_fashion_mnist"), help="folder for the results")
    parser.add_argument("--max-duplicates", type=int, help="more fail (default: what chance explains)")
    args = parser.parse_args(argv)
    try:
        classifier = Classifier.load(args.classifier)
        train, test = load_split(args.data, "train"), load_split(args.data, "t10k")
        if args.samples:
            samples, source = read_samples(args.samples), {"file": args.samples.name}
        else:
            settings = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
            samples, source = draw(args.model, args.per_class, **settings), {"model": args.model, **settings}
        report, near = check(samples, train, test, classifier, args.max_duplicates)
    except FastdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(args.out / "report.json", json.dumps({"source": source, **report}, indent=2) + "\n")
    save_picture(closest_pairs(samples, train, near), args.out / "closest.png")
    save_picture(class_grid(samples), args.out / "grid.png")
    found, limit = report["near_duplicates"]["samples"], report["near_duplicates"]["limit"]
    print(f"read as their class: {report['accuracy']['samples']:.2%} (test images: {report['accuracy']['test']:.2%})")
    print(f"near-duplicates of training images: {found} of {len(samples)}, at most {limit} allowed; see {args.out}")
    for reason in report["failures"]:
        print(f"FAILED: {reason}")
    return 1 if report["failures"] else 0


# Images ---------------------------------------------------------------------------------------------------------------


def load_split(folder: Path, name: str) -> Images:
    """Load the "train" or "t10k" images."""
    images, labels = (folder / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    data = load_data(images, labels=labels, size=SIZE, fit="pad")
    pixels, classes = data.__getitems__(range(len(data)))
    assert classes is not None
    return Images(to_float(pixels), classes)


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 from 0 to 255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read_samples(path: Path) -> Images:
    """Read an .npz file with ``images`` and ``labels`` [N], 0..9.

    The images are [N, 1, 32, 32] or, as ``fastdiff sample`` writes them, [N, 32, 32, 1], floats in [-1, 1] or uint8.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: an .npz file with images and labels is needed ({error})") from error
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = np.moveaxis(pixels, 3, 1)
    if pixels.ndim != 4 or pixels.shape[1:] != (1, SIZE, SIZE) or len(pixels) == 0:
        raise DataError(f"{path}: images must be [N, 1, {SIZE}, {SIZE}], not {list(pixels.shape)}")
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise DataError(f"{path}: images must be floats in [-1, 1] or uint8, not {pixels.dtype}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be {len(pixels)} integers, not {labels.dtype} {list(labels.shape)}")
    if not 0 <= labels.min() <= labels.max() < len(CLASS_NAMES):
        raise DataError(f"{path}: labels must be 0 to {len(CLASS_NAMES) - 1}, not {labels.min()} to {labels.max()}")
    if pixels.dtype == np.uint8:
        pixels = to_float(torch.from_numpy(pixels)).numpy()
    if not np.abs(pixels).max() <= 1 + 1e-3:  # false for NaN, too
        raise DataError(f"{path}: images must be in [-1, 1], not {pixels.min():.4g} to {pixels.max():.4g}")
    return Images(torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels.astype(np.int64)))


def draw(model: str, per_class: int, steps: int, guidance: float, seed: int) -> Images:
    """Draw DDIM samples, `per_class` of each class, one class after another."""
    labels = torch.arange(len(CLASS_NAMES), dtype=torch.int64, device="cpu").repeat_interleave(per_class)
    with fastdiff.Sampler.from_pretrained(model) as sampler:
        output = sampler.sample(
            len(labels), solver="ddim", steps=steps, labels=labels.tolist(), guidance=guidance, seed=seed
        )
    return Images(output.images, labels)


# The check ------------------------------------------------------------------------------------------------------------


def check(
    samples: Images, train: Images, test: Images, classifier: Classifier, max_duplicates: int | None = None
) -> tuple[dict[str, Any], Nearest]:
    """Return the report, ready for JSON, and the samples' nearest training images by pixels.

    Args:
        samples, train, test: Images to check, training images, and test images.
        classifier: The judge of the classes.
        max_duplicates: The number of near-duplicates allowed; None allows as many as the test images make plausible.
    """
    logits, sample_features = classifier.judge(samples.pixels)
    test_logits, test_features = classifier.judge(test.pixels)
    _, train_features = classifier.judge(train.pixels)
    correct, test_correct = logits.argmax(1) == samples.labels, test_logits.argmax(1) == test.labels

    pixels = train.pixels.flatten(1)
    near, test_near = nearest(samples.pixels.flatten(1), pixels), nearest(test.pixels.flatten(1), pixels)
    feature_near, test_feature_near = nearest(sample_features, train_features), nearest(test_features, train_features)

    duplicate, test_duplicate = near.ratio < RATIO, test_near.ratio < RATIO
    found, test_found = int(duplicate.sum()), int(test_duplicate.sum())
    limit = max_duplicates
    if limit is None:
        limit = duplicate_limit(len(samples), test_found, len(test))
    accuracy = correct.double().mean().item()
    failures = []
    if accuracy < MIN_ACCURACY:
        failures.append(f"{accuracy:.1%} of the samples are read as their class, {MIN_ACCURACY:.0%} are needed")
    if found > limit:
        failures.append(f"{found} samples are near-duplicates of training images, at most {limit} are allowed")

    def per_class(values: Tensor, labels: Tensor) -> dict[str, float | None]:
        groups = [values[labels == label].double() for label in range(len(CLASS_NAMES))]
        return {n: g.mean().item() if len(g) else None for n, g in zip(CLASS_NAMES, groups, strict=True)}

    report = {
        "passed": not failures,
        "failures": failures,
        "samples": len(samples),
        "accuracy": {
            "samples": accuracy,
            "test": test_correct.double().mean().item(),
            "needed": MIN_ACCURACY,
            "samples_per_class": per_class(correct, samples.labels),
            "test_per_class": per_class(test_correct, test.labels),
        },
        "near_duplicates": {
            "rule": f"distance to the nearest training image < {RATIO} * mean distance to the nearest {NEIGHBOURS}",
            "samples": found,
            "test": test_found,
            "limit": limit,
            "list": [
                {
                    "sample": i,
                    "class": CLASS_NAMES[samples.labels[i]],
                    "training_image": int(near.index[i, 0]),
                    "distance": near.distance[i, 0].item(),
                    "ratio": near.ratio[i].item(),
                }
                for i in duplicate.nonzero()[:, 0].tolist()
            ],
        },
        "pixels": compare(near, samples.labels, test_near, test.labels),
        "features": compare(feature_near, samples.labels, test_feature_near, test.labels),
    }
    return report, near


def nearest(queries: Tensor, data: Tensor, k: int = NEIGHBOURS, chunk: int = 250) -> Nearest:
    """Find the k nearest of `data` [N, D] to each of `queries` [Q, D]; all of `data` if N < k.

    They are selected by |q - x|^2 = |q|^2 - 2 q.x + |x|^2. Cancellation leaves an error of about 1e-3 there, which
    could hide that a query is a copy, so the distances of these k are then computed from the differences.
    """
    k = min(k, len(data))
    squares = data.square().sum(1)
    indices, distances = [], []
    for block in queries.split(chunk):
        index = (squares - 2 * block @ data.T).topk(k, largest=False).indices
        distance = torch.stack([(block - data[column]).square().mean(1).sqrt() for column in index.T], 1)
        distance, order = distance.sort(1)
        indices.append(index.gather(1, order))
        distances.append(distance)
    return Nearest(torch.cat(indices), torch.cat(distances))


def duplicate_limit(samples: int, test_found: int, test: int) -> int:
    """Compute the most near-duplicates among `samples` that do not differ significantly from `test_found` among `test`.

    If both were drawn alike, the f = found + test_found near-duplicates would fall among the samples by chance:
    P(found or more) = sum_{i >= found} C(samples, i) C(test, f - i) / C(samples + test, f)
    """
    for found in range(1, samples + 1):
        f = found + test_found
        ways = sum(math.comb(samples, i) * math.comb(test, f - i) for i in range(found, min(samples, f) + 1))
        if ways < SIGNIFICANCE * math.comb(samples + test, f):
            return found - 1
    return samples


def compare(near: Nearest, labels: Tensor, test_near: Nearest, test_labels: Tensor) -> dict[str, Any]:
    """Compute quantiles of distance and ratio for samples and test images, overall and per class."""

    def quantiles(values: Tensor) -> dict[str, float] | None:
        return {name: values.quantile(q).item() for name, q in QUANTILES.items()} if len(values) else None

    result: dict[str, Any] = {
        "share_of_samples_below_the_test_images_1_%": (near.ratio < test_near.ratio.quantile(0.01))
        .double()
        .mean()
        .item()
    }
    for what, values, test_values in (
        ("distance", near.distance[:, 0], test_near.distance[:, 0]),
        ("ratio", near.ratio, test_near.ratio),
    ):
        result[what] = {
            "all": {"samples": quantiles(values), "test": quantiles(test_values)},
            **{
                name: {"samples": quantiles(values[labels == i]), "test": quantiles(test_values[test_labels == i])}
                for i, name in enumerate(CLASS_NAMES)
            },
        }
    return result


# Pictures -------------------------------------------------------------------------------------------------------------


def closest_pairs(samples: Images, train: Images, near: Nearest, columns: int = 4, rows: int = 4) -> Image.Image:
    """Draw the samples with the lowest ratio, each left of its nearest training image, with its ratio below."""
    zoom, gap, text = 3, 8, 14
    width, height = 2 * SIZE * zoom + gap, SIZE * zoom + text + gap
    sheet = Image.new("L", (columns * width + gap, rows * height + gap), 96)
    pen = ImageDraw.Draw(sheet)
    for slot, i in enumerate(near.ratio.argsort()[: columns * rows].tolist()):
        x, y = gap + slot % columns * width, gap + slot // columns * height
        pair = torch.cat([samples.pixels[i, 0], train.pixels[near.index[i, 0], 0]], 1)
        sheet.paste(picture(pair).resize((2 * SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + SIZE * zoom + 1), f"{CLASS_NAMES[samples.labels[i]]} {near.ratio[i]:.3f}", fill=255)
    return sheet


def class_grid(samples: Images, columns: int = 8) -> Image.Image:
    """Draw the first samples of each class in a row."""
    rows = []
    for label in range(len(CLASS_NAMES)):
        chosen = samples.pixels[samples.labels == label][:columns, 0]
        blank = chosen.new_full((columns - len(chosen), SIZE, SIZE), -1.0)
        rows.append(torch.cat([*chosen, *blank], 1))
    image = picture(torch.cat(rows, 0))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def picture(pixels: Tensor) -> Image.Image:
    """Convert float32 [H, W] in [-1, 1] to an image with 8 bits of gray."""
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy())


if __name__ == "__main__":
    sys.exit(main())
