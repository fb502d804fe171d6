"""Model folders and weight files: diffusers' layout in and out. Files are untrusted; pickles are never opened.

A model is a diffusers pipeline folder (``unet/``, ``scheduler/``), a bare ``UNet2DModel`` folder, the name of a model that comes
with fastdiff, or a ``.safetensors`` file: a training checkpoint (its EMA weights) or weights with a ``config.json`` beside them.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.files import atomic_path, write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig

METADATA_KEY = "fastdiff"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BUILTIN = Path(__file__).parent / "models"

MAX_HEADER = 16 << 20  # bytes; SDXL's header, with 1,680 tensors, has 0.2 MB
MAX_TENSORS = 1 << 16
MAX_JSON = 1 << 20
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded model: the network in float32 on the CPU, its schedule, and the scheduler's whole configuration."""

    unet: UNet
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    path: Path


def builtin_models() -> list[str]:
    """Names of the models that come with fastdiff."""
    return (
        sorted(p.name for p in BUILTIN.iterdir() if (p / "unet" / "config.json").exists()) if BUILTIN.is_dir() else []
    )


def load(model: str | Path) -> Pretrained:
    """Load a model; see the module's docstring for what ``model`` may be.

    Raises `CheckpointError` naming the file and every mismatch, `ConfigError` naming the key.
    """
    path = Path(model)
    if not path.exists():
        path = BUILTIN / str(model)
        if str(model) not in builtin_models():
            known = ", ".join(builtin_models())
            raise CheckpointError(
                f"{model}: neither an existing folder or file nor a built-in model (built in: {known})"
            )
    if path.is_dir():
        return _load_folder(path)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: pickle formats can run code when opened and are refused; convert the weights to .safetensors"
        )
    return _load_file(path)


def _load_folder(path: Path) -> Pretrained:
    folder = path / "unet" if (path / "unet" / "config.json").exists() else path
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{path}: no config.json and no unet/config.json; a diffusers model or pipeline folder is needed"
        )
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}; only safetensors weights are read (found: {', '.join(sorted(p.name for p in folder.iterdir()))})"
        )
    unet = UNet(_unet_config(folder / "config.json"))
    tensors, _ = read_safetensors(folder / WEIGHTS)
    load_weights(unet, tensors, folder / WEIGHTS)
    for candidate in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if candidate.exists():
            return _pretrained(unet, read_json(candidate), path)
    return _pretrained(unet, {}, path)


def _load_file(path: Path) -> Pretrained:
    tensors, metadata = read_safetensors(path)
    if METADATA_KEY in metadata:
        try:
            info = json.loads(metadata[METADATA_KEY])
            config, scheduler = info["unet"], info["scheduler"]
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: its fastdiff metadata cannot be read ({e!r})") from e
        unet = UNet(UNetConfig.from_dict(config))
        load_weights(unet, {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}, path)
        return _pretrained(unet, scheduler, path)
    config_path = path.parent / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{path} holds no configuration; put the U-Net's config.json beside it")
    unet = UNet(_unet_config(config_path))
    load_weights(unet, tensors, path)
    return _pretrained(unet, {}, path)


def _pretrained(unet: UNet, scheduler_config: dict[str, Any], path: Path) -> Pretrained:
    return Pretrained(unet.eval(), NoiseSchedule.from_scheduler_config(scheduler_config), scheduler_config, path)


def _unet_config(path: Path) -> UNetConfig:
    config = read_json(path)
    name = config.get("_class_name", "UNet2DModel")
    if name not in ("UNet2DModel", "fastdiff.UNet"):
        raise ConfigError(f"{path}: _class_name {name!r} is not supported; UNet2DModel is")
    try:
        return UNetConfig.from_dict(config)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; `CheckpointError` names the file."""
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {MAX_JSON}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({type(e).__name__}: {str(e)[:200]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; its header is bounded before anything of its claimed size is read."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {size} bytes; too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{path}: a header of {length} bytes is refused; at most {MAX_HEADER} are read")
            header = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    # Every tensor's entry has one "data_offsets"; counting bytes costs no memory, parsing 100,000 bogus entries would.
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: {count} tensors are refused; at most {MAX_TENSORS} are read")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({e})") from e


def load_weights(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy weights into ``unet`` (in its dtype). Every missing, extra, misshapen, non-float or non-finite tensor is listed in
    one `CheckpointError`, and then nothing is copied. Legacy attention names and 1x1-convolution projections are understood.
    """
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    expected = unet.state_dict()
    problems = [f"missing: {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"unexpected: {name} {tuple(tensors[name].shape)}" for name in sorted(tensors.keys() - expected.keys())
    ]
    fitted = {}
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, shape = tensors[name], expected[name].shape
        if ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tensor.dtype not in FLOATS:
            problems.append(f"dtype: {name} is {tensor.dtype}, a float type is needed")
        elif tensor.shape != shape:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, {tuple(shape)} is needed")
        elif not torch.isfinite(tensor).all():
            problems.append(f"value: {name} has NaN or infinite values")
        fitted[name] = tensor
    if problems:
        raise CheckpointError(f"{where} does not fit this U-Net, {len(problems)} problems:\n  " + "\n  ".join(problems))
    unet.load_state_dict(fitted)


def _modern(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)


def save_unet(unet: UNet, path: str | Path) -> None:
    """Write ``config.json`` and the weights as a ``UNet2DModel`` folder, each file atomically."""
    path = Path(path)
    name = "UNet2DModel" if unet.config.class_image is None else "fastdiff.UNet"  # diffusers has no class image
    tensors = {k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()}
    with atomic_path(path / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(path / "config.json", json.dumps({"_class_name": name, **unet.config.to_dict()}, indent=2) + "\n")


def save_folder(path: str | Path, unet: UNet, schedule: NoiseSchedule, prediction: str = "epsilon") -> None:
    """Write a diffusers pipeline folder: ``unet/``, ``scheduler/`` and ``model_index.json``."""
    path = Path(path)
    save_unet(unet, path / "unet")
    scheduler = {
        "_class_name": "DDPMScheduler",
        **schedule.to_scheduler_config(),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
    write_text(path / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    write_text(path / "model_index.json", json.dumps(index, indent=2) + "\n")
