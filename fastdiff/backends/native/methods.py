"""The choice of an algorithm for each convolution: Winograd's F(4x4, 3x3) or F(2x2, 3x3), or the direct one."""

from __future__ import annotations

import math

from fastdiff.backends.base import BITWISE_ROWS
from fastdiff.core.program import Conv, Program

METHODS = ("winograd4", "winograd2", "direct")
GROWTH = {"winograd4": 36 / 9, "winograd2": 16 / 9, "direct": 1.0}  # of the weights of a 3x3 kernel
# Bytes of the weights of convolutions and products and their packed copies, which leaves the rest of 8 GB for others.
MOST_BYTES = 7_300_000_000
MOST_COPIES = 2.2  # larger networks: their bytes as multiples of those of the weights


def _cost(op: Conv, program: Program, rows: int | None, method: str) -> float:
    """Return the products for each pair of input and output channels of a 3x3 convolution at stride 1."""
    H, W, _ = program.buffers[op.dst].shape
    count = BITWISE_ROWS if rows is None else rows
    size, positions = {"direct": (1, 9), "winograd2": (2, 16), "winograd4": (4, 36)}[method]
    items = count * math.ceil(H / size) * math.ceil(W / size)
    # In products: reading a weight takes about as long as multiplying it by a dozen items.
    return positions * (items + 12)


def choose_method(op: Conv, program: Program, rows: int | None, allowed: tuple[str, ...] = METHODS) -> str:
    """Choose the algorithm for a convolution: Winograd's where the kernel is 3x3 at stride 1 and there are many tiles.

    A tile costs 36 (F4) or 16 (F2) products per pair of channels for 16 or 4 pixels, against 9 products per pixel. But
    the transformed weights are 4 or 16/9 times as large, and few tiles cannot hide the time of reading them. If
    ``rows``, the number of rows of the batch, is None, the layer's shape alone decides.
    """
    if op.kernel != 3 or op.stride != 1 or op.padding != (1, 1):
        return "direct"
    H, W, _ = program.buffers[op.dst].shape
    # F4 is never taken for a map that is a single F4 tile: such layers could need three packings of their weights, for
    # a small part of the time of a large batch.
    return min((m for m in allowed if m != "winograd4" or H * W > 16), key=lambda m: _cost(op, program, rows, m))


def choose_methods(
    program: Program, rows: int | None, allowed: tuple[str, ...] = METHODS, itemsize: int = 4
) -> dict[str, str]:
    """Choose the algorithm of each convolution by `choose_method`, by the buffer that it writes, in bounded memory.

    A network's weights in float32 and the packed ones, of ``itemsize`` bytes each, take at most `MOST_BYTES`, or
    `MOST_COPIES` times its weights if that is more. Beyond that the convolutions whose next smaller form costs the
    fewest products for each byte that it saves take that form. Neither the memory of the machine nor other programs
    matter, so that the bits of images do not depend on them.
    """
    convs = {op.dst: op for op in program.ops if isinstance(op, Conv)}
    methods = {dst: choose_method(op, program, rows, allowed) for dst, op in convs.items()}
    sizes = {dst: _weights(op, program) for dst, op in convs.items()}
    own = 4 * sum(sizes.values())
    left = max(MOST_BYTES, MOST_COPIES * own) - own
    left -= itemsize * sum(size * GROWTH[methods[dst]] for dst, size in sizes.items())

    def price(dst: str) -> tuple[float, float]:
        """Return the products for each byte saved by the next smaller form, and these bytes."""
        now = methods[dst]
        smaller = METHODS[METHODS.index(now) + 1]
        saved = itemsize * sizes[dst] * (GROWTH[now] - GROWTH[smaller])
        more = _cost(convs[dst], program, rows, smaller) - _cost(convs[dst], program, rows, now)
        return more * sizes[dst] / 9 / saved, saved

    while left < 0 and any(method != "direct" for method in methods.values()):
        dst = min((dst for dst, method in methods.items() if method != "direct"), key=lambda dst: price(dst)[0])
        left += price(dst)[1]
        methods[dst] = METHODS[METHODS.index(methods[dst]) + 1]
    return methods


def _weights(op: Conv, program: Program) -> int:
    """Return the number of a convolution's weights."""
    inputs, outputs = program.channels(op)
    return inputs * outputs * (1 + op.geglu) * op.kernel**2
