"""Cases of GroupNorm: finalise and apply."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.core.program import STRIP
from fastdiff.kernels import norm
from fastdiff.kernels.launch import Config, Launch, cdiv, name_of
from tests.support.interpreter import strip_statistics
from tests.support.kernel_harness import DTYPES, Case

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + mean).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def strips(H: int) -> int:
    return cdiv(H, STRIP)


def finalise_case(
    H: int, W: int, channels: tuple[int, ...], groups: int, mean: float, modulated: bool, indexed: bool
) -> Case:
    rows, C = 2, sum(channels)
    parts = tuple(
        strip_statistics(normal(rows, H, W, c, seed=i, dtype=torch.float64, mean=mean)).float()
        for i, c in enumerate(channels)
    )
    arguments = {
        "statistics": parts, "gamma": normal(C, seed=2, mean=1.0), "beta": normal(C, seed=3),
        "norm": poison(rows, 3, C), "height": H, "width": W, "groups": groups, "eps": 1e-5,
    }  # fmt: skip
    if modulated:
        arguments |= {"table": normal(5 if indexed else rows, 3 + 2 * C + 2, seed=4), "offset": 3}
        arguments |= {"entry": torch.tensor([4, 1])} if indexed else {}
    return Case(norm.finalise, arguments, ("norm",), apart={"norm": 1})


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
    return norm.finalise(
        tuple(meta(16, strips(H), 2, c) for c in channels), meta(C), meta(C), meta(16, 3, C), height=H, width=H,
        groups=32, eps=1e-6, config=config, **more,
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
for config in norm.APPLY_CANDIDATES:
    SHIPPED[f"apply bf16 {config}"] = functools.partial(
        apply_launch, (16, 32, 32), (256, 128), torch.bfloat16, True, config
    )
for dtype in DTYPES:
    SHIPPED[f"apply {name_of(dtype)}"] = functools.partial(apply_launch, (64, 32, 32), (128,), dtype, True)
    SHIPPED[f"apply {name_of(dtype)} two"] = functools.partial(apply_launch, (1, 4, 4), (256, 256), dtype, False)

for channels in ((1,), (1, 1)):
    ONES[f"finalise {channels}"] = functools.partial(
        norm.finalise, tuple(meta(1, 1, 2, 1) for _ in channels), meta(len(channels)), meta(len(channels)),
        meta(1, 3, len(channels)), height=1, width=1, groups=1, eps=1.0, table=meta(1, 5), offset=1,
    )  # fmt: skip
    ONES[f"apply {channels}"] = functools.partial(apply_launch, (1, 1, 1), channels, torch.bfloat16, True)
