"""Many images of one setting, drawn in parts that survive interruption.

    images = draw(sampler, "work/ddim-10", 5000, solver="ddim", steps=10)      # uint8 [5000, C, H, W]

    work/ddim-10/settings.json      what the images are of: the network's fingerprint, the step table, seed, labels, ...
    work/ddim-10/000000.npz         ``images``, uint8 [500, H, W] (gray) or [500, H, W, C]: the images 0 to 499
    work/ddim-10/000500.npz         ...

A part appears when it is complete. A later call with the same settings reuses what is there, also for another n: image
i depends on the settings and on i alone. A folder of other settings is refused, so images of two models never mix.
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
from torch import Tensor, nn

from fastdiff.checkpoints.reading import read_json
from fastdiff.data.arrays import read_npz
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.files import atomic_path, write_text
from fastdiff.sampler import Sampler

log = logging.getLogger("fastdiff")

PART = 500  # images a file
SETTINGS = "settings.json"
# Options of `Sampler.sample` that cannot be told from a file, or that are this module's own.
REFUSED = ("noise", "image", "mask", "strength", "repaint", "guide", "guide_through", "start_index", "callback")


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
    """The images 0 to n - 1 of the settings, uint8 [n, C, H, W]; what ``folder`` lacks is drawn and kept there.

    labels: "cycle": image i is of class i mod classes (of none, where the network has no classes); else as
    `Sampler.sample` takes them, for all images. progress: called with (images there are, n) at the start and after
    every part. options: of `Sampler.sample`; those that cannot be written down (noise=, image=, guide=, ...) are
    `InvalidArgument`.

    Raises `DataError` where the folder's images are of other settings, naming them; `NumericsError` where images
    became NaN, and then the part is not kept.
    """
    folder = Path(folder)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidArgument(f"n={n!r}: a whole number of at least 1 is needed")
    if sampler.info.channels not in (1, 3, 4):
        raise InvalidArgument(f"images of {sampler.info.channels} channels cannot be kept in parts; 1, 3 or 4 can")
    # Batches change images by rounding alone.
    check_settings(folder, settings(sampler, labels=labels, seed=seed, **{**options, "batch_size": None}))
    starts = range(0, n, PART)
    parts = [_read_part(folder / _name(start)) for start in starts]
    there = [0 if part is None else min(len(part), n - start) for start, part in zip(starts, parts, strict=True)]
    if progress is not None:
        progress(sum(there), n)
    for i, start in enumerate(starts):
        need, part = min(PART, n - start) - there[i], parts[i]
        if need > 0:
            first = start + there[i]
            output = sampler.sample(
                need, seed=seed, start_index=first, labels=_labels(sampler, labels, first, need), **options
            )
            new = to_uint8(output.images)
            part = parts[i] = new if part is None else np.concatenate([part, new])
            with atomic_path(folder / _name(start)) as temporary:
                np.savez_compressed(temporary, images=part[..., 0] if part.shape[-1] == 1 else part)
            there[i] += need
            if progress is not None:
                progress(sum(there), n)
    return _tensor([part for part in parts if part is not None])[:n]


def load(folder: str | Path, n: int | None = None) -> Tensor:
    """The images 0 to n - 1 that ``folder`` holds (None: all without a gap), uint8 [n, C, H, W].

    Raises `DataError` where there are fewer.
    """
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
    """What decides the images, as JSON: equal settings give equal images (up to rounding, with the batch size)."""
    given = [name for name in REFUSED if options.get(name) is not None]
    if given:
        raise InvalidArgument(f"{given[0]}= cannot be written down, so its images cannot be kept in parts")
    request = sampler.request(1, **options, seed=seed, labels=_labels(sampler, labels, 0, 1))
    return {
        "model": fingerprint(sampler.unet),
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


def check_settings(folder: str | Path, expected: dict[str, Any]) -> None:
    """Write ``expected`` beside the parts of a new folder, or hold a folder to it: `DataError` names what differs.

    A folder with parts but without settings is refused, too: write the settings, if they are known to be theirs.
    """
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


def fingerprint(unet: nn.Module) -> str:
    """SHA-256 of a network: its class, its configuration, and the names, types, shapes and bytes of its tensors."""
    digest = hashlib.sha256()
    config = getattr(unet, "config", None)
    to_dict = getattr(config, "to_dict", None)
    described = to_dict() if callable(to_dict) else dict(config) if isinstance(config, dict) else None
    digest.update(json.dumps([type(unet).__qualname__, described], sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _labels(sampler: Sampler, labels: int | str | None, start: int, n: int) -> int | list[int] | None:
    if labels != "cycle":
        if isinstance(labels, str):
            raise InvalidArgument(f"labels={labels!r}: 'cycle', a class, or None is needed")
        return labels
    classes = sampler.info.classes
    return None if classes is None else [i % classes for i in range(start, start + n)]


def _name(start: int) -> str:
    return f"{start:06d}.npz"


def _read_part(path: Path) -> np.ndarray | None:
    """uint8 [n, H, W, C], n at most `PART`; None where there is no such file, or a damaged one (which is logged)."""
    if not path.exists():
        return None
    try:
        images, _ = read_npz(path)
    except DataError as e:
        log.warning("%s; its images are drawn anew", e)
        return None
    return images[:PART]


def _tensor(parts: list[np.ndarray]) -> Tensor:
    """Parts [n, H, W, C] as one tensor [N, C, H, W]."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DataError(f"parts of different shapes: {sorted(shapes)}")
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
