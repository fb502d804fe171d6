"""The terms of the comparison: what every contender is given, and what it has to provide.

A contender is a way to run a U-Net: one of fastdiff's backends (`engines`) or another library (`peers`). It is timed by
its steps. A step is one network evaluation for every image (two if the image is guided, in one batch) and DDIM's
update of all images. Work that a contender does only once belongs in its construction or its first call.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.bench.networks import Model
from fastdiff.core.lower import TOKENS
from fastdiff.core.state import Texts
from fastdiff.errors import BackendError, ConfigError, InvalidArgument
from fastdiff.sampler.options import NetworkInfo
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, ddim
from fastdiff.unet import UNetCondition, UNetConditionConfig

ROWS = 50


@dataclasses.dataclass(frozen=True)
class Workload:
    """The inputs of a batch, equal for all contenders."""

    x: Tensor  # the noisy images, float32 [B, C, H, W]
    label: Tensor | None  # their classes, or the numbers of their texts, int64 [B]; None for a network without either
    table: StepTable
    guidance: float | None = None  # the weight w of classifier-free guidance, out = u + w (c - u); None: unguided steps
    null_label: int | None = None  # the label of the unconditional evaluation u, if the steps are guided
    texts: Texts | None = None  # of a network that reads text: another one for each image, and the null text

    @classmethod
    def of(cls, model: Model, batch: int, device: str = "cpu", guidance: float | None = None) -> Workload:
        """Build the workload of a model: standard normal x, the classes in turn, the second half of a DDIM run.

        The states of texts are standard normal too.
        """
        reads = isinstance(model.unet, UNetCondition)
        info = NetworkInfo.of(model.unet, None, text=reads)
        if info.sized:
            raise ConfigError("addition_embed_type='text_time': no texts are made for a network that takes sizes")
        if guidance is not None and info.null_label is None and not reads:
            raise InvalidArgument(
                f"guidance {guidance:g} needs a network trained with label dropout (config null_label); leave it out"
            )
        size = info.size or (info.stride,) * 2
        generator = torch.Generator("cpu").manual_seed(batch)
        x = torch.randn(batch, info.channels, *size, generator=generator, dtype=torch.float32, device="cpu").to(device)
        label = None if info.classes is None else torch.arange(batch, dtype=torch.int64, device=device) % info.classes
        texts, null = None, info.null_label
        if isinstance(model.unet, UNetCondition):
            texts, null = _texts(model.unet.config, batch + 1, generator).to(torch.device(device)), batch
            label = torch.arange(batch, dtype=torch.int64, device=device)
        if isinstance(model.schedule, NoiseSchedule):
            T = model.schedule.timesteps
            rows = min(ROWS, T // 2)
            spacing: Any = [float(T * (rows - i) // (2 * rows)) for i in range(rows)]
            table = ddim(model.schedule, spacing=spacing, prediction=model.prediction)
        elif model.schedule is None:
            raise ConfigError(f"{model.path}: it has no scheduler configuration, so its noise levels are unknown")
        else:
            table = ddim(model.schedule, ROWS, prediction=model.prediction)
        return cls(x, label, table, guidance, None if guidance is None else null, texts)

    def network_rows(self, x: Tensor) -> Tensor:
        """Return the network's batch for x [B, ...]: x itself, or [2B, ...] (first for c, then for u) with guidance."""
        return x if self.guidance is None else torch.cat([x, x])

    @property
    def network_labels(self) -> Tensor | None:
        """The labels of the network's batch: with guidance, the classes and then as many null labels."""
        if self.guidance is None or self.label is None:
            return self.label
        return torch.cat([self.label, torch.full_like(self.label, self.null_label or 0)])

    def inputs(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Return what a network's module is given by name, besides x and t, for these labels."""
        if labels is None:
            return {}
        if self.texts is None:
            return {"class_labels": labels}
        found = {"encoder_hidden_states": self.texts.states[labels]}
        return found if self.texts.pooled is None else {**found, "class_labels": self.texts.pooled[labels]}


def _texts(config: UNetConditionConfig, number: int, generator: torch.Generator) -> Texts:
    """Return random texts of CLIP's length for a network."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    channels = config.encoder_hid_dim or config.cross_attention_dim
    width = channels if isinstance(channels, int) else next(c for c in channels if c is not None)  # at levels that read
    pooled = config.projection_class_embeddings_input_dim
    vectors = None if config.class_embed_type is None or pooled is None else normal(number, pooled)
    return Texts(normal(number, TOKENS, width), vectors)


class Stepper(Protocol):
    """A contender that is ready to run a workload."""

    def forward(self) -> Tensor:
        """Return the network's output [B, C or 2C, H, W] at the first row of the table."""

    def step(self) -> Tensor:
        """Advance by one row of the table and return x; after the last row, start again from the first."""


Make = Callable[[Model, Workload], Stepper]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to run a network."""

    dtype: str  # the type in which it computes, "float32" or "bfloat16"
    make: Make
    needs: tuple[str, ...] = ()  # modules that it imports besides torch
    own: bool = False  # whether it is one of fastdiff's backends, whose speeds a comparison judges
    slow_start: bool = False  # whether it compiles for tens of seconds, so that --quick leaves it out
    where: tuple[str, ...] = ("cpu",)  # kinds of device on which it runs


def import_all(names: tuple[str, ...]) -> None:
    """Import modules by name; a `BackendError` names the first that cannot be imported, and the reason."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # a package made for another version of torch or processor may raise anything
            reason = str(e).strip().splitlines()
            raise BackendError(f"{name} cannot be imported ({reason[0] if reason else type(e).__name__})") from e
