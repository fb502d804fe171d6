"""The text-conditioned U-Net of latent diffusion: the blocks of `fastdiff.unet.model` with transformers between them.

This module defines what the network computes. The keys of state dicts and configurations are those of diffusers'
``UNet2DConditionModel``, the network of Stable Diffusion 1, 2 and XL, so that each loads the weights of the other.

Sources: Rombach et al. 2022 (arXiv:2112.10752); Podell et al. 2023 (arXiv:2307.01952) for the added vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.unet.condition_config import CROSS, UNetConditionConfig
from fastdiff.unet.model import (
    DTYPE,
    Attention,
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
    zero_last_layers,
)
from fastdiff.unet.transformer import Transformer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu,
}  # fmt: skip
ADDED = ("text_embeds", "time_ids")  # the keys of ``added_cond_kwargs``


class GuidedTimestepEmbedding(TimestepEmbedding):
    """Time MLP to whose input a vector is added, W_c c, and which ends with an activation where it has one."""

    def __init__(self, in_features: int, out_features: int, condition: int | None, activation: str | None):
        super().__init__(in_features, out_features)
        self.cond_proj = None if condition is None else nn.Linear(condition, in_features, bias=False, dtype=DTYPE)
        self.activation = activation

    def forward(self, s: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            assert self.cond_proj is not None
            s = s + self.cond_proj(condition)
        emb = super().forward(s)
        return emb if self.activation is None else ACTIVATIONS[self.activation](emb)


def _transformer(config: UNetConditionConfig, level: int, depth: int, only_text: bool) -> Transformer:
    return Transformer(
        config.block_out_channels[level],
        heads=config.level("attention_head_dim", level),
        context_channels=config.level("cross_attention_dim", level),
        depth=depth,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        only_text=only_text,
    )


class _Block(nn.Module):
    """Residual blocks at one level, each with what follows it: a transformer, self-attention, or nothing."""

    def __init__(
        self,
        config: UNetConditionConfig,
        kind: str,
        level: int,
        in_channels: list[int],
        depths: tuple[int, ...],
        head_dim: int,
    ):
        super().__init__()
        channels = config.block_out_channels[level]
        self.scale_factor = float(config.resnet_out_scale_factor) if kind.startswith("Resnet") else 1.0
        self.resnets = nn.ModuleList(ResnetBlock(config, c, channels, None, self.scale_factor) for c in in_channels)
        self.reads_text = kind.startswith(CROSS)
        self.attentions = None
        if self.reads_text:
            only_text = config.level("only_cross_attention", level)
            self.attentions = nn.ModuleList(_transformer(config, level, depth, only_text) for depth in depths)
        elif kind.startswith("Attn"):
            groups, eps = config.norm_num_groups, config.norm_eps
            self.attentions = nn.ModuleList(Attention(channels, head_dim, groups, eps) for _ in in_channels)

    def layer(self, j: int, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """Apply a residual block and what follows it."""
        x = self.resnets[j](x, emb)
        if self.attentions is None:
            return x
        return self.attentions[j](x, context) if self.reads_text else self.attentions[j](x)


class ConditionDownBlock(_Block):
    """Residual blocks with what follows them, and a downsampler at all levels but the last."""

    def __init__(self, config: UNetConditionConfig, level: int):
        widths, kind = config.block_out_channels, config.down_block_types[level]
        layers = config.level("layers_per_block", level)
        in_channels = [widths[max(level - 1, 0)]] + [widths[level]] * (layers - 1)
        head_dim = config.level("attention_head_dim", level)
        super().__init__(config, kind, level, in_channels, config.down_depths(level), head_dim)
        self.downsamplers = None
        if level < len(widths) - 1 and kind.startswith("Resnet"):
            down = ResnetBlock(config, widths[level], widths[level], "down", self.scale_factor)
            self.downsamplers = nn.ModuleList([down])
        elif level < len(widths) - 1:
            self.downsamplers = nn.ModuleList([Downsample(widths[level], config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, emb, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x, emb)
            skips.append(x)
        return x, skips


class ConditionUpBlock(_Block):
    """Residual blocks on [h, skip] with what follows them, and an upsampler at all levels but the first."""

    def __init__(self, config: UNetConditionConfig, i: int):
        widths, kind = config.block_out_channels[::-1], config.up_block_types[i]
        level = len(widths) - 1 - i
        layers = config.level("layers_per_block", level) + 1
        skip = widths[min(i + 1, len(widths) - 1)]
        in_channels = [
            (widths[max(i - 1, 0)] if j == 0 else widths[i]) + (skip if j == layers - 1 else widths[i])
            for j in range(layers)
        ]
        # diffusers reverses this list for the number of heads, but not for the width of a head.
        head_dim = config.level("attention_head_dim", i)
        super().__init__(config, kind, level, in_channels, config.up_depths(i), head_dim)
        self.upsamplers = None
        if level > 0 and kind.startswith("Resnet"):
            self.upsamplers = nn.ModuleList([ResnetBlock(config, widths[i], widths[i], "up", self.scale_factor)])
        elif level > 0:
            self.upsamplers = nn.ModuleList([Upsample(widths[i])])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None) -> Tensor:
        for j in range(len(self.resnets)):
            x = self.layer(j, torch.cat([x, skips.pop()], dim=1), emb, context)
        if self.upsamplers is None:
            return x
        up = self.upsamplers[0]
        # The next skip's size is twice that of x, or one less where the downsampler rounded up.
        return up(x, emb, skips[-1].shape[2:]) if isinstance(up, Upsample) else up(x, emb)


class ConditionMidBlock(nn.Module):
    """Residual block, transformer and residual block at the lowest resolution; or the first residual block alone."""

    def __init__(self, config: UNetConditionConfig):
        super().__init__()
        level, factor = len(config.block_out_channels) - 1, float(config.mid_block_scale_factor)
        channels, reads_text = config.block_out_channels[level], config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nn.ModuleList(
            ResnetBlock(config, channels, channels, None, factor) for _ in range(2 if reads_text else 1)
        )
        self.attentions = nn.ModuleList()
        if reads_text:
            self.attentions.append(_transformer(config, level, config.mid_depth, only_text=False))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), emb)
        return x


class UNetCondition(nn.Module):
    """The denoising network of a text-conditioned model: ``unet(x, t, text) -> out``.

    Weights are initialised as torch does by default. State-dict keys are those of diffusers' ``UNet2DConditionModel``.

    Args:
        config: The configuration, which stays available as ``unet.config``.
    """

    @plain_modes()
    def __init__(self, config: UNetConditionConfig):
        super().__init__()
        self.config = config
        channels, features = config.block_out_channels, config.temb_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1, dtype=DTYPE)
        self.time_embedding = GuidedTimestepEmbedding(
            channels[0], features, config.time_cond_proj_dim, config.timestep_post_act
        )
        self.encoder_hid_proj = None
        if config.encoder_hid_dim is not None:
            assert isinstance(config.cross_attention_dim, int)  # UNetConditionConfig ensures this
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim, dtype=DTYPE)
        self.class_embedding = self._class_embedding(config)
        self.add_embedding = None
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # UNetConditionConfig ensures this
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, features)
        levels = range(len(channels))
        self.down_blocks = nn.ModuleList(ConditionDownBlock(config, i) for i in levels)
        self.mid_block = None if config.mid_block_type is None else ConditionMidBlock(config)
        self.up_blocks = nn.ModuleList(ConditionUpBlock(config, i) for i in levels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps, dtype=DTYPE)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1, dtype=DTYPE)

    @staticmethod
    def _class_embedding(config: UNetConditionConfig) -> nn.Module | None:
        features, width = config.temb_channels, config.projection_class_embeddings_input_dim
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.block_out_channels[0], features)
        if config.class_embed_type == "identity":
            return nn.Identity()
        if config.class_embed_type == "projection":
            assert width is not None  # UNetConditionConfig ensures this
            return TimestepEmbedding(width, features)
        if config.class_embed_type == "simple_projection":
            assert width is not None  # UNetConditionConfig ensures this
            return nn.Linear(width, features, dtype=DTYPE)
        if config.num_class_embeds is not None:
            return nn.Embedding(config.num_class_embeds, features, dtype=DTYPE)
        return None

    def sinusoid(self, t: Tensor, width: int) -> Tensor:
        """Compute the sinusoidal embedding of numbers, such as timesteps.

        Args:
            t: The numbers [n], of any real dtype.
            width: Width of the embedding.

        Returns:
            The embedding [n, width] in the network's dtype.
        """
        config, dtype = self.config, self.conv_in.weight.dtype
        t = t.double() if dtype == torch.float64 else t.float()
        emb = timestep_embedding(t, width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
        return emb.to(dtype)

    def embedding(
        self,
        t: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the vector that conditions every residual block: on the time, a class, and an added vector.

        Args:
            t: Timesteps [B].
            class_labels: As in `forward`.
            timestep_cond: As in `forward`.
            added_cond_kwargs: As in `forward`.

        Returns:
            The embedding [B, config.temb_channels].
        """
        config = self.config
        emb = self.time_embedding(self.sinusoid(t, config.block_out_channels[0]), timestep_cond)
        if self.class_embedding is not None:
            assert class_labels is not None
            if config.class_embed_type == "timestep":
                class_labels = self.sinusoid(class_labels, config.block_out_channels[0])
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        if self.add_embedding is not None:
            assert added_cond_kwargs is not None
            assert config.addition_time_embed_dim is not None
            text, ids = (added_cond_kwargs[key] for key in ADDED)
            width = config.addition_time_embed_dim
            sizes = self.sinusoid(ids.flatten(), width).reshape(len(text), ids.shape[1] * width)
            emb = emb + self.add_embedding(torch.cat([text.to(emb.dtype), sizes], dim=-1))
        return emb if config.time_embedding_act_fn is None else ACTIVATIONS[config.time_embedding_act_fn](emb)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: Noisy images or latents [B, in_channels, H, W] in the network's dtype, of any size, unless an up block is
                of type "AttnUpBlock2D" or "ResnetUpsampleBlock2D": then H and W are multiples of 2^(levels - 1).
            t: Timesteps, [B] or a scalar, of any real dtype; fractions are not rounded.
            encoder_hidden_states: States of the text [B, tokens, config.context_channels] in the network's dtype. All
                tokens are attended to, those that pad a text as well. None for a network that reads no text.
            class_labels: Labels, int64 [B]; for the other types of ``config.class_embed_type`` real numbers [B]
                ("timestep") or vectors [B, width]. None for a network without class conditioning.
            timestep_cond: Vectors [B, config.time_cond_proj_dim], such as LCM's embedding of the guidance; None for
                none.
            added_cond_kwargs: For "text_time": ``text_embeds`` [B, D] and ``time_ids`` [B, n], where
                D + n * config.addition_time_embed_dim = config.projection_class_embeddings_input_dim. Else None.

        Returns:
            The prediction [B, out_channels, H, W] in the network's dtype.

        Raises:
            InvalidArgument: If an input is missing, not expected, or of another shape or dtype.
        """
        config = self.config
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        self._check_images(x, t)
        self._check_text(x, encoder_hidden_states)
        self._check_vectors(len(x), class_labels, timestep_cond, added_cond_kwargs)
        emb = self.embedding(t.to(x.device).expand(x.shape[0]), class_labels, timestep_cond, added_cond_kwargs)
        context = encoder_hidden_states
        if self.encoder_hid_proj is not None and context is not None:
            context = self.encoder_hid_proj(context)
        h = self.conv_in(2 * x - 1.0 if config.center_input_sample else x)
        skips = [h]
        for down in self.down_blocks:
            h, more = down(h, emb, context)
            skips += more
        if self.mid_block is not None:
            h = self.mid_block(h, emb, context)
        for up in self.up_blocks:
            h = up(h, skips, emb, context)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _check_images(self, x: Tensor, t: Tensor) -> None:
        config, dtype = self.config, self.conv_in.weight.dtype
        if x.ndim != 4 or x.shape[1] != config.in_channels or 0 in x.shape or x.dtype != dtype:
            raise InvalidArgument(
                f"x is {_described(x)}; [B, {config.in_channels}, H, W] in {dtype}, the network's dtype, is needed"
            )
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))) or t.is_complex():
            raise InvalidArgument(f"t is {_described(t)}; a number, or one for each of the {len(x)} images, is needed")
        stride = 1 << (len(config.block_out_channels) - 1)
        fixed = [kind for kind in config.up_block_types[:-1] if kind in ("AttnUpBlock2D", "ResnetUpsampleBlock2D")]
        if fixed and (x.shape[2] % stride or x.shape[3] % stride):
            raise InvalidArgument(
                f"height and width must be multiples of {stride} for this U-Net with blocks of type {fixed[0]}, not "
                f"{x.shape[2]}x{x.shape[3]}"
            )

    def _check_text(self, x: Tensor, text: Tensor | None) -> None:
        width, dtype = self.config.context_channels, self.conv_in.weight.dtype
        if width is None:
            if text is not None:
                raise InvalidArgument("this U-Net reads no text and takes no encoder_hidden_states")
            return
        fits = isinstance(text, Tensor) and text.ndim == 3 and len(text) == len(x) and text.shape[2] == width
        if text is None or not fits or text.shape[1] == 0 or text.dtype != dtype:
            raise InvalidArgument(
                f"encoder_hidden_states is {_described(text)}; the states of a text for each image are needed, "
                f"[{len(x)}, tokens, {width}] in {dtype}"
            )

    def _check_vectors(
        self, B: int, labels: Tensor | None, condition: Tensor | None, added: Mapping[str, Tensor] | None
    ) -> None:
        """Check the inputs that enter the embedding."""
        config = self.config
        if (labels is None) != (self.class_embedding is None):
            need = "has no class conditioning and takes no" if self.class_embedding is None else "needs"
            raise InvalidArgument(f"this U-Net {need} class_labels")
        if labels is not None:
            width = {"identity": config.temb_channels, "projection": config.projection_class_embeddings_input_dim}
            width["simple_projection"] = width["projection"]
            shape = (B, width[config.class_embed_type]) if config.class_embed_type in width else (B,)
            whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
            if tuple(labels.shape) != shape or (isinstance(self.class_embedding, nn.Embedding) and not whole):
                raise InvalidArgument(f"class_labels is {_described(labels)}; the shape {list(shape)} is needed")
        if condition is not None:
            shape = (B, config.time_cond_proj_dim)
            if config.time_cond_proj_dim is None or tuple(condition.shape) != shape:
                need = "no time_cond_proj_dim" if config.time_cond_proj_dim is None else f"{list(shape)}"
                raise InvalidArgument(f"timestep_cond is {_described(condition)}; this U-Net has {need}")
        if self.add_embedding is None:
            if added:
                raise InvalidArgument(f"this U-Net has no addition_embed_type and takes no {', '.join(sorted(added))}")
            return
        if added is None or set(added) != set(ADDED) or any(v.ndim != 2 or len(v) != B for v in added.values()):
            given = "None" if added is None else {k: _described(v) for k, v in added.items()}
            raise InvalidArgument(f"added_cond_kwargs is {given}; {' and '.join(ADDED)} are needed, [{B}, n] each")
        assert config.addition_time_embed_dim is not None
        text, ids = (added[key] for key in ADDED)
        found = text.shape[1] + ids.shape[1] * config.addition_time_embed_dim
        if found != config.projection_class_embeddings_input_dim:
            raise InvalidArgument(
                f"text_embeds {list(text.shape)} and time_ids {list(ids.shape)}, each embedded in "
                f"{config.addition_time_embed_dim} numbers, give {found} in all; "
                f"{config.projection_class_embeddings_input_dim} are needed"
            )

    def zero_residuals_(self) -> UNetCondition:
        """Zero the last layer of every residual branch and of the network, as Ho et al. 2020 do before training.

        Residual blocks that change neither channels nor size are then the identity, as are transformers, and the
        network's output is 0.

        Returns:
            The network itself.
        """
        zero_last_layers(self, self.conv_out, *(m.proj_out for m in self.modules() if isinstance(m, Transformer)))
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path, **source: Any) -> UNetCondition:
        """Load a network from the folder of a diffusers pipeline, or of its ``unet``.

        Args:
            path: The folder.
            **source: variant, weights and subfolder, as in `fastdiff.checkpoints.load`; and torch_dtype, the dtype of
                the network, as in diffusers.

        Returns:
            The network in float32, or in torch_dtype, on the CPU, in evaluation mode.

        Raises:
            InvalidArgument: If there is no such option.
            CheckpointError: If a file cannot be read, or its tensors do not fit the network.
            ConfigError: If the configuration is not supported.
        """
        from fastdiff.checkpoints.conditional import load_condition

        return load_condition(path, **source)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} in {value.dtype}"
