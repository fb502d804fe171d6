"""Cases of attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from fastdiff.kernels import attention
from fastdiff.kernels.attention import CANDIDATES, AttentionConfig
from fastdiff.kernels.launch import Launch, name_of
from tests.support.cases_norm import meta, normal, poison
from tests.support.kernel_harness import DTYPES, Case, accumulations

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}

# Weights are rounded to the dtype of the operands, which changes a sum of products by as much of its largest term.
BANDS = {torch.float32: 4.0, torch.float16: 2.0**12, torch.bfloat16: 2.0**15}


def attention_case(
    size: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, config: AttentionConfig, scale: float
) -> Case:
    """Build a case in which q, k and v are slices of one tensor."""
    qkv = normal(*size, 3 * heads * head_dim, dtype=dtype)
    qkv[..., : heads * head_dim] *= scale
    q, k, v = qkv.chunk(3, dim=3)
    arguments = {
        "q": q, "k": k, "v": v, "dst": poison(*size, heads * head_dim, dtype=dtype), "heads": heads,
        "head_dim": head_dim,
    }  # fmt: skip
    return Case(
        attention.attention, arguments, ("dst",), band=BANDS[dtype], config=config,
        accumulations=both_products(size, head_dim, dtype),
    )  # fmt: skip


def both_products(size: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> float:
    """Return how many times tensor cores add to a score and to a sum of values.

    An error of a large score is a relative error of its exponential, but then the reference in float32 has it too.
    """
    _, H, W = size
    return accumulations(dtype, head_dim) + accumulations(dtype, H * W)


def shared_case(size: tuple[int, int, int], C: int, dtype: torch.dtype, config: AttentionConfig) -> Case:
    """Build a case in which k and v are the same map."""
    q, x = (normal(*size, C, seed=seed, dtype=dtype) for seed in (0, 1))
    arguments = {"q": q, "k": x, "v": None, "dst": poison(*size, C, dtype=dtype), "heads": 1, "head_dim": C}
    return Case(
        attention.attention, arguments, ("dst",), band=BANDS[dtype], config=config,
        accumulations=both_products(size, C, dtype),
    )  # fmt: skip


SMALL = AttentionConfig(4, 1, queries=16, keys=16, width=32, depth=16)  # not shipped: small, to save time
# rows, H, W; heads; channels of one. Tokens and channels that divide nothing; heads in parts.
SIZES = [((2, 1, 1), 1, 8), ((1, 5, 7), 2, 5), ((2, 4, 4), 4, 16), ((1, 3, 7), 2, 25), ((1, 5, 5), 1, 70)]
for (size, heads, head_dim), dtype in itertools.product(SIZES, DTYPES):
    CASES[f"attention {size} {heads}x{head_dim} {name_of(dtype)}"] = functools.partial(
        attention_case, size, heads, head_dim, dtype, SMALL, 1.0
    )
CASES["attention of large scores"] = functools.partial(attention_case, (1, 5, 7), 2, 24, torch.float32, SMALL, 300.0)
for (size, C), dtype in itertools.product([((1, 1, 1), 16), ((2, 5, 7), 24), ((1, 5, 5), 70)], DTYPES):
    CASES[f"attention of one map {size} {C} {name_of(dtype)}"] = functools.partial(shared_case, size, C, dtype, SMALL)
for config in CANDIDATES:
    dtype = torch.float32 if config.single else torch.bfloat16
    width = 2 * config.width if config.depth < config.width else config.width
    CASES[f"attention in {config}"] = functools.partial(attention_case, (1, 9, 9), 1, width, dtype, config, 1.0)
    CASES[f"attention of one map in {config}"] = functools.partial(shared_case, (1, 9, 9), width - 8, dtype, config)


def text_case(
    size: tuple[int, int, int], tokens: int, heads: int, head_dim: int, dtype: torch.dtype, config: AttentionConfig
) -> Case:
    """Build a case in which rows read some of four texts, with scores of a spread of 3; the others are NaN."""
    inner = heads * head_dim
    entry = torch.tensor([3, 1, 3])[: size[0]]
    bank = poison(4, 1, tokens, 2 * inner, dtype=dtype)
    bank[entry] = normal(4, 1, tokens, 2 * inner, seed=1, dtype=dtype)[entry]
    k, v = bank.chunk(2, dim=3)
    arguments = {
        "q": (3.0 * normal(*size, inner)).to(dtype), "k": k, "v": v, "dst": poison(*size, inner, dtype=dtype),
        "heads": heads, "head_dim": head_dim, "entry": entry,
    }  # fmt: skip
    count = accumulations(dtype, head_dim) + accumulations(dtype, tokens)
    return Case(attention.attention, arguments, ("dst",), band=BANDS[dtype], config=config, accumulations=count)


# The last block of keys has one of its keys, several, or all.
for (size, tokens, heads, head_dim), dtype in itertools.product(
    [((3, 1, 1), 1, 1, 8), ((3, 5, 7), 77, 2, 5), ((2, 3, 7), 16, 2, 16), ((1, 2, 2), 33, 1, 70)], DTYPES
):
    CASES[f"attention of {size} to texts {tokens} {heads}x{head_dim} {name_of(dtype)}"] = functools.partial(
        text_case, size, tokens, heads, head_dim, dtype, SMALL
    )
for config in (CANDIDATES[0], CANDIDATES[-1]):
    CASES[f"attention to texts in {config}"] = functools.partial(
        text_case, (2, 4, 5), 77, 1, 40, torch.float32 if config.single else torch.bfloat16, config
    )


# Compiled launches ----------------------------------------------------------------------------------------------------


def attention_launch(
    size: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, shared: bool, config: AttentionConfig
) -> Launch:
    inner = heads * head_dim
    qkv = meta(*size, (1 if shared else 3) * inner, dtype=dtype)
    q, k, v = (qkv, meta(*size, inner, dtype=dtype), None) if shared else qkv.chunk(3, dim=3)
    return attention.attention(
        q, k, v, meta(*size, inner, dtype=dtype), heads=heads, head_dim=head_dim, config=config
    )  # fmt: skip


for config in CANDIDATES:
    # A head as wide as the map has k and v in one; narrower heads are slices of q, k and v.
    shared = config.width >= 256
    head_dim = 2 * config.width if config.depth < config.width else config.width
    dtype = torch.float32 if config.single else torch.bfloat16
    SHIPPED[f"attention {head_dim} {name_of(dtype)} {config}"] = functools.partial(
        attention_launch, (16, 16, 16), 512 // head_dim, head_dim, dtype, shared, config
    )
for shared in (False, True):
    ONES[f"attention {'of one map' * shared}"] = functools.partial(
        attention_launch, (1, 1, 1), 1, 1, torch.bfloat16, shared, CANDIDATES[1]
    )


def text_launch(
    size: tuple[int, int, int], tokens: int, heads: int, head_dim: int, dtype: torch.dtype,
    config: AttentionConfig | None = None,
) -> Launch:  # fmt: skip
    inner = heads * head_dim
    k, v = meta(8, 1, tokens, 2 * inner, dtype=dtype).chunk(2, dim=3)
    return attention.attention(
        meta(*size, inner, dtype=dtype), k, v, meta(*size, inner, dtype=dtype), heads=heads, head_dim=head_dim,
        entry=meta(size[0], dtype=torch.int64), config=config,
    )  # fmt: skip


# The heads of Stable Diffusion 1.5 at its levels of 64x64 and 8x8 pixels.
for side, head_dim in ((64, 40), (8, 160)):
    for dtype in (torch.bfloat16, torch.float32):
        SHIPPED[f"attention to texts {head_dim} {name_of(dtype)}"] = functools.partial(
            text_launch, (2, side, side), 77, 8, head_dim, dtype
        )
ONES["attention to texts"] = functools.partial(text_launch, (1, 1, 1), 1, 1, 1, torch.bfloat16, CANDIDATES[1])
