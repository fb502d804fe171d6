"""The operation `fastdiff.core.program.Input`: images in the network's layout, and each row's timestep entry."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation, power_of_two, wide

COMBINE = (None, "add", "multiply", "concat")


@dataclasses.dataclass(frozen=True)
class InputConfig(Config):
    """Tile size: ``pixels`` per program, with all their channels."""

    pixels: int


CANDIDATES = (
    InputConfig(num_warps=4, num_stages=1, pixels=128),
    InputConfig(num_warps=2, num_stages=1, pixels=64),
)


@overlap.overlaps
@triton.jit(do_not_specialize=["images", "table_rows"])
def _input(
    x, class_image, dst, table, row, entries, timestep, images, pixels, C, padded, table_rows,
    CENTER: tl.constexpr, COMBINE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a block of pixels of one row. Grid: (pixel blocks, rows)."""
    overlap.wait()
    r = tl.program_id(1)
    image = r % images
    p = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    here = p < pixels
    v = tl.load(x + (image.to(tl.int64) * C + c) * pixels + p, mask=here & (c < C), other=0.0)
    if CENTER:
        v = tl.where(c < C, 2.0 * v - 1.0, 0.0)
    if COMBINE != 0:
        at = class_image + (r.to(tl.int64) * pixels + p) * C
        if COMBINE == 1:
            v += tl.load(at + c, mask=here & (c < C), other=0.0)
        elif COMBINE == 2:
            v *= 1.0 + tl.load(at + c, mask=here & (c < C), other=0.0)
        else:
            v += tl.load(at + (c - C), mask=here & (c >= C) & (c < 2 * C), other=0.0)
    to = dst + (r.to(tl.int64) * pixels + p) * padded + c
    tl.store(to, v.to(dst.dtype.element_ty), mask=here & (c < padded))
    if timestep is not None:  # noqa: SIM102 - a condition at compile time, the other one at run time
        if tl.program_id(0) == 0:
            place = tl.load(table + image) * table_rows + tl.load(row + image)
            tl.store(timestep + r, tl.load(entries + place))


@operation
def input(
    x: Tensor,
    dst: Tensor,
    *,
    center: bool = False,
    combine: str | None = None,
    class_image: Tensor | None = None,
    table: Tensor | None = None,
    row: Tensor | None = None,
    entries: Tensor | None = None,
    timestep: Tensor | None = None,
    chosen_for: int | None = None,
    config: InputConfig | None = None,
) -> Launch:
    """Write the images x to dst as NHWC, and the index of each row's timestep embedding to timestep.

    Row i reads image i mod images. Channels of dst past those of the images are zeros.

    Args:
        x: float32 [images, C, H, W].
        dst: [rows, H, W, padded].
        center: whether 2 x - 1 replaces x.
        combine: how the class image m is applied. "add": x + m; "multiply": x (1 + m); "concat": the channels of m
            follow those of x; None: there is none.
        class_image: m, float32 [rows, H, W, C].
        table, row: int64 [images], the table of each image and its row of it.
        entries: int64 [tables, rows], the index of each row's timestep in the table of embeddings.
        timestep: int64 [rows], set to entries[table, row] of each row's image; None: not wanted.
    """
    images, C, H, W = x.shape
    rows, _, _, padded = dst.shape
    assert x.is_contiguous()
    assert dst.shape[1:3] == (H, W)
    assert padded >= C * (2 if combine == "concat" else 1)
    like = chosen_for or rows
    key = f"{like}x{H}x{W}x{padded} {name_of(dst.dtype)}"
    config = config or choose_filling("input", key, x, CANDIDATES, lambda config: like * cdiv(H * W, config.pixels))
    return Launch(
        op="input",
        key=key,
        kernel=_input,
        grid=(cdiv(H * W, config.pixels), rows),
        arguments={
            "x": x, "class_image": class_image, "dst": dst, "table": table, "row": row, "entries": entries,
            "timestep": timestep, "images": images, "pixels": H * W, "C": C, "padded": padded,
            "table_rows": 0 if entries is None else entries.shape[1], "CENTER": center,
            "COMBINE": COMBINE.index(combine), "PIXELS": config.pixels, "CHANNELS": power_of_two(padded),
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(
            input_reference, x, dst, center, combine, class_image, table, row, entries, timestep
        ),
    )  # fmt: skip


def input_reference(
    x: Tensor, dst: Tensor, center: bool, combine: str | None, class_image: Tensor | None, table: Tensor | None,
    row: Tensor | None, entries: Tensor | None, timestep: Tensor | None,
) -> None:  # fmt: skip
    """Compute dst and timestep, as `input` describes them, in torch."""
    image = torch.arange(len(dst), dtype=torch.int64, device=x.device) % len(x)
    v = wide(x)[image].permute(0, 2, 3, 1)
    if center:
        v = 2 * v - 1
    if class_image is not None:
        m = class_image
        v = {"add": v + m, "multiply": v * (1 + m), "concat": torch.cat([v, m], dim=3)}[combine or ""]
    dst.zero_()
    dst[..., : v.shape[3]] = v
    if timestep is not None:
        assert table is not None
        assert row is not None
        assert entries is not None
        timestep.copy_(entries[table, row][image])
