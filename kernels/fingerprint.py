"""A checksum of many tensors in one launch, by which changes of weights are noticed.

Its value is that of `fastdiff.backends.network.plain_checksum`, which needs about ten launches for each tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import overlap
from fastdiff.kernels.launch import Config, Launch, operation


@dataclasses.dataclass(frozen=True)
class FingerprintConfig(Config):
    """A program sums the words of one part of a tensor, of at most `WORDS` words of 8 bytes."""


WORDS = 4096
CANDIDATES = (FingerprintConfig(num_warps=8, num_stages=1),)
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # as in `plain_checksum`


def parts(tensors: Sequence[Tensor]) -> Tensor:
    """Return the address, the number of the first word and the bytes of every part of contiguous tensors.

    The result is int64 [parts, 3] on the CPU. Words are numbered from 1 on, through all tensors.
    """
    found, first = [], 1
    for tensor in tensors:
        begin = np.arange(0, tensor.nbytes, 8 * WORDS, dtype=np.int64)
        found.append(
            np.stack([tensor.data_ptr() + begin, first + begin // 8, np.minimum(tensor.nbytes - begin, 8 * WORDS)], 1)
        )
        first += -(-tensor.nbytes // 8)
    return torch.from_numpy(np.concatenate(found or [np.zeros((0, 3), np.int64)]))


@overlap.overlaps
@triton.jit
def _fingerprint(table, sums, WORDS: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Sum the mixed words of one part. Grid: (parts,)."""
    overlap.wait()
    part = tl.program_id(0)
    address = tl.load(table + 3 * part)
    number = tl.load(table + 3 * part + 1)
    size = tl.load(table + 3 * part + 2)
    i = tl.arange(0, WORDS)
    word = tl.zeros([WORDS], tl.uint64)
    if (address | size) % 8 == 0:
        word = tl.load(address.to(tl.pointer_type(tl.uint64)) + i, mask=8 * i < size, other=0)
    else:  # a tensor that begins or ends within a word is read byte by byte
        for k in tl.static_range(8):
            byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + (8 * i + k), mask=8 * i + k < size, other=0)
            word |= byte.to(tl.uint64) << (8 * k)
    x = word ^ ((number + i).to(tl.uint64) * STEP)
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    x = tl.where(8 * i < size, x ^ (x >> 31), 0)
    tl.store(sums + part, tl.sum(x, axis=0).to(tl.int64, bitcast=True))


@operation
def fingerprint(
    tensors: Sequence[Tensor], table: Tensor, sums: Tensor, *, config: FingerprintConfig | None = None
) -> Launch:
    """Sum the mixed words of every part of ``tensors``, which are contiguous.

    table has their `parts`, on their device; sums are int64 [parts]. The sum of these, modulo 2^64, is the checksum.
    """
    assert table.shape == (len(sums), 3)
    return Launch(
        op="fingerprint",
        key="",
        kernel=_fingerprint,
        grid=(len(sums),),
        arguments={
            "table": table, "sums": sums, "WORDS": WORDS, "STEP": STEP, "FIRST": FIRST, "SECOND": SECOND,
        },
        config=config or CANDIDATES[0],
        candidates=CANDIDATES,
        reference=lambda: _reference(tensors, sums),
    )  # fmt: skip


def _reference(tensors: Sequence[Tensor], sums: Tensor) -> None:
    """Compute sums in NumPy, of one tensor after the other."""
    found, first = [], 1
    for tensor in tensors:
        data = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        words = np.pad(data, (0, -len(data) % 8)).view(np.uint64)
        for begin in range(0, len(words), WORDS):
            x = words[begin : begin + WORDS]
            x = x ^ (np.arange(first + begin, first + begin + len(x), dtype=np.uint64) * np.uint64(STEP))
            x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
            found.append((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
        first += len(words)
    sums.copy_(torch.from_numpy(np.array(found, dtype=np.uint64).view(np.int64)))
