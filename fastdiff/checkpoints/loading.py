"""Models in and out: diffusers folders, fastdiff's own files, those of the original code bases. Files are untrusted.

A model is a diffusers pipeline folder (``unet/``, ``scheduler/``) or a bare ``UNet2DModel`` folder, its weights whole
or sharded; the name of a model that comes with fastdiff; or a file: a training checkpoint (its EMA weights), what
`fastdiff.checkpoints.convert` wrote, weights with a ``config.json`` beside them, or a checkpoint of the original DDPM,
of improved- or guided-diffusion, or of EDM's DDPM++ (`fastdiff.checkpoints.layouts`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.checkpoints import layouts, originals
from fastdiff.checkpoints.reading import TORCH_SUFFIXES, read_json, read_safetensors, read_sharded, read_torch
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.files import atomic_path, write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule
from fastdiff.solvers.compat.diffusers import EDM_PREDICTIONS, EDM_SCHEDULERS
from fastdiff.solvers.walk import Schedule
from fastdiff.unet import UNet, UNetConfig

log = logging.getLogger("fastdiff")

METADATA_KEY = "fastdiff"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TORCH_WEIGHTS = "diffusion_pytorch_model.bin"
BUILTIN = Path(__file__).parent.parent / "models"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded model: the network in float32 on the CPU, what it was trained with, the scheduler's configuration."""

    unet: UNet
    schedule: Schedule
    prediction: str
    scheduler_config: dict[str, Any]
    path: Path


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as its file has it: tensors in their own dtypes, under the names of ``layout`` (None: diffusers').

    where: the file that holds the tensors. left_out: tensors that the network does not hear when it samples.
    """

    tensors: dict[str, Tensor]
    layout: str | None
    config: UNetConfig
    scheduler: dict[str, Any]
    path: Path
    where: Path
    left_out: tuple[str, ...] = ()


def builtin_models() -> list[str]:
    """Names of the models that come with fastdiff."""
    return (
        sorted(p.name for p in BUILTIN.iterdir() if (p / "unet" / "config.json").exists()) if BUILTIN.is_dir() else []
    )


def load(
    model: str | Path,
    *,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
) -> Pretrained:
    """Load a model; see the module's docstring for what ``model`` may be, `read` for the options.

    Raises `CheckpointError` naming the file and every mismatch, `ConfigError` naming the key.
    """
    source = read(model, preset=preset, flags=flags, variant=variant, weights=weights)
    with _naming(source.path):
        schedule, prediction = schedule_of(source.scheduler)
    unet = build(source.config, source.tensors, source.where, source.layout)
    config = dict(source.scheduler)
    if isinstance(schedule, EDMSchedule):
        config.setdefault("clip_sample", False)  # neither Karras et al. nor diffusers' schedulers bound x0
    return Pretrained(unet, schedule, prediction, config, source.path)


def schedule_of(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """The schedule and the prediction that a scheduler's configuration names.

    What diffusers' EDM schedulers call "epsilon" is the F of the preconditioning, "edm" here (their c_out is
    sigma sigma_data / sqrt(sigma^2 + sigma_data^2), as in Karras et al. 2022, table 1).
    """
    prediction = config.get("prediction_type", "epsilon")
    if config.get("_class_name") not in EDM_SCHEDULERS:
        if prediction == "edm":
            raise ConfigError(f"prediction_type 'edm' needs one of the schedulers {', '.join(EDM_SCHEDULERS)}")
        return NoiseSchedule.from_scheduler_config(config), prediction
    if prediction not in EDM_PREDICTIONS:
        allowed = ", ".join(EDM_PREDICTIONS)
        raise ConfigError(f"prediction_type={prediction!r} of an EDM scheduler is unknown; allowed: {allowed}")
    levels = {f.name: config[f.name] for f in dataclasses.fields(EDMSchedule) if f.name in config}
    return EDMSchedule(**levels), EDM_PREDICTIONS[prediction]


def read(
    model: str | Path,
    *,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
) -> Source:
    """What `load` loads, before it is a network.

    preset, flags
        For the original code bases' files, which do not say what they are: the name of a published model
        (`originals.PRESETS`), or the flags that its README gives ("--image_size 64 --num_channels 192 ...").
    variant
        The variant of a folder's weights, as "fp16" or "ema" in diffusers.
    weights
        Which weights of a PyTorch file that holds several; by default the averaged ones.

    Raises as `load`, but for what only the tensors' shapes and values can tell.
    """
    path = Path(model)
    if not os.path.exists(path):  # Path.exists raises for names that no file system takes
        if str(model) not in builtin_models():
            known = ", ".join(builtin_models()) or "none"
            raise CheckpointError(
                f"{model}: neither an existing folder or file nor a built-in model (built in: {known})"
            )
        path = BUILTIN / str(model)
    given = {"preset": preset, "flags": flags, "variant": variant, "weights": weights}
    is_torch = path.suffix.lower() in TORCH_SUFFIXES
    heard = ("variant",) if path.is_dir() else ("preset", "flags", *(("weights",) if is_torch else ()))
    for name, value in given.items():
        if value is not None and name not in heard:
            kind = "a folder" if path.is_dir() else "a file of this kind"
            raise CheckpointError(f"{path}: {name}={value!r} does not apply to {kind}; leave it out")
    if path.is_dir():
        return _read_folder(path, variant)
    return _read_file(path, preset, flags, weights)


def _read_folder(path: Path, variant: str | None) -> Source:
    folder = path / "unet" if (path / "unet" / "config.json").exists() else path
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{path}: no config.json and no unet/config.json; a diffusers model or pipeline folder is needed"
        )
    config = _unet_config(folder / "config.json")
    scheduler = read_scheduler(path, folder)
    tensors, where = _read_weights(folder, variant)
    layout = "ddpm" if originals.layout_of(tensors) == "ddpm" else None  # diffusers 0.0.x had those names
    return Source(tensors, layout, config, scheduler, path, where)


def read_scheduler(path: Path, folder: Path) -> dict[str, Any]:
    """The scheduler configuration of a pipeline, or of the folder with its network; {} where there is none."""
    for candidate in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if candidate.exists():
            with _naming(candidate):
                scheduler = originals.modern_scheduler(read_json(candidate))
                schedule_of(scheduler)
            return scheduler
    return {}


def _read_weights(folder: Path, variant: str | None) -> tuple[dict[str, Tensor], Path]:
    """The folder's tensors, and the file that has or lists them: whole, sharded, or in PyTorch's format."""
    if variant is not None and (not variant or set("/\\.") & set(variant)):
        raise CheckpointError(f"{folder}: variant={variant!r}: a word such as fp16 is needed")

    def named(name: str) -> Path:  # as in diffusers, the variant stands before the last part of a name
        head, _, tail = name.rpartition(".")
        return folder / (name if variant is None else f"{head}.{variant}.{tail}")

    if named(WEIGHTS).exists():
        return read_safetensors(named(WEIGHTS))[0], named(WEIGHTS)
    head, _, tail = WEIGHTS.rpartition(".")
    indices = [named(f"{WEIGHTS}.index.json")]
    if variant is not None:  # newer files of diffusers put it before "safetensors"
        indices.append(folder / f"{head}.{variant}.{tail}.index.json")
    for index in indices:
        if index.exists():
            return read_sharded(index), index
    if named(TORCH_WEIGHTS).exists():
        return read_torch(named(TORCH_WEIGHTS)), named(TORCH_WEIGHTS)
    found = ", ".join(sorted(p.name for p in folder.iterdir()))
    raise CheckpointError(
        f"{folder}: no {named(WEIGHTS).name}, no index of shards of it, no {named(TORCH_WEIGHTS).name}; weights under "
        f"another variant's name need variant= (found: {found})"
    )


def _read_file(path: Path, preset: str | None, flags: str | Mapping[str, Any] | None, weights: str | None) -> Source:
    metadata: dict[str, str] = {}
    if path.suffix.lower() in TORCH_SUFFIXES:
        tensors = read_torch(path, weights)
    else:
        tensors, metadata = read_safetensors(path)
    if METADATA_KEY in metadata:
        return _read_own(path, tensors, metadata[METADATA_KEY])
    if all(name.startswith("model.") for name in tensors):  # EDMPrecond and its like wrap the network
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    beside = path.parent / "config.json"
    if preset is None and flags is None and originals.layout_of(tensors) is None and beside.exists():
        return Source(tensors, None, _unet_config(beside), {}, path, path)
    with _naming(path):
        original = originals.describe(tensors, path, preset, flags)
    for name in original.left_out:
        log.info("%s: %s is not read: it is not heard when sampling", path, name)
    heard = {name: tensor for name, tensor in tensors.items() if name not in original.left_out}
    return Source(heard, original.layout, original.config, original.scheduler, path, path, original.left_out)


def _read_own(path: Path, tensors: dict[str, Tensor], text: str) -> Source:
    """A file of fastdiff's own, which says what it is: a training checkpoint, or what `fastdiff.checkpoints.convert`
    wrote.
    """
    try:
        info = json.loads(text)
        unet, scheduler = info["unet"], info["scheduler"]
        layout = info.get("layout", "checkpoint")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: its fastdiff metadata cannot be read ({str(e)[:200]!r})") from e
    if layout not in ("checkpoint", "diffusers", *layouts.LAYOUTS):
        raise CheckpointError(f"{path}: its fastdiff metadata names layout {str(layout)[:80]!r}, which is unknown")
    with _naming(path):
        config = UNetConfig.from_dict(unet)
        if not isinstance(scheduler, dict):
            raise ConfigError(f"a scheduler configuration is an object with keys, not {type(scheduler).__name__}")
        schedule_of(scheduler)
    if layout == "checkpoint":
        tensors = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    return Source(tensors, layout if layout in layouts.LAYOUTS else None, config, scheduler, path, path)


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
    with _naming(path):
        if name == "UNetModel":
            return originals.old_unet_config(config)
        if name not in ("UNet2DModel", "fastdiff.UNet"):
            raise ConfigError(f"_class_name {name!r} is not supported; UNet2DModel is")
        return UNetConfig.from_dict(config)


def build(config: UNetConfig, tensors: Mapping[str, Tensor], where: str | Path, layout: str | None = None) -> UNet:
    """The network in float32, in evaluation mode, with these weights; errors as in `load_weights`.

    Only a network that the weights fit is allocated: what a configuration claims costs no memory. torch's random
    state is left alone.
    """
    unet = empty(config)
    fitted = fit(unet, tensors, where, layout, torch.float32)
    unet.to_empty(device="cpu").load_state_dict(fitted)
    return unet.eval()


def empty(config: UNetConfig) -> UNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return UNet(config).float()


def load_weights(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy weights into ``unet``, in its dtype. Legacy attention names and 1x1-convolution projections are understood.

    Every missing, extra, doubled, misshapen, non-float or non-finite tensor is listed in one `CheckpointError`, and
    then nothing is copied.
    """
    unet.load_state_dict(fit(unet, tensors, where, None, unet.conv_in.weight.dtype))


