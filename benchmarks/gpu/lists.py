"""The launches of a network's step, made on the meta device: neither memory nor a GPU is needed to look at them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .networks import CLASSES, tiny

# Network, images of a batch, and whether they are guided: what is compiled and tuned before it is measured. A guided
# batch has twice as many rows, of a network with classes.
JOBS = [
    *(("cifar10-32", n, False) for n in (1, 8, 64, 256)),
    *(("celebahq-256", n, False) for n in (1, 8)),
    *(("cifar10-32", n, True) for n in (1, 8, 64)),
]


def network(name: str, guided: bool) -> Any:
    """Return the configuration of a published network, with classes if it is to be guided; "": of a tiny one."""
    from fastdiff.bench.networks import PUBLISHED

    config = PUBLISHED[f"ddpm-{name}"] if name else tiny()
    return dataclasses.replace(config, **CLASSES) if guided else config


def step(config: Any, images: int, dtype: Any, guided: bool = False, device: Any = None) -> list[Any]:
    """Return the launches of a whole step of ``images`` images, in order, with the update as the last one.

    ``device`` has the `fastdiff.kernels.launch.Device` for which configurations are chosen; None: an H200 without a
    tuned file.
    """
    import torch

    from fastdiff import NoiseSchedule, UNet, UNetCondition, UNetConditionConfig, solvers
    from fastdiff.backends import Spec
    from fastdiff.backends.triton import TritonStep
    from fastdiff.core.lower import TOKENS, vector_width
    from fastdiff.core.state import State, TableBank, Texts

    meta, found = torch.device("meta"), []
    shape = (config.in_channels, config.sample_size, config.sample_size)
    with on(device), meta, torch.no_grad():
        text = UNetCondition(config) if isinstance(config, UNetConditionConfig) else None
        unet, null = (UNet(config), config.null_label) if text is None else (text, None)
        steps = TritonStep(unet, Spec(images, shape, dtype, meta, null), found.append)
        labels = {} if text is None and config.num_class_embeds is None else {"label": [0] * images}
        bank = TableBank([solvers.ddim(NoiseSchedule(), 2)], meta)
        state = State.create(torch.empty(images, *shape), bank, guidance=1.0 + guided, **labels)
        if text is not None:
            width = vector_width(text)
            pooled = None if width is None else torch.empty(1, width)
            state.texts = Texts(torch.empty(1, TOKENS, config.context_channels), pooled, names=("",))
            state.null = state.label
            steps.follow_texts(text, state)
        steps.whole(state, guided, noisy=False)
    return found


@contextlib.contextmanager
def on(device: Any) -> Iterator[None]:
    """Choose configurations as on a GPU with these properties; None: as without one."""
    from unittest import mock

    from fastdiff.kernels import attention, conv, epilogue, geglu, launch, norm

    with contextlib.ExitStack() as stack:
        for module in (attention, conv, epilogue, geglu, launch, norm):
            stack.enter_context(mock.patch.object(module, "device_of", return_value=device or launch.NO_GPU))
        yield


# Convolutions ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A convolution of a network, with the arguments with which it calls `fastdiff.kernels.conv.layer`."""

    problem: Any
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        return f"conv.layer {self.problem.key}"

    def replaced(self, replace: Callable[[Any], Any]) -> Layer:
        """Return the layer on other tensors."""
        return Layer(self.problem, {name: replace(value) for name, value in self.arguments.items()})

    def launches(self, config: Any) -> tuple[Any, ...]:
        """Build the layer in a configuration, whose layout of weights it may need, and on memory of its own."""
        import torch

        from fastdiff.kernels import conv, library
        from fastdiff.kernels.library import LIBRARY

        a = dict(self.arguments)
        src, weight, then = a["src"], a["weight"], a.get("then")
        N, like = self.problem.N, src[0]
        channels = [s.shape[3] for s in src]
        if a["dst"] is None:
            shape = (*then.out.shape[:3], N)
        else:
            shape = tuple(a["dst"].permute(0, 2, 3, 1).shape if a.get("nchw") else a["dst"].shape)
        if config == LIBRARY:
            k, stride, before = self.problem.kernel, a["stride"], a["padding"]
            ends = [(v - 1) * stride + k - n for v, n in zip(shape[1:3], like.shape[1:3], strict=True)]
            after = max(before, *(end - before for end in ends))
            a["weight"] = library.pack(conv.unpack(weight, N)[0], channels, like.dtype, (before, after))
            a["padding"] = after
        elif isinstance(config, conv.ColumnsConfig):
            a["weight"] = conv.pack_columns(conv.unpack(weight, N)[0], channels, like.dtype)
        problem = conv.Problem.of(src, weight, shape, a["stride"])
        if a.get("statistics") is not None:
            blocks = problem.finished_blocks(config)
            held = a["statistics"]
            a["statistics"] = held.new_zeros(shape[0], blocks.strips, blocks.parts, 2, N)
        need = conv.workspace(src, a["weight"], shape, stride=a["stride"], partial=then is not None, config=config)
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        a["workspace"] = torch.zeros(need, dtype=wide, device=like.device)
        return conv.layer(**a, config=config)


def layers(config: Any, images: int, dtype: Any, guided: bool = False, device: Any = None) -> list[Layer]:
    """Return the convolutions of a network, in order, on the meta device."""
    from unittest import mock

    from fastdiff.kernels import conv

    found: list[Layer] = []
    plain = conv.layer

    def record(src: Any, weight: Any, bias: Any, dst: Any, **more: Any) -> Any:
        made = plain(src, weight, bias, dst, **more)
        if dst is None:
            rows, H, W, _ = more["then"].out.shape
        else:
            rows, H, W, _ = (dst.permute(0, 2, 3, 1) if more["nchw"] else dst).shape
        if isinstance(more["config"], conv.ColumnsConfig):  # a layer repacks its weights for each configuration
            channels = [s.shape[3] for s in src]
            weight = conv.pack(src[0].new_empty(len(bias), sum(channels), 3, 3), channels, src[0].dtype)
        kept = {name: value for name, value in more.items() if name not in ("workspace", "config", "chosen_for")}
        problem = conv.Problem.of(src, weight, (rows, H, W, len(bias)), more["stride"])
        found.append(Layer(problem, {"src": src, "weight": weight, "bias": bias, "dst": dst, **kept}))
        return made

    with mock.patch.object(conv, "layer", record):
        step(config, images, dtype, guided, device)
    return found
