"""Weights in the native engine's layout: merged, transformed for Winograd, padded, and arranged in panels."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.backends.native import threads
from fastdiff.backends.native.arrays import aligned, array
from fastdiff.backends.network import checksums, merged_layer
from fastdiff.core.program import Conv

Built = TypeVar("Built")


def pack(
    native: ModuleType,
    weight: Tensor,
    channels: tuple[int, ...],
    method: str,
    dtype: torch.dtype = torch.float32,
    isa: str = "",
) -> Tensor:
    """Pack the weights [N, C, k, k] of a convolution as [panels, positions, panel / slice, depth, slice].

    In bfloat16 it is [panels, positions, panel / slice, depth / 2, slice, 2]. A slice has the output channels that the
    instruction set (``isa``; empty: the best available one) computes at a time (``native.slice``). The channels of each
    source are padded with zeros to a multiple of ``native.GROUP``, the number that the engine reads at a time, and N to
    whole panels of ``native.PANEL`` output channels. The depth is the number of padded channels, k^2 times that where
    the method is "direct". Weights on "meta" give a tensor of this shape on "meta".
    """
    N, _, k, _ = weight.shape
    depth = sum(-(-c // native.GROUP) * native.GROUP for c in channels)
    positions, taps = {"direct": (1, k * k), "winograd2": (16, 1), "winograd4": (36, 1)}[method]
    panels, depth, together = -(-N // native.PANEL), depth * taps, native.slice(isa, dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        shape = [panels, positions, native.PANEL // together, depth // 2, together, 2]
    else:
        shape = [panels, positions, native.PANEL // together, depth, together]
    if weight.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    packed = aligned(math.prod(shape) * dtype.itemsize, "packed weights").view(dtype).view(shape)
    native.pack(
        weight.float().contiguous().numpy(), list(channels), getattr(native.Method, method), array(packed),
        bf16=dtype == torch.bfloat16, threads=threads.number(), isa=isa,
    )  # fmt: skip
    return packed


def gated(layer: Tensor, half: int) -> Tensor:
    """Order the outputs [2 N, ...] of a gated layer as panels have them: ``half`` of the first N, then their gates.

    N is padded with zeros to a multiple of ``half``.
    """
    both = layer.unflatten(0, (2, -1))
    filled = both.new_zeros(2, -(-both.shape[1] // half) * half, *both.shape[2:])
    filled[:, : both.shape[1]] = both
    return filled.unflatten(1, (-1, half)).transpose(0, 1).flatten(0, 2)


def _state(unet: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in unet.state_dict().items()}


class Weights:
    """Packed weights of a network; each packing is made once and shared by all batch sizes and threads.

    ``made_from`` has the checksum of each of the network's weights, by which `of` notices changes.
    """

    def __init__(self, unet: nn.Module, native: ModuleType, made_from: dict[str, tuple[int, ...]]):
        self.native = native
        self.state = _state(unet)
        self.packed: dict[tuple[Any, ...], Tensor] = {}
        self.made_from = made_from
        self.lock = threading.RLock()

    @classmethod
    def shapes(cls, unet: nn.Module, native: ModuleType) -> Weights:
        """Return weights on "meta", from which the size of every packing is known before anything is packed."""
        weights = cls(unet, native, {})
        weights.state = {k: v.to("meta") for k, v in weights.state.items()}
        return weights

    @classmethod
    def of(cls, unet: nn.Module, native: ModuleType) -> Weights:
        """Return the shared weights of a network, new ones if they have changed since the last call.

        The new ones have the packings of layers that have not changed.
        """
        now = checksums(unet)
        with _weights_lock:
            known = _weights.get(unet)
        if known is not None and known.made_from == now:
            return known
        made = cls(unet, native, now)
        if known is not None:
            made._take(known)
        with _weights_lock:
            other = _weights.get(unet)
            if other is not None and other.made_from == now:  # another thread was first
                return other
            _weights[unet] = made
        return made

    def _take(self, former: Weights) -> None:
        """Take over the former packings of the layers and norms whose weights are the same now."""
        before, now = former.made_from, self.made_from
        with former.lock:  # as it may drop packings that it is making
            for key, packed in former.packed.items():
                layers = key[0]
                names = [layers] if isinstance(layers, str) else [
                    f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")
                ]  # fmt: skip
                if any(name in now for name in names) and all(before.get(name) == now.get(name) for name in names):
                    self.packed[key] = packed

    def unless_changed(self, unet: nn.Module, build: Callable[[], Built]) -> Built | None:
        """Return what ``build`` makes of packed weights; None if it packed some that are not those of ``made_from``.

        Those are dropped. Another thread, or a callback that exchanges the weights during a run, may have changed them.
        """
        with self.lock:
            self.state = _state(unet)
            before, settled = set(self.packed), False
            try:
                built = build()
                settled = self.packed.keys() == before or checksums(unet) == self.made_from
            finally:
                for key in () if settled else self.packed.keys() - before:
                    del self.packed[key]
            return built if settled else None

    def conv(
        self, op: Conv, channels: tuple[int, ...], method: str, dtype: torch.dtype, isa: str
    ) -> tuple[Tensor, Tensor]:
        """Return a convolution's packed weights in ``dtype`` (see `pack`) and its bias, padded float32."""

        def layer() -> tuple[Tensor, Tensor]:
            W, b = merged_layer(op, self.state, torch.float32)
            half = self.native.PANEL // 2
            return (gated(W, half), gated(b, half)) if op.geglu else (W, b)

        def kernel() -> Tensor:
            return pack(self.native, layer()[0], channels, method, dtype, isa)

        bias = self._once((op.weights, "bias"), lambda: self._padded(layer()[1]))
        return self._once((op.weights, channels, method, dtype, isa), kernel), bias

    def _padded(self, v: Tensor) -> Tensor:
        return F.pad(v.float(), (0, -len(v) % self.native.GROUP)).contiguous()

    def vector(self, name: str) -> Tensor:
        return self._once((name,), lambda: self._padded(self.state[name]))

    @property
    def nbytes(self) -> int:
        with self.lock:
            return sum(t.nbytes for t in self.packed.values())

    def _once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            if key not in self.packed:
                self.packed[key] = make()
            return self.packed[key]


_weights: weakref.WeakKeyDictionary[nn.Module, Weights] = weakref.WeakKeyDictionary()
_weights_lock = threading.Lock()


def _after_fork() -> None:
    """Replace locks that threads of the parent may hold: those threads do not exist in the child."""
    global _weights_lock
    _weights_lock = threading.Lock()
    for weights in list(_weights.values()):
        weights.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
