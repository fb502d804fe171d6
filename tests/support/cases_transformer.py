"""Cases of a transformer's LayerNorm and of its gated layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from fastdiff.kernels import conv, geglu, layer_norm
from fastdiff.kernels.geglu import GegluConfig
from fastdiff.kernels.launch import Launch, name_of
from fastdiff.kernels.layer_norm import LayerNormConfig
from tests.support.cases_norm import meta, normal, poison
from tests.support.kernel_harness import DTYPES, Case, accumulations

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}

# LayerNorm ------------------------------------------------------------------------------------------------------------


def layer_norm_case(
    size: tuple[int, int, int], C: int, dtype: torch.dtype, mean: float = 0.0, config: LayerNormConfig | None = None
) -> Case:
    arguments = {
        "src": normal(*size, C, dtype=dtype, mean=mean), "gamma": normal(C, seed=1, mean=1.0),
        "beta": normal(C, seed=2), "dst": poison(*size, C, dtype=dtype), "eps": 1e-5,
    }  # fmt: skip
    return Case(layer_norm.layer_norm, arguments, ("dst",), config=config)


for (size, C), dtype in itertools.product([((1, 1, 1), 3), ((2, 5, 7), 20), ((1, 3, 3), 130)], DTYPES):
    CASES[f"layer_norm {size} {C} {name_of(dtype)}"] = functools.partial(layer_norm_case, size, C, dtype)
CASES["layer_norm of one channel"] = functools.partial(layer_norm_case, (2, 1, 3), 1, torch.float32)
CASES["layer_norm of a large mean"] = functools.partial(layer_norm_case, (2, 2, 3), 40, torch.float32, 1e4)
for norm_config in layer_norm.CANDIDATES:
    CASES[f"layer_norm in {norm_config}"] = functools.partial(
        layer_norm_case, (2, 3, 5), 70, torch.bfloat16, 0.5, norm_config
    )

# GEGLU ----------------------------------------------------------------------------------------------------------------


def geglu_case(
    size: tuple[int, int, int], C: int, N: int, dtype: torch.dtype, config: GegluConfig, spread: float = 1.0
) -> Case:
    """Build a case in which values and gates have so large a ``spread``."""
    weight = spread * normal(2 * N, C, 1, 1, seed=1) / C**0.5
    (packed,) = conv.pack(weight, (C,), dtype)
    arguments = {
        "src": normal(*size, C, dtype=dtype), "weight": packed, "bias": normal(2 * N, seed=2),
        "dst": poison(*size, N, dtype=dtype),
    }  # fmt: skip
    return Case(geglu.geglu, arguments, ("dst",), accumulations=2 * accumulations(dtype, C), config=config)


SMALL = GegluConfig(4, 1, pixels=16, channels=16, depth=16)  # not shipped: less to interpret
for (size, C, N), dtype in itertools.product([((1, 1, 1), 3, 5), ((2, 3, 7), 20, 24), ((1, 4, 4), 32, 16)], DTYPES):
    CASES[f"geglu {size} {C}->{N} {name_of(dtype)}"] = functools.partial(geglu_case, size, C, N, dtype, SMALL)
CASES["geglu of large gates"] = functools.partial(geglu_case, (1, 5, 5), 24, 17, torch.float32, SMALL, 8.0)
for config in geglu.CANDIDATES:
    CASES[f"geglu in {config}"] = functools.partial(
        geglu_case, (1, 5, 5), 72, 40, torch.bfloat16 if config in geglu.HALF else torch.float32, config
    )

# Compiled launches ----------------------------------------------------------------------------------------------------


def layer_norm_launch(size: tuple[int, int, int], C: int, dtype: torch.dtype, config: LayerNormConfig | None) -> Launch:
    return layer_norm.layer_norm(
        meta(*size, C, dtype=dtype), meta(C), meta(C), meta(*size, C, dtype=dtype), eps=1e-5, config=config
    )  # fmt: skip


def geglu_launch(size: tuple[int, int, int], C: int, N: int, dtype: torch.dtype, config: GegluConfig | None) -> Launch:
    columns = -(-2 * N // conv.MULTIPLE) * conv.MULTIPLE
    return geglu.geglu(
        meta(*size, C, dtype=dtype), meta(1, 1, C, columns, dtype=dtype), meta(2 * N), meta(*size, N, dtype=dtype),
        config=config,
    )  # fmt: skip


# At the widths of Stable Diffusion's transformers, the last one at more channels than any published network has.
for norm_config, C in zip(layer_norm.CANDIDATES, (320, 640, 1280, 1280, 4096), strict=True):
    SHIPPED[f"layer_norm {C} {norm_config}"] = functools.partial(
        layer_norm_launch, (2, 32, 32), C, torch.bfloat16, norm_config
    )
SHIPPED["layer_norm fp32"] = functools.partial(layer_norm_launch, (2, 64, 64), 320, torch.float32, None)
for config in geglu.CANDIDATES:
    dtype = torch.bfloat16 if config in geglu.HALF else torch.float32
    SHIPPED[f"geglu {name_of(dtype)} {config}"] = functools.partial(geglu_launch, (2, 32, 32), 640, 2560, dtype, config)
SHIPPED["geglu of odd sizes"] = functools.partial(geglu_launch, (2, 7, 5), 44, 172, torch.float16, geglu.HALF[-1])
ONES["layer_norm"] = functools.partial(layer_norm_launch, (1, 1, 1), 1, torch.bfloat16, None)
ONES["geglu"] = functools.partial(geglu_launch, (1, 1, 1), 1, 1, torch.bfloat16, None)
