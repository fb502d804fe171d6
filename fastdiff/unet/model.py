"""The U-Net: residual blocks of GroupNorm, SiLU and convolutions, attention, time and class conditioning.

This module defines what the network computes; every backend is tested against it. The keys of state dicts and
configurations are those of diffusers' ``UNet2DModel``, so that each loads the weights of the other.

Sources: Ho et al. 2020 (arXiv:2006.11239, appendix B); Dhariwal & Nichol 2021 (arXiv:2105.05233) for scale-shift and
residual up/down-sampling; Ho & Salimans 2022 (arXiv:2207.12598) for the null label.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdiff.errors import InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.unet.config import UNetConfig, norm_groups

if TYPE_CHECKING:
    from fastdiff.unet.condition_config import UNetConditionConfig
    from fastdiff.unet.decoder import CoderConfig

DTYPE = torch.float32  # of new weights, whatever torch's default is
CLASS_MAP_SIZE = 8  # side of the map that the class encoder computes, before it is resized to the input's size


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Compute the sinusoidal embedding of timesteps, which may be fractional (Vaswani et al. 2017; Ho et al. 2020).

        w_i = 10000^(-i / (dim/2 - freq_shift)),    emb = [sin(t w), cos(t w)]      ([cos, sin] when flipped)

    t is [B] of any real dtype. The result is [B, dim], float64 if t is, else float32, with a zero appended for odd dim.
    """
    half = dim // 2
    if t.dtype != torch.float64:
        t = t.float()
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    w = torch.exp(-math.log(10000.0) * i / (half - freq_shift)).to(t.dtype)
    angle = t[:, None] * w[None, :]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class FourierFeatures(nn.Module):
    """Random Fourier features of log t (Tancik et al. 2020, arXiv:2006.10739): [sin, cos](2 pi w log t), w ~ N(0, 256).

    t is [B], float32 or float64 and above 0; the result is [B, 2 features] in t's dtype.
    """

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, dtype=DTYPE, device=None) * 16.0, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = torch.log(t)[:, None] * self.weight.to(t.dtype)[None, :] * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _fir(x: Tensor, gain: float) -> Tensor:
    """Return the filter [1, 3, 3, 1] / 8 in both directions, times ``gain``, for each channel of x: [C, 1, 4, 4]."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8.0
    return (gain * torch.outer(row, row)).expand(x.shape[1], 1, 4, 4)


def fir_down(x: Tensor) -> Tensor:
    """Halve a map [B, C, H, W] by the filter, with zeros around it, as diffusers' ``downsample_2d`` does."""
    return F.conv2d(x, _fir(x, 1.0), stride=2, padding=1, groups=x.shape[1])


def fir_up(x: Tensor) -> Tensor:
    """Double a map [B, C, H, W] by the filter, as diffusers' ``upsample_2d`` does."""
    return F.conv_transpose2d(x, _fir(x, 4.0), stride=2, padding=1, groups=x.shape[1])


