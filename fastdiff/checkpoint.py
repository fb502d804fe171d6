"""Model folders and weight files: diffusers' layout in and out. Files are untrusted; pickles are never opened.

A model is a diffusers pipeline folder (``unet/``, ``scheduler/``), a bare ``UNet2DModel`` folder, the name of a model
that comes with fastdiff, or a ``.safetensors`` file: a training checkpoint (its EMA weights) or weights with a
``config.json`` beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.files import atomic_path, write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from fastdiff.unet_config import UNetConfig

METADATA_KEY = "fastdiff"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BUILTIN = Path(__file__).parent / "models"

# A U-Net of 1,000 tensors (ADM's largest has 900) makes a training checkpoint of 5,000, with a header of 0.7 MB.
MAX_HEADER = 4 << 20
MAX_TENSORS = 1 << 14
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
    if not os.path.exists(path):  # Path.exists raises for names that no file system takes
        if str(model) not in builtin_models():
            known = ", ".join(builtin_models()) or "none"
            raise CheckpointError(
                f"{model}: neither an existing folder or file nor a built-in model (built in: {known})"
            )
        path = BUILTIN / str(model)
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
        found = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise CheckpointError(f"{folder}: no {WEIGHTS}; only safetensors weights are read (found: {found})")
    config = _unet_config(folder / "config.json")
    scheduler: dict[str, Any] = {}
    scheduler_path = folder
    for candidate in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if candidate.exists():
            scheduler, scheduler_path = read_json(candidate), candidate
            break
    with _naming(scheduler_path):
        schedule = NoiseSchedule.from_scheduler_config(scheduler)
    tensors, _ = read_safetensors(folder / WEIGHTS)
    return Pretrained(build(config, tensors, folder / WEIGHTS), schedule, scheduler, path)


def _load_file(path: Path) -> Pretrained:
    tensors, metadata = read_safetensors(path)
    scheduler: dict[str, Any] = {}
    if METADATA_KEY in metadata:
        try:
            info = json.loads(metadata[METADATA_KEY])
            unet, scheduler = info["unet"], info["scheduler"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise CheckpointError(f"{path}: its fastdiff metadata cannot be read ({str(e)[:200]!r})") from e
        with _naming(path):
            config = UNetConfig.from_dict(unet)
        tensors = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    elif (path.parent / "config.json").exists():
        config = _unet_config(path.parent / "config.json")
    else:
        raise CheckpointError(f"{path} holds no configuration; put the U-Net's config.json beside it")
    with _naming(path):
        schedule = NoiseSchedule.from_scheduler_config(scheduler)
    return Pretrained(build(config, tensors, path), schedule, scheduler, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a `ConfigError`."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def _unet_config(path: Path) -> UNetConfig:
    config = read_json(path)
    name = config.get("_class_name", "UNet2DModel")
    if name not in ("UNet2DModel", "fastdiff.UNet"):
        raise ConfigError(f"{path}: _class_name {name!r} is not supported; UNet2DModel is")
    with _naming(path):
        return UNetConfig.from_dict(config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; `CheckpointError` names the file."""
    try:
        with _open(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{path}: a configuration of more than {MAX_JSON} bytes is refused")
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({type(e).__name__}: {str(e)[:200]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file (a pipe would block, a device has no end) for reading; errors name it."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no regular file of this name")
        with path.open("rb") as file:
            yield file
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; its header is bounded before anything of its claimed size is read."""
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
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
    # Every tensor's entry has one "data_offsets"; counting bytes costs no memory, parsing many bogus entries would.
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: {count} tensors are refused; at most {MAX_TENSORS} are read")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            if len(names) != count:  # the parser keeps the last of equal names
                raise CheckpointError(f"{path}: damaged header: {count} entries for {len(names)} distinct tensors")
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({e})") from e


def build(config: UNetConfig, tensors: Mapping[str, Tensor], where: str | Path) -> UNet:
    """The network in float32, in evaluation mode, with these weights; errors as in `load_weights`.

    Only a network that the weights fit is allocated: what a configuration claims costs no memory. torch's random
    state is left alone.
    """
    with torch.device("meta"):
        unet = UNet(config).float()
    fitted = _fit(unet, tensors, where)
    unet.to_empty(device="cpu").load_state_dict(fitted)
    return unet.eval()


def load_weights(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy weights into ``unet``, in its dtype. Legacy attention names and 1x1-convolution projections are understood.

    Every missing, extra, doubled, misshapen, non-float or non-finite tensor is listed in one `CheckpointError`, and
    then nothing is copied.
    """
    unet.load_state_dict(_fit(unet, tensors, where))


def _fit(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The tensors under the names, shapes and dtypes of ``unet``'s state dict."""
    expected = unet.state_dict()
    problems = []
    given: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _modern(name) in given:
            problems.append(f"twice: {_modern(name)} (once as {name})")
        given[_modern(name)] = tensor
    problems += [f"missing: {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected: {name} {tuple(given[name].shape)}" for name in sorted(given.keys() - expected.keys())]
    fitted = {}
    for name in sorted(expected.keys() & given.keys()):
        tensor, shape = given[name], expected[name].shape
        if ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tensor.dtype not in FLOATS:
            problems.append(f"dtype: {name} is {tensor.dtype}, a float type is needed")
        elif tensor.shape != shape:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, {tuple(shape)} is needed")
        else:
            fitted[name] = tensor.to(expected[name].dtype)
            if not torch.isfinite(fitted[name]).all():
                problems.append(f"value: {name} has NaN or infinite values (as {expected[name].dtype})")
    if problems:
        raise CheckpointError(f"{where} does not fit this U-Net, {len(problems)} problems:\n  " + "\n  ".join(problems))
    return fitted


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
    with _writing(path):
        with atomic_path(path / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(path / "config.json", json.dumps({"_class_name": name, **unet.config.to_dict()}, indent=2) + "\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: the model could not be written ({e}); files that were there are whole") from e


def save_folder(path: str | Path, unet: UNet, schedule: NoiseSchedule, prediction: str = "epsilon") -> None:
    """Write a diffusers pipeline folder: ``unet/``, ``scheduler/`` and ``model_index.json``.

    The index is left out for a network with a class image: diffusers, which has none, would load it with random parts.
    """
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
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    with _writing(path):
        write_text(path / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
        if unet.config.class_image is None:
            write_text(path / "model_index.json", json.dumps(index, indent=2) + "\n")
