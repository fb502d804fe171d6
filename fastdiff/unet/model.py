"""The U-Net: GroupNorm + Swish + convolution residual blocks, attention, time and class conditioning.

This module is the meaning of the network; every backend is held to it. State-dict keys and configuration
keys are those of diffusers' ``UNet2DModel``, so weights load in both directions.

Sources: Ho et al. 2020 (arXiv:2006.11239, appendix B); Dhariwal & Nichol 2021 (arXiv:2105.05233) for scale-shift and
residual up/down-sampling; Ho & Salimans 2022 (arXiv:2207.12598) for the null label.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InvalidArgument
from fastdiff.unet.config import UNetConfig

CLASS_MAP_SIZE = 8  # side of the map that the class encoder draws, before it is resized to the image


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps (Vaswani et al. 2017; Ho et al. 2020).

        w_i = 10000^(-i / (dim/2 - freq_shift)),    emb = [sin(t w), cos(t w)]      ([cos, sin] when flipped)

    t: [B]; returns float32 [B, dim] (float64 where t is float64), zero-padded when dim is odd.
    """
    half = dim // 2
    if t.dtype != torch.float64:
        t = t.float()
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    w = torch.exp(-math.log(10000.0) * i / (half - freq_shift)).to(t.dtype)
    angle = t[:, None] * w[None, :]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """MLP on the sinusoid: emb = W2 silu(W1 s + b1) + b2."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, s: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(s)))


class ClassProjection(nn.Module):
    """Label -> vector [B, features] that joins the sinusoid: W (sqrt(L) onehot(label)) + b, L classes; label L is b.

    As in NVlabs/edm, SongUNet.map_label, where no class is a vector of zeros.
    """

    def __init__(self, classes: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, classes))
        self.bias = nn.Parameter(torch.zeros(features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, labels: Tensor) -> Tensor:
        classes = self.weight.shape[1]
        onehot = F.one_hot(labels, classes + 1)[:, :classes].to(self.weight.dtype)
        return F.linear(onehot * math.sqrt(classes), self.weight, self.bias)


class ClassEncoder(nn.Module):
    """Label -> image of ``channels`` x H x W: an embedding, an MLP, and a smooth resize of the small map it draws.

    It depends on the label alone, so a sampler evaluates it once per image, not once per step.
    """

    def __init__(self, num_class_embeds: int, features: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_class_embeds, features)
        self.linear_1 = nn.Linear(features, features)
        self.linear_2 = nn.Linear(features, channels * CLASS_MAP_SIZE * CLASS_MAP_SIZE)
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
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        resample: str | None = None,
        scale_factor: float | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.scale_factor = float(config.block_scale_factor if scale_factor is None else scale_factor)
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.temb_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        shortcut = in_channels != out_channels or (resample is not None and config.resample_shortcut)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if shortcut else None

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x

    def second_norm(self, h: Tensor, emb: Tensor) -> Tensor:
        """h [B, C, H, W], norm2 and the projected embedding [B, C or 2 C, 1, 1], as the class says."""
        if not self.scale_shift:
            return self.norm2(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        x = self._resampled(x)
        h = self.second_norm(h, self.time_emb_proj(F.silu(emb))[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.scale_factor if self.scale_factor != 1.0 else x + h


class Attention(nn.Module):
    """Self-attention over all pixels: out = (x + W_o softmax(q k^T / sqrt(d)) v) / scale_factor, on GroupNorm(x)."""

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale_factor: float = 1.0):
        super().__init__()
        self.head_dim = head_dim
        self.heads = channels // self.head_dim
        self.scale_factor = scale_factor
        inner = self.heads * self.head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
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
    """3x3 convolution of stride 2; padding 0 means the original DDPM's asymmetric pad (right and bottom only)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """``layers_per_block`` residual blocks, each with attention where the type says so, then a halving of the size."""

    def __init__(self, config: UNetConfig, kind: str, in_channels: int, out_channels: int, downsample: bool):
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(config, in_channels if j == 0 else out_channels, out_channels) for j in range(layers)
        )
        attention = kind.startswith("Attn")
        self.attentions = _attentions(config, out_channels, layers) if attention else None
        # As in diffusers, downsample_type is heard by the attention block only; the other two names fix their own.
        resnet = kind == "ResnetDownsampleBlock2D" or (attention and config.downsample_type == "resnet")
        self.downsamplers = None
        if downsample:
            self.downsamplers = nn.ModuleList(
                [
                    ResnetBlock(config, out_channels, out_channels, resample="down")
                    if resnet
                    else Downsample(out_channels, config.downsample_padding)
                ]
            )

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
    """``layers_per_block + 1`` residual blocks on [h, skip], attention where the type says so, then a doubling.

    Attention stands behind all of the residual blocks, or (``up_attention="last"``) behind the last one.
    """

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
        if upsample:
            self.upsamplers = nn.ModuleList(
                [ResnetBlock(config, out_channels, out_channels, resample="up") if resnet else Upsample(out_channels)]
            )

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
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        factor = float(config.mid_block_scale_factor)
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels, scale_factor=factor) for _ in range(2))
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups  # as in diffusers: scale-shift networks have no norm before this attention
        self.attentions = None
        if config.add_attention:
            self.attentions = nn.ModuleList(
                [Attention(channels, config.head_dim(channels), groups, config.norm_eps, factor)]
            )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
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


