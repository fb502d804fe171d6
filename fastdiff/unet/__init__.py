"""The U-Net: its frozen configuration, and the `nn.Module` that defines what the network means."""

from fastdiff.unet.config import UNetConfig
from fastdiff.unet.model import UNet

__all__ = ["UNet", "UNetConfig"]
