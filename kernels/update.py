"""The sampler's update as one kernel: applies one row of its table to every image, including guidance and noise.

Every image has its own table and its own row of it. Operands whose coefficient is zero are not read. The reference is
`fastdiff.core.update`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.core import update as reference
from fastdiff.core.noise import UPDATE
from fastdiff.kernels import noise, overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose_filling, name_of, operation, wide
from fastdiff.solvers.table import COLUMNS

# Positions of the coefficients in a row; COLUMNS in fastdiff/solvers/table.py explains them.
WIDTH = tl.constexpr(len(COLUMNS))
KX, KO, BOUND, HX, HO, H0, AX, AO, A0, A1, A2, A3, AS, S, SV, G, SAVE, PUSH = (
    tl.constexpr(COLUMNS.index(name))
    for name in (
        "kx", "ko", "c", "hx", "ho", "h0", "ax", "ao", "a0", "a1", "a2", "a3", "as_", "s", "sv", "g", "save", "push"
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UpdateConfig(Config):
    """Tile size: ``elements`` of an image per program."""

    elements: int


CANDIDATES = (
    UpdateConfig(num_warps=4, num_stages=1, elements=1024),
    UpdateConfig(num_warps=4, num_stages=1, elements=512),
    UpdateConfig(num_warps=2, num_stages=1, elements=256),
    UpdateConfig(num_warps=1, num_stages=1, elements=128),
)


@triton.jit
def _add(total, k, operand):
    """Return total + k operand, or total if k = 0, whatever the operand holds."""
    return tl.where(k != 0.0, total + k * operand, total)


@triton.jit
def within(e, size, wanted):
    """Return the mask e < size, or an empty one if the scalar ``wanted`` is false.

    (e < size) & wanted would be a float in Triton's interpreter where ``wanted`` is a comparison of floats.
    """
    return e < tl.where(wanted, size, 0)


@triton.jit
def guidance_weight(bank, guidance, image):
    """Return w = 1 + g (guidance - 1). ``bank`` points to the image's row of its table."""
    return 1.0 + tl.load(bank + G) * (tl.load(guidance + image) - 1.0)


@triton.jit
def guided(c, unconditional, w, e, size):
    """Return u + w (c - u), or c where w = 1 or e >= size. ``unconditional`` points to u, which is not read then."""
    mask = within(e, size, w != 1.0)
    u = tl.load(unconditional, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, u + w * (c - u), c)


