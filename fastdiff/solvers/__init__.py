"""Solvers: functions from a `NoiseSchedule` to a `StepTable`."""

from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.spacing import SPACINGS, timesteps
from fastdiff.solvers.table import COLUMNS, Row, StepTable

__all__ = ["COLUMNS", "SPACINGS", "Row", "StepTable", "ddim", "ddpm", "timesteps"]
