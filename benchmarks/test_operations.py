"""Measure every operation of the cases alone, after a check against float64; a wrong one gets no speed.

GFLOP/s count the operations of the algorithm that the engine chose. The ceiling of an operation is the longer of two
times: of its multiplications at the machine's peak, and of its weights and activations at the bandwidth of the
last-level cache, or of memory if they do not fit. As the caches are warm, weights of small layers come from the second
level, so a share can exceed one.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastdiff.backends import native
from fastdiff.backends.native import cost, threads
from fastdiff.core.program import Conv
from tests.support.cases import TOLERANCE, Case, Replay, config_of

pytestmark = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")


@functools.lru_cache(maxsize=1)
def replay(network: str, rows: int) -> Replay:
    return Replay(config_of(network), rows)


@functools.lru_cache(maxsize=1)
def compiled(network: str, rows: int, dtype: str) -> native.NativeProgram:
    return replay(network, rows).compiled(native.isa(), threads.number(), cost.DTYPES[dtype])


def test_operation(benchmark: Any, case: Case, rows: int, dtype: str) -> None:
    known, engine = replay(case.network, rows), compiled(case.network, rows, dtype)
    program, machine = known.program, cost.ceilings()
    op = program.ops[case.index]
    method = engine.methods.get(op.dst, "direct")
    known.check(engine, case.index, 2 * TOLERANCE[dtype][method])

    benchmark.pedantic(engine.engine.run, (case.index, case.index + 1), rounds=25, iterations=2, warmup_rounds=2)

    seconds = benchmark.stats.stats.min  # the fastest run, as for the ceilings
    _, work = list(cost.work(engine, machine))[case.index]
    flop = rows * program.flops(op) / (cost.SAVING[method] if isinstance(op, Conv) else 1.0)
    moved = 4 * rows * program.traffic(op) + (2 if work.dtype == "bfloat16" else 4) * program.parameters(op)
    held = moved <= machine.cache_bytes
    bandwidth = machine.cache_gbs if held else machine.memory_gbs
    least = max(flop / machine.gflops[work.dtype], moved / bandwidth) / 1e9
    benchmark.extra_info |= {
        "method": method,
        "gflops": round(flop / seconds / 1e9, 1),
        "gbs": round(moved / seconds / 1e9, 1),
        "share": round(least / seconds, 3),
        "bound": "products" if flop / machine.gflops[work.dtype] > moved / bandwidth else "bytes",
    }


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield
