"""Lowering of a U-Net to a `Program`: the walk of `UNet.forward`, which emits fused operations instead of computing.

The text-conditioned U-Net (`UNetCondition`) and the decoder and encoder of an autoencoder (`Decoder`, `Encoder`)
consist of the same blocks and are lowered in the same way.

Fusion is decided here, while emitting. A GroupNorm and its SiLU go into the operation that reads the result; bias, time
embedding, residual and statistics go into the operation that writes; a concatenation is two sources; nearest doubling
is a flag of the convolution after it; the projections of an attention are one product before it and one after it, and
half as large where a single head allows them to merge.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.core.program import Attention, Buffer, Conv, Embed, Input, Norm, Op, Pool, Program, Shape
from fastdiff.errors import InvalidArgument
from fastdiff.modes import exact_products, plain_modes
from fastdiff.unet import UNet, UNetCondition, UNetConditionConfig, UNetConfig
from fastdiff.unet import model as modules
from fastdiff.unet.condition import ACTIVATIONS, ConditionDownBlock, ConditionMidBlock, ConditionUpBlock
from fastdiff.unet.decoder import Decoder, DecoderBlock
from fastdiff.unet.encoder import Encoder, EncoderBlock
from fastdiff.unet.tiny_decoder import TinyBlock, TinyDecoder
from fastdiff.unet.tiny_encoder import TinyEncoder
from fastdiff.unet.transformer import TextAttention, Transformer, TransformerBlock

TOKENS = 77  # of a text, where their number is not known: CLIP's
CHUNK = 64  # timesteps embedded at a time; fixed, so that an embedding's bits do not depend on their number
Coder: TypeAlias = Decoder | Encoder | TinyDecoder | TinyEncoder
Block: TypeAlias = (
    modules.DownBlock | modules.UpBlock | ConditionDownBlock | ConditionUpBlock | DecoderBlock | EncoderBlock
)


def lower(unet: UNet | UNetCondition, size: tuple[int, int], tokens: int = TOKENS) -> Program:
    """Lower a U-Net to a program for images of ``size`` (height, width); its weights may be on "meta".

    Each text of a text-conditioned U-Net has so many ``tokens``.
    """
    stride = unet.config.stride
    if any(v < 1 or v % stride for v in size):
        raise InvalidArgument(f"size={size}: height and width must be multiples of {stride} for this U-Net")
    if isinstance(unet, UNetCondition):
        _check_embedding(unet.config)
    elif unlowered(unet.config):
        raise InvalidArgument(f"this network cannot be lowered to a program: {'; '.join(unlowered(unet.config))}")
    return _Emitter(unet, size, tokens).program(unet)


def unlowered(config: UNetConfig) -> list[str]:
    """List the parts of a network that a program has no operation for."""
    reasons = []
    if config.time_embedding_type != "positional":
        reasons.append(f"it has no time_embedding_type {config.time_embedding_type!r}")
    kinds = sorted({kind for kind in config.down_block_types + config.up_block_types if "Skip" in kind})
    return reasons + ([f"it has no {', '.join(kinds)}"] if kinds else [])


def _check_embedding(config: UNetConditionConfig) -> None:
    """Refuse embeddings that a program has no operation for."""
    classes = config.class_embed_type is not None or config.num_class_embeds is not None
    added = config.addition_embed_type is not None
    if classes and added:
        raise InvalidArgument(
            f"addition_embed_type={config.addition_embed_type!r} of a network with classes cannot be lowered to a "
            "program"
        )
    if (classes or added) and config.time_embedding_act_fn is not None:
        raise InvalidArgument(
            f"time_embedding_act_fn={config.time_embedding_act_fn!r} of a network with classes or an added vector "
            "cannot be lowered to a program"
        )


def vector_kind(unet: nn.Module) -> str | None:
    """Return which vector enters the time embedding of a network besides the timestep; None where there is none.

    It is "class", or of a text-conditioned U-Net "added" (SDXL's text_time) or "condition" (LCM's timestep_cond, where
    nothing else is added and no activation is between the layers of the time MLP and those of the blocks).
    """
    if getattr(unet, "class_embedding", None) is not None:
        return "class"
    if not isinstance(unet, UNetCondition):
        return None
    if unet.add_embedding is not None:
        return "added"
    config = unet.config
    plain = config.timestep_post_act is None and config.time_embedding_act_fn is None
    return "condition" if config.time_cond_proj_dim is not None and plain else None


def vector_width(unet: UNetCondition) -> int | None:
    """Return the width of the vector of `vector_kind`, before any layer; None where there is none."""
    config, kind = unet.config, vector_kind(unet)
    if kind == "condition":
        return config.time_cond_proj_dim
    if kind == "class" and config.class_embed_type == "identity":
        return config.temb_channels
    return None if kind is None else config.projection_class_embeddings_input_dim


@plain_modes()
def added_vector(unet: UNetCondition, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
    """Return the input of the MLP of text_time, [B, D]: the pooled texts, and the sinusoids of ``time_ids``."""
    width = unet.config.addition_time_embed_dim
    assert width is not None
    sizes = unet.sinusoid(time_ids.flatten(), width).reshape(len(time_ids), time_ids.shape[1] * width)
    return torch.cat([text_embeds.to(sizes.dtype), sizes], dim=1)


def lower_coder(coder: Coder, size: tuple[int, int]) -> Program:
    """Lower a decoder or encoder to a program for latents or images of ``size``; its weights may be on "meta".

    The program begins behind ``coder.prepared`` and ends before ``coder.finished``.
    """
    emitter = _Emitter(coder, size)
    if isinstance(coder, Encoder):
        return emitter.encoder(coder)
    return emitter.decoder(coder) if isinstance(coder, Decoder) else emitter.tiny(coder)


def projection_keys(unet: nn.Module) -> list[str]:
    """Return the key prefixes of every block's time projection, in the order in which ``projections`` holds them."""
    blocks = ((name, m) for name, m in unet.named_modules() if isinstance(m, modules.ResnetBlock))
    return [f"{name}.time_emb_proj" for name, m in blocks if m.time_emb_proj is not None]


