"""fastdiff: samples from diffusion U-Nets, as fast as the hardware allows.

Names are resolved on first use (PEP 562), so that ``import fastdiff`` and ``fastdiff --help`` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "NoiseSchedule": "fastdiff.schedule",
    "solvers": "fastdiff.solvers",
    "StepTable": "fastdiff.solvers",
    "UNet": "fastdiff.unet",
    "UNetConfig": "fastdiff.unet",
    "UNetCondition": "fastdiff.unet",
    "UNetConditionConfig": "fastdiff.unet",
    "Sampler": "fastdiff.sampler",
    "SampleOutput": "fastdiff.sampler",
    "Scheduler": "fastdiff.integrations",
    "accelerate": "fastdiff.integrations",
    "Trainer": "fastdiff.training",
    "TrainConfig": "fastdiff.training",
    "bulk": "fastdiff.bulk",
    "Engine": "fastdiff.serving",
    "FastdiffError": "fastdiff.errors",
}
# Further names of modules, kept for code written for an earlier layout of the package.
_MODULES = {"checkpoint": "fastdiff.checkpoints", "images": "fastdiff.data.pictures", "unet_config": "fastdiff.unet"}

if TYPE_CHECKING:
    from fastdiff import bulk as bulk
    from fastdiff import solvers as solvers
    from fastdiff.errors import FastdiffError as FastdiffError
    from fastdiff.integrations import Scheduler as Scheduler
    from fastdiff.integrations import accelerate as accelerate
    from fastdiff.sampler import SampleOutput as SampleOutput
    from fastdiff.sampler import Sampler as Sampler
    from fastdiff.schedule import NoiseSchedule as NoiseSchedule
    from fastdiff.serving import Engine as Engine
    from fastdiff.solvers import StepTable as StepTable
    from fastdiff.training import TrainConfig as TrainConfig
    from fastdiff.training import Trainer as Trainer
    from fastdiff.unet import UNet as UNet
    from fastdiff.unet import UNetCondition as UNetCondition
    from fastdiff.unet import UNetConditionConfig as UNetConditionConfig
    from fastdiff.unet import UNetConfig as UNetConfig

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _EXPORTS:
        module = importlib.import_module(_EXPORTS[name])
        value = module if _EXPORTS[name] == f"fastdiff.{name}" else getattr(module, name)
    else:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
