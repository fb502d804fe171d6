"""The choice of an algorithm for each convolution: Winograd's F(4x4, 3x3) or F(2x2, 3x3), or the direct one."""

from __future__ import annotations

import math

from fastdiff.backends.base import BITWISE_ROWS
from fastdiff.core.program import Conv, Program

METHODS = ("winograd4", "winograd2", "direct")


def choose_method(op: Conv, program: Program, rows: int | None, allowed: tuple[str, ...] = METHODS) -> str:
    """Choose the algorithm for a convolution: Winograd's where the kernel is 3x3 at stride 1 and there are many tiles.

    A tile costs 36 (F4) or 16 (F2) products per pair of channels for 16 or 4 pixels, against 9 products per pixel. But
    the transformed weights are 4 or 16/9 times as large, and few tiles cannot hide the time of reading them. If
    ``rows``, the number of rows of the batch, is None, the layer's shape alone decides.
    """
    if op.kernel != 3 or op.stride != 1 or op.padding != (1, 1):
        return "direct"
    H, W, _ = program.buffers[op.dst].shape
    count = BITWISE_ROWS if rows is None else rows

    def cost(method: str) -> float:
        size, positions = {"direct": (1, 9), "winograd2": (2, 16), "winograd4": (4, 36)}[method]
        items = count * math.ceil(H / size) * math.ceil(W / size)
        # In products: reading a weight takes about as long as multiplying it by a dozen items.
        return positions * (items + 12)

    # F4 is never taken for a map that is a single F4 tile: such layers could need three packings of their weights, for
    # a small part of the time of a large batch.
    return min((m for m in allowed if m != "winograd4" or H * W > 16), key=cost)
