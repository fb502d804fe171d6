"""LoRA layers of the package peft: which of them are sums of matrices, and the weights that they amount to.

A layer of peft has the plain layer as its ``base_layer`` and adds the product of two small matrices for each adapter
that is active: W x + s B A x (Hu et al. 2021, arXiv:2106.09685, equation 3). After `fuse`, W contains the product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastdiff.modes import plain_modes
from fastdiff.unet import changes

KINDS = ("Linear", "Conv2d")
ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")  # that diffusers sets on a network, which no result depends on


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers of peft in a network, by their names; those within them are not listed."""
    found: dict[str, Any] = {}
    for name, m in network.named_modules():
        if changes.origin(type(m)) == "peft" and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = m
    return found


def lora_reason(layer: Any) -> str:
    """Say why a layer of peft cannot be merged into the weight of its plain layer; "" where it can."""
    kind = type(layer)
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in KINDS:
        return f"is a {kind.__name__} of {kind.__module__}, no LoRA of a plain layer"
    for name in ("use_dora", "lora_bias", "lora_variant"):
        if any(vars(layer).get(name, {}).values()):
            return f"has LoRA with {name}"
    if layer.training and any(not isinstance(m, nn.Identity) for m in layer.lora_dropout.values()):
        return "has LoRA with dropout, and is in training (call unet.eval())"
    if layer.disable_adapters and layer.merged:
        return "has LoRA that was fused and then disabled, which its next evaluation undoes"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return "has LoRA with forward hooks"
    return ""


def lora_state(layer: Any) -> tuple[Any, ...]:
    """Return all that decides what a layer of peft computes but for its weights."""
    names = ("scaling", "_active_adapter", "merged_adapters", "_disable_adapters")
    return tuple(repr(vars(layer).get(name)) for name in names)


@plain_modes()
def lora_weight(layer: Any) -> Tensor:
    """Return the weight that a layer amounts to: that of its plain layer, with the adapters that are active."""
    weight: Tensor = layer.base_layer.weight.detach().clone()
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight += layer.get_delta_weight(name).to(weight)
    return weight


def without_layers(module: nn.Module, layers: Iterable[Any]) -> nn.Module:
    """Return a module that has the plain layers in the place of those of peft.

    The module itself stays as it is: those above the layers are copied, and all others and the weights are shared.
    """
    replaced = {id(layer): layer.base_layer for layer in layers}

    def copied(m: nn.Module | None) -> nn.Module | None:
        if m is None or id(m) in replaced:
            return None if m is None else replaced[id(m)]
        children = {name: copied(child) for name, child in m._modules.items()}
        if all(child is m._modules[name] for name, child in children.items()):
            return m
        other: nn.Module = object.__new__(type(m))
        object.__setattr__(other, "__dict__", {**vars(m), "_modules": children})
        return other

    plain = copied(module)
    assert plain is not None
    return plain
