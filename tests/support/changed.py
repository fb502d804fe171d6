"""Changes of a network that no weight shows, for fastdiff's U-Net and for that of diffusers alike."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode


def wrapped(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as on a torus."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)


def circular(unet: Any) -> None:
    """Make seamless textures, by the attributes of every convolution."""
    for m in unet.modules():
        if isinstance(m, nn.Conv2d) and m.padding == (1, 1):
            m.padding_mode, m._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def twice(*args: Any) -> Any:
    """Double an output, as a hook."""
    return 2 * args[-1] if isinstance(args[-1], Tensor) else None


def add_slot(unet: Any) -> None:
    """Let a method of an instance hide that of the class."""
    block = unet.mid_block.resnets[0]
    block.forward = types.MethodType(lambda self, x, emb: 2 * type(self).forward(self, x, emb), block)


class Louder(nn.GroupNorm):
    """A norm of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def louder(unet: Any) -> None:
    """Change the class of a module in place."""
    unet.conv_norm_out.__class__ = Louder


# What is done to the network, and what the message has to name.
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "circular": (circular, "conv_in.padding_mode = 'circular' (not 'zeros')"),
    "one circular": (
        lambda u: setattr(u.up_blocks[0].resnets[1].conv2, "padding_mode", "reflect"),
        "up_blocks.0.resnets.1.conv2.padding_mode = 'reflect'",
    ),
    "dilation": (lambda u: setattr(u.conv_out, "dilation", (2, 2)), "conv_out.dilation = (2, 2)"),
    "padding": (lambda u: setattr(u.conv_out, "padding", (0, 1)), "conv_out.padding = (0, 1)"),
    "_conv_forward": (
        lambda u: setattr(u.conv_in, "_conv_forward", types.MethodType(wrapped, u.conv_in)),
        "conv_in._conv_forward was replaced",
    ),
    "eps": (
        lambda u: setattr(u.down_blocks[0].resnets[0].norm1, "eps", 1.0),
        "down_blocks.0.resnets.0.norm1.eps = 1.0",
    ),
    "num_groups": (lambda u: setattr(u.conv_norm_out, "num_groups", 1), "conv_norm_out.num_groups = 1"),
    "heads": (lambda u: setattr(u.mid_block.attentions[0], "heads", 4), "mid_block.attentions.0.heads = 4"),
    "forward of a block": (add_slot, "mid_block.resnets.0.forward was replaced"),
    "forward of a leaf": (
        lambda u: setattr(u.conv_norm_out, "forward", lambda x: x),
        "conv_norm_out.forward was replaced",
    ),
    "forward of the whole": (lambda u: setattr(u, "forward", lambda *a, **k: 0), "forward was replaced"),
    "hook": (lambda u: u.time_embedding.linear_1.register_forward_hook(twice), "time_embedding.linear_1 has forward"),
    "pre-hook of the whole": (lambda u: u.register_forward_pre_hook(lambda *_: None), "it has forward hooks"),
    "class in place": (louder, "conv_norm_out is a Louder of tests.support.changed"),
    "child removed": (
        lambda u: setattr(u.down_blocks[0], "downsamplers", None),
        "down_blocks.0.downsamplers is a NoneType, not a ModuleList",
    ),
    "child added": (lambda u: u.up_blocks.append(nn.Identity()), "up_blocks.2 was added (a Identity)"),
    "another shape": (lambda u: setattr(u, "conv_in", nn.Conv2d(3, 64, 3, padding=1)), "conv_in.out_channels = 64"),
    "weight norm": (lambda u: parametrizations.weight_norm(u.conv_in), "conv_in is a ParametrizedConv2d"),
    "old weight norm": (lambda u: nn.utils.weight_norm(u.conv_in), "conv_in has forward hooks (WeightNorm)"),
    "pruning": (lambda u: prune.l1_unstructured(u.conv_in, "weight", 0.5), "parameter conv_in.weight_orig is new"),
    "no bias": (lambda u: setattr(u.conv_in, "bias", None), "parameter conv_in.bias is missing"),
    "buffer": (lambda u: u.mid_block.register_buffer("scale", torch.ones(1)), "buffer mid_block.scale is new"),
    "compiled part": (lambda u: u.mid_block.compile(), "mid_block was compiled"),
}


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    kept = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def always_circular(self: nn.Conv2d, *args: Any, **options: Any) -> None:
    """Make every new convolution circular: an old recipe for seamless textures."""
    _init(self, *args, **{**options, "padding_mode": "circular"})


_init = nn.Conv2d.__init__
_forward, _call = nn.GroupNorm.forward, nn.Module._call_impl


class Twisted(nn.Conv2d):
    """A class in the place of torch's own."""


@contextlib.contextmanager
def hooked(register: Callable[[Any], Any]) -> Iterator[None]:
    """Register a hook of all modules for a while."""
    handle = register(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


class Doubling(TorchFunctionMode):
    """A mode that doubles what group_norm returns."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.group_norm else out


# Changes of the whole process, made before or after the network, and what the message has to name.
GLOBAL_CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "__init__": (
        lambda: attribute(nn.Conv2d, "__init__", always_circular),
        "torch.nn.modules.conv.Conv2d.__init__ was replaced",
    ),
    "forward": (
        lambda: attribute(nn.GroupNorm, "forward", lambda self, x: 2 * _forward(self, x)),
        "torch.nn.modules.normalization.GroupNorm.forward was replaced",
    ),
    "forward of another class": (
        lambda: attribute(nn.GroupNorm, "forward", nn.Identity.forward),
        "torch.nn.modules.normalization.GroupNorm.forward was replaced",
    ),
    "_conv_forward of all": (
        lambda: attribute(nn.Conv2d, "_conv_forward", wrapped),
        "Conv2d._conv_forward was replaced",
    ),
    "a call of any module": (
        lambda: attribute(nn.Module, "_call_impl", lambda self, *a, **k: _call(self, *a, **k)),
        "torch.nn.modules.module.Module._call_impl was replaced",
    ),
    "function": (lambda: attribute(F, "group_norm", lambda x, *_: x), "torch.nn.functional.group_norm was replaced"),
    "built-in function": (lambda: attribute(F, "conv2d", lambda x, *_: x), "torch.nn.functional.conv2d was replaced"),
    "another function": (lambda: attribute(F, "silu", F.relu), "torch.nn.functional.silu was replaced"),
    "callable object": (
        lambda: attribute(F, "scaled_dot_product_attention", Louder(1, 1)),
        "torch.nn.functional.scaled_dot_product_attention was replaced",
    ),
    "global hook": (lambda: hooked(register_module_forward_hook), "torch has global forward hooks"),
    "global pre-hook": (lambda: hooked(register_module_forward_pre_hook), "torch has global forward pre hooks"),
}
