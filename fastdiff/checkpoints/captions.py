"""Files of the encoder of captions: ``text_encoder/`` in a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdiff.checkpoints.reading import read_json, read_safetensors
from fastdiff.checks import shown
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig

FOLDER, CLASS_NAME = "text_encoder", "fastdiff.CaptionEncoder"
WEIGHTS = "model.safetensors"


def mentions_encoder(path: Path, key: str) -> bool:
    """Return whether a safetensors file's metadata has, under ``key``, JSON that describes an encoder of captions."""
    try:
        with safe_open(path, framework="pt") as file:
            return '"text_encoder"' in (file.metadata() or {}).get(key, "")
    except (OSError, SafetensorError):
        return False  # which `read_safetensors` will say better


def has_encoder(path: Path) -> bool:
    """Return whether the folder of a model has an encoder of captions, and not another one's text encoder."""
    config = path / FOLDER / "config.json"
    return config.exists() and read_json(config).get("_class_name") == CLASS_NAME


def read_encoder(path: Path) -> CaptionEncoder:
    """Read the encoder in the folder of a model, in float32, on the CPU, in evaluation mode."""
    folder = path / FOLDER
    try:
        config = CaptionEncoderConfig.from_dict(read_json(folder / "config.json"))
    except ConfigError as e:
        raise ConfigError(f"{folder / 'config.json'}: {e}") from e
    return build_encoder(config, read_safetensors(folder / WEIGHTS)[0], folder / WEIGHTS)


def build_encoder(config: CaptionEncoderConfig, tensors: Mapping[str, Tensor], where: str | Path) -> CaptionEncoder:
    """Build an encoder with these weights; `CheckpointError` names the first one that does not fit."""
    with torch.random.fork_rng(devices=[]):
        encoder = CaptionEncoder(config)
    check_weights(encoder, tensors, where)
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return encoder.eval()


def check_weights(encoder: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise `CheckpointError`, which names the first of the tensors that does not fit a text encoder."""
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        tensor = tensors.get(name)
        if name not in shapes or tensor is None:
            what = "is missing" if tensor is None else "is unexpected"
        elif tensor.shape != shapes[name]:
            what = f"is {tuple(tensor.shape)}, {tuple(shapes[name])} is needed"
        elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            what = f"of {tensor.dtype} has values that are no finite numbers"
        else:
            continue
        raise CheckpointError(f"{where} does not fit this text encoder: {shown(name)[1:-1]} {what}")


def encoder_config(encoder: CaptionEncoder) -> dict[str, Any]:
    """Return the contents of the encoder's ``config.json``."""
    return {"_class_name": CLASS_NAME, **encoder.config.to_dict()}
