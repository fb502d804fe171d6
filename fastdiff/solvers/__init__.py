"""Solvers: functions from a `NoiseSchedule` (an `EDMSchedule`, `FlowSchedule`, `VESchedule`) to a `StepTable`."""

from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.compat.diffusers import from_config
from fastdiff.solvers.consistency import consistency, lcm, tcd
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.dpm2 import dpm2, dpm2_ancestral
from fastdiff.solvers.dpmpp import dpmpp_1, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from fastdiff.solvers.dpmpp_stages import dpmpp_2s_ancestral, dpmpp_sde
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.euler import euler, euler_ancestral
from fastdiff.solvers.flow import FlowSchedule
from fastdiff.solvers.heun import heun
from fastdiff.solvers.paths import ddim_inversion, dpmpp_inversion, repaint, starting_at
from fastdiff.solvers.plms import plms
from fastdiff.solvers.singlestep import dpmpp_2s, dpmpp_3s
from fastdiff.solvers.spacing import SIGMA_SPACINGS, SPACINGS, sigma_timesteps, timesteps
from fastdiff.solvers.table import COLUMNS, Row, StepTable
from fastdiff.solvers.unipc import unipc
from fastdiff.solvers.ve import VESchedule

__all__ = [
    "COLUMNS",
    "SIGMA_SPACINGS",
    "SPACINGS",
    "EDMSchedule",
    "FlowSchedule",
    "Row",
    "StepTable",
    "VESchedule",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_3s",
    "dpmpp_inversion",
    "dpmpp_sde",
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
    "tcd",
    "timesteps",
    "unipc",
]
