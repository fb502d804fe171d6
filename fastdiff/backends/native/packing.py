"""Weights in the native engine's layout: merged, transformed for Winograd, padded, and arranged in panels."""

from __future__ import annotations

import math
import threading
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.backends.network import checksum, merged_layer
from fastdiff.core.program import Conv
from fastdiff.unet import UNet

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
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack(
    weight: Tensor, channels: tuple[int, ...], method: str, group: int, panel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pack the weights [N, C, k, k] of a convolution as [panels, positions, depth, panel].

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
        U = U.unflatten(2, (-1, 2)).transpose(3, 4).to(dtype)
    return U.contiguous()


class Weights:
    """Packed weights of a network; each packing is made once and shared by all batch sizes.

    ``made_from`` is the checksum of the network's weights, by which `of` notices changes.
    """

    def __init__(self, unet: UNet, native: ModuleType, made_from: tuple[int, ...]):
        self.native = native
        self.state = {k: v.detach() for k, v in unet.state_dict().items()}
        self.packed: dict[tuple[Any, ...], Tensor] = {}
        self.made_from = made_from

    @classmethod
    def shapes(cls, unet: UNet, native: ModuleType) -> Weights:
        """Return weights on "meta", from which the size of every packing is known before anything is packed."""
        weights = cls(unet, native, ())
        weights.state = {k: v.to("meta") for k, v in weights.state.items()}
        return weights

    @classmethod
    def of(cls, unet: UNet, native: ModuleType) -> Weights:
        """Return the shared weights of a network, new ones if they have changed since the last call."""
        with _weights_lock:
            known, now = _weights.get(unet), checksum(unet)
            if known is None or known.made_from != now:
                known = _weights[unet] = cls(unet, native, now)
            return known

    def conv(self, op: Conv, channels: tuple[int, ...], method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a convolution's packed weights in ``dtype`` (see `pack`) and its bias, padded float32."""

        def kernel() -> Tensor:
            return pack(merged_layer(op, self.state)[0], channels, method, self.native.GROUP, self.native.PANEL, dtype)

        bias = self._once((op.weights, "bias"), lambda: self._padded(merged_layer(op, self.state)[1]))
        return self._once((op.weights, channels, method, dtype), kernel), bias

    def _padded(self, v: Tensor) -> Tensor:
        return F.pad(v.float(), (0, -len(v) % self.native.GROUP)).contiguous()

    def vector(self, name: str) -> Tensor:
        return self._once((name,), lambda: self._padded(self.state[name]))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.packed.values())

    def _once(self, key: tuple[Any, ...], make: Any) -> Tensor:
        if key not in self.packed:
            self.packed[key] = make()
        return self.packed[key]


_weights: weakref.WeakKeyDictionary[UNet, Weights] = weakref.WeakKeyDictionary()
_weights_lock = threading.Lock()
