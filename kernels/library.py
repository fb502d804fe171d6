"""Products of convolutions by PyTorch's own library, which is cuDNN on a GPU.

`fastdiff.kernels.epilogue.finish` adds bias, embedding and residual. Only files of tuned configurations choose the
library, for shapes at which it was measured to be faster; heuristics never do.
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
    """Configuration of a layer that the library computes; ``library`` distinguishes it from others in a file."""

    num_warps: int = 0
    num_stages: int = 0
    library: int = 1

    def __str__(self) -> str:
        return "the library"


LIBRARY = LibraryConfig()


def pack(
    weight: Tensor, channels: Sequence[int], dtype: torch.dtype, padding: tuple[int, int] = (0, 0)
) -> tuple[Tensor, ...]:
    """Pack weights [N, C, k, k] as [1, taps, C_i, N] for each source.

    The axes are those of `fastdiff.kernels.conv.pack`, but memory is laid out as the library reads it: [N, k, k, C_i].

    ``padding`` is the number of zeros (before, after) the rows and columns of the source. The library adds equally many
    on both sides. If ``after`` is larger, the kernel gets rows and columns of zeros in front, and is then equivalent to
    the original with ``after`` on all sides.
    """
    before, after = padding
    assert after >= before
    W = F.pad(weight, (after - before, 0, after - before, 0)).permute(0, 2, 3, 1).flatten(1, 2)  # [N, taps, C]
    parts = W.split(list(channels), dim=2)
    return tuple(part.to(dtype).contiguous().permute(1, 2, 0).unsqueeze(0) for part in parts)


@dataclasses.dataclass(frozen=True, eq=False)
class LibraryLaunch(Launch):
    """A launch whose ``kernel`` is a Python function, in which the library launches kernels of its own."""

    def __call__(self) -> None:
        """Call the function on the current stream."""
        self.kernel(**self.arguments)

    def compile(self) -> None:
        """Raise `BackendError` if PyTorch was built without cuDNN; the library needs no compilation."""
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
    """Compute sums[i] = W_i src_i; the convolution of all sources is the sum of these.

    A call copies none of these tensors and does not synchronise. Memory that cuDNN needs comes from PyTorch's
    allocator; while a graph is captured, from the graph's pool.

    Sums are accumulated in float32 without TensorFloat-32. In bfloat16 and float16 the library rounds each sum before
    `fastdiff.kernels.epilogue.finish` reads it: one rounding per source more than in `fastdiff.kernels.conv.conv`.

    src are maps [rows, H, W, C_i], sums [sources, rows, H', W', N] in the same dtype, weight those of `pack`; the
    padding is on all sides.
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
        # The library would copy any other layout at every call.
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (image, kernel, result))
        if x.is_cuda:
            # The library chooses the algorithm by shape. `benchmark` is off because it would measure during the user's
            # first call. `deterministic` excludes atomic additions, whose bits differ from run to run. allow_tf32
            # concerns float32 only and applies to this call; the global setting is not changed.
            torch.ops.aten.cudnn_convolution.out(
                image, kernel, [padding] * 2, [stride] * 2, [1, 1], 1, benchmark=False, deterministic=True,
                allow_tf32=False, out=result,
            )  # fmt: skip
        else:
            result.copy_(F.conv2d(wide(image), wide(kernel), stride=stride, padding=padding))


def _reference(src: Sequence[Tensor], weight: Sequence[Tensor], sums: Tensor, stride: int, padding: int) -> None:
    """Compute sums[i][y, x] = sum_{ky, kx} W_i[ky, kx] src_i[stride y + ky - padding, stride x + kx - padding]."""
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
