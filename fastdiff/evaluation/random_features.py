"""Features of a convolutional network with fixed random weights, for images of any size, gray or colour.

No file and no training is needed, so that they fit any data: Naeem et al. 2020 (arXiv:2002.09797, section 4.2) found
that random embeddings tell image distributions apart where trained ones fit the data badly. They see textures, colours,
contrast and sharpness. They know nothing of objects: distances by them are comparable for one data set only.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.core import noise
from fastdiff.modes import plain_modes

NAME = "random"
SEED = 0x66617374  # of the weights, which are the same on every machine
WIDTHS = (3, 16, 32, 32, 32)  # channels of the images and of each layer; each layer after the first halves the size


class RandomFeatures(nn.Module):
    """The network: F = 224 features, the mean and the standard deviation of every channel of every layer.

    h <- relu(W h), W ~ N(0, 2 / fan-in), as Philox draws it
    """

    @plain_modes()
    def __init__(self) -> None:
        super().__init__()
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
            index = torch.tensor([layer], dtype=torch.int64, device="cpu")
            z = noise.normal(
                torch.full_like(index, SEED), index, torch.zeros_like(index), noise.INITIAL, (outputs, inputs, 9)
            )
            self.register_buffer(f"weight_{layer}", z[0].view(outputs, inputs, 3, 3) * math.sqrt(2.0 / (9 * inputs)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features [N, 224] of images [N, 1 or 3, H, W] in [-1, 1]."""
        h, found = images.expand(-1, 3, -1, -1), []
        for layer in range(len(WIDTHS) - 1):
            h = F.relu(F.conv2d(h, getattr(self, f"weight_{layer}"), stride=1 if layer == 0 else 2, padding=1))
            found += [h.mean(dim=(2, 3)), h.var(dim=(2, 3), unbiased=False).sqrt()]
        return torch.cat(found, dim=1)
