"""A model from one format to another, bit for bit: its tensors are renamed and reordered, never computed with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastdiff.checkpoints import layouts
from fastdiff.checkpoints import loading as checkpoint
from fastdiff.checkpoints.loading import METADATA_KEY
from fastdiff.checkpoints.reading import TORCH_SUFFIXES
from fastdiff.errors import ConfigError
from fastdiff.files import atomic_path

FORMATS = ("diffusers", "safetensors", *layouts.LAYOUTS)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Write the model ``src`` to ``dst``, every file atomically.

    to
        "diffusers": a pipeline folder, which diffusers loads where it has such a network. "safetensors": one file with
        the configuration in it. "ddpm", "openai", "openai-new", "edm" (`fastdiff.checkpoints.layouts`): one file with
        the tensors that the original code loads, as ``.safetensors`` (which says what it is) or ``.pt`` (which does
        not, as ever). None: the folder, or "safetensors" where ``dst`` ends so.

    The other options are those of `checkpoint.read`. The source is read and checked whole before anything is written.
    Returns what was done, for machines. Raises `CheckpointError`, `ConfigError`.
    """
    dst = Path(dst)
    suffix = dst.suffix.lower()
    is_file = suffix in (".safetensors", *TORCH_SUFFIXES)
    if to is None and suffix in TORCH_SUFFIXES:
        raise ConfigError(f"{dst}: which tensors? Give the format, one of {', '.join(layouts.LAYOUTS)}")
    to = to or ("safetensors" if is_file else "diffusers")
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is unknown; allowed: {', '.join(FORMATS)}")
    if is_file == (to == "diffusers"):
        raise ConfigError(
            f"{dst}: format {to!r} is written as {'a folder' if is_file else 'a file, .safetensors or .pt'}"
        )
    if to == "safetensors" and suffix != ".safetensors":
        raise ConfigError(f"{dst}: format 'safetensors' is written as a .safetensors file")

    source = checkpoint.read(src, preset=preset, flags=flags, variant=variant, weights=weights)
    unet = checkpoint.empty(source.config)
    state = checkpoint.fit(unet, source.tensors, source.where, source.layout, dtype=None)
    if to == "diffusers":
        checkpoint.save_pipeline(dst, source.config, state, source.scheduler)
    else:
        if to in layouts.LAYOUTS:
            reasons = layouts.reasons_against(unet, to)
            if reasons:
                raise ConfigError(f"{source.path} cannot be written as {to!r}: " + "; ".join(reasons))
            state = layouts.to_theirs(layouts.pieces(unet, to), state)
        layout = to if to in layouts.LAYOUTS else "diffusers"
        info = {"unet": source.config.to_dict(), "scheduler": source.scheduler, "layout": layout}
        with checkpoint.writing(dst), atomic_path(dst) as temporary:
            if suffix == ".safetensors":
                save_file(checkpoint.plain(state), temporary, metadata={METADATA_KEY: json.dumps(info)})
            else:
                with temporary.open("wb") as file:  # given a path, torch would put its name into the file
                    torch.save(checkpoint.plain(state), file)
    return {
        "src": str(src),
        "dst": str(dst),
        "format": to,
        "from": source.layout or "diffusers",
        "tensors": len(state),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "left_out": list(source.left_out),
    }
