"""Classifier-free guidance (Ho & Salimans 2022) of the network's output, in any dtype and layout, into ``state.out``.

A step in two halves, `Runner.forward` and `Runner.update`, uses this operation. The update of a whole step includes
guidance. The reference is `fastdiff.core.update.guide`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core import update as reference
from fastdiff.kernels import overlap, update
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation, wide
from fastdiff.solvers.table import COLUMNS


@dataclasses.dataclass(frozen=True)
class GuideConfig(Config):
    """Tile size: ``elements`` of an image per program."""

    elements: int


CANDIDATES = (
    GuideConfig(num_warps=4, num_stages=1, elements=1024),
    GuideConfig(num_warps=2, num_stages=1, elements=256),
)


@overlap.overlaps
@triton.jit(do_not_specialize=["images", "rows"])
def _guide(
    net, out, bank, rows, table, row, guidance, images, guided, size, pixels, net_row, net_channel, net_pixel,
    PLANAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a block of one image. Grid: (blocks, images).

    guided: number of elements of an image to which guidance applies; those after them are the learned variance.
    """
    overlap.wait()
    image = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    place = e
    if not PLANAR:
        place = e // pixels * net_channel + e % pixels * net_pixel
    at = net + image.to(tl.int64) * net_row + place
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if guidance is not None:
        w = update.guidance_weight(
            bank + (tl.load(table + image) * rows + tl.load(row + image)) * update.WIDTH, guidance, image
        )
        value = update.guided(value, net + (images + image).to(tl.int64) * net_row + place, w, e, guided)
    tl.store(out + image.to(tl.int64) * size + e, value, mask=mask)


@operation
def guide(
    net: Tensor,
    out: Tensor,
    *,
    bank: Tensor | None = None,
    table: Tensor | None = None,
    row: Tensor | None = None,
    guidance: Tensor | None = None,
    channels: int = 0,
    chosen_for: int | None = None,
    config: GuideConfig | None = None,
) -> Launch:
    """Compute out = u + w (c - u), w = 1 + g (guidance - 1); c and u are conditional and unconditional rows of net.

    Where w = 1, out is c, and u is not read. net, [rows, C, H, W] in any dtype, NCHW or NHWC in memory, has the rows c
    of all images, then their rows u; without guidance only the rows c. Guidance applies to ``channels`` channels; the
    others, a learned variance, are copied from c. bank, table, row and guidance are those of
    `fastdiff.kernels.update.update`.
    """
    images, C, H, W = out.shape
    assert net.shape == (images * (1 if guidance is None else 2), C, H, W)
    assert net.stride(2) == W * net.stride(3)
    assert out.is_contiguous()
    size = C * H * W
    like = chosen_for or images
    key = f"{like}x{size} {name_of(net.dtype)}"
    config = config or choose_filling(
        "guidance", key, out, CANDIDATES, lambda config: like * cdiv(size, config.elements)
    )
    tensors: dict[str, Any] = {"net": net, "out": out, "bank": bank, "table": table, "row": row, "guidance": guidance}
    return Launch(
        op="guidance",
        key=key,
        kernel=_guide,
        grid=(cdiv(size, config.elements), images),
        arguments={
            **tensors, "rows": 0 if bank is None else bank.shape[1], "images": images, "guided": channels * H * W,
            "size": size, "pixels": H * W, "net_row": net.stride(0), "net_channel": net.stride(1),
            "net_pixel": net.stride(3), "PLANAR": update.planar(net), "BLOCK": config.elements,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(guide_reference, **tensors, channels=channels),
    )  # fmt: skip


def guide_reference(
    net: Tensor, out: Tensor, bank: Tensor | None, table: Tensor | None, row: Tensor | None, guidance: Tensor | None,
    channels: int,
) -> None:  # fmt: skip
    """Compute out = u + w (c - u) by `fastdiff.core.update.guide`."""
    net = wide(net)
    if guidance is not None:
        assert bank is not None
        assert table is not None
        assert row is not None
        w = 1.0 + bank[table, row, COLUMNS.index("g")] * (guidance - 1.0)
        net = reference.guide(net[: len(out)], net[len(out) :], w, channels, 0.0)
    out.copy_(net)
