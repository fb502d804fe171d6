"""Cases of convolutions and of what is done behind them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from cases_norm import meta, normal, poison
from kernel_harness import DTYPES, Case
from torch import Tensor

from fastdiff.kernels import conv, epilogue
from fastdiff.kernels.conv import ConvConfig, Problem
from fastdiff.kernels.launch import Launch, name_of
from fastdiff.kernels.tiles import Blocks

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a convolution's operands. size: of the source."""

    rows: int
    size: tuple[int, int]
    channels: tuple[int, ...]
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    upsample: bool = False

    @property
    def out(self) -> tuple[int, int, int, int]:
        H, W = (2 * v if self.upsample else v // self.stride for v in self.size)
        return self.rows, H, W, self.outputs

    def operands(self, dtype: torch.dtype, make: Callable[..., Tensor] | None = None) -> dict[str, Any]:
        C, k = sum(self.channels), self.kernel
        weight = normal(self.outputs, C, k, k, seed=9) / (C * k * k) ** 0.5
        return {
            "src": tuple(normal(self.rows, *self.size, c, seed=i, dtype=dtype) for i, c in enumerate(self.channels)),
            "weight": conv.pack(weight, self.channels, dtype, self.upsample),
            "stride": self.stride,
            "padding": self.padding,
        }

    def shipped(self, dtype: torch.dtype) -> dict[str, Any]:
        """On the meta device."""
        phases, taps = (4, 4) if self.upsample else (1, self.kernel**2)
        columns = -(-self.outputs // conv.MULTIPLE) * conv.MULTIPLE
        return {
            "src": tuple(meta(self.rows, *self.size, c, dtype=dtype) for c in self.channels),
            "weight": tuple(meta(phases, taps, c, columns, dtype=dtype) for c in self.channels),
            "stride": self.stride,
            "padding": self.padding,
        }

    def problem(self, operands: dict[str, Any]) -> Problem:
        return Problem.of(operands["src"], operands["weight"], self.out, self.stride)


SHAPES = {
    "3x3": Shape(2, (5, 7), (20,), 24),
    "3x3 of whole tiles": Shape(1, (8, 8), (64,), 64),
    "3x3 of one pixel": Shape(3, (1, 1), (16,), 5),
    "3x3 of 2x3": Shape(2, (2, 3), (17,), 9),
    "strided": Shape(2, (6, 10), (20,), 24, stride=2),
    "strided, padded behind": Shape(2, (8, 4), (36,), 12, stride=2, padding=0),
    "1x1": Shape(2, (6, 5), (70,), 33, kernel=1, padding=0),
    "1x1 of two": Shape(2, (4, 5), (20, 12), 24, kernel=1, padding=0),
    "3x3 of two": Shape(1, (5, 5), (36, 3), 8),
    "linear": Shape(5, (1, 1), (40,), 70, kernel=1, padding=0),
    "upsampled": Shape(2, (3, 5), (20,), 24, upsample=True),
    "upsampled wide": Shape(1, (2, 20), (16,), 8, upsample=True),
    "of three channels": Shape(2, (6, 9), (3,), 20),
    "of one channel": Shape(1, (8, 8), (1,), 16),
    "wide": Shape(1, (6, 40), (16,), 16),
}  # fmt: skip
SMALL = ConvConfig(4, 2, 32, 32, 32)  # not shipped: less to interpret
SMALL_SPLIT = dataclasses.replace(SMALL, splits=3)


def conv_case(
    shape: Shape, dtype: torch.dtype, config: ConvConfig = SMALL, more: str = "", to: torch.dtype | None = None
) -> Case:
    """more: words that say what is added. to: dst's dtype, where it is another."""
    rows, H, W, N = shape.out
    operands = shape.operands(dtype)
    arguments = operands | finishing(shape, dtype, more)
    nchw = "nchw" in more
    arguments["dst"] = poison(*((rows, N, H, W) if nchw else shape.out), dtype=to or dtype)
    writes = ("dst",)
    if "statistics" in more:
        blocks = shape.problem(operands).blocks(config)
        arguments["statistics"] = poison(rows, blocks.strips, blocks.parts, 2, N)
        writes += ("statistics",)
    return Case(conv.conv, arguments, writes, apart={"statistics": 3}, config=config)


def finishing(shape: Shape, dtype: torch.dtype, more: str) -> dict[str, Any]:
    rows, H, W, N = shape.out
    arguments: dict[str, Any] = {"bias": normal(N, seed=5, mean=1e4 if "large mean" in more else 0.0)}
    if "nchw" in more:
        arguments["nchw"] = True
    if "embedding" in more:
        arguments |= {"table": normal(rows, N + 3, seed=6, dtype=dtype), "offset": 3}
    if "entry" in more:
        arguments |= {"table": normal(7, N + 9, seed=6), "entry": torch.arange(6, 6 - rows, -1), "offset": 5}
    if "residual" in more:
        size = (H // 2, W // 2) if "doubled" in more else (H, W)
        arguments |= {"residual": normal(rows, *size, N, seed=7, dtype=dtype), "divide": 1.7}
    return arguments


for (name, shape), dtype in itertools.product(SHAPES.items(), DTYPES):
    CASES[f"conv {name} {name_of(dtype)}"] = functools.partial(conv_case, shape, dtype)
for name, more in [
    ("3x3", "entry residual statistics"),
    ("3x3 of one pixel", "embedding statistics"),
    ("3x3 of 2x3", "entry residual statistics"),
    ("strided", "statistics"),
    ("upsampled", "embedding residual doubled statistics"),
    ("upsampled wide", "statistics large mean"),
    ("1x1 of two", "residual statistics"),
    ("linear", "residual"),
    ("of three channels", "statistics"),
    ("wide", "statistics large mean entry"),
]:
    CASES[f"conv {name}, {more}"] = functools.partial(conv_case, SHAPES[name], torch.float32, SMALL, more)
CASES["conv of bf16, all but dst"] = functools.partial(
    conv_case, SHAPES["3x3"], torch.bfloat16, SMALL, "entry residual statistics", torch.float32
)
for dtype in DTYPES:
    CASES[f"conv out {name_of(dtype)}"] = functools.partial(
        conv_case, Shape(2, (6, 9), (20,), 3), dtype, SMALL, "nchw", torch.float32
    )
for config in conv.CANDIDATES:
    dtype = torch.bfloat16 if config in conv.HALF else torch.float32
    CASES[f"conv in {config}"] = functools.partial(
        conv_case, Shape(1, (6, 7), (72,), 40), dtype, config, "entry residual statistics", torch.float32
    )


def partial_case(shape: Shape, dtype: torch.dtype, config: ConvConfig) -> Case:
    arguments = shape.operands(dtype) | {"sums": poison(config.splits, *shape.out)}
    return Case(conv.partial, arguments, ("sums",), config=config)


for name in ("3x3", "3x3 of two", "upsampled", "of three channels", "linear"):
    CASES[f"partial {name}"] = functools.partial(partial_case, SHAPES[name], torch.float32, SMALL_SPLIT)
for config in conv.SPLIT_CANDIDATES:
    dtype = torch.bfloat16 if config in conv.HALF_SPLIT else torch.float16
    dtype = torch.float32 if config in conv.SINGLE_SPLIT else dtype
    CASES[f"partial in {config}"] = functools.partial(partial_case, Shape(2, (4, 4), (72,), 24), dtype, config)


# Epilogue -------------------------------------------------------------------------------------------------------------


def finish_case(shape: Shape, splits: int, dtype: torch.dtype, more: str, config: epilogue.FinishConfig) -> Case:
    rows, H, W, N = shape.out
    kind = torch.float32 if splits > 1 else dtype
    arguments = finishing(shape, dtype, more) | {"sums": normal(splits, *shape.out, seed=8, dtype=kind)}
    arguments["dst"] = poison(*((rows, N, H, W) if "nchw" in more else shape.out), dtype=dtype)
    writes = ("dst",)
    if "statistics" in more:
        blocks = Blocks.of(H, W, config.pixels)
        arguments["statistics"] = poison(rows, blocks.strips, blocks.parts, 2, N)
        writes += ("statistics",)
    return Case(epilogue.finish, arguments, writes, apart={"statistics": 3}, config=config)


for (splits, name, more), config in itertools.product(
    [
        (1, "3x3", "entry residual statistics"),
        (3, "upsampled wide", "embedding residual doubled statistics large mean"),
        (4, "of three channels", "nchw"),
    ],
    epilogue.FINISH_CANDIDATES,
):
    for dtype in DTYPES if config is epilogue.FINISH_CANDIDATES[0] else DTYPES[:1]:
        CASES[f"finish {splits} {name} {more} {name_of(dtype)} {config}"] = functools.partial(
            finish_case, SHAPES[name], splits, dtype, more, config
        )


def combine_case(H: int, W: int, upsample: bool, mean: float, config: epilogue.CombineConfig) -> Case:
    rows, C = 2, 40
    blocks = Blocks.of(H, W, 32, upsample)
    parts = torch.stack(
        [normal(rows, blocks.strips, blocks.parts, C, mean=mean), normal(rows, blocks.strips, blocks.parts, C).abs()], 3
    )
    arguments = {"parts": parts, "statistics": poison(rows, blocks.strips, 2, C), "blocks": blocks}
    return Case(epilogue.combine, arguments, ("statistics",), apart={"statistics": 2}, config=config)


for (H, W, upsample, mean), config in itertools.product(
    [(9, 40, False, 1e4), (3, 5, True, 0.0), (2, 20, True, 0.0)], epilogue.COMBINE_CANDIDATES
):
    CASES[f"combine {H}x{W}{' upsampled' * upsample} {config}"] = functools.partial(
        combine_case, H, W, upsample, mean, config
    )
