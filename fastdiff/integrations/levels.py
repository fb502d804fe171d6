"""Noise levels as diffusers shows them: the betas of the training, the sigmas of a run, the variance of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument
from fastdiff.integrations.arguments import TWO_STAGES
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.sigmas import training_betas


def trained_betas(schedule: NoiseSchedule) -> Tensor:
    """Return the betas of the training, rescaled if they are, float32 [T], computed as diffusers does."""
    betas = training_betas(schedule)
    if not schedule.rescale_zero_terminal_snr:
        return betas
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    squares = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1.0 - torch.cat([squares[:1], squares[1:] / squares[:-1]])


def run_sigmas(config: Mapping[str, Any], table: StepTable) -> Tensor:
    """Return the noise levels of a run, and the one at which it ends, float32, as many as diffusers has."""
    name = config["_class_name"]
    rows = [row for row in table.rows if not row.stage] if name in TWO_STAGES else table.rows
    abar = [*(row.abar for row in rows), rows[-1].abar_next]
    if table.flow:
        levels = [table.signal_and_noise(a)[1] for a in abar]
        levels = [1.0 - s for s in levels] if config.get("invert_sigmas") else levels
    else:
        levels = [table.data_scale * math.sqrt((1.0 - a) / a) for a in abar]
    sigmas = torch.tensor(levels, dtype=torch.float64, device="cpu")
    if name in TWO_STAGES:  # both evaluations of a step have an entry, DPM2's of its last step too
        last = len(sigmas) if name.startswith("KDPM2") else -1
        sigmas = torch.cat([sigmas[:1], sigmas[1:last].repeat_interleave(2), sigmas[-1:]])
    if name == "CMStochasticIterativeScheduler":
        sigmas[-1] = config["sigma_min"]
    return sigmas.float()


def step_variance(abar: Tensor, abar_next: Tensor, kind: str | None) -> Tensor:
    """Return the variance of a step between two levels: DDIM's for None, else DDPM's of a ``variance_type``."""
    beta = 1 - abar / abar_next
    variance = (1 - abar_next) / (1 - abar) * beta
    if kind is None:
        return variance
    if kind in ("fixed_small", "fixed_large"):
        return beta if kind == "fixed_large" else variance.clamp(min=1e-20)
    raise InvalidArgument(f"_get_variance of variance_type={shown(kind)}: fixed_small and fixed_large are supported")
