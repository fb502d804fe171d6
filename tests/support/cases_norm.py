"""Cases of GroupNorm: finalise, apply and group_norm."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.core.program import STRIP
from fastdiff.kernels import norm, tiles
from fastdiff.kernels.launch import Config, Launch, name_of, power_of_two
from fastdiff.kernels.tiles import Blocks
from tests.support.kernel_harness import DTYPES, Case

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + mean).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def whole_strips(H: int, W: int) -> Blocks:
    return Blocks.of(H, W, STRIP * power_of_two(W))


def block_statistics(x: Tensor, blocks: Blocks) -> Tensor:
    """Compute mean and sum of squared deviations of each block of x: [rows, strips, parts, 2, C]."""
    rows, _, _, C = x.shape
    result = x.new_empty(rows, blocks.strips, blocks.parts, 2, C)
    nothing = x.new_zeros(C)
    tiles.finish_reference(x, nothing, torch.empty_like(x), False, None, None, 0, None, 1.0, result, blocks)
    return result


def modulation(rows: int, C: int, modulated: bool, indexed: bool) -> dict[str, object]:
    if not modulated:
        return {}
    arguments = {"table": normal(5 if indexed else rows, 3 + 2 * C + 2, seed=4), "offset": 3}
    return arguments | ({"entry": torch.tensor([4, 1])} if indexed else {})


def finalise_case(
    H: int, W: int, channels: tuple[int, ...], groups: int, mean: float, modulated: bool, indexed: bool,
    blocks: tuple[Blocks, ...] = (),
) -> Case:  # fmt: skip
    rows, C = 2, sum(channels)
    blocks = blocks or (whole_strips(H, W),) * len(channels)
    parts = tuple(
        block_statistics(normal(rows, H, W, c, seed=i, dtype=torch.float64, mean=mean), of).float()
        for i, (c, of) in enumerate(zip(channels, blocks, strict=True))
    )
    arguments = {
        "statistics": parts, "gamma": normal(C, seed=2, mean=1.0), "beta": normal(C, seed=3),
        "norm": poison(rows, 3, C), "blocks": blocks, "groups": groups, "eps": 1e-5,
    }  # fmt: skip
    return Case(
        norm.finalise, arguments | modulation(rows, C, modulated, indexed), ("norm",), apart={"norm": 1}
    )  # fmt: skip


for H, W, channels, groups in [
    (1, 1, (6,), 2),
    (4, 4, (32,), 8),
    (5, 7, (20, 12), 4),  # its third group has channels of both sources
    (9, 6, (48, 16), 16),
    (30, 2, (20, 4), 1),  # strips and channels in several blocks
]:
    for modulated, indexed in [(False, False), (True, False), (True, True)]:
        name = f"finalise {H}x{W} {channels}/{groups}" + " modulated" * modulated + " indexed" * indexed
        CASES[name] = functools.partial(finalise_case, H, W, channels, groups, 0.0, modulated, indexed)
CASES["finalise of a large mean"] = functools.partial(finalise_case, 9, 6, (20, 12), 4, 1e4, False, False)
# Strips in several parts, which differ between the sources and may be behind a doubling.
IN_PARTS = (Blocks.of(10, 40, 32), Blocks.of(5, 20, 32, upsample=True))
for mean in (0.0, 1e4):
    CASES[f"finalise of parts about {mean:g}"] = functools.partial(
        finalise_case, 10, 40, (20, 12), 4, mean, False, False, IN_PARTS
    )


def group_norm_case(
    H: int, W: int, channels: tuple[int, ...], groups: int, dtype: torch.dtype, mean: float = 0.0,
    modulated: bool = False, indexed: bool = False, blocks: tuple[Blocks, ...] = (),
) -> Case:  # fmt: skip
    rows, C = 2, sum(channels)
    blocks = blocks or (whole_strips(H, W),) * len(channels)
    src = tuple(normal(rows, H, W, c, seed=i, dtype=dtype, mean=mean) for i, c in enumerate(channels))
    arguments = {
        "src": src,
        "statistics": tuple(block_statistics(x.double(), of).float() for x, of in zip(src, blocks, strict=True)),
        "gamma": normal(C, seed=2, mean=1.0), "beta": normal(C, seed=3), "dst": poison(rows, H, W, C, dtype=dtype),
        "blocks": blocks, "groups": groups, "eps": 1e-5, "silu": indexed or not modulated,
    }  # fmt: skip
    return Case(norm.group_norm, arguments | modulation(rows, C, modulated, indexed), ("dst",))


for (H, W, channels, groups), dtype in itertools.product(
    [(1, 1, (6,), 2), (5, 7, (20, 12), 4), (9, 6, (48,), 4)], DTYPES
):
    CASES[f"group_norm {H}x{W} {channels}/{groups} {name_of(dtype)}"] = functools.partial(
        group_norm_case, H, W, channels, groups, dtype
    )
for indexed in (False, True):
    CASES["group_norm modulated" + " indexed" * indexed] = functools.partial(
        group_norm_case, 5, 7, (20, 12), 4, torch.float32, 0.0, True, indexed
    )
CASES["group_norm of parts"] = functools.partial(
    group_norm_case, 10, 40, (20, 12), 4, torch.float32, 100.0, blocks=IN_PARTS
)  # fmt: skip


def apply_case(
    shape: tuple[int, ...], channels: tuple[int, ...], dtype: torch.dtype, silu: bool, mean: float = 0.0
) -> Case:
    rows, H, W = shape
    C = sum(channels)
    src = tuple(normal(rows, H, W, c, seed=i, dtype=dtype, mean=mean) for i, c in enumerate(channels))
    coefficients = torch.stack([normal(rows, C, seed=5 + i, mean=mean * (i == 0)) for i in range(3)], 1)
    arguments = {"src": src, "norm": coefficients, "dst": poison(rows, H, W, C, dtype=dtype), "silu": silu}
    return Case(norm.apply, arguments, ("dst",))


for (shape, channels), dtype in itertools.product(
    [((1, 1, 1), (3,)), ((2, 5, 7), (20, 12)), ((1, 9, 6), (48,)), ((2, 8, 8), (130, 140))], DTYPES
):
    for silu in (False, True):
        name = f"apply {shape} {channels} {name_of(dtype)}" + " silu" * silu
        CASES[name] = functools.partial(apply_case, shape, channels, dtype, silu)
CASES["apply at a large mean"] = functools.partial(apply_case, (2, 5, 7), (20, 12), torch.float32, True, 1e4)


def configured(build: Callable[[], Case], config: Config) -> Case:
    return dataclasses.replace(build(), config=config)


# Every configuration once.
for label, candidates in {
    "finalise 30x2 (20, 4)/1 modulated": norm.FINALISE_CANDIDATES,
    "apply (2, 5, 7) (20, 12) bf16 silu": norm.APPLY_CANDIDATES,
    "group_norm 5x7 (20, 12)/4 bf16": norm.GROUP_NORM_CANDIDATES,
}.items():
    for config in candidates:
        CASES[f"{label} in {config}"] = functools.partial(configured, CASES[label], config)


# Launches that are compiled: the smallest and the largest shapes of the CIFAR-10 and CelebA-HQ networks, and every
# configuration.


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def finalise_launch(H: int, channels: tuple[int, ...], modulated: bool, config: Config | None = None) -> Launch:
    C = sum(channels)
    more = {"table": meta(64, 6 * C), "entry": meta(16, dtype=torch.int64), "offset": C} if modulated else {}
    blocks = (Blocks.of(H, H, 128),) * len(channels)
    statistics = tuple(meta(16, of.strips, of.parts, 2, c) for of, c in zip(blocks, channels, strict=True))
    return norm.finalise(
        statistics, meta(C), meta(C), meta(16, 3, C), blocks=blocks, groups=32, eps=1e-6, config=config, **more
    )


def group_norm_launch(
    H: int, channels: tuple[int, ...], modulated: bool, dtype: torch.dtype, config: Config | None = None
) -> Launch:
    C = sum(channels)
    more = {"table": meta(64, 6 * C), "entry": meta(2, dtype=torch.int64), "offset": C} if modulated else {}
    blocks = (Blocks.of(H, H, 32),) * len(channels)
    statistics = tuple(meta(2, of.strips, of.parts, 2, c) for of, c in zip(blocks, channels, strict=True))
    src = tuple(meta(2, H, H, c, dtype=dtype) for c in channels)
    return norm.group_norm(
        src, statistics, meta(C), meta(C), meta(2, H, H, C, dtype=dtype), blocks=blocks, groups=32, eps=1e-6,
        silu=True, config=config, **more,
    )  # fmt: skip


def apply_launch(
    shape: tuple[int, ...], channels: tuple[int, ...], dtype: torch.dtype, silu: bool, config: Config | None = None
) -> Launch:
    rows, C = shape[0], sum(channels)
    src = tuple(meta(*shape, c, dtype=dtype) for c in channels)
    return norm.apply(src, meta(rows, 3, C), meta(*shape, C, dtype=dtype), silu=silu, config=config)


for config in norm.FINALISE_CANDIDATES:
    for channels in ((128,), (256, 128)):
        name = f"finalise {channels} {config}"
        SHIPPED[name] = functools.partial(finalise_launch, 32, channels, len(channels) == 2, config)
SHIPPED["finalise 256x256"] = functools.partial(finalise_launch, 256, (128, 128), False)
for config in norm.GROUP_NORM_CANDIDATES:
    for channels in ((128,), (256, 128)):
        SHIPPED[f"group_norm {channels} {config}"] = functools.partial(
            group_norm_launch, 32, channels, len(channels) == 2, torch.bfloat16, config
        )
SHIPPED["group_norm fp32"] = functools.partial(group_norm_launch, 64, (128, 128), False, torch.float32)
for config in norm.APPLY_CANDIDATES:
    SHIPPED[f"apply bf16 {config}"] = functools.partial(
        apply_launch, (16, 32, 32), (256, 128), torch.bfloat16, True, config
    )
for dtype in DTYPES:
    SHIPPED[f"apply {name_of(dtype)}"] = functools.partial(apply_launch, (64, 32, 32), (128,), dtype, True)
    SHIPPED[f"apply {name_of(dtype)} two"] = functools.partial(apply_launch, (1, 4, 4), (256, 256), dtype, False)

for channels in ((1,), (1, 1)):
    one = tuple(meta(1, 1, 1, 2, 1) for _ in channels), meta(len(channels)), meta(len(channels))
    alike = {"blocks": (Blocks.of(1, 1, 1),) * len(channels), "groups": 1, "eps": 1.0, "table": meta(1, 5), "offset": 1}
    ONES[f"finalise {channels}"] = functools.partial(norm.finalise, *one, meta(1, 3, len(channels)), **alike)
    ONES[f"group_norm {channels}"] = functools.partial(
        norm.group_norm,
        tuple(meta(1, 1, 1, 1) for _ in channels),
        *one,
        meta(1, 1, 1, len(channels)),
        silu=True,
        **alike,
    )
    ONES[f"apply {channels}"] = functools.partial(apply_launch, (1, 1, 1), channels, torch.bfloat16, True)
