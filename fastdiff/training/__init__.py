"""Training: data, loss, checkpoints and the loop."""

from fastdiff.data.datasets import ArrayData, FolderData, ImageData, load_data
from fastdiff.training.config import TrainConfig
from fastdiff.training.trainer import Trainer

__all__ = ["ArrayData", "FolderData", "ImageData", "TrainConfig", "Trainer", "load_data"]
