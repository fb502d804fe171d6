"""Editing on every backend: noised images, known pixels, classifier guidance, interpolation; and checks of their input.

Known pixels replace drawn ones after `Runner.update`; guides act between `Runner.forward` and `Runner.update`. Both are
functions of a `State` for each image by itself, so an image does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdiff.core import noise, update
from fastdiff.core.state import State
from fastdiff.data import pictures
from fastdiff.data.pixels import convert, pixels_of, why
from fastdiff.errors import CallbackError, InvalidArgument
from fastdiff.modes import plain_modes

Guide = Callable[[Tensor, Sequence[int]], Tensor]
"""log p(y | x0) of each image: (x0 [n, C, H, W] in the data's units, their global indices) -> [n], differentiable."""

THROUGH = ("x0", "network")


def noised(image: Tensor, signal: float, share: float, z: Tensor) -> Tensor:
    """Return a sample of q(x_t | x_0), signal image + share z, with the factors of `StepTable.signal_and_noise`."""
    x = image * signal
    return x if share == 0.0 else x + share * z


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """Pixels that are known."""

    image: Tensor  # float32 [B, C, H, W]
    anew: Tensor  # bool [B, 1 or C, H, W], True where the image is drawn anew

    def known(self, state: State) -> Tensor:
        """Return the known image [B, C, H, W] at the noise level where the current row ends.

            x_p = a image + s z,     z: Philox's stream MASK of the row, a and s: `StepTable.signal_and_noise`

        (Lugmayr et al. 2022, eq. 8a; its algorithm 1 has the variance in place of the standard deviation.) After the
        last row it is the image itself, and for an idle image it is ``state.x``.
        """
        lengths = state.bank.lengths_host[state.table_host]
        tables = [state.bank.tables[table] for table in state.table_host.tolist()]
        levels = zip(tables, state.column_host("abar_next").tolist(), strict=True)
        a, s = np.array([table.signal_and_noise(abar) for table, abar in levels]).T
        last = state.row_host == lengths - 1
        a, s = np.where(last, 1.0, a), np.where(last, 0.0, s)

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(state.x.device, state.x.dtype).view(-1, 1, 1, 1)

        x = column(a) * self.image
        if s.any():
            z = noise.normal(state.seed, state.index, state.row, noise.MASK, tuple(state.x.shape[1:])).to(x.dtype)
            x = torch.where(column(s) > 0.0, x + column(s) * z, x)
        idle = torch.from_numpy(state.row_host >= lengths).to(state.x.device).view(-1, 1, 1, 1)
        return torch.where(idle, state.x, x)

    def put(self, state: State, known: Tensor) -> None:
        """Replace the known pixels of ``state.x`` by those of ``known``."""
        state.x = torch.where(self.anew, state.x, known)


def guide(state: State, log_p: Guide, indices: Sequence[int], x0_of: Tensor | None, row: int, rows: int) -> None:
    """Change ``state.out`` by classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    With g the gradient of log p(y | x0) by x_t, a = sqrt(abar) and s = sqrt(1 - abar),

        eps <- eps - s g,    which is    x0 <- x0 + s^2 / a g    and    out <- out + s^2 / (a ko) g

    ``log_p`` gets the row's x0, with its bounds, of the first images of the batch, whose global indices are
    ``indices``; the gradient passes the bounds straight through.

    If ``x0_of`` is None, the network is not differentiated, and dx0 / dx_t is taken to be a, as it is for data of unit
    variance: then s^2 / a g is s^2 times the gradient by x0 (r_t^2 of Song et al. 2023, "Pseudoinverse-guided diffusion
    models", section 3.2). Else it is the input of the network, with the graph that led to ``state.out``: g is taken
    through the network (Chung et al. 2023, DPS, arXiv:2209.14687, eq. 9); at abar = 0, where x0 does not depend on x_t,
    nothing is added.
    """
    n, where = len(indices), f"at row {row} of {rows}"
    graph = state.out
    assert graph is not None, "forward comes before guidance"
    state.out = graph.detach()
    with plain_modes(gradients=True):
        scale = state.bank.tables[0].data_scale
        x0 = update.predict_x0(state).detach()[:n].clone().requires_grad_()
        try:
            value: Any = log_p(x0 * scale, indices)
        except Exception as e:
            raise CallbackError(f"the guide raised {type(e).__name__} {where}: {e}") from e
        if not isinstance(value, Tensor) or tuple(value.shape) != (n,):
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidArgument(f"the guide gave {got} {where}; log p of each image is needed, a tensor ({n},)")
        (g,) = torch.autograd.grad(value.sum(), x0, allow_unused=True) if value.requires_grad else (None,)
        if g is None:
            raise InvalidArgument(f"what the guide gave {where} does not depend on x0, or was detached from it")
        abar, kx, ko = (state.column(name)[:n].view(-1, 1, 1, 1) for name in ("abar", "kx", "ko"))
        C = state.x.shape[1]
        if x0_of is None:
            shift = (1.0 - abar) * g
        else:
            straight = kx * x0_of[:n] + ko * graph[:n, :C]
            (by_x,) = torch.autograd.grad(straight, x0_of, g)
            factor = (1.0 - abar) / abar.sqrt()
            if state.bank.tables[0].flow:  # s^2 / a of the flow's own a and s
                factor = factor / (abar.sqrt() + (1.0 - abar).sqrt())
            elif state.bank.tables[0].exploding:  # sigma^2
                factor = factor / abar.sqrt()
            shift = torch.where(abar > 0.0, factor * by_x[:n], 0.0)
    out = state.out.clone()
    out[:n, :C] += torch.where(ko == 0.0, 0.0, shift / ko)
    state.out = out


def slerp(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Interpolate n points [n, *a.shape] on the great arc from a to b, both included (Shoemake 1985).

    With theta the angle between a and b (for noise as in Song et al. 2021, DDIM, appendix D.5),

        z = sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b,     w = 0 .. 1

    so the norm of z stays that of a and b, as noise needs. Where a and b are parallel, z = (1 - w) a + w b.
    """
    a, b = a.double(), b.double()
    cosine = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1.0, 1.0)
    theta = torch.acos(cosine)
    w = torch.linspace(0.0, 1.0, n, dtype=torch.float64, device=a.device).view(-1, *[1] * a.ndim)
    if not 1e-6 < float(theta) < np.pi - 1e-6:
        return ((1.0 - w) * a + w * b).float()
    return ((torch.sin((1.0 - w) * theta) * a + torch.sin(w * theta) * b) / torch.sin(theta)).float()


def end_noise(end: int | Tensor, index: int, shape: tuple[int, int, int]) -> Tensor:
    """Return the initial noise (C, H, W) at one end of an interpolation: that of a seed's image, or as given."""
    if not isinstance(end, Tensor):
        seed, i = noise.as_int64(noise.check_seed(end)), torch.tensor([index], dtype=torch.int64, device="cpu")
        return noise.normal(torch.full_like(i, seed), i, torch.zeros_like(i), noise.INITIAL, shape)[0]
    check_dense("between", end)
    if tuple(end.shape) != shape or not end.is_floating_point() or not torch.isfinite(end).all():
        raise InvalidArgument(f"between: noise of {end.dtype} {tuple(end.shape)}; finite floats {shape} are needed")
    return end.detach().cpu()


# Checks of the caller's tensors ---------------------------------------------------------------------------------------


def check_dense(name: str, tensor: Tensor) -> None:
    """Reject a tensor without numbers that can be read: a sparse one, or one on the device "meta"."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "on the device meta" if tensor.device.type == "meta" else f"of layout {tensor.layout}"
        raise InvalidArgument(f"{name} is a tensor {kind}; a plain (strided) tensor of numbers is needed")


def as_image(image: Any, channels: int, name: str = "image") -> Any:
    """Return pictures of PIL, or uint8 arrays [H, W], [H, W, C] or [n, H, W, C], as floats [n, C, H, W] in [-1, 1].

    They are converted to the channels of the network's images. Other arrays become tensors, and anything else is
    returned as it is, for `check_image`.
    """
    if isinstance(image, Image.Image) or _are(image, Image.Image):
        arrays = [
            _bytes_of(picture, channels, name) for picture in ([image] if isinstance(image, Image.Image) else image)
        ]
    elif (isinstance(image, np.ndarray) and image.dtype == np.uint8) or _are(image, np.ndarray):
        given = image if isinstance(image, (list, tuple)) else [image] if image.ndim < 4 else image
        arrays = [array[..., None] if array.ndim == 2 else array for array in given]
        if any(a.dtype != np.uint8 or a.ndim != 3 or a.shape[-1] not in (1, 3, channels) for a in arrays):
            shapes = ", ".join(str(a.shape) for a in list(given)[:3])
            raise InvalidArgument(
                f"{name} has arrays {shapes}; uint8 [H, W], [H, W, 1 or 3] or [H, W, {channels}] are needed, or a "
                "tensor of floats in [-1, 1]"
            )
        arrays = [a if a.shape[-1] == channels else _converted(a, channels, name) for a in arrays]
    elif isinstance(image, np.ndarray):
        return _tensor(name, image)
    else:
        return image
    if len({array.shape for array in arrays}) != 1:
        raise InvalidArgument(f"{name} has {len(arrays)} pictures of several sizes; resize them to one")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def as_mask(mask: Any) -> Any:
    """Return a picture of PIL or an array as a tensor of 0 and 1, where it is light, for `check_mask`."""
    if isinstance(mask, Image.Image):
        return torch.from_numpy(np.array(mask.convert("L")) > 127)
    if not isinstance(mask, np.ndarray):
        return mask
    if mask.dtype == np.uint8 and mask.size and mask.max() > 1:
        mask = mask > 127
    return _tensor("mask", mask)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(isinstance(v, kind) for v in values)


def _bytes_of(picture: Image.Image, channels: int, name: str) -> NDArray[np.uint8]:
    """Return a picture's pixels [H, W, C]; its alpha is composited over white where the network's images have none."""
    try:
        return _converted(pixels_of(picture), channels, name)
    except InvalidArgument:
        raise
    except Exception as e:  # a picture is decoded when it is first used, and decoders raise anything
        raise InvalidArgument(f"{name} cannot be read: {why(e).splitlines()[0]}") from e


def _converted(pixels: NDArray[Any], channels: int, name: str) -> NDArray[np.uint8]:
    if channels not in pictures.MODES:
        raise InvalidArgument(f"{name} is a picture, but the network takes {channels} channels there; give a tensor")
    return convert(pixels[None], channels)[0]


def _tensor(name: str, array: NDArray[Any]) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"{name} is an array of {array.dtype}; numbers are needed") from e


def check_image(image: Any, n: int, channels: int, name: str = "image") -> Tensor:
    """Return the image as float32 [n, C, H, W] on the CPU; [C, H, W] is for all."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise InvalidArgument(f"{name} is {got}; a tensor of floats in [-1, 1] is needed (of uint8: x / 127.5 - 1)")
    check_dense(name, image)
    full = image if image.ndim == 4 else image[None]
    if full.ndim != 4 or full.shape[1] != channels or len(full) not in (1, n) or 0 in full.shape:
        raise InvalidArgument(
            f"{name} has shape {tuple(image.shape)}; ({n}, {channels}, H, W), or ({channels}, H, W) for all, is needed"
        )
    full = full.detach().to("cpu", torch.float32)
    if not torch.isfinite(full).all():
        raise InvalidArgument(f"{name} has NaN or infinite values")
    return full.expand(n, *full.shape[1:])


def check_range(image: Tensor, bound: float) -> None:
    """Reject an image with values that no x0 of the table can have, as those from 0 to 255."""
    low, high = float(image.min()), float(image.max())
    if max(-low, high) > bound * (1.0 + 1e-4):
        raise InvalidArgument(
            f"image goes from {low:g} to {high:g}, and x0 is bounded to {bound:g} here: scale or clamp it, or give clip"
        )


def check_mask(mask: Any, n: int, shape: tuple[int, int, int]) -> Tensor:
    """Return the mask, [H, W], [1 or C, H, W] or [n, 1 or C, H, W] of 0 and 1, as bool [n, 1 or C, H, W] on the CPU."""
    C, H, W = shape
    if not isinstance(mask, Tensor):
        raise InvalidArgument(f"mask is a {type(mask).__name__}; a tensor ({H}, {W}), 1 where to draw anew, is needed")
    check_dense("mask", mask)
    full = mask[(None,) * max(0, 4 - mask.ndim)]
    if full.ndim != 4 or len(full) not in (1, n) or full.shape[1] not in (1, C) or tuple(full.shape[2:]) != (H, W):
        raise InvalidArgument(
            f"mask has shape {tuple(mask.shape)}; ({H}, {W}), or ({n}, 1 or {C}, {H}, {W}), is needed"
        )
    full = full.detach().cpu()
    if full.is_complex() or not ((full == 0) | (full == 1)).all():
        raise InvalidArgument("mask has values other than 0 (known) and 1 (drawn anew); mixed noise has no level")
    if not full.any():
        raise InvalidArgument("mask is 0 everywhere, so nothing would be drawn; 1 is where to draw anew")
    return full.bool().expand(n, *full.shape[1:])
