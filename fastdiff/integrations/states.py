"""Samples of a scheduler as states of a table, and timesteps that callers give, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument
from fastdiff.solvers import StepTable


def flat(x: Tensor) -> Tensor:
    """Return a sample of any number of dimensions as [B, C, 1, N]; one of four stays as it is."""
    if x.ndim in (0, 4):
        return x
    return x.reshape(len(x), x.shape[1] if x.ndim > 1 else 1, 1, -1)


def x0_ratio(table: StepTable, row: int) -> float:
    """Return kx / ko of a row; 0 for a finished image."""
    return table.rows[row].kx / table.rows[row].ko if row < len(table) else 0.0


def to_state(table: StepTable, row: int) -> float:
    """Return the factor from sigma space to the row's state, sqrt(abar) / sigma_data; 1 for a finished image."""
    return math.sqrt(table.rows[row].abar) / table.data_scale if row < len(table) else 1.0


def from_state(table: StepTable, row: int) -> float:
    """Return the factor from the state after a row to sigma space; the last row ends in the data's units itself."""
    return 1.0 / to_state(table, row + 1) if row < len(table) else 1.0


def listed(timestep: Any, B: int) -> list[float]:
    """List a timestep for each of B images, from a number or a tensor of one or of B."""
    values = timestep.detach().flatten().tolist() if isinstance(timestep, Tensor) else np.ravel(timestep).tolist()
    if len(values) not in (1, B) or any(isinstance(v, (bool, str)) or v is None for v in values):
        raise InvalidArgument(f"timestep={shown(timestep)}: a number, or one for each of {B} images, is needed")
    return [float(v) for v in values] * (B if len(values) == 1 else 1)


def same(a: float, b: float) -> bool:
    """Return whether two timesteps are equal up to rounding: callers have them in float32, tables in float64."""
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))


def indices_of(t: float, times: Sequence[float]) -> list[int]:
    """Return the indices of a timestep: of those equal in float32, else of those equal up to rounding."""
    near = [i for i, other in enumerate(times) if same(t, other)]
    return [i for i in near if np.float32(times[i]) == np.float32(t)] or near
