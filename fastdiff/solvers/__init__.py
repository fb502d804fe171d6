"""Solvers: functions from a `NoiseSchedule` (or an `EDMSchedule`) to a `StepTable`."""

from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.compat.diffusers import from_config
from fastdiff.solvers.consistency import consistency, lcm
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpmpp import dpmpp_1, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.euler import euler, euler_ancestral
from fastdiff.solvers.heun import heun
from fastdiff.solvers.paths import ddim_inversion, repaint, starting_at
from fastdiff.solvers.plms import plms
from fastdiff.solvers.spacing import SIGMA_SPACINGS, SPACINGS, sigma_timesteps, timesteps
from fastdiff.solvers.table import COLUMNS, Row, StepTable
from fastdiff.solvers.unipc import unipc

__all__ = [
    "COLUMNS",
    "SIGMA_SPACINGS",
    "SPACINGS",
    "EDMSchedule",
    "Row",
    "StepTable",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "euler",
    "euler_ancestral",
    "from_config",
    "heun",
    "lcm",
    "lms",
    "plms",
    "repaint",
    "sigma_timesteps",
    "starting_at",
    "timesteps",
    "unipc",
]
