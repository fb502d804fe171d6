"""Loading models: diffusers folders, fastdiff's own files, and files of the original code bases.

A model is one of:

- a diffusers pipeline folder (``unet/``, ``scheduler/``) or a bare ``UNet2DModel`` folder, with weights in one file or
  in shards;
- the name of a model that comes with fastdiff;
- a file: a training checkpoint (its EMA weights are loaded), a file that `fastdiff.checkpoints.convert` wrote, weights
  with a ``config.json`` beside them, or a checkpoint of the original DDPM, of improved- or guided-diffusion, or of the
  DDPM++ networks of EDM (`fastdiff.checkpoints.layouts`).

No file is trusted: see `fastdiff.checkpoints.reading`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import layouts, originals, wrappers
from fastdiff.checkpoints.captions import build_encoder, has_encoder, mentions_encoder, read_encoder
from fastdiff.checkpoints.reading import (
    TORCH_SUFFIXES,
    json_object,
    listed_problems,
    read_json,
    read_safetensors,
    read_sharded,
    read_torch,
)
from fastdiff.checks import optional, shown, text
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.schedule import PREDICTIONS
from fastdiff.solvers import EDMSchedule
from fastdiff.solvers.compat.diffusers import EDM_PREDICTIONS, EDM_SCHEDULERS, scheduler_name
from fastdiff.solvers.compat.flow import flow_schedule
from fastdiff.solvers.compat.source import noise_schedule
from fastdiff.solvers.keys import check_config, unknown_keys, value_of
from fastdiff.solvers.walk import Schedule
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig

log = logging.getLogger("fastdiff")

NAMES_KEY = "_class_names"  # of a network's config.json: the name of each class, a key that diffusers ignores
METADATA_KEY = "fastdiff"  # of a safetensors file's metadata: a JSON object that describes the model in the file
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ("preset", "flags", "variant", "weights", "subfolder")  # of `load`
FOLDER_OPTIONS = ("variant", "weights", "subfolder")  # of `load`, where the model is a folder
CHECKPOINT = "checkpoint.safetensors"  # of a training, in its folder
TORCH_WEIGHTS = "diffusion_pytorch_model.bin"
BUILTIN = Path(__file__).parent.parent / "models"
MOST_PATH = 4096  # bytes of a path; more is no path on the usual systems
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHER_WEIGHTS = {  # by names of tensors
    "LoRA weights, which are a change of another network's weights": r"\blora|lora_|\.hada_",
    "the state of an optimizer": r"exp_avg|momentum_buffer",
    "the weights of an autoencoder (VAE), not of a U-Net": r"^(encoder|decoder)\.|quant_conv",
    "the weights of a text-conditioned U-Net, which UNetCondition loads": r"\.attn2\.|transformer_blocks",
}
# Earlier versions of diffusers named the projections of an attention so.
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded model: the network and the settings with which it was trained.

    Attributes:
        unet: The network, in float32, on the CPU, in evaluation mode.
        schedule: The noise schedule of the training: a `NoiseSchedule`, or an `EDMSchedule`. None if the model has no
            scheduler configuration, so that nothing says what it is.
        prediction: What the network predicts: "epsilon", "sample", "v_prediction", or "edm" (the F of Karras et al.
            2022, equation 7). None if the model has no scheduler configuration.
        scheduler_config: The diffusers scheduler configuration; {} if the model has none.
        path: The folder or file that was loaded.
        class_names: The name of each class from 0 on; None if the model has no names.
    """

    unet: UNet
    schedule: Schedule | None
    prediction: str | None
    scheduler_config: dict[str, Any]
    path: Path
    class_names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PretrainedText:
    """A loaded model that reads text: the network, the encoder that it was trained with, and their settings.

    Attributes:
        unet: The network, in float32, on the CPU, in evaluation mode.
        text_encoder: The encoder of its prompts, likewise.
        schedule: As of `Pretrained`.
        prediction: As of `Pretrained`.
        scheduler_config: As of `Pretrained`.
        path: The folder or file that was loaded.
    """

    unet: UNetCondition
    text_encoder: CaptionEncoder
    schedule: Schedule | None
    prediction: str | None
    scheduler_config: dict[str, Any]
    path: Path


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The contents of a model's files, before a network is built from them."""

    tensors: dict[str, Tensor]  # the weights in their own dtypes, under the names of ``layout``
    layout: str | None  # one of `layouts.LAYOUTS`; None for diffusers' names
    config: UNetConfig
    scheduler: dict[str, Any]  # the diffusers scheduler configuration; {} if the model has none
    path: Path  # the folder or file of the model
    weights_path: Path  # the file that holds or lists the tensors
    left_out: tuple[str, ...] = ()  # the file's tensors that sampling does not need; ``tensors`` lacks them
    class_names: tuple[str, ...] | None = None
    scheduler_path: Path | None = None  # the file that holds the scheduler configuration, if that is a file of its own


