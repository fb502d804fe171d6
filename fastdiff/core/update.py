"""The update of a batch whose rows differ, in plain torch: the reference for every kernel.

Written for reading. Each image gathers its row's coefficients; an operand whose coefficient is zero is not read, so
that NaN or left-over values in an unused buffer cannot reach the image. What depends on values is decided on the host,
from the state's mirrors, or per element: `apply` and `philox` are one sequence of operations on the device, whatever
the values are, so a CUDA graph can hold them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.core import noise
from fastdiff.core.state import State
from fastdiff.errors import InvalidArgument


def _combine(state: State, **operands: Tensor | None) -> Tensor:
    """The sum of k * operand over columns k of every image's row; where k = 0, whatever the operand holds adds nothing.

    Nothing is -0.0: x + -0.0 is x for every x, so an image that idles keeps even its zeros' signs.
    """
    total = torch.full_like(state.x, -0.0)
    for name, operand in operands.items():
        if operand is not None:
            k = state.column(name).view(-1, 1, 1, 1)
            total = total + torch.where(k == 0, -0.0, k * operand)
    return total


def split_output(state: State) -> tuple[Tensor, Tensor | None]:
    """(out, v): what the network predicts, and the variance's share for a network with twice the channels."""
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
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): sets ``state.x0_scale`` to 1/q,

        q = max(1, quantile of |x0| / c over the image's elements), at most the table's largest

    so that x0 = clip(x0 / q, -c, c) fills the data's range without leaving it. The quantile lies between two order
    statistics, linearly. Images whose tables have no threshold keep 1. An image does not depend on its batch.
    """
    state.x0_scale = None
    if not state.bank.thresholds:
        return
    out, _ = split_output(state)
    x0 = _combine(state, kx=state.x, ko=out).abs().flatten(1)
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
    """The denoised image that the current row sees: x0 = clip((kx x + ko out) / q, -c, c), q of `threshold`, else 1."""
    out, _ = split_output(state)
    threshold(state)
    return _x0(state, out)


def _x0(state: State, out: Tensor) -> Tensor:
    x0 = _combine(state, kx=state.x, ko=out)
    if state.x0_scale is not None:
        x0 = x0 * state.x0_scale.view(-1, 1, 1, 1)
    c = state.column("c").view(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(x0, c), -c)


def update_noise(state: State) -> Tensor | None:
    """z ~ N(0, I) for this row: the caller's source, or Philox; None where no image's row adds noise."""
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
    """z of every image's row, whether the row adds noise or not."""
    z = noise.normal(state.seed, state.index, state.row, noise.UPDATE, tuple(state.x.shape[1:]))
    return z.to(state.x.dtype)


def update(state: State) -> None:
    """One row of the table for every image:

        x0 = clip((kx x + ko out) / q, -c, c)          q: `threshold`, else 1
        h  = hx x + ho out + h0 x0
        x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
        save: xs = x        push: m3, m2, m1 = m2, m1, h

    then row += 1 (`fastdiff.solvers.table` says what the columns mean).
    """
    out, v = split_output(state)
    threshold(state)
    apply(state, out, v, update_noise(state))
    state.advance()


def apply(state: State, out: Tensor, v: Tensor | None, z: Tensor | None) -> None:
    """The row of `update`, without row += 1. z: what the row draws; None where no image's row reads it."""
    x = state.x
    x0 = _x0(state, out)
    if z is not None and v is not None:
        z = torch.exp(_combine(state, sv=v)) * z
    new = _combine(state, ax=x, ao=out, a0=x0, a1=state.m1, a2=state.m2, a3=state.m3, as_=state.xs, s=z)

    if state.m1 is not None:
        push = state.column("push").view(-1, 1, 1, 1) != 0
        h = _combine(state, hx=x, ho=out, h0=x0)
        if state.m2 is not None:
            if state.m3 is not None:
                state.m3 = torch.where(push, state.m2, state.m3)
            state.m2 = torch.where(push, state.m1, state.m2)
        state.m1 = torch.where(push, h, state.m1)
    if state.xs is not None:
        state.xs = torch.where(state.column("save").view(-1, 1, 1, 1) != 0, x, state.xs)
    state.x = new


def guide(conditional: Tensor, unconditional: Tensor, w: Tensor, channels: int, rescale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022; 1 is off), rescaled (Lin et al. 2023, eqs. 15, 16).

        out = u + w (c - u);    out <- phi out std(c) / std(out) + (1 - phi) out,   std over an image's elements

    An image with w = 1 keeps its conditional output bit for bit. Channels past ``channels`` (learned variance) are c's.
    rescale: phi (0: off), or [phi, 1 - phi] on the device.
    """
    c, u = conditional[:, :channels], unconditional[:, :channels]
    w = w.view(-1, 1, 1, 1)
    out = u + w * (c - u)
    if isinstance(rescale, Tensor) or rescale:
        phi, rest = (rescale[0], rescale[1]) if isinstance(rescale, Tensor) else (rescale, 1.0 - rescale)
        std_c, std_out = c.std(dim=(1, 2, 3), keepdim=True), out.std(dim=(1, 2, 3), keepdim=True)
        out = phi * (out * (std_c / std_out)) + rest * out
    out = torch.where(w == 1.0, c, out)
    return torch.cat([out, conditional[:, channels:]], dim=1) if conditional.shape[1] > channels else out
