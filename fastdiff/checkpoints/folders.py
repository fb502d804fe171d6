"""The files of a diffusers folder, and of a training's: where the network, the weights and the scheduler are."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints import originals, wrappers
from fastdiff.checkpoints.reading import read_json, read_safetensors, read_sharded, read_torch
from fastdiff.checks import shown
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.solvers.keys import check_config, unknown_keys

log = logging.getLogger("fastdiff")

WEIGHTS = "diffusion_pytorch_model.safetensors"
TORCH_WEIGHTS = "diffusion_pytorch_model.bin"
CHECKPOINT = "checkpoint.safetensors"  # of a training, in its folder


def checked_subfolder(path: Path, subfolder: str | None) -> str:
    """Return the name of a folder that exists below ``path``, "" for none."""
    if not subfolder:
        return ""
    parts = Path(subfolder).parts
    if "\0" in subfolder or ".." in parts or Path(subfolder).is_absolute() or not os.path.isdir(path / subfolder):
        found = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:20]) or "none"
        raise CheckpointError(f"{path}: subfolder={shown(subfolder)} is no folder in it (found: {found})")
    return subfolder


def result_of_run(path: Path, weights: str | None) -> Path | None:
    """Return what a run of `fastdiff train` has left in its folder, or None if the folder is of another kind.

    That is the exported ``model``; before the end of the training, or of its continuation, or where ``weights`` asks
    for a set of them, the checkpoint.
    """
    if any((path / name).exists() for name in ("config.json", "unet", "unet_ema")):
        return None
    checkpoint, model = path / CHECKPOINT, path / "model"
    if not checkpoint.exists():
        return model if (model / "unet" / "config.json").exists() or (model / "config.json").exists() else None
    exported = model / "unet" / WEIGHTS
    if weights is None and exported.exists() and exported.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns:
        return model
    if weights is None and exported.exists():
        log.warning("%s: reads %s, which is newer than %s", path, CHECKPOINT, model)
    return checkpoint


def network_folder(path: Path, weights: str | None) -> tuple[Path, str | None]:
    """Return the folder with a network's config.json, and what is left of ``weights``.

    A training checkpoint of diffusers' scripts has the weights in ``unet`` and their average in ``unet_ema``, which is
    preferred; in a pipeline, which has a model_index.json, ``unet`` is what it uses.
    """
    both = [name for name in ("unet", "unet_ema") if (path / name / "config.json").exists()]
    if both:
        preferred = both[0] if (path / "model_index.json").exists() else both[-1]
        if len(both) > 1 and weights not in both:
            other = both[0] if preferred == both[-1] else both[-1]
            log.warning("%s: reads the weights in %s; weights=%r reads the others", path, preferred, other)
        return path / (weights if weights in both else preferred), None if weights in both else weights
    if (path / "config.json").exists():
        return path, weights
    steps = sorted((p.name for p in path.glob("checkpoint-*") if p.is_dir()), key=lambda name: (len(name), name))
    raise CheckpointError(
        f"{path}: no config.json and no unet/config.json; a diffusers model or pipeline folder is needed"
        + (f" (the last checkpoint of a training in it is {steps[-1]})" if steps else "")
        + ("; the training in it has not written a checkpoint yet" if (path / "log.jsonl").exists() else "")
    )


def read_scheduler(folder: str | Path) -> dict[str, Any]:
    """Read the scheduler configuration of a diffusers folder.

    Args:
        folder: A folder with ``scheduler/scheduler_config.json`` or ``scheduler_config.json``.

    Returns:
        The configuration, with the keys of today's diffusers; {} if the folder has neither file.

    Raises:
        CheckpointError: If the file is not a JSON object.
        ConfigError: If a value is of a wrong type, or the scheduler is not diffusers'; the message names the file.
    """
    return scheduler_file(Path(folder))[1]


def scheduler_file(folder: Path, warn: bool = True) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the contents of the scheduler's file, as `read_scheduler` does.

    ``warn`` is whether a warning names a pipeline's parts besides the network and the scheduler.
    """
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.exists():
            with naming(path):
                scheduler = originals.modern_scheduler(check_config(read_json(path)))
                named = _pipeline_scheduler(folder, scheduler.get("_class_name"), warn)
            unknown = unknown_keys(scheduler)
            if unknown:
                log.warning("%s: unknown keys are ignored, as in diffusers: %s", path, ", ".join(map(shown, unknown)))
            return path, scheduler if named is None else {**scheduler, "_class_name": named}
    return None, {}


def _pipeline_scheduler(folder: Path, named: str | None, warn: bool) -> str | None:
    """Return the class of a folder's scheduler: ``model_index.json`` decides, as in diffusers, else ``named``."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    parts = {key: part for key, part in index.items() if not key.startswith("_") and isinstance(part, list)}
    others = sorted(key for key in parts.keys() - {"unet", "scheduler"} if any(parts[key]))
    if others and warn:
        log.warning(
            "%s: the pipeline %s has %s besides, which fastdiff does not run: images are the U-Net's own output",
            folder, shown(index.get("_class_name")), ", ".join(map(shown, others)),
        )  # fmt: skip
    library, name = (*parts.get("scheduler", ()), None, None)[:2]
    if library not in (None, "diffusers"):
        raise ConfigError(f"model_index.json: its scheduler {shown(name)} is of {shown(library)}, not of diffusers")
    if isinstance(name, str) and name != named:
        if named is not None:
            log.warning("%s: model_index.json names the scheduler %s, its file %s", folder, shown(name), shown(named))
        return name
    return named


def read_weights(folder: Path, variant: str | None, weights: str | None) -> tuple[dict[str, Tensor], Path]:
    """Read the tensors of a folder, from safetensors, shards, or a PyTorch file, and return the file's path as well."""
    if variant is not None and re.fullmatch(r"[\w-]{1,60}", variant) is None:
        raise CheckpointError(f"{folder}: variant={shown(variant)}: a word such as fp16 is needed")

    def named(name: str) -> Path:  # diffusers inserts the variant before the last part of a name
        head, _, tail = name.rpartition(".")
        return folder / (name if variant is None else f"{head}.{variant}.{tail}")

    if named(WEIGHTS).exists():
        return wrappers.choose(named(WEIGHTS), read_safetensors(named(WEIGHTS))[0], weights), named(WEIGHTS)
    head, _, tail = WEIGHTS.rpartition(".")
    indices = [named(f"{WEIGHTS}.index.json")]
    if variant is not None:  # newer versions of diffusers insert it before "safetensors"
        indices.append(folder / f"{head}.{variant}.{tail}.index.json")
    for index in indices:
        if index.exists():
            return wrappers.choose(index, read_sharded(index), weights), index
    if named(TORCH_WEIGHTS).exists():
        return read_torch(named(TORCH_WEIGHTS), weights), named(TORCH_WEIGHTS)
    found = ", ".join(sorted(p.name for p in folder.iterdir()))
    raise CheckpointError(
        f"{folder}: no {named(WEIGHTS).name}, no index of shards of it, no {named(TORCH_WEIGHTS).name}; weights under "
        f"another variant's name need variant= (found: {found})"
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix the message of a `ConfigError` with the file's name."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