class TimestepEmbedding(nn.Module):
    """MLP that maps the sinusoid s to the time embedding: emb = W2 silu(W1 s + b1) + b2."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features, dtype=DTYPE)
        self.linear_2 = nn.Linear(out_features, out_features, dtype=DTYPE)

    def forward(self, s: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(s)))


class ClassProjection(nn.Module):
    """Linear map of labels to vectors [B, features] that are added to the sinusoid: W (sqrt(L) onehot(label)) + b.

    There are L classes; the one-hot vector of the null label, L, is zero. As in NVlabs/edm, SongUNet.map_label.
    """

    def __init__(self, classes: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, classes, dtype=DTYPE, device=None))
        self.bias = nn.Parameter(torch.zeros(features, dtype=DTYPE, device=None))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, labels: Tensor) -> Tensor:
        classes = self.weight.shape[1]
        onehot = F.one_hot(labels, classes + 1)[:, :classes].to(self.weight.dtype)
        return F.linear(onehot * math.sqrt(classes), self.weight, self.bias)


class ClassEncoder(nn.Module):
    """Map of labels to images [B, channels, H, W]: an embedding, an MLP that gives a small map, and bilinear resizing.

    The image depends on the label alone, so a sampler computes it once per image, not once per step.
    """

    def __init__(self, num_class_embeds: int, features: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_class_embeds, features, dtype=DTYPE)
        self.linear_1 = nn.Linear(features, features, dtype=DTYPE)
        self.linear_2 = nn.Linear(features, channels * CLASS_MAP_SIZE * CLASS_MAP_SIZE, dtype=DTYPE)
        self.channels = channels

    def forward(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        m = self.linear_2(F.silu(self.linear_1(self.embedding(labels))))
        m = m.view(-1, self.channels, CLASS_MAP_SIZE, CLASS_MAP_SIZE)
        return F.interpolate(m, size=size, mode="bilinear", align_corners=False)


class ResnetBlock(nn.Module):
    """Residual block (Ho et al. 2020, appendix B); ``scale_shift`` and resampling as in Dhariwal & Nichol 2021.

    h = conv1(resample(silu(norm1(x))))
    h = norm2(h + W silu(emb))                       time_scale_shift "default"
    h = norm2(h) (1 + scale) + shift                 "scale_shift", [scale, shift] = W silu(emb)
    out = (shortcut(resample(x)) + conv2(silu(h))) / scale_factor

    Where the configuration's ``temb_channels`` is None, there is no embedding, and emb is None. ``resample`` is "up",
    "down", or "fir_up" or "fir_down" for a filter, with a convolution in the shortcut; ``groups`` are those of the two
    norms in place of the configuration's.
    """

    recompute = False  # whether activations are computed anew in the backward pass (gradient checkpointing)

    def __init__(
        self,
        config: UNetConfig | UNetConditionConfig | CoderConfig,
        in_channels: int,
        out_channels: int,
        resample: str | None = None,
        scale_factor: float | None = None,
        groups: tuple[int, int] | None = None,
    ):
        super().__init__()
        if groups is None:
            groups = norm_groups(config.norm_num_groups, in_channels), norm_groups(config.norm_num_groups, out_channels)
        self.resample = resample
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.scale_factor = float(config.block_scale_factor if scale_factor is None else scale_factor)
        self.norm1 = nn.GroupNorm(groups[0], in_channels, eps=config.norm_eps, dtype=DTYPE)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, dtype=DTYPE)
        self.time_emb_proj = None
        if config.temb_channels is not None:
            width = out_channels * (2 if self.scale_shift else 1)
            self.time_emb_proj = nn.Linear(config.temb_channels, width, dtype=DTYPE)
        self.norm2 = nn.GroupNorm(groups[1], out_channels, eps=config.norm_eps, dtype=DTYPE)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, dtype=DTYPE)
        filtered = resample in ("fir_up", "fir_down")
        shortcut = in_channels != out_channels or filtered or (resample is not None and config.resample_shortcut)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, dtype=DTYPE) if shortcut else None

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "fir_up":
            return fir_up(x)
        if self.resample == "fir_down":
            return fir_down(x)
        return x

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        """Apply norm2 and the projected embedding [B, C or 2 C, 1, 1] to h [B, C, H, W], as the class describes."""
        if not self.scale_shift:
            return self.norm2(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, emb, use_reentrant=False)
        return self._compute(x, emb)

    def _compute(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        x = self._resampled(x)
        if self.time_emb_proj is None:
            h = self.norm2(h)
        else:
            assert emb is not None
            h = self.second_norm(h, self.time_emb_proj(F.silu(emb))[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.scale_factor if self.scale_factor != 1.0 else x + h


class Attention(nn.Module):
    """Self-attention over all pixels, with q, k and v linear in the pixels of GroupNorm(x).

    out = (x + W_o softmax(q k^T / sqrt(d)) v) / scale_factor
    """

    recompute = False  # as in `ResnetBlock`

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale_factor: float = 1.0):
        super().__init__()
        self.head_dim = head_dim
        self.heads = channels // self.head_dim
        self.scale_factor = scale_factor
        inner = self.heads * self.head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps, dtype=DTYPE) if groups is not None else None
        self.to_q = nn.Linear(channels, inner, dtype=DTYPE)
        self.to_k = nn.Linear(channels, inner, dtype=DTYPE)
        self.to_v = nn.Linear(channels, inner, dtype=DTYPE)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels, dtype=DTYPE)])

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            proj(h).view(B, H * W, self.heads, self.head_dim).transpose(1, 2)
            for proj in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).reshape(B, H * W, self.heads * self.head_dim))
        out = x + h.transpose(1, 2).reshape(B, C, H, W)
        return out / self.scale_factor if self.scale_factor != 1.0 else out


class Downsample(nn.Module):
    """3x3 convolution of stride 2; padding 0 stands for the original DDPM's padding of the right and bottom only."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding, dtype=DTYPE)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, or to ``size``, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=DTYPE)

    def forward(self, x: Tensor, emb: Tensor | None, size: Sequence[int] | None = None) -> Tensor:
        if size is not None:
            return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """``layers_per_block`` residual blocks, with attention after each in the types "Attn...", and a downsampler."""

    skips = False  # whether a picture goes beside the maps, as in `fastdiff.unet.skip`

    def __init__(self, config: UNetConfig, kind: str, in_channels: int, out_channels: int, downsample: bool):
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(config, in_channels if j == 0 else out_channels, out_channels) for j in range(layers)
        )
        attention = kind.startswith("Attn")
        self.attentions = _attentions(config, out_channels, layers) if attention else None
        # As in diffusers, downsample_type concerns only blocks with attention; the other two types imply the kind.
        resnet = kind == "ResnetDownsampleBlock2D" or (attention and config.downsample_type == "resnet")
        self.downsamplers = None
        if downsample and resnet:
            self.downsamplers = nn.ModuleList([ResnetBlock(config, out_channels, out_channels, resample="down")])
        elif downsample:
            self.downsamplers = nn.ModuleList([Downsample(out_channels, config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions is not None:
                x = self.attentions[j](x)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x, emb)
            skips.append(x)
        return x, skips


class UpBlock(nn.Module):
    """``layers_per_block + 1`` residual blocks on [h, skip], attention in blocks of type "Attn...", and an upsampler.

    Attention follows every residual block, or only the last one if ``up_attention`` is "last".
    """

    skips = False  # as in `DownBlock`

    def __init__(
        self, config: UNetConfig, kind: str, prev_channels: int, out_channels: int, in_channels: int, upsample: bool
    ):
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList(
            ResnetBlock(
                config,
                (prev_channels if j == 0 else out_channels) + (in_channels if j == layers - 1 else out_channels),
                out_channels,
            )
            for j in range(layers)
        )
        attention = kind.startswith("Attn")
        behind = layers if config.up_attention == "all" else 1
        self.attentions = _attentions(config, out_channels, behind) if attention else None
        resnet = kind == "ResnetUpsampleBlock2D" or (attention and config.upsample_type == "resnet")
        self.upsamplers = None
        if upsample and resnet:
            self.upsamplers = nn.ModuleList([ResnetBlock(config, out_channels, out_channels, resample="up")])
        elif upsample:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        bare = len(self.resnets) - len(self.attentions or ())
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions is not None and j >= bare:
                x = self.attentions[j - bare](x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, emb)
        return x


class MidBlock(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig | CoderConfig, channels: int):
        super().__init__()
        factor = float(config.mid_block_scale_factor)
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels, scale_factor=factor) for _ in range(2))
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            # In diffusers, scale-shift networks have no norm before this attention.
            groups = norm_groups(config.norm_num_groups, channels)
        self.attentions = None
        if config.add_attention:
            self.attentions = nn.ModuleList(
                [Attention(channels, config.head_dim(channels), groups, config.norm_eps, factor)]
            )

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x, emb)


