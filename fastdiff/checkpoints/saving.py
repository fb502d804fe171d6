"""Saving models as diffusers folders; every file is written atomically, so that no reader sees half of one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdiff.checkpoints import captions
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.checkpoints.loading import NAMES_KEY
from fastdiff.checkpoints.reading import DTYPES
from fastdiff.checks import one_of, shown
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument, WriteError
from fastdiff.files import atomic_file, write_text
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers import EDMSchedule, FlowSchedule, VESchedule
from fastdiff.solvers.compat.edm import EDM_PREDICTIONS
from fastdiff.solvers.compat.flow import flow_config
from fastdiff.solvers.compat.ve import ve_config
from fastdiff.solvers.flow import PREDICTIONS as FLOW_PREDICTIONS
from fastdiff.solvers.walk import Schedule
from fastdiff.text import CaptionEncoder
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig


def save_unet(unet: UNet, path: str | Path) -> None:
    """Write a network as a ``UNet2DModel`` folder: ``config.json`` and ``diffusion_pytorch_model.safetensors``.

    Args:
        unet: The network; its weights are written in their own dtype.
        path: The folder, which is created if need be.

    Raises:
        CheckpointError: If a file cannot be written. The files that were there before are then unchanged.
    """
    if not isinstance(unet, UNet):
        raise InvalidArgument(f"unet is a {type(unet).__name__}; a fastdiff.UNet is needed")
    save_tensors(unet.config, unet.state_dict(), path)


def save_folder(
    path: str | Path,
    unet: UNet | UNetCondition,
    schedule: Schedule,
    prediction: str = "epsilon",
    class_names: Sequence[str] | None = None,
    text_encoder: CaptionEncoder | None = None,
) -> None:
    """Write a diffusers pipeline folder: ``unet/``, ``scheduler/`` and ``model_index.json``.

    A network that reads text is written with its encoder, in ``text_encoder/``, and without ``model_index.json``, as no
    pipeline of diffusers has such an encoder.

    The scheduler is a ``DDPMScheduler`` with trailing spacing, which clips x0 to [-1, 1], or of an `EDMSchedule` an
    ``EDMEulerScheduler``, of a `FlowSchedule` a ``FlowMatchEulerDiscreteScheduler``, or of a `VESchedule` a
    ``ScoreSdeVeScheduler``, whose network must have ``unit_range``. For a network that diffusers'
    ``UNet2DModel`` cannot represent, ``model_index.json`` is left out: diffusers would load the network with random
    weights in place of those that it does not know.

    Args:
        path: The folder, which is created if need be.
        unet: The network.
        schedule: The noise schedule with which it was trained.
        prediction: What the network predicts: "epsilon", "sample" or "v_prediction"; with an `EDMSchedule` "edm" or
            "v_prediction"; with a `FlowSchedule` "flow_prediction", "epsilon" or "sample"; with a `VESchedule` "score".
        class_names: The name of each class from 0 on, which `fastdiff.Sampler` takes as labels; None for no names.
        text_encoder: The encoder of a network that reads text; None for a `fastdiff.UNet`.

    Raises:
        InvalidArgument: If ``prediction`` is unknown, or not one of the schedule.
        ConfigError: If no scheduler of diffusers can represent the schedule.
        CheckpointError: If a file cannot be written. The files that were there before are then unchanged.
    """
    scheduler = scheduler_of(schedule, prediction)
    if isinstance(schedule, VESchedule):
        if not isinstance(unet, UNet) or not unet.config.unit_range:
            raise ConfigError(
                "diffusers has variance-exploding networks of images in [0, 1] alone: unit_range is needed"
            )
        config = dataclasses.replace(unet.config, unit_range=False)  # which follows from the scheduler
        save_pipeline(path, config, unet.state_dict(), scheduler, class_names)
        return
    if isinstance(unet, UNetCondition) and isinstance(text_encoder, CaptionEncoder):
        _save_captioned(Path(path), unet, text_encoder, scheduler)
        return
    if not isinstance(unet, UNet) or text_encoder is not None:
        raise InvalidArgument(
            f"unet is a {type(unet).__name__} and text_encoder a {type(text_encoder).__name__}; a fastdiff.UNet alone, "
            "or a fastdiff.UNetCondition with a CaptionEncoder, is needed"
        )
    save_pipeline(path, unet.config, unet.state_dict(), scheduler, class_names)


def _save_captioned(path: Path, unet: UNetCondition, encoder: CaptionEncoder, scheduler: dict[str, Any]) -> None:
    """Write a network that reads text, its encoder and its scheduler."""
    save_tensors(unet.config, unet.state_dict(), path / "unet")
    folder = path / captions.FOLDER
    with writing(path):
        with atomic_file(folder / captions.WEIGHTS) as file:
            write_safetensors(file, encoder.state_dict(), {"format": "pt"})
        write_text(folder / "config.json", json.dumps(captions.encoder_config(encoder), indent=2) + "\n")
        write_text(path / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")


def scheduler_of(schedule: Schedule, prediction: str) -> dict[str, Any]:
    """Return the scheduler configuration from which `schedule_of` reads the same schedule and prediction."""
    if isinstance(schedule, EDMSchedule):
        one_of("prediction", prediction, tuple(EDM_PREDICTIONS.values()))
        if schedule.time_scale != 1.0:
            raise ConfigError(f"time_scale={schedule.time_scale!r}: no scheduler of diffusers has it; 1 can be saved")
        names = {ours: theirs for theirs, ours in EDM_PREDICTIONS.items()}
        levels = {k: v for k, v in dataclasses.asdict(schedule).items() if k != "time_scale"}
        return {"_class_name": "EDMEulerScheduler", **levels, "prediction_type": names[prediction]}
    if isinstance(schedule, FlowSchedule):
        one_of("prediction", prediction, FLOW_PREDICTIONS)
        name = "FlowMatchEulerDiscreteScheduler" if prediction == "flow_prediction" else "DPMSolverMultistepScheduler"
        return {"_class_name": name, **flow_config(name, schedule, prediction)}
    if isinstance(schedule, VESchedule):
        one_of("prediction", prediction, ("score",))
        return ve_config(schedule)
    if not isinstance(schedule, NoiseSchedule):
        raise InvalidArgument(
            f"schedule={shown(schedule)}: a NoiseSchedule, EDMSchedule, FlowSchedule or VESchedule is needed"
        )
    return {
        "_class_name": "DDPMScheduler",
        **schedule.to_scheduler_config(),
        "prediction_type": one_of("prediction", prediction, PREDICTIONS),
        "timestep_spacing": "trailing",
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }


def save_pipeline(
    path: str | Path,
    config: UNetConfig,
    state: Mapping[str, Tensor],
    scheduler: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a diffusers pipeline folder from a state dict and a scheduler configuration; see `save_folder`.

    Args:
        path: The folder, which is created if need be.
        config: The network's configuration.
        state: The network's state dict, which is written in its own dtypes.
        scheduler: The whole contents of ``scheduler_config.json``; ``_class_name`` defaults to "DDPMScheduler". If
            it is empty, as nothing says what it is, that file and ``model_index.json`` are left out.
        class_names: As for `save_folder`.

    Raises:
        CheckpointError: If a file cannot be written. The files that were there before are then unchanged.
    """
    path = Path(path)
    save_tensors(config, state, path / "unet", class_names)
    if not scheduler:
        return
    name = scheduler.get("_class_name", "DDPMScheduler")
    pipeline = "ScoreSdeVePipeline" if name == "ScoreSdeVeScheduler" else "DDPMPipeline"
    index = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", name]}
    with writing(path):
        text = json.dumps({"_class_name": name, **scheduler}, indent=2) + "\n"
        write_text(path / "scheduler" / "scheduler_config.json", text)
        if config.diffusers_can_run:
            write_text(path / "model_index.json", json.dumps(index, indent=2) + "\n")


