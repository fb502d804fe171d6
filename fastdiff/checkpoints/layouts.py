"""Layouts: how the weight files of the original code bases map to the state dict of `fastdiff.unet.UNet`.

Every layout is a bijection that renames, reshapes and reorders tensors and computes nothing, so converting to a layout
and back gives the same bits. Layouts:

    ddpm         hojonathanho/diffusion in its PyTorch ports (pesser, ermongroup)
    openai       improved-diffusion, and guided-diffusion without use_new_attention_order
    openai-new   guided-diffusion with use_new_attention_order
    edm          the DDPM++ networks of NVlabs/edm (SongUNet)

All layouts but ddpm stack the projections of an attention with H heads of d channels in one tensor ``qkv``, whose rows
are ordered (q|k|v, H, d) in openai-new, (H, q|k|v, d) in openai, and (H, d, q|k|v) in edm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.unet import UNet
from fastdiff.unet.config import CONVENTIONS
from fastdiff.unet.model import Attention, Downsample, ResnetBlock, Upsample

LAYOUTS = ("ddpm", "openai", "openai-new", "edm")

# Names of the modules within a residual block and an attention. The part of a layout's name before "-" is its family:
# openai and openai-new differ only in the order of qkv.
OURS = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
RESNET = {
    "ddpm": ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"),
    "openai": ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
    "edm": ("norm0", "conv0", "affine", "norm1", "conv1", "skip"),
}
NORM = {"ddpm": "norm", "openai": "norm", "edm": "norm2"}
PROJECTION = {"ddpm": "proj_out", "openai": "proj_out", "edm": "proj"}
QKV_AXIS = {"openai-new": 0, "openai": 1, "edm": 2}  # the axis of q|k|v among the three that order the rows of qkv
# The code bases implement the linear layers of an attention as convolutions of size 1, in one or two dimensions.
UNIT_AXES = {"ddpm": 2, "openai": 1, "openai-new": 1, "edm": 2}
RESAMPLE_FILTER = 0.25  # edm saves its averaging filter, 2x2 of this value, with every block that resamples


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a layout's file, and the tensors of `UNet` that it consists of.

    They are one tensor, which is reshaped; three, the q, k and v that are stacked; or none, for a constant tensor of
    the value RESAMPLE_FILTER.
    """

    theirs: str  # name in the file
    ours: tuple[str, ...]  # names in `UNet`'s state dict
    shape: tuple[int, ...]  # in the file
    heads: int = 1  # of a stacked tensor
    axis: int | None = None  # for a stacked tensor, that of q|k|v among the three that order its rows


def pieces(unet: UNet, layout: str) -> list[Piece]:
    """List the tensors of a layout's file for this network, whose weights may be on "meta"."""
    found: list[Piece] = []
    family = layout.partition("-")[0]
    for ours, theirs in _places(unet, layout):
        module = unet.get_submodule(ours)
        if isinstance(module, ResnetBlock):
            for mine, name in zip(OURS, RESNET[family], strict=True):
                if getattr(module, mine) is not None:
                    found += _leaf(getattr(module, mine), f"{ours}.{mine}", f"{theirs}.{name}")
            if layout == "edm" and module.resample is not None:
                for name in ("conv0", "skip"):
                    found.append(Piece(f"{theirs}.{name}.resample_filter", (), (1, 1, 2, 2)))
        elif isinstance(module, Attention):
            found += _attention(module, ours, theirs, layout)
        else:
            found += _leaf(module, ours, theirs)
    return found


def _leaf(module: nn.Module, ours: str, theirs: str) -> Iterator[Piece]:
    for name, parameter in module.named_parameters():
        yield Piece(f"{theirs}.{name}", (f"{ours}.{name}",), tuple(parameter.shape))


def _attention(module: Attention, ours: str, theirs: str, layout: str) -> Iterator[Piece]:
    family = layout.partition("-")[0]
    if module.group_norm is not None:
        yield from _leaf(module.group_norm, f"{ours}.group_norm", f"{theirs}.{NORM[family]}")
    units = (1,) * UNIT_AXES[layout]
    C, inner = module.to_q.in_features, module.to_q.out_features
    shapes = {"weight": (inner, C, *units), "bias": (inner,)}
    for kind, shape in shapes.items():
        if layout == "ddpm":
            for letter in "qkv":
                yield Piece(f"{theirs}.{letter}.{kind}", (f"{ours}.to_{letter}.{kind}",), shape)
        else:
            names = tuple(f"{ours}.to_{letter}.{kind}" for letter in "qkv")
            yield Piece(f"{theirs}.qkv.{kind}", names, (3 * inner, *shape[1:]), module.heads, QKV_AXIS[layout])
        out = (C, inner, *units) if kind == "weight" else (C,)
        yield Piece(f"{theirs}.{PROJECTION[family]}.{kind}", (f"{ours}.to_out.0.{kind}",), out)


