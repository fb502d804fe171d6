"""Interpreter of a lowered program in plain torch, which separates bugs of lowering from bugs of kernels.

It works in the arena of the program's plan, where memory that is not alive or not written yet is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.core.lower import embed_classes, embed_text, embed_timesteps, vector_kind
from fastdiff.core.plan import STATISTICS, Plan, plan
from fastdiff.core.program import STRIP, Attention, Conv, Embed, Input, Norm, Op, Pool, Program


def strip_statistics(x: Tensor) -> Tensor:
    """Compute mean and sum of squared deviations of each strip of x [rows, H, W, C]: [rows, strips, 2, C]."""
    parts = []
    for part in x.split(STRIP, dim=1):
        mean = part.mean(dim=(1, 2))
        parts.append(torch.stack([mean, ((part - mean[:, None, None]) ** 2).sum(dim=(1, 2))], dim=1))
    return torch.stack(parts, dim=1)


class Interpreter:
    """Runs a program in the precision of ``unet``, which may be a decoder or encoder, for a fixed number of rows."""

    def __init__(self, program: Program, unet: Any, rows: int):
        self.program = program
        self.unet = unet
        self.rows = rows
        self.dtype = next(unet.parameters()).dtype
        self.weights = unet.state_dict()
        self.plan: Plan = plan(program, rows, self.dtype.itemsize)
        self.arena = torch.empty(self.plan.size, dtype=torch.uint8)
        self.external: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, texts: Tensor | None = None) -> Tensor:
        """Compute `UNet.forward`, or `UNetCondition.forward` with the states of a text per row, by the program."""
        self.set_inputs(x, t, labels, texts)
        return self.run()

    @torch.no_grad()
    def code(self, z: Tensor) -> Tensor:
        """Compute the forward of a decoder or an encoder by the program."""
        out = torch.full((len(z), *self.shape("out")), math.nan).to(z)
        self.external = {"given": self.unet.prepared(z).permute(0, 2, 3, 1), "out": out}
        return self.unet.finished(self.run())

    def run(self) -> Tensor:
        self.view_bytes(0, self.plan.size).fill_(0xFF)  # NaN
        for i, op in enumerate(self.program.ops):
            result = self.compute(op)
            assert result.shape == (self.rows, *self.shape(op.dst))
            self.buffer(op.dst).copy_(result)
            if self.program.buffers[op.dst].statistics:
                self.statistics(op.dst).copy_(strip_statistics(result))
            for dead, life in self.plan.lifetimes.items():
                if life.last == i:
                    self.view_bytes(self.plan.offsets[dead], life.size).fill_(0xFF)
        assert self.arena.eq(0xFF).all(), "something outlives the program"
        return self.external["out"].permute(0, 3, 1, 2)

    def set_inputs(self, x: Tensor, t: Tensor, labels: Tensor | None, texts: Tensor | None = None) -> None:
        self.external = {"x": x.permute(0, 2, 3, 1), "out": torch.full((len(x), *self.shape("out")), math.nan).to(x)}
        name = "projections" if vector_kind(self.unet) is None else "time"
        self.external[name] = embed_timesteps(self.unet, t)[:, None, None, :]
        if texts is not None:
            read = [
                embed_text(self.unet, states, None if labels is None else labels[i]) for i, states in enumerate(texts)
            ]
            self.external |= {name: torch.stack([rows[name] for rows, _ in read])[:, None] for name in read[0][0]}
            if vector_kind(self.unet) is not None:
                self.external["class"] = torch.stack([embedded for _, embedded in read])[:, None, None, :]
            return
        if self.unet.config.class_before_mlp:
            self.external["class"] = embed_classes(self.unet)[labels][:, None, None, :]
        elif self.unet.class_embedding is not None:
            if self.unet.config.class_embed_type == "timestep":
                labels = self.unet.sinusoid(labels)
            self.external["class"] = self.unet.class_embedding(labels)[:, None, None, :].to(self.dtype)
        if self.unet.class_encoder is not None:
            self.external["class_image"] = self.unet.class_encoder(labels, x.shape[2:]).permute(0, 2, 3, 1)

    def shape(self, name: str) -> tuple[int, int, int]:
        return self.program.buffers[name].shape

    def view_bytes(self, offset: int, size: int) -> Tensor:
        return self.arena[offset : offset + size]

    def buffer(self, name: str) -> Tensor:
        if self.program.buffers[name].external:
            return self.external[name]
        return self._view(name, self.shape(name))

    def statistics(self, name: str) -> Tensor:
        return self._view(name + STATISTICS, (self.program.buffers[name].strips, 2, self.shape(name)[2]))

    def _view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = self.rows * math.prod(shape) * self.dtype.itemsize
        return self.view_bytes(self.plan.offsets[name], size).view(self.dtype).view(self.rows, *shape)

    def compute(self, op: Op) -> Tensor:
        sources = [self.buffer(name) for name in op.src]
        if isinstance(op, Input):
            x = 2 * sources[0] - 1 if op.center else sources[0]
            if op.class_image is None:
                return x
            m = sources[1]
            return {"add": x + m, "multiply": x * (1 + m), "concat": torch.cat([x, m], dim=3)}[op.class_image]
        if isinstance(op, Embed):
            return F.silu(sum(sources))
        if isinstance(op, Attention):
            return self.attended(op)
        h = torch.cat(sources, dim=3)
        if op.norm is not None:
            h = self.normalized(h, op.src, op.norm)
        if isinstance(op, Pool):
            return (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4
        return self.convolved(op, h)

    def normalized(self, h: Tensor, src: tuple[str, ...], norm: Norm) -> Tensor:
        """Normalize h by the statistics alone, combined over each group's channels (Chan et al. 1979)."""
        rows, H, W, C = h.shape
        if not norm.groups:
            weight, bias = (self.weights[f"{norm.weights}.{kind}"] for kind in ("weight", "bias"))
            return F.layer_norm(h, (C,), weight, bias, norm.eps)
        statistics = torch.cat([self.statistics(name) for name in src], dim=3)  # [rows, strips, 2, C]
        mean, squares = statistics.unflatten(3, (norm.groups, C // norm.groups)).unbind(2)
        count = torch.tensor([min(STRIP, H - y) * W for y in range(0, H, STRIP)], dtype=h.dtype).view(1, -1, 1, 1)
        total = H * W * C // norm.groups
        centre = (count * mean).sum(dim=(1, 3), keepdim=True) / total
        var = (squares + count * (mean - centre) ** 2).sum(dim=(1, 3), keepdim=True) / total
        centre, rstd = (
            v[:, 0].expand(-1, -1, C // norm.groups).reshape(rows, 1, 1, C)
            for v in (centre, 1 / (var + norm.eps).sqrt())
        )
        h = (h - centre) * rstd * self.weights[f"{norm.weights}.weight"] + self.weights[f"{norm.weights}.bias"]
        if norm.modulation is not None:
            scale, shift = self.buffer("projections")[..., norm.modulation : norm.modulation + 2 * C].chunk(2, dim=3)
            h = h * (1 + scale) + shift
        return F.silu(h) if norm.silu else h

    def attended(self, op: Attention) -> Tensor:
        h = self.buffer(op.src[0])
        rows, H, W, _ = h.shape
        if op.text:
            q = h.view(rows, H * W, op.heads, op.head_dim).transpose(1, 2)
            k, v = self.buffer(op.src[1]).view(rows, -1, 2, op.heads, op.head_dim).permute(2, 0, 3, 1, 4)
        elif len(op.src) == 2:
            x = self.buffer(op.src[1])
            k = v = (x if op.norm is None else self.normalized(x, op.src[1:], op.norm)).view(rows, 1, H * W, -1)
            q = h.view(rows, 1, H * W, -1)
        else:
            q, k, v = h.view(rows, H * W, 3, op.heads, op.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(op.head_dim)).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).reshape(rows, H, W, op.heads * op.head_dim)

    def layer(self, op: Conv) -> tuple[Tensor, Tensor]:
        """Return W [N, C, k, k] and b [N] of a convolution, by code of its own and not the backends'."""
        W = [self.weights[f"{key}.weight"] for key in op.weights]
        b = [self.weights.get(f"{key}.bias", w.new_zeros(len(w))) for key, w in zip(op.weights, W, strict=True)]
        if op.merged == "first transposed":
            return (W[0].T @ W[1])[:, :, None, None], W[0].T @ b[1]
        if op.merged == "in turn":
            return (W[0] @ W[1])[:, :, None, None], W[0] @ b[1] + b[0]
        return torch.cat(W).view(-1, W[0].shape[1], op.kernel, op.kernel), torch.cat(b)

    def convolved(self, op: Conv, h: Tensor) -> Tensor:
        if op.upsample:
            h = h.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        before, after = op.padding
        W, b = self.layer(op)
        h = F.conv2d(
            F.pad(h.permute(0, 3, 1, 2), (before, after) * 2, "circular" if op.circular else "constant"),
            W,
            b,
            op.stride,
        )
        h = h.permute(0, 2, 3, 1)
        if op.geglu:
            a, gate = h.chunk(2, dim=3)
            return a * F.gelu(gate)
        if op.emb is not None:
            h = h + self.buffer("projections")[..., op.emb : op.emb + h.shape[3]]
        if op.residual is not None:
            residual = self.buffer(op.residual)
            if residual.shape[1] != h.shape[1]:
                residual = residual.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            h = h + residual
        h = h / op.divide
        return F.relu(h) if op.relu else h