def builtin_models() -> list[str]:
    """List the names of the models that come with fastdiff.

    Returns:
        The names, sorted; `load` accepts each of them.
    """
    if not BUILTIN.is_dir():
        return []
    return sorted(p.name for p in BUILTIN.iterdir() if (p / "unet" / "config.json").exists())


@plain_modes()
def load(
    model: str | Path,
    *,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
    subfolder: str | None = None,
) -> Pretrained:
    """Load a model from a folder, a file, or by the name of a built-in model.

    Args:
        model: A diffusers pipeline or model folder; a training checkpoint, a file that `convert` wrote, weights with a
            ``config.json`` beside them, or a file of an original code base; or one of `builtin_models`.
        preset: For a file of an original code base, which does not describe its network: the name of the published
            model, one of `PRESETS`.
        flags: For such a file, in place of ``preset``: the flags of its training run, as a command line
            ("--image_size 64 --num_channels 192 ...") or a mapping.
        variant: For a folder: the variant of the weights, such as "fp16" or "ema" in diffusers.
        weights: For weights of which a file holds several sets: the key, position or prefix of one; the message of an
            ambiguous file lists them. The default is the averaged (EMA) weights.
        subfolder: The folder below ``model`` that has the network, as in diffusers, such as "unet_ema"; a scheduler's
            configuration is looked for in both.

    Returns:
        The model, with its network in float32 on the CPU.

    Raises:
        CheckpointError: If a file cannot be read, or its tensors do not fit the network; the message names the file,
            the number of mismatches, the likely cause and three of them.
        ConfigError: If a configuration, preset or flag is not supported; the message names the key.
    """
    stored = read_model(model, preset=preset, flags=flags, variant=variant, weights=weights, subfolder=subfolder)
    schedule, prediction = None, None
    if stored.scheduler:
        with _naming(stored.scheduler_path or stored.path):
            schedule, prediction = schedule_of(stored.scheduler)
            if stored.scheduler_path is not None and "_class_name" not in stored.scheduler:
                raise ConfigError("it names no scheduler (_class_name), and nothing about a model's process is assumed")
    unet = build(stored.config, stored.tensors, stored.weights_path, stored.layout)
    config = dict(stored.scheduler)
    if isinstance(schedule, EDMSchedule):
        config.setdefault("clip_sample", False)  # neither Karras et al. nor diffusers' EDM schedulers clip x0
    return Pretrained(unet, schedule, prediction, config, stored.path, stored.class_names)


def load_network(model: str | Path, torch_dtype: Any = None, **source: Any) -> UNet:
    """Load the network alone, in float32 or ``torch_dtype``; other arguments and errors are those of `load`."""
    check_options(source)
    dtype = _float_type(torch_dtype)
    stored = read_model(model, **source)
    unet = build(stored.config, stored.tensors, stored.weights_path, stored.layout)
    return unet if dtype is None else unet.to(dtype)


def load_condition(model: str | Path, torch_dtype: Any = None, **source: Any) -> UNetCondition:
    """Load a text-conditioned network from a folder of diffusers; see `UNetCondition.from_pretrained`."""
    check_options(source, FOLDER_OPTIONS)
    dtype = _float_type(torch_dtype)
    for name, value in source.items():
        optional(text)(name, value)
    path = Path(check_path("path", model))
    if not os.path.isdir(path):
        raise CheckpointError(f"{shown(str(model))[1:-1]}: no such folder exists; a diffusers folder is needed")
    below = path / _checked_subfolder(path, source.get("subfolder"))
    return _condition_in(below, source.get("variant"), source.get("weights"), dtype or torch.float32)