class UNet(nn.Module):
    """The denoiser: ``unet(x, t, class_labels) -> out``.

    x: [B, in_channels, H, W] in the network's dtype, H and W multiples of ``config.stride``. t: [B] or a scalar, any
    real dtype. class_labels: int64 [B] (float for ``class_embed_type`` "timestep"; [B, temb] for "identity").
    Returns [B, out_channels, H, W].
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        features = config.temb_channels
        self.class_encoder = None
        in_channels = config.in_channels
        if config.class_image is not None:
            assert config.num_class_embeds is not None  # held by UNetConfig
            self.class_encoder = ClassEncoder(config.num_class_embeds, features, config.in_channels)
            in_channels *= 2 if config.class_image == "concat" else 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(config.sinusoid_channels, features)
        self.class_embedding = self._class_embedding(config)

        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            last = i == len(channels) - 1
            self.down_blocks.append(DownBlock(config, kind, channels[max(i - 1, 0)], channels[i], downsample=not last))
        self.mid_block = MidBlock(config, channels[-1]) if config.mid_block_type is not None else None
        self.up_blocks = nn.ModuleList()
        reverse = channels[::-1]
        for i, kind in enumerate(config.up_block_types):
            last = i == len(channels) - 1
            skip = reverse[min(i + 1, len(channels) - 1)]
            self.up_blocks.append(UpBlock(config, kind, reverse[max(i - 1, 0)], reverse[i], skip, upsample=not last))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @staticmethod
    def _class_embedding(config: UNetConfig) -> nn.Module | None:
        if config.class_image is not None:
            return None
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.sinusoid_channels, config.temb_channels)
        if config.class_embed_type == "identity":
            return nn.Identity()
        if config.class_before_mlp:
            assert config.num_classes is not None  # held by UNetConfig
            return ClassProjection(config.num_classes, config.sinusoid_channels)
        if config.num_class_embeds is not None:
            return nn.Embedding(config.num_class_embeds, config.temb_channels)
        return None

    def sinusoid(self, t: Tensor) -> Tensor:
        """The embedding of timesteps [B] that the time MLP hears, [B, config.sinusoid_channels]."""
        dtype = self.conv_in.weight.dtype
        t = t.double() if dtype == torch.float64 else t.float()
        return timestep_embedding(
            t * self.config.timestep_scale,
            self.config.sinusoid_channels,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        ).to(dtype)

    def embedding(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The vector [B, temb_channels] that every residual block hears: time, plus the class where it is added."""
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
        config = self.config
        if (class_labels is None) == config.conditional:
            need = "needs" if config.conditional else "has no class conditioning and takes no"
            raise InvalidArgument(f"this U-Net {need} class_labels")
        if x.shape[2] % config.stride or x.shape[3] % config.stride:
            raise InvalidArgument(
                f"height and width must be multiples of {config.stride} for this U-Net, not {x.shape[2]}x{x.shape[3]}"
            )
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
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

        h = self.conv_in(x)
        skips = [h]
        for down in self.down_blocks:
            h, more = down(h, emb)
            skips += more
        if self.mid_block is not None:
            h = self.mid_block(h, emb)
        for up in self.up_blocks:
            h = up(h, skips, emb)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def zero_residuals_(self) -> UNet:
        """Zero the last layer of every residual branch and the head, where Ho et al. start training: eps = 0."""
        heads: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                heads.append(module.conv2)
            elif isinstance(module, Attention):
                heads.append(module.to_out[0])
        for head in heads:
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path, **source: Any) -> UNet:
        """Load a folder, a checkpoint file, or a built-in model's name, with the options of `checkpoint.load`."""
        from fastdiff.checkpoints import load

        return load(path, **source).unet

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, atomically; diffusers loads the folder."""
        from fastdiff.checkpoints import save_unet

        save_unet(self, path)
