"""The packing of weights by plain tensor operations, in float64, as the engine's has to be."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Points of the Winograd transforms (csrc/kernels/winograd.hpp); infinity is the last one of each.
POINTS = {"winograd2": (0.0, 1.0, -1.0), "winograd4": (0.0, 0.75, -0.75, 1.5, -1.5)}


def winograd_g(points: tuple[float, ...]) -> Tensor:
    """Compute the weight transform G of Winograd's algorithm, float64 [len(points) + 1, 3].

    Row j is [1, p_j, p_j^2] / prod_k (p_j - p_k) over the other points p_k; the last row, of infinity, is [0, 0, 1].
    """
    rows = []
    for p in points:
        n = math.prod(p - other for other in points if other != p)
        rows.append([1 / n, p / n, p * p / n])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


def pack(
    weight: Tensor,
    channels: tuple[int, ...],
    method: str,
    group: int,
    panel: int,
    together: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pack the weights [N, C, k, k] of a convolution as [panels, positions, panel / together, depth, together].

    In bfloat16 it is [panels, positions, depth / 2, panel, 2]. The channels of each source are padded with zeros to a
    multiple of ``group``, the number that the engine reads at a time, and N to whole panels of ``panel`` output
    channels. The depth is the number of padded channels, k^2 times that where the method is "direct".
    """
    N, _, k, _ = weight.shape
    parts = weight.split(channels, dim=1)
    W = torch.cat([F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % group)) for part in parts], dim=1)
    if method == "direct":
        U = W.permute(2, 3, 1, 0).reshape(1, k * k * W.shape[1], N)
    else:
        G = winograd_g(POINTS[method]).to(weight.device)
        U = torch.einsum("ia,ncab,jb->ijcn", G, W.double(), G).flatten(0, 1)
    U = F.pad(U, (0, -N % panel))
    U = U.unflatten(2, (-1, panel)).permute(2, 0, 1, 3).float()
    if dtype == torch.bfloat16:
        return U.unflatten(2, (-1, 2)).transpose(3, 4).to(dtype).contiguous()
    U = U.unflatten(3, (-1, together)).transpose(2, 3)
    return U.contiguous()
