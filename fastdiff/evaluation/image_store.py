"""A folder with many images of one setting, drawn in parts so that an interruption loses little.

    images = draw(sampler, "work/ddim-10", 5000, solver="ddim", steps=10)      # uint8 [5000, C, H, W]

    work/ddim-10/settings.json      digests of the network and the step table, seed, labels, ...
    work/ddim-10/000000.npz         ``images``, uint8 [500, H, W] (gray) or [500, H, W, C]: the images 0 to 499
    work/ddim-10/000500.npz         ...

A part is written when it is complete. As image i depends only on the settings and on i, a later call with the same
settings reuses the parts, also for another n. A folder of other settings is refused, so images of two models never mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.backends.native import cost
from fastdiff.checkpoints.reading import network_digest, read_json
from fastdiff.checks import shown, whole
from fastdiff.data.arrays import OWN, read_npz
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.files import atomic_file, write_text
from fastdiff.sampler import Sampler
from fastdiff.unet import UNet

log = logging.getLogger("fastdiff")

PART = 500  # images in a file
SETTINGS = "settings.json"
# Options of `Sampler.sample` that cannot be written to settings.json, or that this module sets itself.
REFUSED = (
    "noise", "image", "mask", "condition", "strength", "repaint", "guide", "guide_through", "start_index", "index",
    "indices", "callback",
)  # fmt: skip


def draw(
    sampler: Sampler,
    folder: str | Path,
    n: int,
    *,
    labels: int | str | None = "cycle",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Draw the images that a folder lacks, and return the images 0 to n - 1, uint8 [n, C, H, W].

    The labels "cycle" give image i the class i mod classes, if the network has classes; a class or None is for all
    images. ``options`` are those of `Sampler.sample` that can be written as JSON; not noise=, image=, guide=, ...
    ``progress`` is called with the number of images that are there and n, at the start and after every part. If images
    become NaN, their part is not kept.
    """
    folder = Path(folder)
    n = whole("n", n, 1)
    if sampler.info.channels not in (1, 3, 4):
        raise InvalidArgument(f"images of {sampler.info.channels} channels cannot be kept in parts; 1, 3 or 4 can")
    # The batch size changes images by rounding only.
    check_settings(folder, settings(sampler, labels=labels, seed=seed, **{**options, "batch_size": None}))
    starts = range(0, n, PART)
    parts = [_read_part(folder / _name(start)) for start in starts]
    there = [0 if part is None else min(len(part), n - start) for start, part in zip(starts, parts, strict=True)]
    progress = progress or (lambda done, total: None)
    progress(sum(there), n)
    for i, start in enumerate(starts):
        need, part = min(PART, n - start) - there[i], parts[i]
        if need > 0:
            first = start + there[i]
            classes = _labels(sampler, labels, first, need)
            new = to_uint8(sampler.sample(need, seed=seed, start_index=first, labels=classes, **options).images)
            part = parts[i] = new if part is None else np.concatenate([part, new])
            with atomic_file(folder / _name(start)) as file:
                np.savez_compressed(file, images=part[..., 0] if part.shape[-1] == 1 else part)
            there[i] += need
            progress(sum(there), n)
    return _tensor([part for part in parts if part is not None])[:n]


def load(folder: str | Path, n: int | None = None) -> Tensor:
    """Read the images 0 to n - 1 of a folder, or all up to the first gap, uint8 [n, C, H, W]."""
    folder, found, count = Path(folder), [], 0
    while n is None or count < n:
        part = _read_part(folder / _name(count)) if count % PART == 0 else None
        if part is None:
            break
        found.append(part)
        count += len(part)
    if not found or (n is not None and count < n):
        raise DataError(f"{folder} holds {count} images from {_name(0)} on, {n or 'at least 1'} are needed")
    return _tensor(found)[:n]


def settings(sampler: Sampler, *, labels: int | str | None = "cycle", seed: int = 0, **options: Any) -> dict[str, Any]:
    """Collect everything that decides the images, ready for JSON: equal settings give equal images, up to rounding."""
    given = [name for name in REFUSED if options.get(name) is not None]
    if given:
        raise InvalidArgument(f"{given[0]}= cannot be written down, so its images cannot be kept in parts")
    request = sampler.request(1, **options, seed=seed, labels=_labels(sampler, labels, 0, 1))
    return {
        "model": network_digest(sampler.unet),
        "table": hashlib.sha256(request.table.to_json().encode()).hexdigest(),
        "solver": request.table.solver,
        "nfe": request.nfe,
        "seed": request.seed,
        "labels": labels if sampler.info.classes is not None else None,
        "guidance": float(request.guidance[0]),
        "guidance_rescale": request.guidance_rescale,
        "shape": list(request.shape),
        "backend": sampler.backend,
        "dtype": "bfloat16-fast" if sampler.fast else str(sampler.dtype).removeprefix("torch."),
    }


def expected_seconds(
    sampler: Sampler, n: int, *, labels: int | str | None = "cycle", seed: int = 0, **options: Any
) -> float | None:
    """Predict the time of drawing n images; None for backends whose time cannot be predicted."""
    if sampler.backend != "native" or not isinstance(sampler.unet, UNet):
        return None
    r = sampler.request(n, **options, seed=seed, labels=_labels(sampler, labels, 0, n))
    dtype = "bfloat16-fast" if sampler.fast else sampler.dtype
    guided = r.nfe > len(r.table)
    return cost.estimate(sampler.unet, r.shape[1:], n, r.nfe, r.batch_size, dtype, guided=guided).seconds


def check_settings(folder: str | Path, expected: dict[str, Any]) -> None:
    """Check a folder's settings, or write them to a new folder; other settings raise a `DataError` that lists them."""
    path = Path(folder) / SETTINGS
    if path.exists():
        try:
            found = read_json(path)
        except CheckpointError as e:
            raise DataError(f"{e}; delete the folder to draw its images anew") from e
        differ = [k for k in (*expected, *(found.keys() - expected.keys())) if found.get(k) != expected.get(k)]
        if differ:
            what = ", ".join(f"{k} {found.get(k)!r}, not {expected.get(k)!r}" for k in differ)
            raise DataError(f"{folder} holds images of other settings ({what}); use another folder, or delete it")
    elif any(Path(folder).glob("[0-9]*.npz")):
        raise DataError(f"{folder} holds images, but no {SETTINGS} that says what they are of; use another folder")
    else:
        write_text(path, json.dumps(expected, indent=2) + "\n")


def _labels(sampler: Sampler, labels: int | str | None, start: int, n: int) -> int | str | list[int] | None:
    if labels != "cycle":
        if isinstance(labels, str) and labels not in (sampler.info.class_names or ()):
            raise InvalidArgument(f"labels={shown(labels)}: 'cycle', a class, or None is needed")
        return labels
    classes = sampler.info.classes
    return None if classes is None else [i % classes for i in range(start, start + n)]


def _name(start: int) -> str:
    return f"{start:06d}.npz"


def _read_part(path: Path) -> np.ndarray | None:
    """Read a part, uint8 [n, H, W, C], n at most `PART`; None if the file is missing or damaged (which is logged)."""
    if not path.exists():
        return None
    try:
        images = read_npz(path, layout=OWN).images
    except DataError as e:
        log.warning("%s; its images are drawn anew", e)
        return None
    return images[:PART]


def _tensor(parts: list[np.ndarray]) -> Tensor:
    """Join parts [n, H, W, C] to one tensor [N, C, H, W]."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DataError(f"parts of different shapes: {sorted(shapes)}")
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