def _condition_in(path: Path, variant: str | None, weights: str | None, dtype: torch.dtype) -> UNetCondition:
    """Load the text-conditioned network in a folder."""
    folder, weights = _network_folder(path, weights)
    config = read_json(folder / "config.json")
    with _naming(folder / "config.json"):
        name = config.get("_class_name", "UNet2DConditionModel")
        if name != "UNet2DConditionModel":
            raise ConfigError(f"_class_name {shown(name)} is not supported by UNetCondition; UNet2DConditionModel is")
        described = UNetConditionConfig.from_dict(config)
    tensors, weights_path = _read_weights(folder, variant, weights)
    return _build_condition(described, tensors, weights_path, dtype)


def _build_condition(
    config: UNetConditionConfig, tensors: Mapping[str, Tensor], where: Path, dtype: torch.dtype
) -> UNetCondition:
    """Build a text-conditioned network with these weights, in evaluation mode."""
    with torch.device("meta"):
        unet = UNetCondition(config)
    fitted = fit(unet, tensors, where, None, dtype)
    unet.to(dtype).to_empty(device="cpu").load_state_dict(fitted)
    return unet.eval()


@plain_modes()
def load_text(model: str | Path, **options: Any) -> PretrainedText | None:
    """Load a model that reads text and has a `fastdiff.text.CaptionEncoder`.

    Args:
        model: The folder of a model or of its training, a training checkpoint, or one of `builtin_models`.
        **options: variant and weights, as in `load`; the other options of `load` are refused.

    Returns:
        The model; None where ``model`` is anything else, which `load` may know.

    Raises:
        CheckpointError: If a file cannot be read, or its tensors do not fit the network or the encoder.
        ConfigError: If a configuration is not supported; the message names the file.
    """
    check_options(options)
    options = {name: options.get(name) for name in OPTIONS}
    path = Path(check_path("model", model))
    if not os.path.exists(path):
        if str(model) not in builtin_models():
            return None
        path = BUILTIN / str(model)
    weights = options["weights"]
    if path.is_dir() and not has_encoder(path):
        path = _result_of_run(path, weights) or path
    if path.is_dir():
        if not has_encoder(path):
            return None
        _refuse(path, options, ("preset", "flags", "subfolder"))
        unet, encoder = _condition_in(path, options["variant"], weights, torch.float32), read_encoder(path)
        scheduler_path, scheduler = _scheduler_file(path)
        where: Path = scheduler_path or path
    else:
        if path.suffix.lower() in TORCH_SUFFIXES or not mentions_encoder(path, METADATA_KEY):
            return None
        _refuse(path, options, ("preset", "flags", "subfolder", "variant"))
        tensors, metadata = read_safetensors(path)
        info = json_object(f"{path}: its fastdiff metadata", metadata[METADATA_KEY])
        with _naming(path):
            config = UNetConditionConfig.from_dict(info.get("unet", {}))
            text = CaptionEncoderConfig.from_dict(info["text_encoder"])
            scheduler = check_config(info.get("scheduler", {}))
        if weights not in (None, "ema", "model"):
            raise CheckpointError(f"{path}: weights={shown(weights)}: this file holds 'ema' and 'model'")

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{weights or 'ema'}.{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        unet = _build_condition(config, part("unet"), path, torch.float32)
        encoder, where = build_encoder(text, part("encoder"), path), path
    with _naming(where):
        schedule, prediction = schedule_of(scheduler) if scheduler else (None, None)
    return PretrainedText(unet, encoder, schedule, prediction, dict(scheduler), path)


def _float_type(torch_dtype: Any) -> torch.dtype | None:
    """Return the dtype that a caller names, or raise `InvalidArgument`."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    dtype: torch.dtype | None = torch_dtype
    if isinstance(torch_dtype, str) and torch_dtype in names:
        dtype = names[torch_dtype]
    if dtype is not None and not any(dtype is known for known in FLOATS):
        raise InvalidArgument(f"torch_dtype={shown(torch_dtype)} is unknown; allowed: {', '.join(names)}")
    return dtype


def check_options(given: Mapping[str, Any], allowed: Collection[str] = OPTIONS) -> None:
    """Refuse options that `load` does not have, by name."""
    if not given.keys() <= set(allowed):
        unknown = ", ".join(sorted(given.keys() - set(allowed)))
        raise InvalidArgument(f"from_pretrained has no option {unknown}; allowed besides: {', '.join(allowed)}")


def schedule_of(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """Read the noise schedule and the prediction type from a diffusers scheduler configuration.

    diffusers' EDM schedulers use "epsilon" for the F of EDM's preconditioning, which is called "edm" here: their c_out
    is sigma sigma_data / sqrt(sigma^2 + sigma_data^2), as in Karras et al. 2022, table 1.

    Args:
        config: The contents of a ``scheduler_config.json``; keys that concern only the sampling are ignored.

    Returns:
        The schedule, and what the network predicts: "epsilon", "sample", "v_prediction", "edm" or "flow_prediction".

    Raises:
        ConfigError: If the scheduler or a value is not supported. A configuration without ``_class_name`` has the keys
            of DDPMScheduler.
    """
    config = check_config(config)
    prediction = value_of(config, "prediction_type", "epsilon")
    name = None if config.get("_class_name") is None else scheduler_name(config)
    if name == "CMStochasticIterativeScheduler":
        raise ConfigError(
            f"scheduler {name} (_class_name) is of a consistency model, which its own solver alone can draw: "
            "Sampler(UNet.from_pretrained(...), solvers.EDMSchedule(time_scale=1000.0)) with solver='consistency'"
        )
    flow = flow_schedule(config)
    if flow is not None:
        return flow
    if name not in EDM_SCHEDULERS:
        if prediction == "edm":
            raise ConfigError(f"prediction_type 'edm' needs one of the schedulers {', '.join(EDM_SCHEDULERS)}")
        if prediction == "original_sample" and name == "EulerDiscreteScheduler":  # its name for "sample"
            prediction = "sample"
        if prediction not in PREDICTIONS:
            raise ConfigError(
                f"prediction_type={shown(prediction)} is not supported; allowed: {', '.join(PREDICTIONS)}"
            )
        if value_of(config, "timestep_type", "discrete") == "continuous" and prediction == "v_prediction":
            raise ConfigError("timestep_type='continuous' is not supported: the network's timesteps are sigmas")
        return noise_schedule(config), prediction
    if prediction not in EDM_PREDICTIONS:
        allowed = ", ".join(EDM_PREDICTIONS)
        raise ConfigError(f"prediction_type={shown(prediction)} of an EDM scheduler is unknown; allowed: {allowed}")
    levels = {f.name: config[f.name] for f in dataclasses.fields(EDMSchedule) if config.get(f.name) is not None}
    return EDMSchedule(**levels), EDM_PREDICTIONS[prediction]


def read_model(
    model: str | Path,
    *,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
    subfolder: str | None = None,
) -> StoredModel:
    """Read a model's files without building the network. Arguments and errors are those of `load`.

    Whether the tensors fit the network is not checked; `fit` does that.
    """
    path = Path(check_path("model", model))
    for name, value in {"preset": preset, "variant": variant, "weights": weights, "subfolder": subfolder}.items():
        optional(text)(name, value)
    if flags is not None and not isinstance(flags, (str, Mapping)):
        raise InvalidArgument(f"flags={shown(flags)}: a text, a mapping or None is needed")
    if not os.path.exists(path):  # Path.exists raises for names that no file system accepts
        if str(model) not in builtin_models():
            known = ", ".join(builtin_models()) or "none"
            raise CheckpointError(
                f"{shown(str(model))[1:-1]}: no such folder or file exists, nor a built-in model (built in: {known})"
            )
        path = BUILTIN / str(model)
    given: dict[str, Any] = {"preset": preset, "flags": flags, "variant": variant, "subfolder": subfolder}
    _refuse(path, given, ("preset", "flags") if path.is_dir() else ("variant", "subfolder"))
    if path.is_dir():
        below = path / _checked_subfolder(path, subfolder)
        return _read_folder(below, variant, weights, around=path)
    return _read_file(path, preset, flags, weights)


def _refuse(path: Path, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `CheckpointError` for the first of these options that is given, as it does not apply to ``path``."""
    for name in names:
        if options[name] is not None:
            kind = "a folder" if path.is_dir() else "a file of this kind"
            raise CheckpointError(f"{path}: {name}={shown(options[name])} does not apply to {kind}; leave it out")


def _checked_subfolder(path: Path, subfolder: str | None) -> str:
    """Return the name of a folder that exists below ``path``, "" for none."""
    if not subfolder:
        return ""
    parts = Path(subfolder).parts
    if "\0" in subfolder or ".." in parts or Path(subfolder).is_absolute() or not os.path.isdir(path / subfolder):
        found = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:20]) or "none"
        raise CheckpointError(f"{path}: subfolder={shown(subfolder)} is no folder in it (found: {found})")
    return subfolder