def fit(
    unet: UNet, tensors: Mapping[str, Tensor], where: str | Path, layout: str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a layout under the names and shapes of ``unet``'s state dict, in ``dtype`` (None: in their own).

    They are compared under the names that their file has; errors as in `load_weights`. ``unet`` may be on "meta".
    """
    parts = None if layout is None else layouts.pieces(unet, layout)
    if parts is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    else:
        shapes = {part.theirs: part.shape for part in parts}
    constant = {part.theirs for part in parts or () if not part.ours}
    problems = []
    given: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = name if parts is not None else _modern(name)
        if ours in given:
            problems.append(f"twice: {ours} (once as {name})")
        given[ours] = tensor
    problems += [f"missing: {name} {shapes[name]}" for name in sorted(shapes.keys() - given.keys())]
    problems += [f"unexpected: {name} {tuple(given[name].shape)}" for name in sorted(given.keys() - shapes.keys())]
    fitted = {}
    for name in sorted(shapes.keys() & given.keys()):
        tensor, shape = given[name], shapes[name]
        if parts is None and ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = tensor.dtype if tensor.layout == torch.strided and tensor.device.type == "cpu" else "no plain tensor"
            problems.append(f"dtype: {name} is {kind}, a float type is needed")
        elif tensor.shape != shape:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, {shape} is needed")
        else:
            fitted[name] = tensor.to(dtype or tensor.dtype)
            if not torch.isfinite(fitted[name]).all():
                problems.append(f"value: {name} has NaN or infinite values (as {fitted[name].dtype})")
            elif name in constant and not fitted[name].eq(layouts.RESAMPLE_FILTER).all():
                problems.append(f"value: {name} is not {layouts.RESAMPLE_FILTER} everywhere; other filters are refused")
    if problems:
        raise CheckpointError(f"{where} does not fit this U-Net, {len(problems)} problems:\n  " + "\n  ".join(problems))
    return fitted if parts is None else layouts.to_ours(parts, fitted, unet)


def _modern(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)


def save_unet(unet: UNet, path: str | Path) -> None:
    """Write ``config.json`` and the weights as a ``UNet2DModel`` folder, each file atomically."""
    save_tensors(unet.config, unet.state_dict(), path)


def save_tensors(config: UNetConfig, state: Mapping[str, Tensor], path: str | Path) -> None:
    """`save_unet` for the state dict of a network that need not exist."""
    path = Path(path)
    name = "UNet2DModel" if config.diffusers_can_run else "fastdiff.UNet"
    with writing(path):
        with atomic_path(path / WEIGHTS) as temporary:
            save_file(plain(state), temporary, metadata={"format": "pt"})
        write_text(path / "config.json", json.dumps({"_class_name": name, **config.to_dict()}, indent=2) + "\n")


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each filling memory of its own, as safetensors and torch.save need them."""
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        result[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return result


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as e:  # torch.save raises the last of them
        raise CheckpointError(f"{path}: the model could not be written ({e}); files that were there are whole") from e


def save_folder(path: str | Path, unet: UNet, schedule: NoiseSchedule, prediction: str = "epsilon") -> None:
    """Write a diffusers pipeline folder: ``unet/``, ``scheduler/`` and ``model_index.json``.

    The index is left out for a network that diffusers does not have: it would load it with random parts.
    """
    scheduler = {
        "_class_name": "DDPMScheduler",
        **schedule.to_scheduler_config(),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
    save_pipeline(path, unet.config, unet.state_dict(), scheduler)


def save_pipeline(
    path: str | Path, config: UNetConfig, state: Mapping[str, Tensor], scheduler: Mapping[str, Any]
) -> None:
    """`save_folder` for a state dict and a whole scheduler configuration."""
    path = Path(path)
    save_tensors(config, state, path / "unet")
    name = scheduler.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", name],
    }
    with writing(path):
        text = json.dumps({"_class_name": name, **scheduler}, indent=2) + "\n"
        write_text(path / "scheduler" / "scheduler_config.json", text)
        if config.diffusers_can_run:
            write_text(path / "model_index.json", json.dumps(index, indent=2) + "\n")
