"""The transformer behind a residual block of a text-conditioned U-Net: self-attention, attention to a text, an MLP.

Sources: Rombach et al. 2022 (arXiv:2112.10752, appendix E.2.1); Shazeer 2020 (arXiv:2002.05202) for GEGLU.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.unet.model import DTYPE

NORM_EPS = 1e-6  # of the GroupNorm before a transformer, whatever the network's other epsilons are


class TextAttention(nn.Module):
    """Attention of tokens x to the states c of a text, or to each other where c is x.

    q = W_q x,  k = W_k c,  v = W_v c,    out = W_o softmax(q k^T / sqrt(d)) v + b_o
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False, dtype=DTYPE)
        self.to_k = nn.Linear(context_channels, channels, bias=False, dtype=DTYPE)
        self.to_v = nn.Linear(context_channels, channels, bias=False, dtype=DTYPE)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels, dtype=DTYPE)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            h.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for h in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated layer: h gelu(g), where [h, g] = W x + b, with the exact gelu."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """MLP of a token, four times as wide as it: W_2 GEGLU(x) + b_2."""

    def __init__(self, channels: int):
        super().__init__()
        # Index 1 is a dropout in diffusers, which has the names of the weights from its positions.
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels, dtype=DTYPE)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Three residual layers, each behind a LayerNorm: self-attention, attention to the text, feed-forward.

    With ``only_text`` the first attention reads the text too.
    """

    def __init__(self, channels: int, heads: int, context_channels: int, only_text: bool):
        super().__init__()
        self.only_text = only_text
        self.norm1 = nn.LayerNorm(channels, dtype=DTYPE)
        self.attn1 = TextAttention(channels, heads, context_channels if only_text else channels)
        self.norm2 = nn.LayerNorm(channels, dtype=DTYPE)
        self.attn2 = TextAttention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels, dtype=DTYPE)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.only_text else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer over the pixels of a map: GroupNorm, a projection, ``depth`` blocks, a projection, and the residual.

    The projections are linear layers, or 1x1 convolutions, which compute the same. Inside, a pixel has as many channels
    as ``heads`` heads of equal width have, at most ``channels``.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int, depth: int, groups: int, linear: bool, only_text: bool
    ):
        super().__init__()
        inner = channels // heads * heads
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS, dtype=DTYPE)
        self.linear = linear
        if linear:
            self.proj_in: nn.Module = nn.Linear(channels, inner, dtype=DTYPE)
            self.proj_out: nn.Module = nn.Linear(inner, channels, dtype=DTYPE)
        else:
            self.proj_in = nn.Conv2d(channels, inner, 1, dtype=DTYPE)
            self.proj_out = nn.Conv2d(inner, channels, 1, dtype=DTYPE)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, context_channels, only_text) for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[2:]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, HW, C]
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, size)
        return x + (h if self.linear else self.proj_out(h))
