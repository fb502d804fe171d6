"""A convolution's products by PyTorch's own library, which on a GPU is cuDNN; `fastdiff.kernels.epilogue.finish` does
what comes behind them.

Only a tuned file chooses this, for shapes at which it was measured to be faster; no heuristic does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Config, Launch, name_of, operation, wide


@dataclasses.dataclass(frozen=True)
class LibraryConfig(Config):
    """The library launches what it likes; ``library`` tells this from other configurations in a file."""

    num_warps: int = 0
    num_stages: int = 0
    library: int = 1

    def __str__(self) -> str:
        return "the library"


LIBRARY = LibraryConfig()


def pack(
    weight: Tensor, channels: Sequence[int], dtype: torch.dtype, padding: tuple[int, int] = (0, 0)
) -> tuple[Tensor, ...]:
    """[N, C, k, k] -> for each source, of ``channels``, [1, taps, C_i, N] in ``dtype``.

    Axes as of `fastdiff.kernels.conv.pack`, memory as the library reads it: [N, k, k, C_i]. padding: (before, after).
    The library pads with as much before as behind; where a convolution has more behind, its kernel gets that many rows
    and columns of zeros in front, and is the same with ``after`` on all sides.
    """
    before, after = padding
    assert after >= before
    W = F.pad(weight, (after - before, 0, after - before, 0)).permute(0, 2, 3, 1).flatten(1, 2)  # [N, taps, C]
    parts = W.split(list(channels), dim=2)
    return tuple(part.to(dtype).contiguous().permute(1, 2, 0).unsqueeze(0) for part in parts)


@dataclasses.dataclass(frozen=True, eq=False)
class LibraryLaunch(Launch):
    """A launch whose ``kernel`` is a function of its arguments that has the library launch kernels of its own."""

    def __call__(self) -> None:
        self.kernel(**self.arguments)

    def compile(self) -> None:
        """Nothing: kernels come with the library. Raises `BackendError` where PyTorch was built without it."""
        if self.arguments["sums"].is_cuda and not torch.backends.cudnn.is_available():
            raise BackendError(f"{self.op} ({self.key}): this build of PyTorch has no cuDNN")


@operation
def products(
    src: Sequence[Tensor],
    weight: Sequence[Tensor],
    sums: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    config: LibraryConfig | None = None,
) -> Launch:
    """sums[i] = W_i src_i: [sources, rows, H', W', N] in the sources' dtype, whose sum is the product of all.

    src: maps [rows, H, W, C_i]; weight: of `pack`; padding: zeros on all sides. A call reads and writes these tensors
    as they stand, and waits for nothing. What cuDNN needs beside them comes from PyTorch's allocator: while a graph is
    captured, from the graph's own pool.

    Sums are of float32, without TensorFloat-32. Where the dtype is a half one, the library rounds them to it before
    `fastdiff.kernels.epilogue.finish` adds to them: of each source one rounding more than `fastdiff.kernels.conv.conv`.
    """
    _, rows, H, W, N = sums.shape
    k = math.isqrt(weight[0].shape[1])
    assert len(sums) == len(src) == len(weight)
    channels = "+".join(str(s.shape[3]) for s in src)
    return LibraryLaunch(
        op="library.products",
        key=f"{rows}x{H}x{W}x{channels}->{N} {k}x{k}/{stride} {name_of(sums.dtype)}",
        kernel=_convolve,
        grid=(),
        arguments={"src": src, "weight": weight, "sums": sums, "stride": stride, "padding": padding},
        config=config or LIBRARY,
        candidates=(LIBRARY,),
        reference=lambda: _reference(src, weight, sums, stride, padding),
    )


def _convolve(src: Sequence[Tensor], weight: Sequence[Tensor], sums: Tensor, stride: int, padding: int) -> None:
    for x, w, y in zip(src, weight, sums.unbind(), strict=True):
        k = math.isqrt(w.shape[1])
        image, result = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
        kernel = w.squeeze(0).unflatten(0, (k, k)).permute(3, 2, 0, 1)
        # Else the library would copy them at every call.
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (image, kernel, result))
        if x.is_cuda:
            # The algorithm is the library's choice by shape, without `benchmark`: that would measure in the user's
            # first call, and choose by what it measured. Nor one with atomic additions, whose bits differ from run to
            # run. allow_tf32, which concerns float32 alone, is this call's: the global switch stays as it is.
            torch.ops.aten.cudnn_convolution.out(
                image, kernel, [padding] * 2, [stride] * 2, [1, 1], 1, benchmark=False, deterministic=True,
                allow_tf32=False, out=result,
            )  # fmt: skip
        else:
            result.copy_(F.conv2d(wide(image), wide(kernel), stride=stride, padding=padding))


def _reference(src: Sequence[Tensor], weight: Sequence[Tensor], sums: Tensor, stride: int, padding: int) -> None:
    """sums[i][y, x] = sum over ky, kx of W_i[ky, kx] src_i[stride y + ky - padding, stride x + kx - padding]"""
    _, H, W, _ = sums.shape[1:]
    for x, w, y in zip(src, weight, sums, strict=True):
        x = F.pad(wide(x), (0, 0, *(padding,) * 4))
        k = math.isqrt(w.shape[1])
        taps = [
            x[:, ky : ky + stride * (H - 1) + 1 : stride, kx : kx + stride * (W - 1) + 1 : stride]
            for ky in range(k)
            for kx in range(k)
        ]
        y.copy_(sum(tap @ part for tap, part in zip(taps, wide(w[0]), strict=True)))
