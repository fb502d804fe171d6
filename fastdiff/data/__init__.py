"""Image data: data sets from files and folders, and pictures from tensors.

`load_data` opens a folder of images, an ``.npz`` file or an IDX (MNIST) file as a data set of uint8 images. The other
functions turn tensors of images in [-1, 1] into PIL images, grids, picture files and animations.
"""

from fastdiff.data.base import ImageData
from fastdiff.data.datasets import load_data
from fastdiff.data.folder import FolderData
from fastdiff.data.in_memory import ArrayData
from fastdiff.data.pairs import ConditionedData
from fastdiff.data.pictures import animate, grid, save_picture, to_pil, to_uint8

__all__ = [
    "ArrayData", "ConditionedData", "FolderData", "ImageData", "animate", "grid", "load_data", "save_picture", "to_pil",
    "to_uint8",
]  # fmt: skip
