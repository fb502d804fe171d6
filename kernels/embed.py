"""The operation `fastdiff.core.program.Embed`: silu(time + class), where both vectors are rows of tables."""

from __future__ import annotations

import dataclasses
import functools

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import overlap, sources
from fastdiff.kernels.launch import Config, Launch, cdiv, choose, device_of, name_of, operation, row_vectors, wide


@dataclasses.dataclass(frozen=True)
class EmbedConfig(Config):
    """Tile size: ``features`` of a row per program."""

    features: int


CANDIDATES = (EmbedConfig(num_warps=1, num_stages=1, features=128),)


@overlap.overlaps
@triton.jit
def _embed(
    time, timestep, classes, label, dst, features, time_stride, class_stride, dst_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute a block of features of one row. Grid: (feature blocks, rows)."""
    overlap.wait()
    row = tl.program_id(1).to(tl.int64)
    at, what = row, row
    if timestep is not None:
        at = tl.load(timestep + row)
    if label is not None:
        what = tl.load(label + row)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < features
    v = tl.load(time + at * time_stride + i, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(classes + what * class_stride + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + row * dst_stride + i, sources.silu(v).to(dst.dtype.element_ty), mask=mask)


@operation
def embed(
    time: Tensor,
    timestep: Tensor | None,
    classes: Tensor,
    label: Tensor | None,
    dst: Tensor,
    *,
    config: EmbedConfig | None = None,
) -> Launch:
    """Compute dst = silu(time[timestep] + classes[label]), [rows, features].

    The tables are [entries, features]. timestep and label are int64 [rows], the entry of each row; None: row i reads
    entry i.
    """
    rows, features = dst.shape
    assert time.shape[1] == classes.shape[1] == features
    assert all(v.stride(1) == 1 for v in (time, classes, dst))
    key = f"{features} {name_of(dst.dtype)}"
    config = config or choose("embed", key, device_of(dst), CANDIDATES, lambda: CANDIDATES[0])
    return Launch(
        op="embed",
        key=key,
        kernel=_embed,
        grid=(cdiv(features, config.features), rows),
        arguments={
            "time": time, "timestep": timestep, "classes": classes, "label": label, "dst": dst, "features": features,
            "time_stride": time.stride(0), "class_stride": classes.stride(0), "dst_stride": dst.stride(0),
            "BLOCK": config.features,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(embed_reference, time, timestep, classes, label, dst),
    )  # fmt: skip


def embed_reference(time: Tensor, timestep: Tensor | None, classes: Tensor, label: Tensor | None, dst: Tensor) -> None:
    """Compute dst = silu(time[timestep] + classes[label]) in torch."""
    dst.copy_(F.silu(wide(row_vectors(time, timestep)) + wide(row_vectors(classes, label))))
