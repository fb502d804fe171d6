"""The original code bases' networks, short and independent of fastdiff, as references for its conversions.

They are written from the published code of hojonathanho/diffusion and its PyTorch ports (pesser, ermongroup), openai/
improved-diffusion, openai/guided-diffusion and NVlabs/edm, with their names, so that ``state_dict()`` is the layout of
their files. Where the originals cast to float32, these keep float64.

Frequencies are float32 as in the originals. The order of their operations, which differs between the code bases by a
rounding, is the same for all here, so that networks can be compared in float64; `test_layouts` compares them with each
original.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def frequencies(half: int, endpoint: bool) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - endpoint))


def angles(t: Tensor, half: int, endpoint: bool) -> Tensor:
    return t[:, None] * frequencies(half, endpoint).to(t.dtype)[None]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of q, k and v, [..., C, T] each."""
    scale = 1 / math.sqrt(math.sqrt(q.shape[-2]))
    weights = torch.softmax((q * scale).transpose(-1, -2) @ (k * scale), dim=-1)
    return v @ weights.transpose(-1, -2)


# hojonathanho/diffusion in PyTorch ------------------------------------------------------------------------------------


class DDPM(nn.Module):
    def __init__(self, ch, out_ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution):
        super().__init__()
        self.ch = ch
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        n, before = len(ch_mult), (1, *ch_mult)
        self.down = nn.ModuleList()
        for level in range(n):
            down, width = nn.Module(), ch * before[level]
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                down.block.append(DDPMBlock(width, ch * ch_mult[level], 4 * ch))
                width = ch * ch_mult[level]
                if resolution >> level in attn_resolutions:
                    down.attn.append(DDPMAttention(width))
            if level < n - 1:
                down.downsample = nn.Module()
                down.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1 = DDPMBlock(width, width, 4 * ch)
        self.mid.attn_1 = DDPMAttention(width)
        self.mid.block_2 = DDPMBlock(width, width, 4 * ch)
        self.up = nn.ModuleList()
        for level in reversed(range(n)):
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for i in range(num_res_blocks + 1):
                skip = ch * (before[level] if i == num_res_blocks else ch_mult[level])
                up.block.append(DDPMBlock(width + skip, ch * ch_mult[level], 4 * ch))
                width = ch * ch_mult[level]
                if resolution >> level in attn_resolutions:
                    up.attn.append(DDPMAttention(width))
            if level > 0:
                up.upsample = nn.Module()
                up.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.insert(0, up)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x, t):
        a = angles(t, self.ch // 2, endpoint=True)
        temb = self.temb.dense[1](silu(self.temb.dense[0](torch.cat([a.sin(), a.cos()], dim=1))))
        hs = [self.conv_in(x)]
        for down in self.down:
            for i, block in enumerate(down.block):
                h = block(hs[-1], temb)
                hs.append(down.attn[i](h) if len(down.attn) else h)
            if hasattr(down, "downsample"):
                hs.append(down.downsample.conv(F.pad(hs[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for up in reversed(self.up):
            for i, block in enumerate(up.block):
                h = block(torch.cat([h, hs.pop()], dim=1), temb)
                h = up.attn[i](h) if len(up.attn) else h
            if hasattr(up, "upsample"):
                h = up.upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(silu(self.norm_out(h)))


class DDPMBlock(nn.Module):
    def __init__(self, inputs, outputs, temb):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(temb, outputs)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, temb):
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(temb))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class DDPMAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


# openai/improved-diffusion and guided-diffusion -----------------------------------------------------------------------


class OpenAI(nn.Module):
    """The ``UNetModel`` of both code bases.

    Args:
        new_order: Whether it has guided-diffusion's QKVAttention, not QKVAttentionLegacy as improved-diffusion.
        scale: The factor of timesteps in ``_WrappedModel`` (rescale_timesteps).
    """

    def __init__(
        self, image_size, model_channels, channel_mult, num_res_blocks, attention_ds, out_channels=3, num_heads=4,
        num_head_channels=-1, num_classes=None, scale_shift=True, resblock_updown=False, new_order=False, scale=1.0,
        in_channels=3,
    ):  # fmt: skip
        super().__init__()
        self.model_channels, self.scale = model_channels, scale
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def block(inputs, outputs, resample=None):
            return OpenAIBlock(inputs, outputs, emb, scale_shift, resample)

        def attention(channels):
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return OpenAIAttention(channels, heads, new_order)

        ch = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, ch, 3, padding=1)])])
        widths, ds = [ch], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [block(ch, int(mult * model_channels))]
                ch = int(mult * model_channels)
                if ds in attention_ds:
                    layers.append(attention(ch))
                self.input_blocks.append(nn.ModuleList(layers))
                widths.append(ch)
            if level != len(channel_mult) - 1:
                down = block(ch, ch, "down") if resblock_updown else OpenAIDownsample(ch)
                self.input_blocks.append(nn.ModuleList([down]))
                widths.append(ch)
                ds *= 2
        self.middle_block = nn.ModuleList([block(ch, ch), attention(ch), block(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [block(ch + widths.pop(), int(mult * model_channels))]
                ch = int(mult * model_channels)
                if ds in attention_ds:
                    layers.append(attention(ch))
                if level and i == num_res_blocks:
                    layers.append(block(ch, ch, "up") if resblock_updown else OpenAIUpsample(ch))
                    ds //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))

    def forward(self, x, t, y=None):
        a = angles(t * self.scale, self.model_channels // 2, endpoint=False)
        emb = self.time_embed(torch.cat([a.cos(), a.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)

        def run(layers, h):
            for layer in layers:
                h = layer(h, emb) if isinstance(layer, OpenAIBlock) else layer(h)
            return h

        hs, h = [], x
        for layers in self.input_blocks:
            h = run(layers, h)
            hs.append(h)
        h = run(self.middle_block, h)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, hs.pop()], dim=1))
        return self.out(h)


class OpenAIDownsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class OpenAIUpsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class OpenAIBlock(nn.Module):
    def __init__(self, inputs, outputs, emb, scale_shift, resample):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outputs * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resampled(self, x):
        if self.resample == "up":
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5)) if self.resample else x

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resampled(act(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        return self.skip_connection(self.resampled(x)) + conv(act(h))


class OpenAIAttention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x.flatten(2)))
        if self.new_order:
            q, k, v = (part.reshape(B * self.heads, C // self.heads, H * W) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(B * self.heads, 3 * C // self.heads, H * W).split(C // self.heads, dim=1)
        h = softmax_attention(q, k, v).reshape(B, C, H * W)
        return x + self.proj_out(h).reshape(B, C, H, W)


# NVlabs/edm -----------------------------------------------------------------------------------------------------------


class EDMConv(nn.Module):
    def __init__(self, inputs, outputs, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        f = torch.ones(2)
        self.register_buffer("resample_filter", f.outer(f)[None, None] / f.sum().square() if up or down else None)

    def forward(self, x):
        C = x.shape[1]
        if self.up:
            x = F.conv_transpose2d(x, self.resample_filter.to(x.dtype).mul(4).tile(C, 1, 1, 1), groups=C, stride=2)
        if self.down:
            x = F.conv2d(x, self.resample_filter.to(x.dtype).tile(C, 1, 1, 1), groups=C, stride=2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def edm_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class EDMBlock(nn.Module):
    def __init__(self, inputs, outputs, emb, up=False, down=False, attention=False):
        super().__init__()
        self.inputs, self.attention = inputs, attention
        self.norm0 = edm_norm(inputs)
        self.conv0 = EDMConv(inputs, outputs, 3, up, down)
        self.affine = nn.Linear(emb, outputs)
        self.norm1 = edm_norm(outputs)
        self.conv1 = EDMConv(outputs, outputs, 3)
        self.skip = EDMConv(inputs, outputs, 1, up, down) if inputs != outputs or up or down else None
        if attention:
            self.norm2 = edm_norm(outputs)
            self.qkv = EDMConv(outputs, 3 * outputs, 1)
            self.proj = EDMConv(outputs, outputs, 1)

    def forward(self, x, emb):
        h = self.conv0(silu(self.norm0(x)))
        h = self.conv1(silu(self.norm1(h + self.affine(emb)[:, :, None, None])))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention:
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)
            x = (self.proj(softmax_attention(q, k, v).reshape(B, C, H, W)) + x) * math.sqrt(0.5)
        return x


class SongUNet(nn.Module):
    """The DDPM++ network. ``augment_dim`` is the size of the augmentation labels, which only training uses."""

    def __init__(
        self, img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions, augment_dim=0, label_dim=0
    ):
        super().__init__()
        emb = 4 * model_channels
        self.model_channels = model_channels
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.label_dim = label_dim
        if label_dim:
            self.map_label = nn.Linear(label_dim, model_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout, skips = model_channels, []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = EDMConv(3, cout, 3)
            else:
                self.enc[f"{res}x{res}_down"] = EDMBlock(cout, cout, emb, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = EDMBlock(cin, cout, emb, attention=res in attn_resolutions)
                skips.append(cout)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = EDMBlock(cout, cout, emb, attention=True)
                self.dec[f"{res}x{res}_in1"] = EDMBlock(cout, cout, emb)
            else:
                self.dec[f"{res}x{res}_up"] = EDMBlock(cout, cout, emb, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                has = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = EDMBlock(cin, cout, emb, attention=has)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = edm_norm(cout)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = EDMConv(cout, 3, 3)

    def forward(self, x, t, class_labels=None):
        """Compute the output. ``class_labels`` [B, label_dim] are rows of the identity, or zeros for no class."""
        a = angles(t, self.model_channels // 2, endpoint=True)
        emb = torch.cat([a.cos(), a.sin()], dim=1)
        emb = emb.reshape(len(t), 2, -1).flip(1).reshape(*emb.shape)  # swap sin and cos
        if self.label_dim:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, EDMBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if name.endswith("aux_norm"):
                x = silu(block(x))
            elif name.endswith("aux_conv"):
                x = block(x)
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != block.inputs else x, emb)
        return x
