"""Sampling in latents: sizes and images of a call are those of pixels, the loop's are those of latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.native import NativeCoder
from fastdiff.checks import is_whole, shown
from fastdiff.core.turns import Lock
from fastdiff.errors import InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.sampler.options import NetworkInfo, Options
from fastdiff.unet.latents import LatentDecoder

PICTURES = ("image", "mask", "condition")  # options that would have to be encoded


class Latents:
    """The decoder of a sampler's latents. It may be called from several threads, which take turns."""

    def __init__(self, autoencoder: LatentDecoder, backend: str, device: torch.device):
        self.autoencoder = autoencoder.to(device)
        self.device = device
        self.lock = Lock()
        self.native = NativeCoder(autoencoder.decoder) if backend == "native" else None

    def options(self, o: Options, info: NetworkInfo) -> Options:
        """Return a call's options with the size of its latents; `InvalidArgument` says what latents do not allow."""
        for name in PICTURES:
            if getattr(o, name) is not None:
                raise InvalidArgument(
                    f"{name}= is of pixels, and a Sampler does not encode them to latents; "
                    "fastdiff.accelerate(StableDiffusionImg2ImgPipeline) or its inpainting pipeline starts from images"
                )
        if o.size is None:
            return o
        pair: Any = o.size if isinstance(o.size, (tuple, list)) else (o.size, o.size)
        multiple = self.autoencoder.factor * info.stride
        if len(pair) != 2 or not all(is_whole(v) and v >= 1 and v % multiple == 0 for v in pair):
            raise InvalidArgument(
                f"size={shown(o.size)}: height and width in pixels, multiples of {multiple}, are needed: latents are "
                f"{self.autoencoder.factor} times as small, and the network halves those "
                f"{info.stride.bit_length() - 1} times"
            )
        height, width = (int(v) // self.autoencoder.factor for v in pair)
        return dataclasses.replace(o, size=(height, width))

    @plain_modes()
    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents [n, C, h, w]: float32 on the CPU, in [-1, 1], decoded one by one."""
        C = self.autoencoder.config.latent_channels
        if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != C or 0 in z.shape or not z.is_floating_point():
            what = f"{list(z.shape)} in {z.dtype}" if isinstance(z, Tensor) else type(z).__name__
            raise InvalidArgument(f"latents are {what}; floats [n, {C}, height, width] are needed")
        factor, channels = self.autoencoder.factor, self.autoencoder.config.out_channels
        n, _, h, w = z.shape
        images = torch.empty(n, channels, h * factor, w * factor, dtype=torch.float32, device="cpu")
        with self.lock.held:
            for i in range(n):  # so that the memory does not grow with their number
                given = z[i : i + 1].detach().to(self.device, torch.float32)
                if self.native is not None:
                    images[i] = self.native(self.autoencoder.prepared(given))[0]
                else:
                    images[i] = self.autoencoder(given)[0].cpu()
        return images.clamp_(-1.0, 1.0)