def text_attentions(unet: nn.Module) -> dict[str, TextAttention]:
    """Return the attentions to a text, by the name of the external buffer of their keys and values."""
    found: dict[str, TextAttention] = {}
    for name, m in unet.named_modules():
        if isinstance(m, TransformerBlock):
            found |= {f"{name}.attn1.text": m.attn1} if m.only_text else {}
            found[f"{name}.attn2.text"] = m.attn2
    return found


@plain_modes()
@exact_products()
def embed_timesteps(unet: UNet | UNetCondition, t: Tensor) -> Tensor:
    """Compute the part of the network that depends on the timesteps t [n] alone; once per table, not once per step.

    The result [n, features] has the rows of the external buffer ``time`` where classes are embedded, else of
    ``projections``.
    """
    padded = F.pad(t, (0, -len(t) % CHUNK))
    parts = []
    for chunk in padded.split(CHUNK):
        if isinstance(unet, UNetCondition):
            sinusoid = unet.sinusoid(chunk, unet.config.block_out_channels[0])
            if vector_kind(unet) == "condition":
                parts.append(unet.time_embedding.linear_1(sinusoid))
                continue
            emb = unet.time_embedding(sinusoid)
            activation = unet.config.time_embedding_act_fn
            emb = emb if activation is None else ACTIVATIONS[activation](emb)  # such a network has no classes here
        elif unet.config.class_before_mlp:
            parts.append(unet.time_embedding.linear_1(unet.sinusoid(chunk)))
            continue
        else:
            emb = unet.time_embedding(unet.sinusoid(chunk))
        if vector_kind(unet) is None:
            emb = F.silu(emb)
            emb = torch.cat([unet.get_submodule(key)(emb) for key in projection_keys(unet)], dim=1)
        parts.append(emb)
    return torch.cat(parts)[: len(t)]


