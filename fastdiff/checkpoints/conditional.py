"""Loading networks that read text, alone or with the encoder of their prompts."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.captions import build_encoder, has_encoder, mentions_encoder, read_encoder
from fastdiff.checkpoints.fitting import fit
from fastdiff.checkpoints.folders import (
    checked_subfolder,
    naming,
    network_folder,
    read_weights,
    result_of_run,
    scheduler_file,
)
from fastdiff.checkpoints.loading import (
    BUILTIN,
    FOLDER_OPTIONS,
    METADATA_KEY,
    OPTIONS,
    builtin_models,
    check_options,
    check_path,
    float_type,
    refuse,
    schedule_of,
)
from fastdiff.checkpoints.pipelines import (
    check_network,
    check_pipeline,
    outdated_options,
    read_autoencoder,
    read_text_encoder,
    reads_text,
)
from fastdiff.checkpoints.reading import TORCH_SUFFIXES, json_object, read_json, read_safetensors
from fastdiff.checks import optional, shown, text
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.modes import plain_modes
from fastdiff.solvers.keys import check_config
from fastdiff.solvers.walk import Schedule
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig, ClipEncoder, ClipPair
from fastdiff.unet import UNetCondition, UNetConditionConfig
from fastdiff.unet.latents import LatentDecoder

log = logging.getLogger("fastdiff")


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
        autoencoder: What makes images of the network's latents, likewise; None for a network of pixels.
    """

    unet: UNetCondition
    text_encoder: CaptionEncoder | ClipEncoder | ClipPair
    schedule: Schedule | None
    prediction: str | None
    scheduler_config: dict[str, Any]
    path: Path
    autoencoder: LatentDecoder | None = None


def load_condition(model: str | Path, torch_dtype: Any = None, **source: Any) -> UNetCondition:
    """Load a text-conditioned network from a folder of diffusers; see `UNetCondition.from_pretrained`."""
    check_options(source, FOLDER_OPTIONS)
    dtype = float_type(torch_dtype)
    for name, value in source.items():
        optional(text)(name, value)
    path = Path(check_path("path", model))
    if not os.path.isdir(path):
        raise CheckpointError(f"{shown(str(model))[1:-1]}: no such folder exists; a diffusers folder is needed")
    below = path / checked_subfolder(path, source.get("subfolder"))
    return _condition_in(below, source.get("variant"), source.get("weights"), dtype or torch.float32)


def _condition_in(path: Path, variant: str | None, weights: str | None, dtype: torch.dtype) -> UNetCondition:
    """Load the text-conditioned network in a folder."""
    folder, weights = network_folder(path, weights)
    config = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        name = config.get("_class_name", "UNet2DConditionModel")
        if name != "UNet2DConditionModel":
            raise ConfigError(f"_class_name {shown(name)} is not supported by UNetCondition; UNet2DConditionModel is")
        described = UNetConditionConfig.from_dict(config)
    tensors, weights_path = read_weights(folder, variant, weights)
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
    """Load a model that reads text: one with a `fastdiff.text.CaptionEncoder`, or a pipeline of Stable Diffusion.

    Args:
        model: The folder of a model or of its training, a training checkpoint, one of `builtin_models`, or the folder
            of a StableDiffusionPipeline or StableDiffusionXLPipeline.
        **options: variant and weights, as in `load`; the other options of `load` are refused.

    Returns:
        The model; None where ``model`` is anything else, which `load` may know.

    Raises:
        CheckpointError: If a file cannot be read, or its tensors do not fit the network or the encoder.
        ConfigError: If a configuration is not supported; the message names the file.
        BackendError: If the package transformers is needed and not installed.
    """
    check_options(options)
    options = {name: options.get(name) for name in OPTIONS}
    path = Path(check_path("model", model))
    if not os.path.exists(path):
        if str(model) not in builtin_models():
            return None
        path = BUILTIN / str(model)
    weights = options["weights"]
    if path.is_dir() and not has_encoder(path) and reads_text(path) and not options["subfolder"]:
        refuse(path, options, ("preset", "flags"))
        return _pipeline_in(path, options["variant"], weights)
    if path.is_dir() and not has_encoder(path):
        path = result_of_run(path, weights) or path
    if path.is_dir():
        if not has_encoder(path):
            return None
        refuse(path, options, ("preset", "flags", "subfolder"))
        unet, encoder = _condition_in(path, options["variant"], weights, torch.float32), read_encoder(path)
        scheduler_path, scheduler = scheduler_file(path)
        where: Path = scheduler_path or path
    else:
        if path.suffix.lower() in TORCH_SUFFIXES or not mentions_encoder(path, METADATA_KEY):
            return None
        refuse(path, options, ("preset", "flags", "subfolder", "variant"))
        tensors, metadata = read_safetensors(path)
        info = json_object(f"{path}: its fastdiff metadata", metadata[METADATA_KEY])
        with naming(path):
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
    with naming(where):
        schedule, prediction = schedule_of(scheduler) if scheduler else (None, None)
    return PretrainedText(unet, encoder, schedule, prediction, dict(scheduler), path)


def _pipeline_in(path: Path, variant: str | None, weights: str | None) -> PretrainedText:
    """Load the folder of a pipeline that draws latents from a text."""
    index, others = check_pipeline(path)
    encoder = read_text_encoder(path, variant, index)
    autoencoder = read_autoencoder(path, variant)
    unet = _condition_in(path, variant, weights, torch.float32)
    check_network(path, unet.config, autoencoder, encoder)
    if others:
        log.warning("%s: a Sampler does not run %s of this pipeline", path, ", ".join(map(shown, others)))
    scheduler_path, scheduler = scheduler_file(path, warn=False)
    with naming(scheduler_path or path):
        # The pipeline of XL takes the scheduler as it is.
        outdated = outdated_options(scheduler) if scheduler and not isinstance(encoder, ClipPair) else {}
        schedule, prediction = schedule_of(scheduler) if scheduler else (None, None)
    if outdated:
        changes = ", ".join(f"{key}={value}" for key, value in outdated.items())
        log.warning("%s: an outdated configuration; %s as in diffusers' pipeline", scheduler_path, changes)
    config = {**scheduler, **outdated} if scheduler else {}
    if config and not isinstance(encoder, ClipPair):
        config["clip_sample"] = False
    return PretrainedText(unet, encoder, schedule, prediction, config, path, autoencoder)
