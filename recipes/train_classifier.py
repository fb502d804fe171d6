"""Train the classifier that judges fastdiff's Fashion-MNIST samples, and record its accuracy on the test images.

    python recipes/train_classifier.py                # writes classifier.safetensors and classifier.json beside it

It needs no GPU. The data are the four IDX files of Fashion-MNIST (Debian: apt install dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.data.datasets import load_data
from fastdiff.data.in_memory import ArrayData
from fastdiff.errors import FastdiffError, InvalidArgument
from fastdiff.evaluation.classifier import CLASS_NAMES, SIZE, Classifier
from fastdiff.files import write_text

DATA = Path("/usr/share/datasets/fashion-mnist")
OUT = Path("fastdiff/models/fashion-mnist/classifier.safetensors")
MAX_LR, MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.2, 0.9, 5e-4, 0.05
SHIFT = 2  # pixels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with Fashion-MNIST's four IDX files")
    parser.add_argument("--out", type=Path, default=OUT, help="weights; the report goes beside them as .json")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="weights, order and augmentation")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the training's autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_data, test_data = load_split(args.data, "train"), load_split(args.data, "t10k")
    start = time.perf_counter()
    classifier = train(train_data, args.epochs, args.batch_size, args.precision)
    seconds = time.perf_counter() - start
    correct = predictions(classifier, test_data.images) == test_data.labels
    classifier.save(args.out)

    report = {
        "accuracy": correct.double().mean().item(),
        "accuracy_per_class": {
            name: correct[test_data.labels == label].double().mean().item() for label, name in enumerate(CLASS_NAMES)
        },
        "test_images": len(test_data),
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "precision": args.precision,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "training_seconds": round(seconds),
        "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
        "command": shlex.join(["python", "recipes/train_classifier.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    write_text(args.out.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    print(f"test accuracy {report['accuracy']:.2%} after {seconds:.0f} s; wrote {args.out}")
    return 0


def load_split(folder: Path, name: str) -> ArrayData:
    """Load the "train" or "t10k" images, uint8 [N, 1, 32, 32], and their labels, int64 [N]."""
    data = load_data(
        folder / f"{name}-images-idx3-ubyte.gz", labels=folder / f"{name}-labels-idx1-ubyte.gz", size=SIZE, fit="pad"
    )
    assert isinstance(data, ArrayData)
    return data


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 from 0 to 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train(data: ArrayData, epochs: int, batch_size: int, precision: str) -> Classifier:
    """Train by SGD with one cycle of the learning rate, without the last, incomplete batch of an epoch."""
    classifier = Classifier().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        classifier.parameters(), MAX_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = len(data) // batch_size
    if steps < 1 or epochs < 1:
        raise InvalidArgument(f"{epochs} epochs of {len(data)} images in batches of {batch_size} are no training")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(data), dtype=torch.int64, device="cpu")[: steps * batch_size].split(batch_size):
            images, labels = data.__getitems__(batch)
            images = augment(to_float(images)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = classifier(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}/{epochs}: loss {total / steps:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return classifier.to(memory_format=torch.contiguous_format).eval()


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images and shift all by up to SHIFT pixels.

    float32 [B, 1, 32, 32] in [-1, 1], black is -1. As Fashion-MNIST's padding is 2 pixels wide, shifts lose nothing.
    """
    n = len(images)
    images = torch.where(torch.rand(n, 1, 1, 1, dtype=torch.float32, device="cpu") < 0.5, images.flip(3), images)
    windows = F.pad(images[:, 0], [SHIFT] * 4, value=-1.0).unfold(1, SIZE, 1).unfold(2, SIZE, 1)  # [B, dy, dx, H, W]
    dy, dx = torch.randint(2 * SHIFT + 1, (2, n), dtype=torch.int64, device="cpu")
    return windows[torch.arange(n, dtype=torch.int64, device="cpu"), dy, dx][:, None]


def predictions(classifier: Classifier, images: Tensor) -> Tensor:
    """Predict the classes, int64 [N], of images, uint8 [N, 1, 32, 32]."""
    logits, _ = classifier.judge(to_float(images))
    return logits.argmax(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastdiffError as error:
        sys.exit(f"error: {error}")
