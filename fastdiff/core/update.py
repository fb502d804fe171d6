"""The update of a batch whose rows differ, in plain torch: the reference for every kernel.

It is written for reading. `update_rows` is a pure function of tensors; `update` applies it to a `State`. An operand
whose coefficient is zero is not read, so that NaN or left-over values in an unused buffer cannot reach the image.
Decisions by value are made on the host, from the state's mirrors, or per element: `apply` and `philox` are the same
sequence of operations on the device whatever the values are, so a CUDA graph can hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.core import noise
from fastdiff.core.state import State
from fastdiff.errors import InvalidArgument
from fastdiff.solvers.table import COLUMNS


class History(NamedTuple):
    """The saved x and the last three values of h that were pushed, [B, C, H, W] each; None where no table uses it."""

    xs: Tensor | None = None
    m1: Tensor | None = None
    m2: Tensor | None = None
    m3: Tensor | None = None


def update_rows(
    x: Tensor,
    out: Tensor,
    coefficients: Tensor,
    history: History = History(),  # noqa: B008 - immutable
    z: Tensor | None = None,
    x0_scale: Tensor | None = None,
) -> tuple[Tensor, History]:
    """Compute one row of a table for every image:

        x0 = clip((kx x + ko out) / q, -c, c)
        h  = hx x + ho out + h0 x0
        x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
        save: xs = x        push: m3, m2, m1 = m2, m1, h

    `fastdiff.solvers.table` defines the columns. x and the noise z (None where no row adds noise) are [B, C, H, W]. The
    network's output after guidance is of the same shape, or [B, 2C, H, W] with v behind it where the variance is
    learned. ``coefficients`` are `State.coefficients`; ``x0_scale`` is 1/q, [B], or None for q = 1. No argument is
    changed.
    """
    C = x.shape[1]
    out, v = out[:, :C], out[:, C:] if out.shape[1] > C else None
    xs, m1, m2, m3 = history
    x0 = _x0(x, out, coefficients, x0_scale)
    if z is not None and v is not None:
        z = torch.exp(_combine(coefficients, x, sv=v)) * z
    new = _combine(coefficients, x, ax=x, ao=out, a0=x0, a1=m1, a2=m2, a3=m3, as_=xs, s=z)

    if m1 is not None:
        push = _column(coefficients, "push") != 0
        h = _combine(coefficients, x, hx=x, ho=out, h0=x0)
        if m2 is not None:
            if m3 is not None:
                m3 = torch.where(push, m2, m3)
            m2 = torch.where(push, m1, m2)
        m1 = torch.where(push, h, m1)
    if xs is not None:
        xs = torch.where(_column(coefficients, "save") != 0, x, xs)
    return new, History(xs, m1, m2, m3)


def _column(coefficients: Tensor, name: str) -> Tensor:
    return coefficients[:, COLUMNS.index(name)].view(-1, 1, 1, 1)


def _combine(coefficients: Tensor, like: Tensor, **operands: Tensor | None) -> Tensor:
    """Sum k * operand over the named columns k, where an operand with k = 0 adds nothing, whatever it holds.

    The sum starts at -0.0: x + -0.0 is x for every x, so an idle image keeps even the signs of its zeros.
    """
    total = torch.full_like(like, -0.0)
    for name, operand in operands.items():
        if operand is not None:
            k = _column(coefficients, name)
            total = total + torch.where(k == 0, -0.0, k * operand)
    return total


def _x0(x: Tensor, out: Tensor, coefficients: Tensor, x0_scale: Tensor | None) -> Tensor:
    x0 = _combine(coefficients, x, kx=x, ko=out)
    if x0_scale is not None:
        x0 = x0 * x0_scale.view(-1, 1, 1, 1)
    c = _column(coefficients, "c")
    return torch.maximum(torch.minimum(x0, c), -c)


def update(state: State) -> None:
    """Apply one row of the table to every image, by `update_rows`, then increment its row; ``out`` must be set."""
    split_output(state)
    threshold(state)
    apply(state, update_noise(state))
    state.advance()


def apply(state: State, z: Tensor | None) -> None:
    """Apply `update_rows` to a state, without incrementing its rows; ``z`` is as there."""
    assert state.out is not None, "forward comes before update"
    history = History(state.xs, state.m1, state.m2, state.m3)
    state.x, kept = update_rows(state.x, state.out, state.coefficients(), history, z, state.x0_scale)
    state.xs, state.m1, state.m2, state.m3 = kept


def split_output(state: State) -> tuple[Tensor, Tensor | None]:
    """Split ``state.out`` into the prediction and v, the variance's share, which is None for C channels."""
    assert state.out is not None, "forward comes before update"
    C = state.x.shape[1]
    if state.out.shape[1] == C and not state.column_host("sv").any():
        return state.out, None
    if state.out.shape[1] != 2 * C:
        raise InvalidArgument(
            f"the network gave {state.out.shape[1]} channels; {C} are needed, or {2 * C} where the variance is learned"
        )
    return state.out[:, :C], state.out[:, C:]