def check_path(name: str, value: Any) -> str | os.PathLike[str]:
    """Return a path, or raise `InvalidArgument` if the value is none."""
    if isinstance(value, (str, os.PathLike)):
        return value
    raise InvalidArgument(f"{name}={shown(value)}: a path is needed")


def check_new_path(name: str, value: Any) -> str | os.PathLike[str]:
    """Return a path of a file or folder to be made, or raise `InvalidArgument` if none can have it."""
    check_path(name, value)
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded or len(encoded) > MOST_PATH:
        raise InvalidArgument(f"{name}={shown(value)}: no file can have this path")
    return value


def _read_folder(path: Path, variant: str | None, weights: str | None, around: Path | None = None) -> StoredModel:
    """Read a folder; ``around`` is another one that may have the scheduler."""
    result = _result_of_run(path, weights)
    if result is not None:
        return _read_file(result, None, None, weights) if result.is_file() else _read_folder(result, variant, weights)
    folder, weights = _network_folder(path, weights)
    config = _unet_config(folder / "config.json")
    scheduler_path, scheduler = _scheduler_file(path)
    if scheduler_path is None and around is not None:
        scheduler_path, scheduler = _scheduler_file(around)
    tensors, weights_path = _read_weights(folder, variant, weights)
    layout = "ddpm" if originals.layout_of(tensors) == "ddpm" else None  # diffusers 0.0.x used the names of DDPM
    with _naming(folder / "config.json"):
        names = _class_names(read_json(folder / "config.json").get(NAMES_KEY), config)
    return StoredModel(
        tensors, layout, config, scheduler, path, weights_path, class_names=names, scheduler_path=scheduler_path
    )


