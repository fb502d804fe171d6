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

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import layouts, originals, wrappers
from fastdiff.checkpoints.captions import has_encoder
from fastdiff.checkpoints.fitting import FLOATS, build
from fastdiff.checkpoints.folders import (
    checked_subfolder,
    naming,
    network_folder,
    read_weights,
    result_of_run,
    scheduler_file,
)
from fastdiff.checkpoints.reading import TORCH_SUFFIXES, json_object, read_json, read_safetensors, read_torch
from fastdiff.checks import optional, shown, text
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.schedule import PREDICTIONS
from fastdiff.solvers import EDMSchedule, VESchedule
from fastdiff.solvers.compat.diffusers import EDM_SCHEDULERS, scheduler_name
from fastdiff.solvers.compat.edm import EDM_PREDICTIONS
from fastdiff.solvers.compat.flow import flow_schedule
from fastdiff.solvers.compat.source import noise_schedule
from fastdiff.solvers.compat.ve import ve_schedule
from fastdiff.solvers.keys import check_config, value_of
from fastdiff.solvers.walk import Schedule
from fastdiff.unet import UNet, UNetConfig

log = logging.getLogger("fastdiff")

NAMES_KEY = "_class_names"  # of a network's config.json: the name of each class, a key that diffusers ignores
METADATA_KEY = "fastdiff"  # of a safetensors file's metadata: a JSON object that describes the model in the file
OPTIONS = ("preset", "flags", "variant", "weights", "subfolder")  # of `load`
FOLDER_OPTIONS = ("variant", "weights", "subfolder")  # of `load`, where the model is a folder
BUILTIN = Path(__file__).parent.parent / "models"
MOST_PATH = 4096  # bytes of a path; more is no path on the usual systems


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
        with naming(stored.scheduler_path or stored.path):
            schedule, prediction = schedule_of(stored.scheduler)
            if stored.scheduler_path is not None and "_class_name" not in stored.scheduler:
                raise ConfigError("it names no scheduler (_class_name), and nothing about a model's process is assumed")
            if isinstance(schedule, VESchedule):
                stored = dataclasses.replace(stored, config=_of_unit_range(stored.config))
    unet = build(stored.config, stored.tensors, stored.weights_path, stored.layout)
    config = dict(stored.scheduler)
    if isinstance(schedule, EDMSchedule):
        config.setdefault("clip_sample", False)  # neither Karras et al. nor diffusers' EDM schedulers clip x0
    return Pretrained(unet, schedule, prediction, config, stored.path, stored.class_names)


def _of_unit_range(config: UNetConfig) -> UNetConfig:
    """Return the configuration of a network of ScoreSdeVeScheduler, whose images are in [0, 1]."""
    if config.time_embedding_type != "fourier":
        raise ConfigError(
            f"scheduler ScoreSdeVeScheduler needs a network of noise levels, of time_embedding_type 'fourier', not "
            f"{config.time_embedding_type!r}"
        )
    return dataclasses.replace(config, unit_range=True)


def load_network(model: str | Path, torch_dtype: Any = None, **source: Any) -> UNet:
    """Load the network alone, in float32 or ``torch_dtype``; other arguments and errors are those of `load`."""
    check_options(source)
    dtype = float_type(torch_dtype)
    stored = read_model(model, **source)
    unet = build(stored.config, stored.tensors, stored.weights_path, stored.layout)
    return unet if dtype is None else unet.to(dtype)


def float_type(torch_dtype: Any) -> torch.dtype | None:
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
        The schedule, and what the network predicts: "epsilon", "sample", "v_prediction", "edm", "flow_prediction" or
        "score". A `VESchedule` is for images in [-1, 1], as a network with ``unit_range`` takes them.

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
    if name == "ScoreSdeVeScheduler":
        return ve_schedule(config), "score"
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
    refuse(path, given, ("preset", "flags") if path.is_dir() else ("variant", "subfolder"))
    if path.is_dir():
        below = path / checked_subfolder(path, subfolder)
        return _read_folder(below, variant, weights, around=path)
    return _read_file(path, preset, flags, weights)


def refuse(path: Path, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `CheckpointError` for the first of these options that is given, as it does not apply to ``path``."""
    for name in names:
        if options[name] is not None:
            kind = "a folder" if path.is_dir() else "a file of this kind"
            raise CheckpointError(f"{path}: {name}={shown(options[name])} does not apply to {kind}; leave it out")


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
    result = result_of_run(path, weights)
    if result is not None:
        return _read_file(result, None, None, weights) if result.is_file() else _read_folder(result, variant, weights)
    folder, weights = network_folder(path, weights)
    config = _unet_config(folder / "config.json")
    scheduler_path, scheduler = scheduler_file(path)
    if scheduler_path is None and around is not None:
        scheduler_path, scheduler = scheduler_file(around)
    tensors, weights_path = read_weights(folder, variant, weights)
    layout = "ddpm" if originals.layout_of(tensors) == "ddpm" else None  # diffusers 0.0.x used the names of DDPM
    with naming(folder / "config.json"):
        names = _class_names(read_json(folder / "config.json").get(NAMES_KEY), config)
    return StoredModel(
        tensors, layout, config, scheduler, path, weights_path, class_names=names, scheduler_path=scheduler_path
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
        scheduler_path, scheduler = scheduler_file(path.parent)
        return StoredModel(tensors, None, _unet_config(beside), scheduler, path, path, scheduler_path=scheduler_path)
    with naming(path):
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
    with naming(path):
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


def _unet_config(path: Path) -> UNetConfig:
    config = read_json(path)
    name = config.get("_class_name", "UNet2DModel")
    with naming(path):
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
