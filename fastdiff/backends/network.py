"""Parts that `native` and `triton`, the backends that run a lowered program, have in common.

They are the check that a program describes the module it was lowered from, the checksum that notices changed weights,
the weights of merged layers, and the tables of embeddings that replace the time MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.core.lower import embed_classes, embed_timesteps
from fastdiff.core.program import Conv, Program
from fastdiff.core.state import TableBank
from fastdiff.solvers.table import COLUMNS
from fastdiff.unet import UNet, UNetConfig, changes
from fastdiff.unet.model import ClassProjection

# Buffers written by the matrix products of the embedding. They are small, and computed in float32 in every precision.
EMBEDDING_PRODUCTS = ("projections", "time_embedding.linear_2")


def network_reasons(unet: nn.Module) -> list[str]:
    """List every reason why a network cannot run as a lowered program; empty where it can."""
    if type(unet) is not UNet:
        return [f"it runs fastdiff.UNet only, not {type(unet).__name__}"]
    reasons = unsupported_changes(unet)
    if unet.config.class_embed_type is not None:
        reasons.append(f"it has no class_embed_type {unet.config.class_embed_type!r}")
    return reasons


def unsupported_changes(unet: UNet) -> list[str]:
    """List what the network does beyond its configuration, which lowering cannot see."""
    if not isinstance(unet.config, UNetConfig):
        return [f"its config is a {type(unet.config).__name__}, not a UNetConfig"]
    # Changes of the process come first: a reference made after them has them too.
    changed = changes.global_changes(unet) or changes.differences(unet, _as_described(unet.config))
    return [f"the network is not what its configuration says: {changes.in_words(changed)}"] if changed else []


@functools.lru_cache(maxsize=8)
def _as_described(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def checksum(unet: UNet) -> tuple[int, ...]:
    """Compute a checksum of the weights' bits, two numbers for each parameter.

    In-place edits of ``.data`` and fused optimizers change weights without bumping tensor versions, so only the bits
    show it. It is fast and in memory only; files name a model by `fastdiff.checkpoints.weights_digest`.
    """
    sums = []
    for p in unet.parameters():
        own = {8: torch.int64, 4: torch.int32, 2: torch.int16}[p.element_size()]
        bits = p.detach().contiguous().flatten().view(torch.int64 if p.nbytes % 8 == 0 else own)
        # The second sum depends on the order of the numbers: each is combined with its neighbour.
        sums += [int(bits.sum()), int((bits[1:] ^ (bits[:-1] << 1)).sum())]
    return tuple(sums)


def merged_layer(op: Conv, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return W [N, C, k, k] and b [N], float64, of a convolution whose layers are stacked or merged (see `Conv`)."""
    W, b = ([state[f"{key}.{kind}"].double() for key in op.weights] for kind in ("weight", "bias"))
    if op.merged == "first transposed":
        return (W[0].T @ W[1])[:, :, None, None], W[0].T @ b[1]
    if op.merged == "in turn":
        return (W[0] @ W[1])[:, :, None, None], W[0] @ b[1] + b[0]
    return torch.cat(W).reshape(-1, W[0].shape[1], op.kernel, op.kernel), torch.cat(b)


def embedding_width(program: Program) -> int:
    """Return the number of features that `fastdiff.core.lower.embed_timesteps` computes for a timestep."""
    return program.buffers["time" if "time" in program.buffers else "projections"].shape[2]


class EmbeddingTables:
    """Embeddings of timesteps and of class labels, computed once for all steps.

    ``times``, float32 [room, features], has one row for every distinct timestep, whichever step table it comes from; a
    larger tensor takes its place when more than ``room`` timesteps are needed. ``places`` has the row of each timestep.
    Beyond ``most`` timesteps the rows are given to others: then another dict takes its place, and earlier results of
    `entries` no longer hold. ``classes`` is float32 [labels, features], or None where the network has no such table.
    """

    @torch.inference_mode(False)
    def __init__(self, unet: UNet, program: Program, device: torch.device, room: int, most: int):
        self.unet = unet
        self.most = most
        self.times = torch.zeros(room, embedding_width(program), device=device)
        self.places: dict[float, int] = {}
        self.classes: Tensor | None = None
        if isinstance(unet.class_embedding, (nn.Embedding, ClassProjection)):
            self.classes = embed_classes(unet).detach().to(device, torch.float32, copy=True).contiguous()

    @torch.no_grad()
    def refresh(self) -> None:
        """Drop what was computed from weights that have changed since; all tensors keep their addresses."""
        self.places = {}
        if self.classes is not None:
            self.classes.copy_(embed_classes(self.unet))

    @torch.inference_mode(False)
    @torch.no_grad()
    def entries(self, bank: TableBank) -> Tensor:
        """Return the row of ``times`` for each row of each table, int64 [tables, rows] on the CPU.

        Timesteps that were not embedded yet are embedded now.
        """
        t, inverse = np.unique(bank.host[..., COLUMNS.index("t")], return_inverse=True)
        wanted = t.tolist()
        if len(self.places.keys() | set(wanted)) > self.most:
            self.places = {}
        new = [v for v in wanted if v not in self.places]
        if new:
            first, end = len(self.places), len(self.places) + len(new)
            if end > len(self.times):
                grown = self.times.new_zeros(max(2 * first, end), self.times.shape[1])
                grown[:first] = self.times[:first]
                self.times = grown
            t32 = torch.tensor(new, dtype=torch.float32, device=self.times.device)
            self.times[first:end] = embed_timesteps(self.unet, t32)
            self.places |= {v: first + i for i, v in enumerate(new)}
        places = np.array([self.places[v] for v in wanted], dtype=np.int64)
        return torch.from_numpy(places[inverse.reshape(bank.host.shape[:2])])
