"""The U-Net: the module that defines what the network computes, and its configuration."""

from fastdiff.unet.config import UNetConfig
from fastdiff.unet.model import UNet

__all__ = ["UNet", "UNetConfig"]