# Names of modules -----------------------------------------------------------------------------------------------------


def _places(unet: UNet, layout: str) -> Iterator[tuple[str, str]]:
    """Yield (our name, their name) of every residual block, every attention, and every other module with weights."""
    if layout == "ddpm":
        return _ddpm(unet)
    return _edm(unet) if layout == "edm" else _openai(unet)


def _layers(block: nn.Module) -> Iterator[tuple[int, int | None]]:
    """Yield the index of each residual layer of a block, and that of the attention after it or None."""
    resnets, attentions = len(block.resnets), len(block.attentions or ())  # type: ignore[arg-type]  # module lists
    for j in range(resnets):
        k = j - (resnets - attentions)
        yield j, k if k >= 0 else None


def _ddpm(unet: UNet) -> Iterator[tuple[str, str]]:
    yield "conv_in", "conv_in"
    yield "time_embedding.linear_1", "temb.dense.0"
    yield "time_embedding.linear_2", "temb.dense.1"
    levels = len(unet.down_blocks)
    for kind, blocks in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        for i, block in enumerate(blocks):
            ours = f"{kind}_blocks.{i}"
            theirs = f"{kind}.{i if kind == 'down' else levels - 1 - i}"
            for j, attention in _layers(block):
                yield f"{ours}.resnets.{j}", f"{theirs}.block.{j}"
                if attention is not None:
                    yield f"{ours}.attentions.{attention}", f"{theirs}.attn.{j}"
            if getattr(block, f"{kind}samplers") is not None:
                yield f"{ours}.{kind}samplers.0.conv", f"{theirs}.{kind}sample.conv"
    yield "mid_block.resnets.0", "mid.block_1"
    yield "mid_block.attentions.0", "mid.attn_1"
    yield "mid_block.resnets.1", "mid.block_2"
    yield "conv_norm_out", "norm_out"
    yield "conv_out", "conv_out"