@plain_modes()
@exact_products()
def embed_classes(unet: UNet) -> Tensor:
    """Compute the rows of the external buffer ``class``, one for each label: [labels, features].

    Where classes are added before the time MLP, whose first layer is linear, the sum moves behind that layer:
    W1 (s + c) + b1 = (W1 s + b1) + W1 c, and both parts become tables.
    """
    embedding = unet.class_embedding
    if isinstance(embedding, modules.ClassProjection):
        labels = torch.arange(embedding.weight.shape[1] + 1, dtype=torch.int64, device=embedding.weight.device)
        return F.linear(embedding(labels), unet.time_embedding.linear_1.weight)
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight


@plain_modes()
@exact_products()
def embed_text(unet: UNetCondition, states: Tensor, vector: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute the part of the network that depends on a text alone; once per text, not once per step.

    ``states`` are [tokens, channels], and ``vector`` is that of `vector_kind`; None stands for zeros where it is LCM's.
    The result has the row of each external buffer ``<key>.text``, [tokens, C], and that of ``class``, [features]. Each
    text is computed by itself, so that its bits do not depend on others.
    """
    if unet.encoder_hid_proj is not None:
        states = unet.encoder_hid_proj(states)
    rows = {name: torch.cat([m.to_k(states), m.to_v(states)], dim=1) for name, m in text_attentions(unet).items()}
    kind, embedded = vector_kind(unet), None
    if kind == "condition":
        # It joins before the time MLP, whose first layer is linear: W1 (s + W c) + b1 = (W1 s + b1) + W1 W c.
        first, project = unet.time_embedding.linear_1.weight, unet.time_embedding.cond_proj
        assert project is not None
        embedded = first.new_zeros(len(first)) if vector is None else F.linear(project(vector), first)
    elif kind is not None:
        embed = unet.class_embedding if kind == "class" else unet.add_embedding
        assert embed is not None
        assert vector is not None
        embedded = embed(vector[None])[0]
    return rows, embedded


class _Emitter:
    """Collector of operations and buffers. Methods that emit return the name of the buffer they write."""

    def __init__(self, network: nn.Module, size: tuple[int, int], tokens: int = 0):
        self.network = network
        self.size = size
        self.tokens = tokens
        self.ops: list[Op] = []
        self.buffers: dict[str, Buffer] = {}
        self.emb: dict[str, int] = {}
        self.width = 0
        for key in projection_keys(network):
            self.emb[key] = self.width
            projection = network.get_submodule(key)
            assert isinstance(projection, nn.Linear)
            self.width += projection.out_features

    def buffer(self, name: str, shape: Shape, external: bool = False) -> str:
        self.buffers[name] = Buffer(name, shape, external)
        return name

    def program(self, unet: UNet | UNetCondition) -> Program:
        config = unet.config
        class_image = config.class_image if isinstance(config, UNetConfig) else None
        H, W = self.size
        self._embedding(unet)
        src = [self.buffer("x", (H, W, config.in_channels), external=True)]
        if class_image is not None:
            src.append(self.buffer("class_image", (H, W, config.in_channels), external=True))
        dst = self.buffer("input", (H, W, unet.conv_in.in_channels))
        self.ops.append(Input(dst, tuple(src), config.center_input_sample, class_image))

        h = self._conv("conv_in", (dst,))
        skips = [h]
        for i, down in enumerate(unet.down_blocks):
            assert isinstance(down, modules.DownBlock | ConditionDownBlock)
            for j in range(len(down.resnets)):
                h = self._layer(f"down_blocks.{i}", down, j, (h,))
                skips.append(h)
            if down.downsamplers is not None:
                h = self._resampled(f"down_blocks.{i}.downsamplers.0", h)
                skips.append(h)
        if unet.mid_block is not None:
            h = self._mid(unet.mid_block, h)
        for i, up in enumerate(unet.up_blocks):
            assert isinstance(up, modules.UpBlock | ConditionUpBlock)
            for j in range(len(up.resnets)):
                h = self._layer(f"up_blocks.{i}", up, j, (h, skips.pop()))
            if up.upsamplers is not None:
                h = self._resampled(f"up_blocks.{i}.upsamplers.0", h)
        return self._finished(h, config.out_channels)

    def decoder(self, decoder: Decoder) -> Program:
        h = self._conv("conv_in", (self._given(decoder),))
        h = self._mid(decoder.mid_block, h)
        for i, up in enumerate(decoder.up_blocks):
            assert isinstance(up, DecoderBlock)
            for j in range(len(up.resnets)):
                h = self._layer(f"up_blocks.{i}", up, j, (h,))
            if up.upsamplers is not None:
                h = self._resampled(f"up_blocks.{i}.upsamplers.0", h)
        return self._finished(h, decoder.config.out_channels)

    def encoder(self, encoder: Encoder) -> Program:
        h = self._conv("conv_in", (self._given(encoder),))
        for i, down in enumerate(encoder.down_blocks):
            assert isinstance(down, EncoderBlock)
            for j in range(len(down.resnets)):
                h = self._layer(f"down_blocks.{i}", down, j, (h,))
            if down.downsamplers is not None:
                h = self._resampled(f"down_blocks.{i}.downsamplers.0", h)
        return self._finished(self._mid(encoder.mid_block, h), encoder.config.out_channels)

    def _given(self, coder: Coder) -> str:
        return self.buffer("given", (*self.size, coder.in_channels), external=True)

    def tiny(self, coder: TinyDecoder | TinyEncoder) -> Program:
        h = self._given(coder)
        upsample = False
        last = len(coder.layers) - 1
        for i, layer in enumerate(coder.layers):
            if isinstance(layer, TinyBlock):
                x = h
                for j, residual in ((0, None), (2, None), (4, x)):
                    h = self._conv(f"layers.{i}.conv.{j}", (h,), residual=residual, relu=True)
            elif isinstance(layer, nn.Conv2d):
                if i == last:
                    H, W, _ = self.buffers[h].shape
                    self.buffer("out", (H, W, layer.out_channels), external=True)
                dst = "out" if i == last else None
                relu = isinstance(coder, TinyDecoder) and i == 0
                h = self._conv(f"layers.{i}", (h,), upsample=upsample, relu=relu, dst=dst)
            upsample = isinstance(layer, nn.Upsample)
        return Program(tuple(self.ops), self.buffers)

    def _mid(self, block: modules.MidBlock | ConditionMidBlock, h: str) -> str:
        h = self._resnet("mid_block.resnets.0", (h,))
        if block.attentions:
            h = self._attended("mid_block.attentions.0", h)
        return h if len(block.resnets) == 1 else self._resnet("mid_block.resnets.1", (h,))

    def _finished(self, h: str, channels: int) -> Program:
        H, W, _ = self.buffers[h].shape
        self.buffer("out", (H, W, channels), external=True)
        self._conv("conv_out", (h,), norm=self._norm("conv_norm_out", silu=True), dst="out")
        return Program(tuple(self.ops), self.buffers)

    def _embedding(self, unet: UNet | UNetCondition) -> None:
        kind = vector_kind(unet)
        if kind is None:
            self.buffer("projections", (1, 1, self.width), external=True)
            return
        features = unet.config.temb_channels
        src: tuple[str, ...] = (
            self.buffer("time", (1, 1, features), external=True),
            self.buffer("class", (1, 1, features), external=True),
        )
        if kind == "condition" or (isinstance(unet, UNet) and unet.config.class_before_mlp):
            hidden = self.buffer("hidden", (1, 1, features))
            self.ops.append(Embed(hidden, src))
            src = (self._conv("time_embedding.linear_2", (hidden,)),)
        self.ops.append(Embed(self.buffer("emb", (1, 1, features)), src))
        self.buffer("projections", (1, 1, self.width))
        self.ops.append(Conv("projections", ("emb",), tuple(self.emb), kernel=1, padding=(0, 0)))

    def _norm(self, key: str, silu: bool, modulation: int | None = None) -> Norm:
        module = self.network.get_submodule(key)
        if isinstance(module, nn.LayerNorm):
            return Norm(key, 0, module.eps, silu)
        assert isinstance(module, nn.GroupNorm)
        return Norm(key, module.num_groups, module.eps, silu, modulation)

    def _measured(self, src: tuple[str, ...], norm: Norm | None) -> None:
        """Request the statistics of ``src`` if a norm is going to read them."""
        for name in src if norm is not None and norm.groups else ():
            self.buffers[name] = dataclasses.replace(self.buffers[name], statistics=True)

    def _conv(
        self,
        keys: str | tuple[str, ...],
        src: tuple[str, ...],
        *,
        dst: str | None = None,
        upsample: bool = False,
        padding: tuple[int, int] | None = None,
        norm: Norm | None = None,
        emb: int | None = None,
        residual: str | None = None,
        divide: float = 1.0,
        merged: str | None = None,
        channels: int | None = None,
        geglu: bool = False,
        relu: bool = False,
    ) -> str:
        """Emit a convolution or linear layer, whose sizes are those of the module at the first of ``keys``."""
        keys = (keys,) if isinstance(keys, str) else keys
        layers = [self.network.get_submodule(key) for key in keys]
        kernel = stride = 1
        circular = False
        if isinstance(layers[0], nn.Conv2d):
            (kernel, _), (stride, _) = layers[0].kernel_size, layers[0].stride
            circular = layers[0].padding_mode == "circular"
        padding = padding or (kernel // 2, kernel // 2)
        H, W, _ = self.buffers[src[0]].shape
        H, W = ((v * (1 + upsample) + sum(padding) - kernel) // stride + 1 for v in (H, W))
        if channels is None:
            channels = 0
            for layer in layers:
                assert isinstance(layer.weight, Tensor)
                channels += layer.weight.shape[0] // (1 + geglu)
        dst = dst or self.buffer(keys[0], (H, W, channels))
        self._measured(src, norm)
        self.ops.append(
            Conv(
                dst, src, keys, kernel, stride, padding, upsample, norm, emb, residual, divide, merged, circular,
                geglu, relu, bias=layers[0].bias is not None,
            )
        )  # fmt: skip
        return dst

    def _layer(
        self,
        key: str,
        block: Block,
        j: int,
        src: tuple[str, ...],
    ) -> str:
        """Emit a residual block and, if the block has one there, its attention or transformer."""
        h = self._resnet(f"{key}.resnets.{j}", src)
        j -= len(block.resnets) - len(block.attentions or ())
        return h if j < 0 else self._attended(f"{key}.attentions.{j}", h)

    def _attended(self, key: str, x: str) -> str:
        transforms = isinstance(self.network.get_submodule(key), Transformer)
        return self._transformer(key, x) if transforms else self._attention(key, x)

    def _transformer(self, key: str, x: str) -> str:
        transformer = self.network.get_submodule(key)
        assert isinstance(transformer, Transformer)
        h = self._conv(f"{key}.proj_in", (x,), norm=self._norm(f"{key}.norm", silu=False))
        for i, block in enumerate(transformer.transformer_blocks):
            assert isinstance(block, TransformerBlock)
            at = f"{key}.transformer_blocks.{i}"
            attend = self._text_attention if block.only_text else self._self_attention
            h = attend(f"{at}.attn1", block.attn1, h, self._norm(f"{at}.norm1", silu=False))
            h = self._text_attention(f"{at}.attn2", block.attn2, h, self._norm(f"{at}.norm2", silu=False))
            gated = self._conv(f"{at}.ff.net.0.proj", (h,), norm=self._norm(f"{at}.norm3", silu=False), geglu=True)
            h = self._conv(f"{at}.ff.net.2", (gated,), residual=h)
        return self._conv(f"{key}.proj_out", (h,), residual=x)

    def _self_attention(self, key: str, attention: TextAttention, x: str, norm: Norm) -> str:
        H, W, C = self.buffers[x].shape
        qkv = self._conv((f"{key}.to_q", f"{key}.to_k", f"{key}.to_v"), (x,), norm=norm)
        core = self.buffer(f"{key}.core", (H, W, C))
        self.ops.append(Attention(core, (qkv,), attention.heads, C // attention.heads))
        return self._conv(f"{key}.to_out.0", (core,), residual=x)

    def _text_attention(self, key: str, attention: TextAttention, x: str, norm: Norm) -> str:
        H, W, C = self.buffers[x].shape
        q = self._conv(f"{key}.to_q", (x,), norm=norm)
        text = self.buffer(f"{key}.text", (1, self.tokens, 2 * C), external=True)
        core = self.buffer(f"{key}.core", (H, W, C))
        self.ops.append(Attention(core, (q, text), attention.heads, C // attention.heads, text=True))
        return self._conv(f"{key}.to_out.0", (core,), residual=x)

    def _resnet(self, key: str, src: tuple[str, ...]) -> str:
        block = self.network.get_submodule(key)
        assert isinstance(block, modules.ResnetBlock)
        emb = self.emb.get(f"{key}.time_emb_proj")
        norm: Norm | None = self._norm(f"{key}.norm1", silu=True)
        h = src
        if block.resample == "down":
            h, norm, src = (self._pool(f"{key}.pool1", src, norm),), None, (self._pool(f"{key}.pool", src, None),)
        upsample = block.resample == "up"
        first = self._conv(f"{key}.conv1", h, upsample=upsample, norm=norm, emb=None if block.scale_shift else emb)
        # Only concatenations, which always have a shortcut, come from two sources.
        residual = src[0] if block.conv_shortcut is None else self._conv(f"{key}.conv_shortcut", src)
        norm = self._norm(f"{key}.norm2", silu=True, modulation=emb if block.scale_shift else None)
        return self._conv(f"{key}.conv2", (first,), norm=norm, residual=residual, divide=block.scale_factor)

    def _pool(self, name: str, src: tuple[str, ...], norm: Norm | None) -> str:
        H, W, C = self.buffers[src[0]].shape
        self._measured(src, norm)
        self.ops.append(Pool(self.buffer(name, (H // 2, W // 2, C)), src, norm))
        return name

    def _attention(self, key: str, x: str) -> str:
        block = self.network.get_submodule(key)
        assert isinstance(block, modules.Attention)
        norm = None if block.group_norm is None else self._norm(f"{key}.group_norm", silu=False)
        H, W, C = self.buffers[x].shape
        to_q, to_k, to_v, to_out = (f"{key}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
        core = self.buffer(f"{key}.core", (H, W, block.heads * block.head_dim))
        out: tuple[str, ...] = (to_out,)
        merged = None
        if (block.heads, block.head_dim) == (1, C):
            q = self._conv((to_k, to_q), (x,), norm=norm, merged="first transposed", channels=C)
            self.ops.append(Attention(core, (q, x), 1, C, norm))
            out, merged = (to_out, to_v), "in turn"
        else:
            qkv = self._conv((to_q, to_k, to_v), (x,), norm=norm)
            self.ops.append(Attention(core, (qkv,), block.heads, block.head_dim))
        return self._conv(out, (core,), residual=x, divide=block.scale_factor, merged=merged, channels=C)

    def _resampled(self, key: str, h: str) -> str:
        block = self.network.get_submodule(key)
        if isinstance(block, modules.ResnetBlock):
            return self._resnet(key, (h,))
        if isinstance(block, modules.Upsample):
            return self._conv(f"{key}.conv", (h,), upsample=True)
        assert isinstance(block, modules.Downsample)
        return self._conv(f"{key}.conv", (h,), padding=(block.padding, 1))
