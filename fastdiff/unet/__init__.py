"""The U-Nets: the modules that define what the networks compute, and their configurations."""

from fastdiff.unet.condition import UNetCondition
from fastdiff.unet.condition_config import UNetConditionConfig
from fastdiff.unet.config import UNetConfig
from fastdiff.unet.model import UNet

__all__ = ["UNet", "UNetCondition", "UNetConditionConfig", "UNetConfig"]
