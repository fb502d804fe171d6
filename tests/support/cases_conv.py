"""Cases of convolutions and of the operations that follow them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.core.lower import lower
from fastdiff.core.program import Conv, Program
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
    "of three outputs": Shape(2, (5, 7), (40,), 3),
}  # fmt: skip
SMALL = ConvConfig(4, 2, 64, 32, 64)  # not shipped: less to interpret
SMALL_SPLIT = dataclasses.replace(SMALL, splits=3)
COLUMNS = conv.ColumnsConfig(4, 2, 64, 32, 64)


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
# Those of other numbers of warps are the same to an interpreter.
TILES = {(c.pixels, c.channels, c.depth): c for c in conv.CANDIDATES}
for config in TILES.values():
    dtype = torch.bfloat16 if config in conv.HALF else torch.float32
    CASES[f"conv in {config}"] = functools.partial(
        conv_case, Shape(1, (6, 7), (72,), 40), dtype, config, "entry residual statistics", torch.float32
    )


def partial_case(shape: Shape, dtype: torch.dtype, config: ConvConfig) -> Case:
    arguments = shape.operands(dtype) | {"sums": poison(config.splits, *shape.out)}
    return Case(conv.partial, arguments, ("sums",), accumulations=shape.accumulations(dtype), config=config)


for name in ("3x3", "3x3 of two", "upsampled", "of three channels", "linear"):
    CASES[f"partial {name}"] = functools.partial(partial_case, SHAPES[name], torch.float32, SMALL_SPLIT)
CASES["partial upsampled, not split"] = functools.partial(partial_case, SHAPES["upsampled"], torch.bfloat16, SMALL)
for config in conv.SPLIT_CANDIDATES:
    dtype = torch.bfloat16 if config in conv.HALF_SPLIT else torch.float32
    CASES[f"partial in {config}"] = functools.partial(partial_case, Shape(2, (4, 4), (72,), 24), dtype, config)

# Small maps, so that a tile has several rows, rows that do not exist, and parts of two images.
WITH_TMA = conv.HopperConfig(8, 2, 128, 128, 64)
HOPPER_SHAPES = {
    "3x3": (Shape(3, (8, 8), (72,), 136), "entry residual statistics"),
    "3x3 of 5x7": (Shape(5, (5, 7), (40,), 24), "embedding statistics large mean"),
    "3x3 of two": (Shape(3, (4, 4), (72, 24), 72), "residual"),
    "wide": (Shape(1, (6, 64), (16,), 8), "statistics entry"),
    "1x1": (Shape(9, (4, 4), (136,), 40, kernel=1, padding=0), "residual statistics"),
    "3x3 of one pixel": (Shape(3, (1, 1), (16,), 5), "embedding"),
    "padded behind alone": (Shape(2, (8, 8), (24,), 16, padding=0), "statistics"),
    "upsampled": (Shape(2, (3, 5), (24,), 24, upsample=True), "embedding residual doubled statistics"),
    "upsampled wide": (Shape(1, (4, 64), (16, 24), 8, upsample=True), "statistics"),
    "out": (Shape(3, (8, 8), (24,), 72), "nchw"),
}  # fmt: skip
for name, (shape, more) in HOPPER_SHAPES.items():
    for dtype in DTYPES[1:] if name == "3x3" else DTYPES[1:2]:
        CASES[f"hopper {name}, {more} {name_of(dtype)}"] = functools.partial(
            conv_case, shape, dtype, WITH_TMA, more, torch.float32
        )
CASES["hopper partial"] = functools.partial(partial_case, HOPPER_SHAPES["3x3 of two"][0], torch.bfloat16, WITH_TMA)
for config in conv.HOPPER:
    CASES[f"hopper in {config}"] = functools.partial(
        conv_case, Shape(3, (8, 16), (72,), 264), torch.bfloat16, config, "entry residual statistics", torch.float32
    )


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


def normed(
    sums: Tensor, bias: Tensor, dst: Tensor | None, out: Tensor, gamma: Tensor, beta: Tensor, groups: int, silu: bool,
    second: Tensor | None = None, norm_table: Tensor | None = None, norm_entry: Tensor | None = None,
    norm_offset: int = 0, config: epilogue.NormedConfig | None = None, **finish: Any,
) -> Launch:  # fmt: skip
    """`epilogue.normed` with the fields of its norm as arguments."""
    then = epilogue.Normed(out, gamma, beta, groups, 1e-5, silu, second, norm_table, norm_entry, norm_offset)
    return epilogue.normed(sums, bias, dst, then, config=config, **finish)


def normed_case(
    shape: Shape, splits: int, second: int, groups: int, dtype: torch.dtype, more: str,
    config: epilogue.NormedConfig | None = None,
) -> Case:  # fmt: skip
    """Build a case of `epilogue.normed`. second: channels of the second source; more: also "unread", "modulated"."""
    rows, H, W, N = shape.out
    C = N + second
    arguments = finishing(shape, dtype, more) | {
        "sums": normal(splits, *shape.out, seed=8, dtype=torch.float32 if splits > 1 else dtype),
        "dst": None if "unread" in more else poison(*shape.out, dtype=dtype),
        "out": poison(rows, H, W, C, dtype=dtype), "gamma": normal(C, seed=2, mean=1.0), "beta": normal(C, seed=3),
        "groups": groups, "silu": "linear" not in more,
        "second": normal(rows, H, W, second, seed=4, dtype=dtype) if second else None,
    }  # fmt: skip
    if "modulated" in more:
        arguments |= {"norm_table": normal(7 if "indexed" in more else rows, 3 + 2 * C, seed=10), "norm_offset": 3}
        arguments |= {"norm_entry": torch.arange(rows) * 3 % 7} if "indexed" in more else {}
    return Case(normed, arguments, ("out",) if "unread" in more else ("dst", "out"), config=config)


for (splits, shape, second, groups, more), dtype in itertools.product(
    [
        (4, Shape(2, (5, 7), (1,), 24), 0, 4, "entry residual"),
        (16, Shape(2, (4, 4), (1,), 20), 12, 4, "unread modulated indexed"),  # a group has channels of both sources
        (2, Shape(2, (2, 3), (1,), 24, upsample=True), 8, 2, "embedding residual doubled modulated linear"),
    ],
    DTYPES,
):
    CASES[f"normed {splits} {shape.out}+{second}/{groups} {more} {name_of(dtype)}"] = functools.partial(
        normed_case, shape, splits, second, groups, dtype, more
    )
CASES["normed of one pixel"] = functools.partial(normed_case, SHAPES["3x3 of one pixel"], 1, 0, 5, torch.float32, "")
CASES["normed large mean"] = functools.partial(
    normed_case, Shape(2, (7, 5), (1,), 20), 3, 4, 2, torch.float32, "large mean"
)  # fmt: skip
for config in epilogue.NORMED_CANDIDATES:
    CASES[f"normed in {config}"] = functools.partial(
        normed_case, Shape(1, (6, 6), (1,), 40), 2, 20, 5, torch.bfloat16, "residual", config
    )


def gather_case(shape: tuple[int, int, int], N: int, config: epilogue.GatherConfig | None = None) -> Case:
    rows, H, W = shape
    arguments = {
        "sums": normal(rows, H, W, 9 * N), "bias": normal(N, seed=1), "dst": poison(rows, N, H, W), "padding": 1
    }  # fmt: skip
    return Case(epilogue.gather, arguments, ("dst",), config=config)


for config in epilogue.GATHER_CANDIDATES:
    CASES[f"gather {config}"] = functools.partial(gather_case, (2, 9, 20), 3, config)
CASES["gather one pixel"] = functools.partial(gather_case, (1, 1, 1), 1)


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


def layer(out: Tensor | None = None, gamma: Any = None, beta: Any = None, **kwargs: Any) -> Layer:
    """`conv.layer`; with ``out``, a norm of two groups follows."""
    then = None if out is None else epilogue.Normed(out, gamma, beta, 2, 1e-5, silu=True)
    return Layer(conv.layer(**kwargs, then=then))


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
    if isinstance(config, conv.ColumnsConfig):
        weight = conv.unpack(operands["weight"], N)[0]
        operands |= {"weight": conv.pack_columns(weight, shape.channels, dtype)}
    arguments = operands | finishing(shape, dtype, more)
    size = conv.workspace(
        operands["src"], operands["weight"], shape.out, stride=shape.stride, partial="then" in more, config=config
    )
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
        blocks = shape.problem(operands).finished_blocks(config)
        arguments["statistics"] = poison(rows, blocks.strips, blocks.parts, 2, N)
        writes += ("statistics",)
    if "then" in more:
        arguments |= {"out": poison(*shape.out, dtype=dtype), "gamma": normal(N, seed=2), "beta": normal(N, seed=3)}
        writes += ("out",)
    count = 0.0 if config == LIBRARY else shape.accumulations(dtype)
    return Case(
        layer, arguments, writes, apart={"statistics": 3}, accumulations=count, config=config, scratch=scratch
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
    ("3x3", "entry residual then", SMALL_SPLIT),
    ("of three outputs", "nchw", COLUMNS),
    ("upsampled", "embedding then", SMALL),
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
    ("1x1 of two", "residual then", torch.bfloat16),
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
        arguments["statistics"] = meta(rows, Blocks.of(H, W, 128).strips, parts, 2, N)
    return arguments


def partial_launch(shape: Shape, dtype: torch.dtype, config: ConvConfig) -> Launch:
    return conv.partial(**shape.shipped(dtype), sums=meta(config.splits, *shape.out), config=config)


def conv_launch(shape: Shape, dtype: torch.dtype, config: ConvConfig, more: str) -> Launch:
    operands = shape.shipped(dtype)
    if config.splits > 1:
        return partial_launch(shape, dtype, config)
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
    SHIPPED[f"conv {name}"] = functools.partial(conv_launch, shape, dtype, conv.HALF[3], more)
for config in conv.HOPPER:
    SHIPPED[f"hopper {config}"] = functools.partial(
        conv_launch, LARGE, torch.bfloat16, config, "entry residual statistics"
    )  # fmt: skip
for name, shape, config in [
    ("two sources", Shape(16, (16, 16), (256, 128), 256), conv.HOPPER[2]),
    ("upsampled", Shape(16, (16, 16), (256,), 256, upsample=True), conv.HOPPER[0]),
]:
    SHIPPED[f"hopper {name}"] = functools.partial(conv_launch, shape, torch.float16, config, "statistics")
SHIPPED["hopper partial"] = functools.partial(partial_launch, LARGE, torch.bfloat16, conv.HOPPER[0])
for config, splits in zip(epilogue.FINISH_CANDIDATES, (1, 4, 16, 16), strict=True):
    SHIPPED[f"finish {splits} {config}"] = functools.partial(finish_launch, LARGE, splits, torch.bfloat16, config)


def normed_launch(
    shape: Shape, splits: int, second: int, dtype: torch.dtype, config: epilogue.NormedConfig | None, groups: int = 32
) -> Launch:
    rows, H, W, N = shape.out
    C = N + second
    kind = dtype if splits == 1 else torch.float32
    return normed(
        meta(splits, *shape.out, dtype=kind), meta(N), meta(*shape.out, dtype=dtype), meta(rows, H, W, C, dtype=dtype),
        meta(C), meta(C), groups, True, meta(rows, H, W, second, dtype=dtype) if second else None, meta(64, 2 * C),
        meta(rows, dtype=torch.int64), N, config, table=meta(64, 16 * N), entry=meta(rows, dtype=torch.int64), offset=N,
        residual=meta(*shape.out, dtype=dtype),
    )  # fmt: skip


def columns_launch(config: conv.ColumnsConfig, dtype: torch.dtype) -> Launch:
    src, weight = meta(16, 32, 32, 128, dtype=dtype), meta(1, 1, 128, 32, dtype=dtype)
    return conv.partial((src,), (weight,), meta(1, 16, 32, 32, 27), config=config)


for config in conv.COLUMNS_CANDIDATES:
    dtype = torch.bfloat16 if config in conv.HALF_COLUMNS else torch.float32
    SHIPPED[f"partial {config}"] = functools.partial(columns_launch, config, dtype)
for config in epilogue.GATHER_CANDIDATES:
    SHIPPED[f"gather {config}"] = functools.partial(
        epilogue.gather, meta(16, 32, 32, 27), meta(3), meta(16, 3, 32, 32), padding=1, config=config
    )
# Each configuration at a map that it is made for, behind as many shares as there are at such a map.
for config in epilogue.NORMED_CANDIDATES:
    side, splits = {8: (16, 4), 4: (8, 16), 2: (4, 16), 1: (4, 16)}[config.num_warps]
    for second in (0, 128) if config.groups == 1 else (256,):
        SHIPPED[f"normed {second} {config}"] = functools.partial(
            normed_launch, Shape(16, (side, side), (256,), 256), splits, second, torch.bfloat16, config
        )
SHIPPED["normed fp32"] = functools.partial(
    normed_launch, Shape(1, (16, 16), (256,), 256, upsample=False), 1, 256, torch.float32, None
)  # fmt: skip
ONE = Shape(1, (1, 1), (1,), 1)
for name, shape, config, more in [
    ("conv", ONE, conv.HALF[5], "entry residual statistics"),
    ("conv out", ONE, conv.HALF[5], "nchw"),
    ("conv upsampled", dataclasses.replace(ONE, channels=(32,), upsample=True), conv.HALF[5], "entry statistics"),
    ("partial", dataclasses.replace(ONE, channels=(16, 16)), conv.HALF_SPLIT[0], ""),
    ("hopper", dataclasses.replace(ONE, channels=(16,)), conv.HOPPER[2], "entry residual statistics"),
]:
    ONES[name] = functools.partial(conv_launch, shape, torch.bfloat16, config, more)
ONES["gather"] = functools.partial(epilogue.gather, meta(1, 1, 1, 9), meta(1), meta(1, 1, 1, 1), padding=1)
ONES["finish"] = functools.partial(finish_launch, ONE, 4, torch.bfloat16, epilogue.FINISH_CANDIDATES[2])
for second in (0, 1):
    ONES[f"normed {second}"] = functools.partial(normed_launch, ONE, 4, second, torch.bfloat16, None, 1)