def _attentions(config: UNetConfig, channels: int, layers: int) -> nn.ModuleList:
    factor = float(config.block_scale_factor)
    return nn.ModuleList(
        Attention(channels, config.head_dim(channels), config.norm_num_groups, config.norm_eps, factor)
        for _ in range(layers)
    )


def zero_last_layers(network: nn.Module, *others: nn.Module) -> None:
    """Zero the last layer of every residual and attention block of a network, and these other layers."""
    heads: list[nn.Module] = [m.conv2 for m in network.modules() if isinstance(m, ResnetBlock)]
    heads += [m.to_out[0] for m in network.modules() if isinstance(m, Attention)]
    for head in (*heads, *others):
        for parameter in head.parameters():
            nn.init.zeros_(parameter)


class UNet(nn.Module):
    """The denoising network of a diffusion model: ``unet(x, t, class_labels) -> out``.

    Weights are initialised as torch does by default. State-dict keys are those of diffusers' ``UNet2DModel``.

    Args:
        config: The configuration, which stays available as ``unet.config``.
    """

    @plain_modes()
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        features = config.temb_channels
        self.class_encoder = None
        in_channels = config.in_channels
        if config.class_image is not None:
            assert config.num_class_embeds is not None  # UNetConfig ensures this
            self.class_encoder = ClassEncoder(config.num_class_embeds, features, config.in_channels)
            in_channels *= 2 if config.class_image == "concat" else 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1, dtype=DTYPE)
        self.time_proj = FourierFeatures(channels[0]) if config.time_embedding_type == "fourier" else None
        self.time_embedding = TimestepEmbedding(config.sinusoid_channels, features)
        self.class_embedding = self._class_embedding(config)

        from fastdiff.unet.skip import SkipDownBlock, SkipUpBlock  # built from the blocks above

        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            last, block = i == len(channels) - 1, SkipDownBlock if "Skip" in kind else DownBlock
            self.down_blocks.append(block(config, kind, channels[max(i - 1, 0)], channels[i], downsample=not last))
        self.mid_block = MidBlock(config, channels[-1]) if config.mid_block_type is not None else None
        self.up_blocks = nn.ModuleList()
        reverse = channels[::-1]
        for i, kind in enumerate(config.up_block_types):
            last, above = i == len(channels) - 1, SkipUpBlock if "Skip" in kind else UpBlock
            skip = reverse[min(i + 1, len(channels) - 1)]
            self.up_blocks.append(above(config, kind, reverse[max(i - 1, 0)], reverse[i], skip, upsample=not last))
        groups = norm_groups(config.norm_num_groups, channels[0])
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=config.norm_eps, dtype=DTYPE)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1, dtype=DTYPE)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.padding != (0, 0):
                m.padding_mode = config.padding_mode

    @staticmethod
    def _class_embedding(config: UNetConfig) -> nn.Module | None:
        if config.class_image is not None:
            return None
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.sinusoid_channels, config.temb_channels)
        if config.class_embed_type == "identity":
            return nn.Identity()
        if config.class_before_mlp:
            assert config.num_classes is not None  # UNetConfig ensures this
            return ClassProjection(config.num_classes, config.sinusoid_channels)
        if config.num_class_embeds is not None:
            return nn.Embedding(config.num_class_embeds, config.temb_channels, dtype=DTYPE)
        return None

    def sinusoid(self, t: Tensor) -> Tensor:
        """Compute the input of the time MLP, without a class.

        Args:
            t: Timesteps [B] of any real dtype, before ``config.timestep_scale``.

        Returns:
            The sinusoidal embedding, or the Fourier features, [B, config.sinusoid_channels] in the network's dtype.
        """
        dtype = self.conv_in.weight.dtype
        t = t.double() if dtype == torch.float64 else t.float()
        if self.time_proj is not None:
            return self.time_proj(t * self.config.timestep_scale).to(dtype)
        return timestep_embedding(
            t * self.config.timestep_scale,
            self.config.sinusoid_channels,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        ).to(dtype)

    def embedding(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Compute the vector that conditions every residual block on the time, and on the class if it is embedded.

        Blocks depend on ``t`` and ``class_labels`` only through this vector, so a sampler may tabulate it.

        Args:
            t: Timesteps [B].
            class_labels: As in `forward`.

        Returns:
            The time embedding [B, config.temb_channels], which includes the class unless ``config.class_image`` is set.
        """
        if self.config.class_before_mlp:
            assert class_labels is not None
            assert self.class_embedding is not None
            return self.time_embedding(self.sinusoid(t) + self.class_embedding(class_labels))
        emb = self.time_embedding(self.sinusoid(t))
        if self.class_embedding is not None:
            assert class_labels is not None
            if self.config.class_embed_type == "timestep":
                class_labels = self.sinusoid(class_labels)
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        return emb

    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: Noisy images [B, in_channels, H, W] in the network's dtype; H and W are multiples of ``config.stride``.
            t: Timesteps, [B] or a scalar, of any real dtype; fractions are not rounded.
            class_labels: Labels, int64 [B]. If ``config.class_embed_type`` is "timestep", real numbers [B]; if it is
                "identity", vectors [B, config.temb_channels]. None for a network without class conditioning.

        Returns:
            The prediction [B, out_channels, H, W] in the network's dtype.

        Raises:
            InvalidArgument: If labels are missing or not expected, or H or W is no multiple of ``config.stride``.
        """
        config = self.config
        if (class_labels is None) == config.conditional:
            need = "needs" if config.conditional else "has no class conditioning and takes no"
            raise InvalidArgument(f"this U-Net {need} class_labels")
        if x.shape[2] % config.stride or x.shape[3] % config.stride:
            raise InvalidArgument(
                f"height and width must be multiples of {config.stride} for this U-Net, not {x.shape[2]}x{x.shape[3]}"
            )
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        t = t.to(x.device).expand(x.shape[0])
        if config.unit_range:  # x_0 in [0, 1] has half the noise, and twice the score, which is halved again below
            x, t = 0.5 * x + 0.5, 0.5 * t
        emb = self.embedding(t, class_labels)

        if config.center_input_sample:
            x = 2 * x - 1.0
        if self.class_encoder is not None:
            image = self.class_encoder(class_labels, (x.shape[2], x.shape[3]))
            if config.class_image == "add":
                x = x + image
            elif config.class_image == "multiply":
                x = x * (1 + image)
            else:
                x = torch.cat([x, image], dim=1)

        out = self._drawn(x, emb)
        if self.time_proj is not None:
            out = out / t.to(out.dtype).view(-1, 1, 1, 1)
        return 0.5 * out if config.unit_range else out

    def _drawn(self, x: Tensor, emb: Tensor) -> Tensor:
        """Compute the output from the input and the embedding: down, across and up."""
        h = self.conv_in(x)
        skips, picture = [h], x
        for down in self.down_blocks:
            if down.skips:
                h, more, picture = down(h, emb, picture)
            else:
                h, more = down(h, emb)
            skips += more
        if self.mid_block is not None:
            h = self.mid_block(h, emb)
        drawn = None  # the picture of the levels so far
        for up in self.up_blocks:
            if up.skips:
                h, drawn = up(h, skips, emb, drawn)
            else:
                h = up(h, skips, emb)
        out = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out if drawn is None else out + drawn

    @contextlib.contextmanager
    def gradient_checkpointing(self) -> Iterator[None]:
        """Let residual and attention blocks compute their activations anew in the backward pass, within this context.

        A training then takes less memory and about a third more time. Outputs and gradients are the same.

        Yields:
            Nothing; the blocks are as they were afterwards.
        """
        blocks = [m for m in self.modules() if isinstance(m, (ResnetBlock, Attention))]
        for block in blocks:
            block.recompute = True
        try:
            yield
        finally:
            for block in blocks:
                del block.recompute

    def zero_residuals_(self) -> UNet:
        """Zero the last layer of every residual branch and of the network, as Ho et al. 2020 do before training.

        Residual blocks that change neither channels nor size are then the identity, and the network's output is 0.

        Returns:
            The network itself.
        """
        zero_last_layers(self, self.conv_out)
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path, **source: Any) -> UNet:
        """Load a network from a folder, a file, or by the name of a built-in model.

        Args:
            path: The model, as in `fastdiff.checkpoints.load`.
            **source: The options of `fastdiff.checkpoints.load`: preset, flags, variant, weights, subfolder; and
                torch_dtype, the dtype of the network, as in diffusers.

        Returns:
            The network in float32, or in torch_dtype, on the CPU, in evaluation mode.

        Raises:
            InvalidArgument: If there is no such option.
            CheckpointError: If a file cannot be read, or its tensors do not fit the network.
            ConfigError: If a configuration, preset or flag is not supported.
        """
        from fastdiff.checkpoints.loading import load_network

        return load_network(path, **source)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a ``UNet2DModel`` folder; see `fastdiff.checkpoints.save_unet`.

        Args:
            path: The folder, which is created if need be.

        Raises:
            CheckpointError: If a file cannot be written.
        """
        from fastdiff.checkpoints import save_unet

        save_unet(self, path)