def _openai(unet: UNet) -> Iterator[tuple[str, str]]:
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    if unet.class_embedding is not None:
        yield "class_embedding", "label_emb"
    yield "conv_in", "input_blocks.0.0"
    k = 1
    for i, block in enumerate(unet.down_blocks):
        for j, attention in _layers(block):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{k}.0"
            if attention is not None:
                yield f"down_blocks.{i}.attentions.{attention}", f"input_blocks.{k}.1"
            k += 1
        if block.downsamplers is not None:
            yield _resampler(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{k}.0", unet, "op")
            k += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    k = 0
    for i, block in enumerate(unet.up_blocks):
        for j, attention in _layers(block):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{k}.0"
            if attention is not None:
                yield f"up_blocks.{i}.attentions.{attention}", f"output_blocks.{k}.1"
            if j == len(block.resnets) - 1 and block.upsamplers is not None:  # type: ignore[arg-type]  # a module list
                after = f"output_blocks.{k}.{1 if attention is None else 2}"
                yield _resampler(f"up_blocks.{i}.upsamplers.0", after, unet, "conv")
            k += 1
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _resampler(ours: str, theirs: str, unet: UNet, convolution: str) -> tuple[str, str]:
    """Return both names of a resampling residual block, or of the convolution of a plain resampler."""
    if isinstance(unet.get_submodule(ours), ResnetBlock):
        return ours, theirs
    return f"{ours}.conv", f"{theirs}.{convolution}"


def _edm(unet: UNet) -> Iterator[tuple[str, str]]:
    size = unet.config.sample_size
    assert isinstance(size, int)  # the names contain it, and `reasons_against` requires it
    if unet.class_embedding is not None:
        yield "class_embedding", "map_label"
    yield "time_embedding.linear_1", "map_layer0"
    yield "time_embedding.linear_2", "map_layer1"
    yield "conv_in", f"enc.{size}x{size}_conv"
    for i, block in enumerate(unet.down_blocks):
        side = size >> i
        yield from _edm_blocks(f"down_blocks.{i}", f"enc.{side}x{side}", block)
        if block.downsamplers is not None:
            yield f"down_blocks.{i}.downsamplers.0", f"enc.{side // 2}x{side // 2}_down"
    side = size >> (len(unet.down_blocks) - 1)
    yield "mid_block.resnets.0", f"dec.{side}x{side}_in0"
    yield "mid_block.attentions.0", f"dec.{side}x{side}_in0"
    yield "mid_block.resnets.1", f"dec.{side}x{side}_in1"
    for i, block in enumerate(unet.up_blocks):
        yield from _edm_blocks(f"up_blocks.{i}", f"dec.{side}x{side}", block)
        if block.upsamplers is not None:
            side *= 2
            yield f"up_blocks.{i}.upsamplers.0", f"dec.{side}x{side}_up"
    yield "conv_norm_out", f"dec.{size}x{size}_aux_norm"
    yield "conv_out", f"dec.{size}x{size}_aux_conv"


def _edm_blocks(ours: str, theirs: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    for j, attention in _layers(block):
        yield f"{ours}.resnets.{j}", f"{theirs}_block{j}"
        if attention is not None:
            yield f"{ours}.attentions.{attention}", f"{theirs}_block{j}"


# Conversion -----------------------------------------------------------------------------------------------------------


def to_ours(parts: list[Piece], theirs: Mapping[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """Convert the tensors of a file, which are exactly those of ``parts``, to ``unet``'s names and shapes."""
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    result = {}
    for part in parts:
        tensor = theirs[part.theirs]
        if part.axis is None:
            for name in part.ours:
                result[name] = tensor.reshape(shapes[name])
            continue
        order = [part.heads, part.shape[0] // 3 // part.heads]
        order.insert(part.axis, 3)  # q|k|v
        split = tensor.reshape(*order, *part.shape[1:]).unbind(part.axis)
        for name, rows in zip(part.ours, split, strict=True):
            result[name] = rows.reshape(shapes[name])
    return result


def to_theirs(parts: list[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict to the tensors of a file; the inverse of `to_ours`."""
    result = {}
    dtype = next(iter(ours.values())).dtype
    for part in parts:
        if not part.ours:
            result[part.theirs] = torch.full(part.shape, RESAMPLE_FILTER, dtype=dtype, device="cpu")
        elif part.axis is None:
            result[part.theirs] = ours[part.ours[0]].reshape(part.shape)
        else:
            H, d = part.heads, part.shape[0] // 3 // part.heads
            rows = [ours[name].reshape(H, d, *part.shape[1:]) for name in part.ours]
            result[part.theirs] = torch.stack(rows, dim=part.axis).reshape(part.shape)
    return result


# Limits of a layout ---------------------------------------------------------------------------------------------------

# The fields of `UNetConfig` that the code base of a layout fixes.
_ALL: dict[str, Any] = {
    "center_input_sample": False, "mid_block_type": "UNetMidBlock2D", "add_attention": True, "class_embed_type": None,
    "class_image": None, "time_embedding_type": "positional",
}  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    "ddpm": {
        **_ALL, **CONVENTIONS["ho"], "norm_num_groups": 32, "resnet_time_scale_shift": "default", "timestep_scale": 1.0,
        "attn_norm_num_groups": None, "num_attention_heads": None, "sinusoid_dim": None, "num_class_embeds": None,
        "mid_block_scale_factor": 1.0, "block_scale_factor": 1.0, "up_attention": "all", "resample_shortcut": False,
    },
    "openai": {
        **_ALL, **CONVENTIONS["openai"], "norm_num_groups": 32, "mid_block_scale_factor": 1.0,
        "block_scale_factor": 1.0, "up_attention": "all", "resample_shortcut": False, "class_before_mlp": False,
    },
    "edm": {
        **_ALL, **CONVENTIONS["ho"], "resnet_time_scale_shift": "default", "attn_norm_num_groups": None,
        "timestep_scale": 1.0, "num_attention_heads": None,
        "mid_block_scale_factor": math.sqrt(2), "block_scale_factor": math.sqrt(2), "up_attention": "last",
        "resample_shortcut": True,
    },
}  # fmt: skip


def reasons_against(unet: UNet, layout: str) -> list[str]:
    """List the reasons why a network cannot be written in a layout; the list is empty if it can."""
    config, family = unet.config, layout.partition("-")[0]
    fixed = {**FIXED[family]}
    if family == "openai":  # every attention has a norm; in diffusers' scale-shift networks this field asks for one
        fixed["attn_norm_num_groups"] = 32 if config.resnet_time_scale_shift == "scale_shift" else None
    reasons = [f"{k}={getattr(config, k)!r}, {v!r} is needed" for k, v in fixed.items() if getattr(config, k) != v]
    if any("Skip" in kind for kind in config.down_block_types + config.up_block_types):
        reasons.append("it has blocks of type ...Skip..., which diffusers' names alone have")
    attention = [kind.startswith("Attn") for kind in config.down_block_types]
    if attention != [kind.startswith("Attn") for kind in reversed(config.up_block_types)]:
        reasons.append("down and up blocks have attention at different levels")
    resampling = [m for m in unet.modules() if isinstance(m, (Downsample, Upsample)) or getattr(m, "resample", None)]
    kinds = {isinstance(m, ResnetBlock) for m in resampling}
    if not kinds <= {"ddpm": {False}, "edm": {True}}.get(family, {False, True}) or len(kinds) > 1:
        reasons.append("its down- and upsampling is of another kind")
    if family == "edm" and config.num_class_embeds is not None and not config.class_before_mlp:
        reasons.append("its classes join behind the time MLP; class_before_mlp=True is needed")
    if family == "edm" and not isinstance(config.sample_size, int):
        reasons.append(f"sample_size={config.sample_size!r}, one number is needed: the names of its tensors have it")
    return reasons
