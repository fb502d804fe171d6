"""Multi-head attention over the pixels of a row, or the tokens of its text, without storing the matrix of its weights.

The algorithm is that of Dao et al. 2022. `attention` builds the launch, `_attention` is the kernel, and
`attention_reference` computes the same in torch.
"""

from __future__ import annotations

import dataclasses
import math

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, cdiv, choose, device_of, name_of, operation, power_of_two, wide

PRECISION = "tf32x3"  # of float32 products; see `fastdiff.kernels.conv`


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Config):
    """Tile sizes of attention.

    A head with more than ``width`` channels is split into parts. Each part is computed by a program of its own, which
    computes all weights again, ``depth`` channels at a time. The same loop runs if ``depth`` is less than ``width``.
    """

    queries: int  # per program
    keys: int  # per iteration
    width: int  # channels of the result per program
    depth: int  # channels per product of queries and keys
    single: bool = False  # whether it is for float32, whose operands take twice the shared memory


# The float32 sums [queries, width] are in registers, all other operands in shared memory. Larger tiles come first.
CANDIDATES = (
    AttentionConfig(num_warps=4, num_stages=3, queries=128, keys=64, width=64, depth=64),
    AttentionConfig(num_warps=4, num_stages=3, queries=64, keys=64, width=64, depth=64),
    AttentionConfig(num_warps=8, num_stages=2, queries=128, keys=64, width=128, depth=128),
    AttentionConfig(num_warps=4, num_stages=2, queries=64, keys=64, width=128, depth=128),
    AttentionConfig(num_warps=8, num_stages=2, queries=64, keys=64, width=256, depth=256),
    AttentionConfig(num_warps=8, num_stages=2, queries=64, keys=64, width=256, depth=64),
    AttentionConfig(num_warps=8, num_stages=2, queries=64, keys=32, width=128, depth=32, single=True),
)


