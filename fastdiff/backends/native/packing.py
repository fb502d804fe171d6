"""Weights as the native engine reads them: transformed for Winograd, merged, padded, and laid out in panels."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.core.program import Conv
from fastdiff.unet import UNet

# Points of the Winograd transforms (csrc/kernels/winograd.hpp); infinity is the last one of each.
POINTS = {"winograd2": (0.0, 1.0, -1.0), "winograd4": (0.0, 0.75, -0.75, 1.5, -1.5)}


def winograd_g(points: tuple[float, ...]) -> Tensor:
    """G [len(points) + 1, 3] in float64: row j is [1, p_j, p_j^2] / prod_k (p_j - p_k), the last row [0, 0, 1]."""
    rows = []
    for p in points:
        n = math.prod(p - other for other in points if other != p)
        rows.append([1 / n, p / n, p * p / n])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack(
    weight: Tensor, channels: tuple[int, ...], method: str, group: int, panel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[N, C, k, k] -> [panels, positions, depth, panel], zeros where channels are padded; bfloat16 is [.., depth / 2,
    panel, 2].

    channels: of each source; every one is padded to a multiple of ``group``. depth: padded channels, under every tap
    where ``method`` is "direct".
    """
    N, _, k, _ = weight.shape
    parts = []
    for part in weight.split(channels, dim=1):
        parts.append(F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % group)))
    W = torch.cat(parts, dim=1)
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


def fingerprint(unet: UNet) -> tuple[int, ...]:
    """Of every weight's bits: fused optimizers and edits of ``.data`` leave no other trace of a change."""
    sums = []
    for p in unet.parameters():
        own = {8: torch.int64, 4: torch.int32, 2: torch.int16}[p.element_size()]
        bits = p.detach().contiguous().flatten().view(torch.int64 if p.nbytes % 8 == 0 else own)
        # The second sum hears the order: each number counts with its neighbour.
        sums += [int(bits.sum()), int((bits[1:] ^ (bits[:-1] << 1)).sum())]
    return tuple(sums)


def layer(op: Conv, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W [N, C, k, k] and b [N] in float64, stacked or merged as the operation says, of a network's state dict."""
    W, b = ([state[f"{key}.{kind}"].double() for key in op.weights] for kind in ("weight", "bias"))
    if op.merged == "first transposed":
        return (W[0].T @ W[1])[:, :, None, None], W[0].T @ b[1]
    if op.merged == "in turn":
        return (W[0] @ W[1])[:, :, None, None], W[0] @ b[1] + b[0]
    return torch.cat(W).reshape(-1, W[0].shape[1], op.kernel, op.kernel), torch.cat(b)


class Weights:
    """A network's weights as the engine reads them, each packing made once and shared by all batch sizes."""

    def __init__(self, unet: UNet, native: ModuleType, fingerprint: tuple[int, ...]):
        self.native = native
        self.state = {k: v.detach() for k, v in unet.state_dict().items()}
        self.packed: dict[tuple[Any, ...], Tensor] = {}
        self.fingerprint = fingerprint

    @classmethod
    def shapes(cls, unet: UNet, native: ModuleType) -> Weights:
        """The same without numbers (on "meta"): what they would take, before anything is packed."""
        weights = cls(unet, native, ())
        weights.state = {k: v.to("meta") for k, v in weights.state.items()}
        return weights

    @classmethod
    def of(cls, unet: UNet, native: ModuleType) -> Weights:
        """The network's, as they are now."""
        with _weights_lock:
            known, now = _weights.get(unet), fingerprint(unet)
            if known is None or known.fingerprint != now:
                known = _weights[unet] = cls(unet, native, now)
            return known

    def conv(self, op: Conv, channels: tuple[int, ...], method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Kernel, in ``dtype``, and bias; channels: of each source."""

        def kernel() -> Tensor:
            return pack(layer(op, self.state)[0], channels, method, self.native.GROUP, self.native.PANEL, dtype)

        def bias() -> Tensor:
            return self._padded(layer(op, self.state)[1])

        return self._once((op.weights, channels, method, dtype), kernel), self._once((op.weights, "bias"), bias)

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