def save_tensors(
    config: UNetConfig | UNetConditionConfig,
    state: Mapping[str, Tensor],
    path: str | Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a configuration and a state dict as `save_unet` does, without building the network."""
    path = Path(path)
    name = "UNet2DConditionModel"
    if isinstance(config, UNetConfig):
        name = "UNet2DModel" if config.diffusers_can_run else "fastdiff.UNet"
    with writing(path):
        with atomic_file(path / WEIGHTS) as file:
            write_safetensors(file, state, {"format": "pt"})
        # diffusers ignores keys that begin with an underscore.
        names = {} if class_names is None else {NAMES_KEY: list(class_names)}
        text = json.dumps({"_class_name": name, **config.to_dict(), **names}, indent=2) + "\n"
        write_text(path / "config.json", text)


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as the safetensors library does, byte for byte, but one tensor at a time into an open file."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    order = {kind: i for i, kind in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (-order[kinds[tensors[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if tensors[name].numel():
            values = tensors[name].detach().cpu().contiguous()
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # an array is a buffer


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous and without shared storage, as torch.save needs them."""
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        result[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return result


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn failed writes, and torch.save's RuntimeError for one, into a `CheckpointError` that names the file."""
    try:
        yield
    except WriteError as e:
        raise CheckpointError(f"the model was not saved: {e}") from e
    except RuntimeError as e:
        raise CheckpointError(f"{path} could not be written ({e}); what was there is unchanged") from e