def threshold(state: State) -> None:
    """Set ``state.x0_scale`` to 1/q of dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3),

        q = max(1, quantile of |x0| / c over the image's elements), at most the table's largest

    so that x0 = clip(x0 / q, -c, c) fills the data's range without leaving it. The quantile is interpolated linearly
    between two order statistics. It is 1 for images whose tables have no threshold, and None where no table has one.
    An image does not depend on its batch.
    """
    state.x0_scale = None
    if not state.bank.thresholds:
        return
    if state.taking is not None:
        part = state.select(state.taking)
        threshold(part)
        assert part.x0_scale is not None, "some table has a threshold"
        state.x0_scale = torch.ones_like(state.guidance)
        state.x0_scale[torch.from_numpy(state.taking).to(state.x.device)] = part.x0_scale
        return
    out, _ = split_output(state)
    x0 = _combine(state.coefficients(), state.x, kx=state.x, ko=out).abs().flatten(1)
    c = state.column("c")
    scale = torch.ones_like(c)
    for i, table in enumerate(state.table_host.tolist()):
        asked = state.bank.tables[table].threshold
        if asked is None or state.row_host[i] == state.bank.lengths_host[table]:
            continue
        ordered, place = x0[i].sort().values, asked[0] * (x0.shape[1] - 1)
        low = min(int(place), x0.shape[1] - 1)
        high = min(low + 1, x0.shape[1] - 1)
        q = torch.lerp(ordered[low], ordered[high], place - low) / c[i]
        scale[i] = 1.0 / q.clamp(1.0, asked[1])
    state.x0_scale = scale


def predict_x0(state: State) -> Tensor:
    """Return the denoised images of the current row, x0 = clip((kx x + ko out) / q, -c, c), [B, C, H, W].

    q is that of `threshold`, else 1.
    """
    out, _ = split_output(state)
    threshold(state)
    return _x0(state.x, out, state.coefficients(), state.x0_scale)


def update_noise(state: State) -> Tensor | None:
    """Draw z ~ N(0, I) for the current rows, by the caller's source or Philox; None where no row adds noise."""
    noisy = state.column_host("s") != 0.0
    if not noisy.any():
        return None
    if state.noise is not None:
        first, *others = np.unique(state.row_host[noisy]).tolist()
        z = state.noise(first)
        for row in others:
            z = torch.where((state.row == row).view(-1, 1, 1, 1), state.noise(row), z)
        return z
    return philox(state)


def philox(state: State) -> Tensor:
    """Draw z by Philox for every image's row, whether the row adds noise or not."""
    z = noise.normal(state.seed, state.index, state.row, noise.UPDATE, tuple(state.x.shape[1:]))
    return z.to(state.x.dtype)


def guide(conditional: Tensor, unconditional: Tensor, w: Tensor, channels: int, rescale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance (Ho & Salimans 2022), rescaled (Lin et al. 2023, eqs. 15, 16).

        out = u + w (c - u);    out <- phi out std(c) / std(out) + (1 - phi) out,   std over an image's elements

    c and u are the network's outputs with and without labels, [B, C or 2C, H, W]; channels beyond C, of a learned
    variance, are those of c. An image whose weight w [B] is 1 keeps c bit for bit. ``rescale`` is phi, 0 for off, or
    the tensor (phi, 1 - phi) on the device, or a tensor [B, 2] of them, in which 0 is off too.
    """
    c, u = conditional[:, :channels], unconditional[:, :channels]
    w = w.view(-1, 1, 1, 1)
    out = u + w * (c - u)
    if isinstance(rescale, Tensor) or rescale:
        each = isinstance(rescale, Tensor) and rescale.ndim == 2
        phi: float | Tensor
        rest: float | Tensor
        if isinstance(rescale, Tensor):
            phi, rest = (rescale[:, i].view(-1, 1, 1, 1) if each else rescale[i] for i in (0, 1))
        else:
            phi, rest = rescale, 1.0 - rescale
        std_c, std_out = c.std(dim=(1, 2, 3), keepdim=True), out.std(dim=(1, 2, 3), keepdim=True)
        rescaled = phi * (out * (std_c / std_out)) + rest * out
        off = rescale[:, 0].view(-1, 1, 1, 1) == 0.0 if isinstance(rescale, Tensor) and each else None
        out = rescaled if off is None else torch.where(off, out, rescaled)
    out = torch.where(w == 1.0, c, out)
    return torch.cat([out, conditional[:, channels:]], dim=1) if conditional.shape[1] > channels else out
