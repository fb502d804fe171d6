"""Training of U-Nets on images: `Trainer`, its settings `TrainConfig`, and the data sets of `fastdiff.data`."""

from fastdiff.data import ArrayData, ConditionedData, FolderData, ImageData, load_data
from fastdiff.training.config import TrainConfig
from fastdiff.training.trainer import Trainer

__all__ = ["ArrayData", "ConditionedData", "FolderData", "ImageData", "TrainConfig", "Trainer", "load_data"]
