"""The options of a call, and what a sampler must know of the network to check them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.checks import is_whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.sampler.editing import Guide
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.run import FROM_MODEL

STRENGTH = 0.8  # of img2img where the caller gives none, as in diffusers' pipelines

NoiseSource = Callable[[int | None, range], Tensor]


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """What a sampler must know of a network: read from a `UNetConfig` or a diffusers config, or given as a shape."""

    channels: int
    size: tuple[int, int] | None
    out_channels: int | None = None
    stride: int = 1
    width: int = 64
    classes: int | None = None
    null_label: int | None = None
    described: bool = False

    @classmethod
    def of(cls, unet: nn.Module, shape: tuple[int, int, int] | None) -> NetworkInfo:
        """Raises `InvalidArgument` where neither the network nor ``shape`` tells the input, `ConfigError` for class
        embeddings that are not fed by labels.
        """
        if shape is not None and not (
            isinstance(shape, tuple) and len(shape) == 3 and all(is_whole(v) and v >= 1 for v in shape)
        ):
            raise InvalidArgument(f"shape={shape!r}: (channels, height, width), each at least 1, is needed")
        config: Any = getattr(unet, "config", None)
        if getattr(config, "in_channels", None) is None:
            if shape is None:
                raise InvalidArgument(
                    "the network has no configuration that tells its input; give shape=(channels, height, width)"
                )
            return cls(channels=shape[0], size=shape[1:])
        if getattr(config, "class_embed_type", None) is not None:
            raise ConfigError(
                f"class_embed_type={config.class_embed_type!r} is not fed by labels, so a Sampler cannot run it"
            )
        size = config.sample_size
        if size is not None and not isinstance(size, (tuple, list)):
            size = (size, size)
        null = getattr(config, "null_label", None)
        embeds = config.num_class_embeds
        return cls(
            channels=config.in_channels if shape is None else shape[0],
            size=(None if size is None else tuple(size)) if shape is None else shape[1:],
            out_channels=config.out_channels,
            stride=1 << (len(config.block_out_channels) - 1),
            width=max(config.block_out_channels[0], 1),
            classes=None if embeds is None else embeds - (null is not None),
            null_label=null,
            described=True,
        )

    def activation_bytes(self, size: tuple[int, int]) -> int:
        """A rough size of one image's activations: a dozen float32 maps of the first block's width."""
        return 12 * 4 * self.width * size[0] * size[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `Sampler.sample`, which describes them."""

    solver: str | StepTable = "ddim"
    steps: int | None = None
    eta: float = 0.0
    variance: str | None = None
    order: int | None = None
    spacing: str | Sequence[float] | None = None
    clip: float | str | None = FROM_MODEL
    seed: int | None = 0
    start_index: int = 0
    labels: int | Sequence[int] | Tensor | None = None
    guidance: float | Sequence[float] = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    size: int | tuple[int, int] | None = None
    noise: Tensor | NoiseSource | None = None
    batch_size: int | None = None
    image: Tensor | None = None
    strength: float | None = None
    mask: Tensor | None = None
    repaint: tuple[int, int] | None = None
    guide: Guide | None = None
    guide_through: str = "x0"
    quality: float | None = None
    deadline_s: float | None = None
    compat: str | None = None

    @property
    def late(self) -> float | None:
        """How much of the run an image goes through; None: it starts at noise alone."""
        if self.strength is None and self.image is not None and self.mask is None:
            return STRENGTH
        return self.strength
