"""Training checkpoints: one safetensors file, written atomically, that resumes a run bit for bit.

The tensors are ``model.*``, ``ema.*`` (with diffusers' keys) and ``optimizer.<moment>.*``. The metadata has JSON under
"fastdiff": the step, the configurations, the number, size and channels of the images, and the losses since the last
line of the log. There is no random state to save, as every draw is a function of the seed and the step.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.loading import METADATA_KEY
from fastdiff.checkpoints.reading import json_object, read_safetensors
from fastdiff.checkpoints.saving import write_safetensors
from fastdiff.errors import CheckpointError, TrainingError, WriteError
from fastdiff.files import LEFTOVER, atomic_file

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write of ``path`` into a `TrainingError`; as files are replaced whole, the old one is intact."""
    try:
        yield
    except OSError as e:
        advice = "Free some space and start" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "Start"
        what = e if isinstance(e, WriteError) else f"{path} could not be written ({e}); what was there is unchanged"
        raise TrainingError(f"{what}. {advice} again to resume") from e


def save(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, info: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises `TrainingError`, and leaves the old file as it is, if a tensor is not finite or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", model), ("ema", ema)):
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor.detach().contiguous()
    for name, parameter in model.named_parameters():
        for moment, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = tensor.detach().contiguous()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} has NaN or infinite values; {path} stays as it was: the last good checkpoint. Try a lower lr "
                "or grad_clip, in another folder"
            )
    with writing(path), atomic_file(path) as file:
        write_safetensors(file, tensors, {METADATA_KEY: json.dumps(info)})


def sweep(out: Path) -> None:
    """Remove the half-written files that a killed run left in its folder."""
    for folder in (out, out / "samples", out / "model", out / "model" / "unet", out / "model" / "scheduler"):
        for leftover in folder.glob(LEFTOVER):
            with writing(leftover):
                leftover.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the info that `save` wrote; a file that is none of its kind raises `CheckpointError`."""
    tensors, metadata = read_safetensors(path)
    info = json_object(f"{path}: its fastdiff metadata", metadata.get(METADATA_KEY, "{}"))
    if info.get("kind") != "training":
        raise CheckpointError(f"{path} is not a training checkpoint of fastdiff, so training cannot resume from it")
    missing = {"step", "train", "unet", "scheduler", "data", "world_size"} - info.keys()
    if missing:
        raise CheckpointError(f"{path}: its metadata lacks {', '.join(sorted(missing))}")
    return tensors, info


def restore(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Copy a checkpoint's tensors into place; nothing is changed unless all of them fit."""
    parameters = dict(model.named_parameters())
    expected = {
        f"{prefix}.{k}": v.shape for prefix, m in (("model", model), ("ema", ema)) for k, v in m.state_dict().items()
    }
    started = any(name.startswith("optimizer.") for name in tensors)  # without an update yet there are no moments
    for name, parameter in parameters.items() if started else ():
        expected |= {f"optimizer.{m}.{name}": torch.Size() if m == "step" else parameter.shape for m in MOMENTS}
    bad = sorted(k for k in expected.keys() | tensors.keys() if k not in tensors or tensors[k].shape != expected.get(k))
    if bad:
        raise CheckpointError(f"{path} belongs to another network: {len(bad)} tensors differ: {', '.join(bad[:10])}")
    for prefix, module in (("model", model), ("ema", ema)):
        module.load_state_dict(
            {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        )
    for name, parameter in parameters.items() if started else ():
        # Fused AdamW pairs elements by their place in memory, not by strides, so the moments need their parameter's
        # layout.
        moments = {m: torch.empty_like(parameter, requires_grad=False) for m in MOMENTS if m != "step"}
        moments["step"] = torch.empty((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {m: t.copy_(tensors[f"optimizer.{m}.{name}"]) for m, t in moments.items()}
