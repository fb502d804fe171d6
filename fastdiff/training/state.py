"""Training checkpoints: one safetensors file, written atomically, that resumes a run bit for bit.

Tensors: ``model.*`` and ``ema.*`` (diffusers keys), ``optimizer.<moment>.*``. Metadata: JSON under "fastdiff": the step,
the configurations, what the data was. There is no random state to save: every draw is a function of (seed, step).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoint import METADATA_KEY, read_safetensors
from fastdiff.errors import CheckpointError, TrainingError
from fastdiff.files import atomic_path

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, info: dict[str, Any]) -> None:
    """Write a checkpoint; `TrainingError` (and the previous file intact) when the weights are not finite or the disk is full."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", model), ("ema", ema)):
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor.detach().contiguous()
    for name, parameter in model.named_parameters():
        for moment, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = tensor.detach().contiguous()
    _check_finite(path, tensors.items())
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(info)})
    except (OSError, SafetensorError) as e:
        full = getattr(e, "errno", None) == errno.ENOSPC or "No space" in str(e)
        advice = "the disk is full; free some space and start again to resume" if full else "start again to resume"
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({e}); the one before it is intact; {advice}"
        ) from e


def _check_finite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} has NaN or infinite values; {path} keeps the last good checkpoint. Try a lower lr"
            )


def load(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save` wrote, in place, and return its info. Nothing is changed unless every tensor fits."""
    tensors, metadata = read_safetensors(path)
    info: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
    if info.get("kind") != "training":
        raise CheckpointError(f"{path} is not a training checkpoint of fastdiff, so training cannot resume from it")
    parameters = dict(model.named_parameters())
    expected = {
        f"{prefix}.{k}": v.shape for prefix, m in (("model", model), ("ema", ema)) for k, v in m.state_dict().items()
    }
    for name, parameter in parameters.items():
        expected |= {f"optimizer.{m}.{name}": torch.Size() if m == "step" else parameter.shape for m in MOMENTS}
    bad = sorted(k for k in expected.keys() | tensors.keys() if k not in tensors or tensors[k].shape != expected.get(k))
    if bad:
        raise CheckpointError(f"{path} belongs to another network: {len(bad)} tensors differ: {', '.join(bad[:10])}")
    for prefix, module in (("model", model), ("ema", ema)):
        module.load_state_dict(
            {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        )
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            m: tensors[f"optimizer.{m}.{name}"].to(parameter.device if m != "step" else "cpu") for m in MOMENTS
        }
    return info
