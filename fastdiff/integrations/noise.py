"""The noise of diffusers' schedulers: in which steps they draw some, from which generator, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.diffusers import ETA

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw normals as diffusers' ``randn_tensor`` does, from one generator or from a list with one for each image.

    A CPU generator draws on the CPU, and the normals are moved, so that they are the same on every device.
    """
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise InvalidArgument(f"{len(generator)} generators for {shape[0]} images: one, or one for each, is needed")
        return torch.cat([randn((1, *shape[1:]), one, device, dtype) for one in generator])
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise InvalidArgument(
            f"generator is a {type(generator).__name__}; a torch.Generator, a list of them or None is needed"
        )
    where = device
    if generator is not None and generator.device.type != device.type:
        if generator.device.type != "cpu":
            raise InvalidArgument(
                f"a generator of {generator.device} cannot draw noise for {device}; use one of the CPU"
            )
        where = generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


def draws_noise(config: Mapping[str, Any], table: StepTable, row: int, eta: float | None = None) -> bool:
    """Return whether diffusers' scheduler draws noise in this row.

    Noise that is then multiplied by zero counts, as drawing it advances the generator.
    """
    name = config["_class_name"]
    if name == "DDPMScheduler":
        return table.rows[row].t > 0
    if name in ETA:
        eta = ETA[name] if eta is None else eta
        return eta > 0 and (name == "DDIMScheduler" or row < len(table) - 1)
    if name == "LCMScheduler":
        return row < len(table) - 1
    if name == "CMStochasticIterativeScheduler":
        return len(table) > 1
    if name == "FlowMatchEulerDiscreteScheduler":
        return bool(config.get("stochastic_sampling"))
    if name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        return str(config.get("algorithm_type")).startswith("sde")
    if name in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        return table.rows[row].s > 0.0
    return name == "EulerAncestralDiscreteScheduler"


def noise_dtype(name: str, model_output: Tensor, sample: Tensor) -> torch.dtype:
    """Return the dtype in which diffusers' scheduler draws its noise."""
    if name in ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        return torch.float32
    if name in ("LCMScheduler", "TCDScheduler"):
        return torch.promote_types(model_output.dtype, sample.dtype)
    return model_output.dtype
