"""Fit the tensors of a file to a network: their names, shapes and values are checked before memory is allocated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import layouts, wrappers
from fastdiff.checkpoints.reading import listed_problems
from fastdiff.errors import CheckpointError
from fastdiff.unet import UNet, UNetCondition, UNetConfig
from fastdiff.unet.latents import LatentDecoder

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHER_WEIGHTS = {  # by names of tensors
    "LoRA weights, which are a change of another network's weights": r"\blora|lora_|\.hada_",
    "the state of an optimizer": r"exp_avg|momentum_buffer",
    "the weights of an autoencoder (VAE), not of a U-Net": r"^(encoder|decoder)\.|quant_conv",
    "the weights of a text-conditioned U-Net, which UNetCondition loads": r"\.attn2\.|transformer_blocks",
}
# Earlier versions of diffusers named the projections of an attention so.
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def build(config: UNetConfig, tensors: Mapping[str, Tensor], where: str | Path, layout: str | None = None) -> UNet:
    """Build the network in float32, in evaluation mode, with these weights; errors are those of `load_weights`.

    Memory is allocated only after the weights are known to fit, so a false configuration costs none. torch's random
    state is not changed.
    """
    unet = empty(config)
    fitted = fit(unet, tensors, where, layout, torch.float32)
    unet.to_empty(device="cpu").load_state_dict(fitted)
    return unet.eval()


def empty(config: UNetConfig) -> UNet:
    """Build the network on the device "meta", without memory for its weights."""
    with torch.device("meta"):
        return UNet(config)


def load_weights(unet: UNet, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy weights into a network. On an error nothing is copied.

    Args:
        unet: The network; the weights are converted to its dtype.
        tensors: The weights under the names of diffusers; the names of its earlier versions for the projections of an
            attention, and projections stored as 1x1 convolutions, are accepted as well.
        where: Origin of the tensors, for the message.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, given twice, misshapen, not of a float type, or not finite;
            the message says how many are, the likely cause, and three of them.
    """
    tensors = wrappers.choose(where, tensors)
    unet.load_state_dict(fit(unet, tensors, where, None, unet.conv_in.weight.dtype))


def fit(
    unet: UNet | UNetCondition | LatentDecoder,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    layout: str | None,
    dtype: torch.dtype | None,
    what: str = "U-Net",
) -> dict[str, Tensor]:
    """Convert the tensors of a file to the names and shapes of the state dict of ``unet``, which may be on "meta".

    ``layout`` None stands for diffusers' names; ``dtype`` None keeps that of each tensor. Errors are those of
    `load_weights`, with the names of the file; ``what`` names the module in them.
    """
    parts = layouts.pieces(unet, layout) if layout is not None and isinstance(unet, UNet) else None
    if parts is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    else:
        shapes = {part.theirs: part.shape for part in parts}
    constant = {part.theirs for part in parts or () if not part.ours}
    problems = []
    given: dict[str, Tensor] = {}
    for name, tensor in (tensors if parts else _named(tensors, unet)).items():
        ours = name if parts is not None else _modern(name)
        if ours in given:
            problems.append(f"twice: {ours} (once as {name})")
        given[ours] = tensor
    problems += [f"missing: {name} {shapes[name]}" for name in sorted(shapes.keys() - given.keys())]
    problems += [f"unexpected: {name} {tuple(given[name].shape)}" for name in sorted(given.keys() - shapes.keys())]
    fitted = {}
    for name in sorted(shapes.keys() & given.keys()):
        tensor, shape = given[name], shapes[name]
        if parts is None and ".attentions." in name and tensor.shape[2:] == (1, 1) and len(shape) == 2:
            tensor = tensor[:, :, 0, 0]
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = tensor.dtype if tensor.layout == torch.strided and tensor.device.type == "cpu" else "no plain tensor"
            problems.append(f"dtype: {name} is {kind}, a float type is needed")
        elif tensor.shape != shape:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, {shape} is needed")
        else:
            fitted[name] = tensor.to(dtype or tensor.dtype)
            if not torch.isfinite(fitted[name]).all():
                problems.append(f"value: {name} has NaN or infinite values (as {fitted[name].dtype})")
            elif name in constant and not fitted[name].eq(layouts.RESAMPLE_FILTER).all():
                problems.append(f"value: {name} is not {layouts.RESAMPLE_FILTER} everywhere; other filters are refused")
    if problems:
        cause = _cause(given.keys(), shapes.keys(), problems)
        raise CheckpointError(f"{where} does not fit this {what}, {listed_problems(problems, cause)}")
    return layouts.to_ours(parts, fitted, unet) if parts is not None and isinstance(unet, UNet) else fitted


def _named(tensors: Mapping[str, Tensor], unet: nn.Module) -> Mapping[str, Tensor]:
    """Name a list of averaged parameters, whose names are their positions, in the order of diffusers' or our module."""
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    if not all(name.isdecimal() for name in tensors) or len(tensors) != len(shapes):
        return tensors
    for order in (wrappers.parameter_order(shapes), list(shapes)):
        if [tuple(tensor.shape) for tensor in tensors.values()] == [shapes[name] for name in order]:
            return dict(zip(order, tensors.values(), strict=True))
    return tensors


def _cause(given: Set[str], needed: Set[str], problems: list[str]) -> str:
    """Say what tensors that do not fit a network probably are, by their names; "" where that is unclear."""
    kinds = {problem.partition(":")[0] for problem in problems}
    for what, pattern in OTHER_WEIGHTS.items():
        found = [any(re.search(pattern, name) for name in names) for names in (given - needed, needed)]
        if found == [True, False]:
            return what
    both = len(given & needed)
    if given and all(name.isdecimal() for name in given):
        return f"a list of {len(given)} tensors without names, the config.json is of a network with {len(needed)}"
    if not both:
        return "the weights of another kind of network"
    if kinds == {"shape"}:
        return "the config.json is of a network with other widths (block_out_channels, in_channels, ...)"
    if kinds == {"missing"}:
        return "the file is incomplete, or the config.json is of a network with more blocks or layers"
    if kinds == {"unexpected"}:
        return "the config.json is of a network with fewer blocks or layers"
    return "the config.json is of another network" if kinds & {"missing", "unexpected"} and len(problems) > 3 else ""


def _modern(name: str) -> str:
    """Replace the name of an attention's projection in early versions of diffusers by today's."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)