@overlap.overlaps
@triton.jit(do_not_specialize=["images", "rows"])
def _update(
    x, xs, m1, m2, m3, out, z, x0_scale, bank, rows, table, row, lengths, seed, index, guidance, arrived, images, size,
    pixels, out_row, out_channel, out_pixel,
    LEARNED: tl.constexpr, PLANAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a block of one image. Grid: (blocks, images). xs, m1, m2, m3, z, x0_scale and guidance may be None.

        x0 = clip((kx x + ko out) / q, -c, c)          1/q: x0_scale
        h  = hx x + ho out + h0 x0
        x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
        save: xs = x        push: m3, m2, m1 = m2, m1, h

    The last of an image's programs to arrive advances its row: all others have read it by then.
    """
    # long: one pass over the image, whose loads, masks and stores depend on each other; parts of it would share as many
    # arguments as it has lines.
    overlap.wait()
    image = tl.program_id(1)
    its_table = tl.load(table + image)
    its_row = tl.load(row + image)
    k = bank + (its_table * rows + its_row) * WIDTH
    kx, ko, bound = tl.load(k + KX), tl.load(k + KO), tl.load(k + BOUND)
    hx, ho, h0 = tl.load(k + HX), tl.load(k + HO), tl.load(k + H0)
    ax, ao, a0 = tl.load(k + AX), tl.load(k + AO), tl.load(k + A0)
    a1, a2, a3, as_ = tl.load(k + A1), tl.load(k + A2), tl.load(k + A3), tl.load(k + AS)
    s, save, push = tl.load(k + S), tl.load(k + SAVE) != 0.0, tl.load(k + PUSH) != 0.0
    if x0_scale is not None:
        scale = tl.load(x0_scale + image)
        kx *= scale
        ko *= scale
    if m1 is None:
        push = False
    if xs is None:
        save = False

    others = (ao != 0.0) | (a0 != 0.0) | (a1 != 0.0) | (a2 != 0.0) | (a3 != 0.0) | (as_ != 0.0) | (s != 0.0)
    if (ax != 1.0) | others | push | save:  # else x' = x, and there is nothing to do
        e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = image.to(tl.int64) * size + e
        clean = (a0 != 0.0) | (push & (h0 != 0.0))  # whether x0 is needed
        reads_x = (ax != 0.0) | save | (clean & (kx != 0.0)) | (push & (hx != 0.0))
        reads_out = (ao != 0.0) | (clean & (ko != 0.0)) | (push & (ho != 0.0))
        old = tl.load(x + at, mask=within(e, size, reads_x), other=0.0)
        place = e
        if not PLANAR:
            place = e // pixels * out_channel + e % pixels * out_pixel
        prediction = out + image.to(tl.int64) * out_row + place
        net = tl.load(prediction, mask=within(e, size, reads_out), other=0.0).to(tl.float32)
        if guidance is not None:
            w = guidance_weight(k, guidance, image)
            unconditional = out + (images + image).to(tl.int64) * out_row + place
            net = guided(net, unconditional, w, e, tl.where(reads_out, size, 0))

        nothing = tl.full([BLOCK], -0.0, tl.float32)  # x + -0.0 is x for every x
        x0 = _add(_add(nothing, kx, old), ko, net)
        x0 = tl.where(x0 > bound, bound, x0)  # NaN stays
        x0 = tl.where(x0 < -bound, -bound, x0)
        new = _add(_add(_add(nothing, ax, old), ao, net), a0, x0)
        if m1 is not None:
            first = tl.load(m1 + at, mask=within(e, size, (a1 != 0.0) | push), other=0.0)
            new = _add(new, a1, first)
            if m2 is not None:
                second = tl.load(m2 + at, mask=within(e, size, (a2 != 0.0) | push), other=0.0)
                new = _add(new, a2, second)
                if m3 is not None:
                    third = tl.load(m3 + at, mask=within(e, size, a3 != 0.0), other=0.0)
                    new = _add(new, a3, third)
                    tl.store(m3 + at, second, mask=within(e, size, push))
                tl.store(m2 + at, first, mask=within(e, size, push))
            tl.store(m1 + at, _add(_add(_add(nothing, hx, old), ho, net), h0, x0), mask=within(e, size, push))
        if xs is not None:
            new = _add(new, as_, tl.load(xs + at, mask=within(e, size, as_ != 0.0), other=0.0))
            tl.store(xs + at, old, mask=within(e, size, save))
        if s != 0.0:
            if z is None:
                it = noise.normals(
                    tl.load(seed + image), tl.load(index + image), its_row, tl.program_id(0) * (BLOCK // 4),
                    noise.UPDATE, BLOCK,
                )  # fmt: skip
            else:
                it = tl.load(z + at, mask=e < size, other=0.0)
            if LEARNED:
                sv = tl.load(k + SV)
                v = tl.load(prediction + size // pixels * out_channel, mask=within(e, size, sv != 0.0), other=0.0)
                it = tl.where(sv != 0.0, tl.exp(sv * v.to(tl.float32)) * it, it)
            new = _add(new, s, it)
        tl.store(x + at, new, mask=e < size)

    tl.debug_barrier()  # every thread of this program has read the row
    if tl.atomic_add(arrived + image, 1) == tl.num_programs(0) - 1:
        tl.store(row + image, tl.minimum(its_row + 1, tl.load(lengths + its_table)))
        tl.store(arrived + image, 0)


def planar(out: Tensor) -> bool:
    """Return whether the channels of [rows, C, H, W] are contiguous planes, as those of x are."""
    return out.stride(3) == 1 and out.stride(1) == out.shape[2] * out.shape[3]


@operation
def update(
    x: Tensor,
    out: Tensor,
    bank: Tensor,
    table: Tensor,
    row: Tensor,
    lengths: Tensor,
    seed: Tensor,
    index: Tensor,
    arrived: Tensor,
    *,
    xs: Tensor | None = None,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    m3: Tensor | None = None,
    z: Tensor | None = None,
    x0_scale: Tensor | None = None,
    guidance: Tensor | None = None,
    chosen_for: int | None = None,
    config: UpdateConfig | None = None,
) -> Launch:
    """Apply one row of its table to every image in place, and advance the row, as `fastdiff.core.update.update` does.

    Images at the last row of their table, the identity, stay there.

    Args:
        x: float32 [images, C, H, W].
        out: output of the network [rows, C or 2C, H, W] in any dtype, NCHW or NHWC in memory. Row i is image i; with
            guidance, row images + i is the unconditional evaluation of image i. 2C channels hold a learned variance,
            which tables with ``sv`` need (the caller checks).
        bank, lengths: values (float32) and lengths of a `TableBank`.
        table, row, seed, index: int64 [images].
        arrived: int32 [images], zeros before and after a launch.
        xs, m1, m2, m3: float32 [images, C, H, W]: m1 to m3 as far as the tables read them, xs if they save x.
        z: noise given by the caller, float32 [images, C, H, W]; None: Philox noise.
        x0_scale: float32 [images], 1/q of dynamic thresholding; None: 1.
        guidance: float32 [images]; None: there are no unconditional rows.
    """
    images, C, H, W = x.shape
    assert out.shape[0] == images * (1 if guidance is None else 2)
    assert out.shape[1] in (C, 2 * C)
    assert out.stride(2) == W * out.stride(3)
    assert all(v.is_contiguous() for v in (x, xs, m1, m2, m3, z, bank) if v is not None)
    size = C * H * W
    like = chosen_for or images
    key = f"{like}x{size} {name_of(out.dtype)}"
    config = config or choose_filling("update", key, x, CANDIDATES, lambda config: like * cdiv(size, config.elements))
    tensors: dict[str, Any] = {
        "x": x, "out": out, "bank": bank, "table": table, "row": row, "lengths": lengths, "seed": seed, "index": index,
        "xs": xs, "m1": m1, "m2": m2, "m3": m3, "z": z, "x0_scale": x0_scale, "guidance": guidance,
    }  # fmt: skip
    return Launch(
        op="update",
        key=key,
        kernel=_update,
        grid=(cdiv(size, config.elements), images),
        arguments={
            **tensors, "arrived": arrived, "rows": bank.shape[1], "images": images, "size": size, "pixels": H * W,
            "out_row": out.stride(0), "out_channel": out.stride(1), "out_pixel": out.stride(3),
            "LEARNED": out.shape[1] > C, "PLANAR": planar(out), "BLOCK": config.elements,
        },
        config=config,
        candidates=CANDIDATES,
        reference=functools.partial(update_reference, **tensors),
    )  # fmt: skip


def update_reference(
    x: Tensor, out: Tensor, bank: Tensor, table: Tensor, row: Tensor, lengths: Tensor, seed: Tensor, index: Tensor,
    xs: Tensor | None, m1: Tensor | None, m2: Tensor | None, m3: Tensor | None, z: Tensor | None,
    x0_scale: Tensor | None, guidance: Tensor | None,
) -> None:  # fmt: skip
    """Compute the update by `fastdiff.core.update.update_rows`."""
    values = bank[table, row].to(x.dtype)
    if x0_scale is not None:
        for name in ("kx", "ko"):
            values[:, COLUMNS.index(name)] *= x0_scale
    net = wide(out).to(x.dtype)
    if guidance is not None:
        w = 1.0 + values[:, COLUMNS.index("g")] * (guidance - 1.0)
        net = reference.guide(net[: len(x)], net[len(x) :], w, x.shape[1], 0.0)
    if z is None:
        z = torch.empty_like(x)
        noise.noise_reference(seed, index, row, z, UPDATE)
    history = reference.History(xs, m1, m2, m3)
    new, kept = reference.update_rows(x, net, values, history, z)
    for tensor, result in zip((x, *history), (new, *kept), strict=True):
        if tensor is not None and result is not None:
            tensor.copy_(result)
    row.copy_(torch.minimum(row + 1, lengths[table]))
