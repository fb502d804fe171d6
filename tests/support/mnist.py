"""A small data set in MNIST's files, of random pictures."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

TRAIN, TEST = 40, 30  # images


def idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def pictures(n: int, seed: int) -> np.ndarray:
    """uint8 [n, 28, 28]: blocks of random brightness."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (n, 7, 7)), np.ones((4, 4))).astype(np.uint8)


def write(folder: Path) -> None:
    """Write the four files: pictures of the seeds 0 and 1, labelled 0 to 9 in turn."""
    for seed, (name, n) in enumerate((("train", TRAIN), ("t10k", TEST))):
        idx(folder / f"{name}-images-idx3-ubyte.gz", pictures(n, seed))
        idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(n) % 10)
