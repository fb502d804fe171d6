"""Cases of the input, the embedding, pooling, and the checksum of weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.kernels import embed, fingerprint, input, pool
from fastdiff.kernels.launch import Config, Launch, name_of
from tests.support.cases_norm import configured, meta, normal, poison
from tests.support.kernel_harness import DTYPES, Case

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}


def pool_case(
    shape: tuple[int, ...], channels: tuple[int, ...], dtype: torch.dtype, normed: bool, mean: float = 0.0
) -> Case:
    rows, H, W = shape
    C = sum(channels)
    src = tuple(normal(rows, 2 * H, 2 * W, c, seed=i, dtype=dtype, mean=mean) for i, c in enumerate(channels))
    arguments = {"src": src, "dst": poison(rows, H, W, C, dtype=dtype), "silu": normed}
    if normed:
        arguments["norm"] = torch.stack([normal(rows, C, seed=5 + i, mean=mean * (i == 0)) for i in range(3)], 1)
    return Case(pool.pool, arguments, ("dst",))


for (shape, channels), dtype in itertools.product([((1, 1, 1), (3,)), ((2, 5, 3), (20, 12))], DTYPES):
    for normed in (False, True):
        name = f"pool {shape} {channels} {name_of(dtype)}" + " normed" * normed
        CASES[name] = functools.partial(pool_case, shape, channels, dtype, normed)
CASES["pool at a large mean"] = functools.partial(pool_case, (1, 3, 5), (130,), torch.float32, True, 1e4)
for config in pool.CANDIDATES:
    build = functools.partial(pool_case, (2, 5, 3), (40, 30), torch.bfloat16, True)
    CASES[f"pool in {config}"] = functools.partial(configured, build, config)


def input_case(
    shape: tuple[int, ...], dtype: torch.dtype, rows: int, combine: str | None, center: bool, padding: int, timed: bool
) -> Case:
    B, C, H, W = shape
    width = C * (2 if combine == "concat" else 1) + padding
    arguments = {
        "x": normal(*shape), "dst": poison(rows, H, W, width, dtype=dtype), "center": center, "combine": combine,
        "class_image": None if combine is None else normal(rows, H, W, C, seed=1),
    }  # fmt: skip
    if timed:
        arguments |= {
            "table": torch.arange(B) % 2, "row": torch.arange(B) * 2 % 5, "timestep": torch.full((rows,), -1),
            "entries": torch.randperm(10, generator=torch.Generator().manual_seed(0)).view(2, 5),
        }  # fmt: skip
    return Case(input.input, arguments, ("dst", "timestep") if timed else ("dst",))


for shape, dtype in itertools.product([(1, 1, 1, 1), (3, 3, 9, 35)], DTYPES):
    for combine in input.COMBINE:
        name = f"input {shape} {name_of(dtype)} {combine}"
        CASES[name] = functools.partial(
            input_case, shape, dtype, 2 * shape[0], combine, combine != "add", 5, combine is None
        )
for config in input.CANDIDATES:
    build = functools.partial(input_case, (2, 3, 20, 20), torch.bfloat16, 2, "concat", True, 0, True)
    CASES[f"input in {config}"] = functools.partial(configured, build, config)


def embed_case(rows: int, features: int, dtype: torch.dtype, indexed: bool) -> Case:
    time, classes = (normal(9 if indexed else rows, features, seed=i) for i in range(2))
    entries = [torch.arange(rows) * k % 9 if indexed else None for k in (2, 5)]
    arguments = {
        "time": time, "timestep": entries[0], "classes": classes, "label": entries[1],
        "dst": poison(rows, features, dtype=dtype),
    }  # fmt: skip
    return Case(embed.embed, arguments, ("dst",))


for (rows, features), dtype, indexed in itertools.product([(1, 1), (3, 200)], DTYPES, (False, True)):
    name = f"embed {rows}x{features} {name_of(dtype)}" + " indexed" * indexed
    CASES[name] = functools.partial(embed_case, rows, features, dtype, indexed)


def fingerprint_of(
    tensors: tuple[Tensor, ...], sums: Tensor, skip: int = 0, config: Config | None = None
) -> Launch:  # fmt: skip
    """`fingerprint.fingerprint` without the first numbers of every tensor."""
    own = [t[skip:] for t in tensors]
    return fingerprint.fingerprint(own, fingerprint.parts(own).to(sums.device), sums, config=config)


def fingerprint_case(dtype: torch.dtype, lengths: tuple[int, ...], skip: int) -> Case:
    random = torch.Generator().manual_seed(0)
    least = torch.iinfo(dtype)
    tensors = tuple(torch.randint(least.min, least.max, (n,), dtype=dtype, generator=random) for n in lengths)
    arguments = {"tensors": tensors, "sums": torch.zeros(len(fingerprint.parts([t[skip:] for t in tensors])))}
    arguments["sums"] = arguments["sums"].to(torch.int64)
    return Case(fingerprint_of, arguments | {"skip": skip}, ("sums",))


for dtype, lengths, skip in [
    (torch.int64, (5, 4100, 1), 0),
    (torch.int16, (3, 8000, 16400), 0),  # tensors that end within a word
    (torch.int16, (7, 9000), 1),  # and that begin within one
    (torch.uint8, (1, 70), 3),
]:
    CASES[f"fingerprint {dtype} {lengths} from {skip}"] = functools.partial(fingerprint_case, dtype, lengths, skip)


# Compiled launches.

SHIPPED["fingerprint"] = functools.partial(
    fingerprint.fingerprint, (), meta(4400, 3, dtype=torch.int64), meta(4400, dtype=torch.int64)
)


def pool_launch(normed: bool, dtype: torch.dtype, config: Config | None = None) -> Launch:
    norm = meta(16, 3, 384) if normed else None
    src = (meta(16, 32, 32, 256, dtype=dtype), meta(16, 32, 32, 128, dtype=dtype))
    return pool.pool(src, meta(16, 16, 16, 384, dtype=dtype), norm=norm, silu=normed, config=config)


for config in pool.CANDIDATES:
    SHIPPED[f"pool bf16 {config}"] = functools.partial(pool_launch, True, torch.bfloat16, config)
SHIPPED["pool fp32"] = functools.partial(pool_launch, False, torch.float32)


def input_launch(combine: str | None, dtype: torch.dtype, config: Config | None = None) -> Launch:
    whole = functools.partial(meta, dtype=torch.int64)
    return input.input(
        meta(4, 3, 32, 32), meta(8, 32, 32, 8, dtype=dtype), combine=combine,
        class_image=None if combine is None else meta(8, 32, 32, 3), table=whole(4), row=whole(4),
        entries=whole(2, 51), timestep=whole(8), config=config,
    )  # fmt: skip


for config in input.CANDIDATES:
    SHIPPED[f"input bf16 {config}"] = functools.partial(input_launch, None, torch.bfloat16, config)
SHIPPED["input fp32 concat"] = functools.partial(input_launch, "concat", torch.float32)
for dtype in DTYPES:
    SHIPPED[f"embed {name_of(dtype)}"] = functools.partial(
        embed.embed, meta(64, 512), meta(8, dtype=torch.int64), meta(11, 512), meta(8, dtype=torch.int64),
        meta(8, 512, dtype=dtype),
    )  # fmt: skip

for channels in (1, 2):
    src = (meta(1, 2, 2, 1),) * channels
    ONES[f"pool {channels}"] = functools.partial(
        pool.pool, src, meta(1, 1, 1, channels), norm=meta(1, 3, channels), silu=True
    )
for combine in input.COMBINE:
    whole = functools.partial(meta, dtype=torch.int64)
    ONES[f"input {combine}"] = functools.partial(
        input.input, meta(1, 1, 1, 1), meta(1, 1, 1, 2 if combine == "concat" else 1), combine=combine,
        class_image=None if combine is None else meta(1, 1, 1, 1), table=whole(1), row=whole(1), entries=whole(1, 1),
        timestep=whole(1),
    )  # fmt: skip
ONES["embed"] = functools.partial(embed.embed, meta(1, 1), None, meta(1, 1), None, meta(1, 1))