def _result_of_run(path: Path, weights: str | None) -> Path | None:
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


def _network_folder(path: Path, weights: str | None) -> tuple[Path, str | None]:
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
    return _scheduler_file(Path(folder))[1]


def _scheduler_file(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the contents of the scheduler's file, as `read_scheduler` does."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.exists():
            with _naming(path):
                scheduler = originals.modern_scheduler(check_config(read_json(path)))
                named = _pipeline_scheduler(folder, scheduler.get("_class_name"))
            unknown = unknown_keys(scheduler)
            if unknown:
                log.warning("%s: unknown keys are ignored, as in diffusers: %s", path, ", ".join(map(shown, unknown)))
            return path, scheduler if named is None else {**scheduler, "_class_name": named}
    return None, {}


def _pipeline_scheduler(folder: Path, named: str | None) -> str | None:
    """Return the class of a folder's scheduler: ``model_index.json`` decides, as in diffusers, else ``named``."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    parts = {key: part for key, part in index.items() if not key.startswith("_") and isinstance(part, list)}
    others = sorted(key for key in parts.keys() - {"unet", "scheduler"} if any(parts[key]))
    if others:
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


def _read_weights(folder: Path, variant: str | None, weights: str | None) -> tuple[dict[str, Tensor], Path]:
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


def _read_file(
    path: Path, preset: str | None, flags: str | Mapping[str, Any] | None, weights: str | None
) -> StoredModel:
    metadata: dict[str, str] = {}
    if path.suffix.lower() in TORCH_SUFFIXES:
        tensors = read_torch(path, weights)
    else:
        tensors, metadata = read_safetensors(path)
        if METADATA_KEY in metadata:
            return _read_own(path, tensors, metadata[METADATA_KEY], weights)
        tensors = wrappers.choose(path, tensors, weights)
    beside = path.parent / "config.json"
    if preset is None and flags is None and originals.layout_of(tensors) is None and beside.exists():
        scheduler_path, scheduler = _scheduler_file(path.parent)
        return StoredModel(tensors, None, _unet_config(beside), scheduler, path, path, scheduler_path=scheduler_path)
    with _naming(path):
        original = originals.describe(tensors, path, preset, flags)
    for name in original.left_out:
        log.info("%s: %s is left out: it does not affect sampling", path, name)
    kept = {name: tensor for name, tensor in tensors.items() if name not in original.left_out}
    return StoredModel(kept, original.layout, original.config, original.scheduler, path, path, original.left_out)


def _read_own(path: Path, tensors: dict[str, Tensor], text: str, weights: str | None) -> StoredModel:
    """Interpret a file by fastdiff's metadata ``text``: a training checkpoint, or a file that `convert` wrote."""
    info = json_object(f"{path}: its fastdiff metadata", text)
    missing = [key for key in ("unet", "scheduler") if key not in info]
    if missing:
        raise CheckpointError(f"{path}: its fastdiff metadata lacks {', '.join(missing)}")
    unet, scheduler, layout = info["unet"], info["scheduler"], info.get("layout", "checkpoint")
    if layout not in ("checkpoint", "diffusers", *layouts.LAYOUTS):
        raise CheckpointError(f"{path}: its fastdiff metadata names layout {str(layout)[:80]!r}, which is unknown")
    with _naming(path):
        config = UNetConfig.from_dict(unet)
        check_config(scheduler)
        names = _class_names(info.get("class_names"), config)
    if weights not in ((None, "ema", "model") if layout == "checkpoint" else (None,)):
        holds = "'ema' and 'model'" if layout == "checkpoint" else "one set of weights only; leave it out"
        raise CheckpointError(f"{path}: weights={shown(weights)}: this file holds {holds}")
    if layout == "checkpoint":
        prefix = f"{weights or 'ema'}."
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    layout = layout if layout in layouts.LAYOUTS else None
    return StoredModel(tensors, layout, config, scheduler, path, path, class_names=names)


def _class_names(names: Any, config: UNetConfig) -> tuple[str, ...] | None:
    """Check the names of classes that a file has: different strings, at most one for each class."""
    if names is None:
        return None
    limit = config.num_classes or 0
    if not isinstance(names, list) or not all(isinstance(name, str) and 0 < len(name) <= 1000 for name in names):
        raise ConfigError("the names of the classes are not a list of strings, none of them empty")
    if len(names) > limit or len(set(names)) < len(names):
        raise ConfigError(f"{len(names)} names of classes, {len(set(names))} of them different, for {limit} classes")
    return tuple(names) or None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix the message of a `ConfigError` with the file's name."""
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
            hint = "; UNetCondition.from_pretrained loads it" if name == "UNet2DConditionModel" else ""
            if has_encoder(path.parent.parent):
                hint = (
                    ": the network reads text, which a Sampler gives it (fastdiff sample --prompt) and nothing else yet"
                )
            raise ConfigError(f"_class_name {shown(name)} is not supported; UNet2DModel is{hint}")
        return UNetConfig.from_dict(config)


# From tensors to a network --------------------------------------------------------------------------------------------


def build(config: UNetConfig, tensors: Mapping[str, Tensor], where: str | Path, layout: str | None = None) -> UNet:
    """Build the network in float32, in evaluation mode, with these weights; errors are those of `load_weights`.

    Memory is allocated only after the weights are known to fit, so a false configuration costs none. torch's random
    state is not changed.
    """
    unet = empty(config)
    fitted = fit(unet, tensors, where, layout, torch.float32)
    unet.to_empty(device="cpu").load_state_dict(fitted)
    return unet.eval()


def empty(config: UNetConfig) -> UNet:
    """Build the network on the device "meta", without memory for its weights."""
    with torch.device("meta"):
        return UNet(config)


def load_weights(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy weights into a network. On an error nothing is copied.

    Args:
        unet: The network; the weights are converted to its dtype.
        tensors: The weights under the names of diffusers; the names of its earlier versions for the projections of an
            attention, and projections stored as 1x1 convolutions, are accepted as well.
        where: Origin of the tensors, for the message.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, given twice, misshapen, not of a float type, or not finite;
            the message says how many are, the likely cause, and three of them.
    """
    tensors = wrappers.choose(where, tensors)
    unet.load_state_dict(fit(unet, tensors, where, None, unet.conv_in.weight.dtype))


def fit(
    unet: UNet | UNetCondition,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    layout: str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Convert the tensors of a file to the names and shapes of the state dict of ``unet``, which may be on "meta".

    ``layout`` None stands for diffusers' names; ``dtype`` None keeps that of each tensor. Errors are those of
    `load_weights`, with the names of the file.
    """
    parts = layouts.pieces(unet, layout) if layout is not None and isinstance(unet, UNet) else None
    if parts is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    else:
        shapes = {part.theirs: part.shape for part in parts}
    constant = {part.theirs for part in parts or () if not part.ours}
    problems = []
    given: dict[str, Tensor] = {}
    for name, tensor in (tensors if parts else _named(tensors, unet)).items():
        ours = name if parts is not None else _modern(name)
        if ours in given:
            problems.append(f"twice: {ours} (once as {name})")
        given[ours] = tensor
    problems += [f"missing: {name} {shapes[name]}" for name in sorted(shapes.keys() - given.keys())]
    problems += [f"unexpected: {name} {tuple(given[name].shape)}" for name in sorted(given.keys() - shapes.keys())]
    fitted = {}
    for name in sorted(shapes.keys() & given.keys()):
        tensor, shape = given[name], shapes[name]
        if parts is None and ".attentions." in name and tensor.shape[2:] == (1, 1) and len(shape) == 2:
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
        cause = _cause(given.keys(), shapes.keys(), problems)
        raise CheckpointError(f"{where} does not fit this U-Net, {listed_problems(problems, cause)}")
    return layouts.to_ours(parts, fitted, unet) if parts is not None and isinstance(unet, UNet) else fitted


def _named(tensors: Mapping[str, Tensor], unet: nn.Module) -> Mapping[str, Tensor]:
    """Name a list of averaged parameters, whose names are their positions, in the order of diffusers' or our module."""
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    if not all(name.isdecimal() for name in tensors) or len(tensors) != len(shapes):
        return tensors
    for order in (wrappers.parameter_order(shapes), list(shapes)):
        if [tuple(tensor.shape) for tensor in tensors.values()] == [shapes[name] for name in order]:
            return dict(zip(order, tensors.values(), strict=True))
    return tensors


def _cause(given: Set[str], needed: Set[str], problems: list[str]) -> str:
    """Say what tensors that do not fit a network probably are, by their names; "" where that is unclear."""
    kinds = {problem.partition(":")[0] for problem in problems}
    for what, pattern in OTHER_WEIGHTS.items():
        found = [any(re.search(pattern, name) for name in names) for names in (given - needed, needed)]
        if found == [True, False]:
            return what
    both = len(given & needed)
    if given and all(name.isdecimal() for name in given):
        return f"a list of {len(given)} tensors without names, the config.json is of a network with {len(needed)}"
    if not both:
        return "the weights of another kind of network"
    if kinds == {"shape"}:
        return "the config.json is of a network with other widths (block_out_channels, in_channels, ...)"
    if kinds == {"missing"}:
        return "the file is incomplete, or the config.json is of a network with more blocks or layers"
    if kinds == {"unexpected"}:
        return "the config.json is of a network with fewer blocks or layers"
    return "the config.json is of another network" if kinds & {"missing", "unexpected"} and len(problems) > 3 else ""


def _modern(name: str) -> str:
    """Replace the name of an attention's projection in early versions of diffusers by today's."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)
