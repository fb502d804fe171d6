"""Cases of convolutions and of the operations that follow them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from fastdiff.core.lower import lower
from fastdiff.core.program import STRIP, Conv, Program
from fastdiff.kernels import conv, epilogue, library
from fastdiff.kernels.conv import ConvConfig, LayerConfig, Problem
from fastdiff.kernels.launch import Launch, name_of
from fastdiff.kernels.library import LIBRARY
from fastdiff.kernels.tiles import Blocks
from fastdiff.unet import UNet
from tests.support.cases_norm import meta, normal, poison
from tests.support.kernel_harness import DTYPES, Case, accumulations
from tests.support.unets import RESNET_BLOCKS, THREE_LEVELS, change

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a convolution and its operands. size: height and width of the source."""

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

    def operands(self, dtype: torch.dtype) -> dict[str, Any]:
        C, k = sum(self.channels), self.kernel
        weight = normal(self.outputs, C, k, k, seed=9) / (C * k * k) ** 0.5
        return {
            "src": tuple(normal(self.rows, *self.size, c, seed=i, dtype=dtype) for i, c in enumerate(self.channels)),
            "weight": conv.pack(weight, self.channels, dtype, self.upsample),
            "stride": self.stride,
            "padding": self.padding,
        }

    def shipped(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the operands on the meta device."""
        phases, taps = (4, 4) if self.upsample else (1, self.kernel**2)
        columns = -(-self.outputs // conv.MULTIPLE) * conv.MULTIPLE
        return {
            "src": tuple(meta(self.rows, *self.size, c, dtype=dtype) for c in self.channels),
            "weight": tuple(meta(phases, taps, c, columns, dtype=dtype) for c in self.channels),
            "stride": self.stride,
            "padding": self.padding,
        }

    def laid_out(self, operands: dict[str, Any], config: LayerConfig) -> dict[str, Any]:
        """Return the operands in the layout that a layer in ``config`` needs."""
        if config != LIBRARY:
            return operands
        _, H, W, N = self.out
        ends = [(v - 1) * self.stride + self.kernel - n for v, n in zip((H, W), self.size, strict=True)]
        after = max(self.padding, *(end - self.padding for end in ends))
        weight = conv.unpack(operands["weight"], N)[0]
        dtype = operands["src"][0].dtype
        return operands | {
            "weight": library.pack(weight, self.channels, dtype, (self.padding, after)), "padding": after
        }  # fmt: skip

    def accumulations(self, dtype: torch.dtype) -> float:
        """Return how many times tensor cores add to a sum."""
        return accumulations(dtype, (4 if self.upsample else self.kernel**2) * sum(self.channels))

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
SMALL = ConvConfig(4, 2, 64, 32, 64)  # not shipped: less to interpret
SMALL_SPLIT = dataclasses.replace(SMALL, splits=3)


def conv_case(
    shape: Shape, dtype: torch.dtype, config: ConvConfig = SMALL, more: str = "", to: torch.dtype | None = None
) -> Case:
    """Build a case of `conv.conv`. more: words for `finishing`; to: dtype of dst, if it differs."""
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
    return Case(
        conv.conv, arguments, writes, apart={"statistics": 3}, accumulations=shape.accumulations(dtype), config=config
    )  # fmt: skip


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
    if dtype == torch.float16 and name not in ("3x3", "upsampled", "of three channels"):
        continue
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
    return Case(conv.partial, arguments, ("sums",), accumulations=shape.accumulations(dtype), config=config)


for name in ("3x3", "3x3 of two", "upsampled", "of three channels", "linear"):
    CASES[f"partial {name}"] = functools.partial(partial_case, SHAPES[name], torch.float32, SMALL_SPLIT)
for config in conv.SPLIT_CANDIDATES:
    dtype = torch.bfloat16 if config in conv.HALF_SPLIT else torch.float32
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


# Layers of lowered networks -------------------------------------------------------------------------------------------


class Layer:
    """Several launches as one."""

    def __init__(self, launches: tuple[Launch, ...]):
        self.launches = launches
        self.op = launches[-1].op

    def __call__(self) -> None:
        for launch in self.launches:
            launch()

    def reference(self) -> None:
        for launch in self.launches:
            launch.reference()


def layer(*args: Any, **kwargs: Any) -> Layer:
    return Layer(conv.layer(*args, **kwargs))


def harvest(program: Program, rows: int) -> dict[Shape, set[str]]:
    """Return all distinct convolutions, with the words for `finishing` of all their occurrences."""
    found: dict[Shape, set[str]] = {}
    for op in program.ops:
        if not isinstance(op, Conv):
            continue
        source, target = program.buffers[op.src[0]], program.buffers[op.dst]
        channels = tuple(program.buffers[name].shape[2] for name in op.src)
        if op.norm is not None:  # another kernel has then concatenated the sources
            channels = (sum(channels),)
        shape = Shape(
            rows, source.shape[:2], channels, target.shape[2], op.kernel, op.stride, op.padding[0], op.upsample
        )
        assert shape.out[1:] == target.shape
        words = found.setdefault(shape, set())
        words |= {"statistics"} if target.statistics else set()
        words |= {"entry"} if op.emb is not None else set()
        words |= {"nchw"} if op.dst == "out" else set()
        if op.residual is not None:
            words |= {"residual"} if program.buffers[op.residual].shape == target.shape else {"residual", "doubled"}
    return found


def layer_case(shape: Shape, dtype: torch.dtype, more: str, config: LayerConfig | None = None) -> Case:
    rows, H, W, N = shape.out
    operands = shape.operands(dtype)
    config = config or shape.problem(operands).choose(splits=True)
    operands = shape.laid_out(operands, config)
    arguments = operands | finishing(shape, dtype, more)
    size = conv.workspace(
        operands["src"], operands["weight"], shape.out, stride=shape.stride, statistics="statistics" in more,
        config=config,
    )  # fmt: skip
    nchw = "nchw" in more
    arguments |= {"dst": poison(*((rows, N, H, W) if nchw else shape.out), dtype=torch.float32 if nchw else dtype)}
    writes, scratch = ("dst",), ()
    if config == LIBRARY:
        size = size * torch.float32.itemsize // dtype.itemsize  # room for as many sums in float64
        scratch = ("workspace",)  # its contents have another dtype
    elif size:
        writes += ("workspace",)
    arguments |= {"workspace": poison(size) if size else None}
    if "statistics" in more:
        arguments["statistics"] = poison(rows, -(-H // STRIP), 2, N)
        writes += ("statistics",)
    count = 0.0 if config == LIBRARY else shape.accumulations(dtype)
    return Case(
        layer, arguments, writes, apart={"statistics": 2}, accumulations=count, config=config, scratch=scratch
    )  # fmt: skip


# Layers of small networks, in the configurations that heuristics choose.
NETWORKS = {
    "odd groups": (change(**THREE_LEVELS, norm_num_groups=6), (12, 12)),
    "resnet blocks": (change(**RESNET_BLOCKS, num_class_embeds=3), (8, 8)),
}
for network, (config, size) in NETWORKS.items():
    with torch.device("meta"):
        program = lower(UNet(config), size)
    for (shape, words), dtype in zip(
        harvest(program, rows=2).items(), itertools.cycle([torch.bfloat16, torch.float32, torch.float16])
    ):
        CASES[f"layer of {network}: {shape}"] = functools.partial(layer_case, shape, dtype, " ".join(sorted(words)))
for name, more, config in [
    ("3x3", "entry residual statistics", SMALL_SPLIT),
    ("upsampled", "embedding residual statistics", SMALL_SPLIT),
    ("upsampled", "entry statistics", SMALL),
    ("wide", "statistics", SMALL_SPLIT),
    ("wide", "statistics", SMALL),
]:
    case = functools.partial(layer_case, SHAPES[name], torch.float32, more, config)
    CASES[f"layer {name}, {more}, {config}"] = case
for name, more, dtype in [
    ("3x3", "entry residual statistics", torch.bfloat16),
    ("3x3 of one pixel", "embedding statistics", torch.float16),
    ("strided", "statistics", torch.bfloat16),
    ("strided, padded behind", "entry residual statistics", torch.float32),
    ("1x1 of two", "residual statistics", torch.float16),
    ("of three channels", "nchw", torch.bfloat16),
    ("wide", "statistics", torch.float32),
]:
    case = functools.partial(layer_case, SHAPES[name], dtype, more, LIBRARY)
    CASES[f"layer {name}, {more}, {name_of(dtype)}, by {LIBRARY}"] = case


# Compiled launches ----------------------------------------------------------------------------------------------------


def finishing_on_meta(shape: Shape, dtype: torch.dtype, more: str, parts: int) -> dict[str, Any]:
    rows, H, W, N = shape.out
    nchw = "nchw" in more
    arguments: dict[str, Any] = {"bias": meta(N), "nchw": nchw}
    arguments["dst"] = meta(rows, N, H, W) if nchw else meta(*shape.out, dtype=dtype)
    if "entry" in more:
        arguments |= {"table": meta(64, 16 * N), "entry": meta(rows, dtype=torch.int64), "offset": N}
    if "residual" in more:
        arguments["residual"] = meta(*shape.out, dtype=dtype)
    if "statistics" in more:
        arguments["statistics"] = meta(rows, -(-H // STRIP), parts, 2, N)
    return arguments


def conv_launch(shape: Shape, dtype: torch.dtype, config: ConvConfig, more: str) -> Launch:
    operands = shape.shipped(dtype)
    if config.splits > 1:
        return conv.partial(**operands, sums=meta(config.splits, *shape.out), config=config)
    parts = shape.problem(operands).blocks(config).parts
    return conv.conv(**operands, **finishing_on_meta(shape, dtype, more, parts), config=config)


def finish_launch(shape: Shape, splits: int, dtype: torch.dtype, config: epilogue.FinishConfig) -> Launch:
    sums = meta(splits, *shape.out, dtype=dtype if splits == 1 else torch.float32)
    parts = Blocks.of(*shape.size, config.pixels).parts
    return epilogue.finish(
        sums, **finishing_on_meta(shape, dtype, "entry residual statistics", parts), config=config
    )  # fmt: skip


# Each configuration at a layer of the CIFAR-10 network that has it.
LARGE, FEW = Shape(16, (32, 32), (256,), 256), Shape(16, (32, 32), (128,), 3)
for config in (*conv.CANDIDATES, *conv.SPLIT_CANDIDATES):
    dtype = torch.bfloat16 if config.depth == conv.HALF[0].depth else torch.float32
    shape, more = (FEW, "nchw") if config.channels == 16 else (LARGE, "entry residual statistics")
    SHIPPED[f"conv {name_of(dtype)} {config}"] = functools.partial(conv_launch, shape, dtype, config, more)
for name, shape, dtype, more in [
    ("two sources", Shape(16, (16, 16), (256, 128), 256, kernel=1, padding=0), torch.bfloat16, ""),
    ("upsampled", Shape(16, (16, 16), (256,), 256, upsample=True), torch.bfloat16, "statistics"),
    ("strided fp16", Shape(16, (32, 32), (256,), 256, stride=2, padding=0), torch.float16, "statistics"),
    ("of three channels", Shape(16, (32, 32), (3,), 128), torch.bfloat16, "statistics"),
]:
    SHIPPED[f"conv {name}"] = functools.partial(conv_launch, shape, dtype, conv.HALF[0], more)
for config, splits in zip(epilogue.FINISH_CANDIDATES, (1, 16, 4), strict=True):
    SHIPPED[f"finish {splits} {config}"] = functools.partial(finish_launch, LARGE, splits, torch.bfloat16, config)
for config in epilogue.COMBINE_CANDIDATES:
    blocks = Blocks.of(256, 256, 128)
    SHIPPED[f"combine {config}"] = functools.partial(
        epilogue.combine, meta(1, blocks.strips, blocks.parts, 2, 128), meta(1, blocks.strips, 2, 128), blocks=blocks,
        config=config,
    )  # fmt: skip
ONE = Shape(1, (1, 1), (1,), 1)
for name, shape, config, more in [
    ("conv", ONE, conv.HALF[2], "entry residual statistics"),
    ("conv out", ONE, conv.HALF[2], "nchw"),
    ("conv upsampled", dataclasses.replace(ONE, channels=(32,), upsample=True), conv.HALF[2], "entry statistics"),
    ("partial", dataclasses.replace(ONE, channels=(16, 16)), conv.HALF_SPLIT[0], ""),
]:
    ONES[name] = functools.partial(conv_launch, shape, torch.bfloat16, config, more)
ONES["finish"] = functools.partial(finish_launch, ONE, 4, torch.bfloat16, epilogue.FINISH_CANDIDATES[2])
ONES["combine"] = functools.partial(
    epilogue.combine, meta(1, 1, 4, 2, 1), meta(1, 1, 2, 1), blocks=Blocks.of(1, 1, 64, upsample=True)
)