@overlap.overlaps
@triton.jit
def _attention(
    q, k, v, dst, entry, tokens, keys, head_dim, q_stride, kv_stride, dst_stride, scale,
    WHOLE: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a block of queries of one head, over blocks j of keys (Dao et al. 2022, algorithm 1):

        s = q k_j^T scale,    m' = max(m, max s),    p = 2^(s - m'),    l' = l 2^(m - m') + sum p,
        acc' = acc 2^(m - m') + p v_j,    result = acc / l                   scale = log2(e) / sqrt(head_dim)

    Grid: (blocks of queries x parts of a head's channels, heads, rows). ``tokens`` are the queries of a row, ``keys``
    its keys. entry None: the keys of row i are those at i. WHOLE: the head is a single part. SHARED: k and v are the
    same tensor, which a whole head reads once.
    """
    overlap.wait()
    blocks = tl.cdiv(tokens, QUERIES)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, WIDTH)
    j = tl.arange(0, KEYS)
    q += row * tokens * q_stride + head * head_dim
    at = row
    if entry is not None:
        at = tl.load(entry + row)
    k += at * keys * kv_stride + head * head_dim
    v += at * keys * kv_stride + head * head_dim
    if WHOLE:
        mask = (t < tokens)[:, None] & (d < head_dim)[None, :]
        query = tl.load(q + t[:, None] * q_stride + d[None, :], mask=mask, other=0.0)
    out = part * WIDTH + d
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    for begin in range(0, keys, KEYS):
        there = begin + j < keys
        key_at = (begin + j)[:, None] * kv_stride
        if WHOLE:
            key = tl.load(k + key_at + d[None, :], mask=there[:, None] & (d < head_dim)[None, :], other=0.0)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        else:
            s = tl.zeros([QUERIES, KEYS], tl.float32)
            for first in range(0, head_dim, DEPTH):
                i = (first + tl.arange(0, DEPTH))[None, :]
                query = tl.load(q + t[:, None] * q_stride + i, mask=(t < tokens)[:, None] & (i < head_dim), other=0.0)
                key = tl.load(k + key_at + i, mask=there[:, None] & (i < head_dim), other=0.0)
                s = tl.dot(query, tl.trans(key), s, input_precision=PRECISION)
        s = tl.where(there[None, :], s * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        if WHOLE and SHARED:
            value = key
        else:
            value = tl.load(v + key_at + out[None, :], mask=there[:, None] & (out < head_dim)[None, :], other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        largest = larger
    acc /= total[:, None]
    dst += row * tokens * dst_stride + head * head_dim
    mask = (t < tokens)[:, None] & (out < head_dim)[None, :]
    tl.store(dst + t[:, None] * dst_stride + out[None, :], acc.to(dst.dtype.element_ty), mask=mask)


@operation
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    dst: Tensor,
    *,
    heads: int,
    head_dim: int,
    entry: Tensor | None = None,
    chosen_for: int | None = None,
    config: AttentionConfig | None = None,
) -> Launch:
    """Compute dst = softmax(q k^T / sqrt(head_dim)) v, head by head, over the keys of a row.

    These are its pixels or, with ``entry``, int64 [rows], the tokens of the text at k[entry] and v[entry], which are
    [texts, 1, tokens, heads head_dim]: rows may share a text.

    Scores are relative to the largest one so far, so that no exponential overflows. In bfloat16 and float16 the weights
    are rounded to that dtype before they are multiplied by v. All other tensors are [rows, H, W, heads head_dim], and
    all are contiguous or slices of wider pixels; without v, v is k.
    """
    rows, H, W, inner = dst.shape
    assert inner == heads * head_dim == k.shape[3]
    assert q.shape == dst.shape
    assert entry is not None or k.shape == dst.shape
    assert v is None or (v.shape, v.stride()) == (k.shape, k.stride())
    for x in (q, k, dst):
        (_, height, width, _), step = x.shape, x.stride(2)
        assert x.stride() == (height * width * step, width * step, step, 1), "pixels follow each other at one stride"
    tokens, keys = H * W, k.shape[1] * k.shape[2]
    like = chosen_for or rows
    key = f"{like}x{tokens}x{heads}x{head_dim} " + f"of {keys} " * (entry is not None) + name_of(q.dtype)
    device = device_of(q)
    config = config or choose(
        "attention.attention", key, device, CANDIDATES,
        lambda: heuristic(like * heads, tokens, head_dim, q.dtype.itemsize > 2, device.processors),
    )  # fmt: skip
    width = min(config.width, max(16, power_of_two(head_dim)))
    whole = head_dim <= width and config.depth >= width
    return Launch(
        op="attention.attention",
        key=key,
        kernel=_attention,
        grid=(cdiv(tokens, config.queries) * cdiv(head_dim, width), heads, rows),
        arguments={
            "q": q, "k": k, "v": k if v is None else v, "dst": dst, "entry": entry, "tokens": tokens, "keys": keys,
            "head_dim": head_dim, "q_stride": q.stride(2), "kv_stride": k.stride(2), "dst_stride": dst.stride(2),
            "scale": math.log2(math.e) / math.sqrt(head_dim), "WHOLE": whole,
            "SHARED": v is None, "PRECISION": PRECISION if q.dtype.itemsize > 2 else "ieee",
            "QUERIES": config.queries, "KEYS": config.keys,
            "WIDTH": width, "DEPTH": config.depth,
        },
        config=config,
        candidates=CANDIDATES,
        reference=lambda: attention_reference(q, k, k if v is None else v, dst, heads, entry),
    )  # fmt: skip


def heuristic(sequences: int, tokens: int, head_dim: int, single: bool, processors: int) -> AttentionConfig:
    """Choose the narrowest configuration that holds a whole head, or else the one that splits heads.

    Among several of that width it is the largest tile with at least one program per multiprocessor.
    """
    kind = [config for config in CANDIDATES if config.single == single]
    holding = [config for config in kind if config.depth == config.width >= head_dim]
    width = min((config.width for config in holding), default=None)
    fitting = [config for config in holding if config.width == width] or kind[-1:]
    for config in fitting:
        if sequences * cdiv(tokens, config.queries) >= processors:
            return config
    return fitting[-1]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, dst: Tensor, heads: int, entry: Tensor | None = None) -> None:
    """Compute dst = softmax(q k^T / sqrt(head_dim)) v in torch."""
    if entry is not None:
        k, v = k[entry], v[entry]
    q, k, v = (wide(x).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
    dst.copy_((weights @ v).transpose(1, 2).reshape(dst.shape))
