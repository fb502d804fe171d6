"""Measure whole steps and the update alone, after a check against float64; a wrong one gets no speed.

The ceiling of a step is the time of its multiplications, Winograd's savings included, at the machine's peak. That of
the update is the time of a copy of as many bytes, measured in the same run.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, UNet, solvers
from fastdiff.backends import Spec, native
from fastdiff.backends.native import cost
from fastdiff.bench.timing import mean_seconds
from fastdiff.core.state import State, TableBank
from fastdiff.core.update import update
from tests.support.unets import PUBLISHED, random_unet, relative_error

extension = native.extension()
pytestmark = pytest.mark.skipif(extension is None, reason="fastdiff._native is not built")

CPU = torch.device("cpu")
ALLOWED = {"float32": 1e-5, "bfloat16": 1e-2, "bfloat16-fast": 2.5e-2}
DTYPES = list(ALLOWED) if extension is not None and extension.bf16_isas() else ["float32"]
CASES = [("ddpm-cifar10-32", b) for b in (1, 8)] + [("fashion-mnist", b) for b in (1, 16, 64)]


def network(name: str) -> UNet:
    if name in PUBLISHED:
        return random_unet(PUBLISHED[name])
    unet = Sampler.from_pretrained(name, device="cpu").unet
    assert isinstance(unet, UNet)
    return unet


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "batch"), CASES)
@torch.no_grad()
def test_step(benchmark: Any, name: str, batch: int, dtype: str) -> None:
    unet, machine = network(name), cost.ceilings()
    side = unet.config.sample_size
    assert isinstance(side, int)
    spec = Spec(
        batch, (unet.config.in_channels, side, side), cost.DTYPES[dtype], CPU, unet.config.null_label,
        fast=dtype == "bfloat16-fast",
    )  # fmt: skip
    label = [i % 10 for i in range(batch)] if unet.config.num_classes else None
    table = solvers.ddim(NoiseSchedule(), 1000)
    x = torch.randn(batch, *spec.shape, generator=torch.Generator().manual_seed(0))
    state = State.create(x.clone(), TableBank([table], CPU), label=label)
    runner = native.prepare(unet, spec)
    runner.forward(state)
    exact = copy.deepcopy(unet).double()(
        x[:1].double(), torch.full((1,), table.rows[0].t).double(), None if label is None else torch.tensor(label[:1])
    )
    assert state.out is not None
    assert relative_error(state.out[:1], exact) <= ALLOWED[dtype]

    benchmark.pedantic(runner.step, (state,), rounds=7 if batch < 32 else 4, warmup_rounds=2)

    seconds = benchmark.stats.stats.median
    estimate = cost.estimate(unet, (side, side), batch, 1, batch, dtype, machine=machine)
    assert estimate.products is not None
    assert estimate.seconds is not None
    benchmark.extra_info |= {
        "img_steps_per_s": round(batch / seconds, 1),
        "gflops": round(estimate.products / seconds / 1e9, 1),
        "share": round(estimate.products / seconds / 1e9 / machine.gflops[dtype.removesuffix("-fast")], 3),
        "predicted_over_measured": round(estimate.seconds / seconds, 2),
    }


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
@torch.no_grad()
def test_update(benchmark: Any, solver: str) -> None:
    """Measure the update of 256 images of 3x32x32 on one thread, as `Runner.update` runs it; ddpm draws noise."""
    assert extension is not None
    batch, shape = 256, (3, 32, 32)
    table = {"ddim": solvers.ddim, "ddpm": solvers.ddpm, "dpmpp_2m": solvers.dpmpp_2m}[solver](NoiseSchedule(), 50)
    bank = TableBank([table], CPU)

    def start(dtype: torch.dtype) -> State:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        state = State.create(x, bank if dtype == torch.float32 else TableBank([table], CPU, dtype))
        state.out = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        state.advance()
        return state

    def run(state: State) -> None:
        extension.update(
            state.x, state.out, bank.values, state.table, state.row, seed=state.seed, index=state.index,
            xs=state.xs, m1=state.m1, m2=state.m2, m3=state.m3,
        )  # fmt: skip

    mine, reference = start(torch.float32), start(torch.float64)
    run(mine)
    update(reference)
    assert reference.x.dtype == torch.float64
    assert relative_error(mine.x, reference.x) <= 1e-6

    benchmark.pedantic(run, (mine,), rounds=30, warmup_rounds=2)

    seconds = benchmark.stats.stats.median
    history = sum(m is not None for m in (mine.m1, mine.m2, mine.m3))
    moved = 4 * mine.x.numel() * (3 + 2 * history)  # x and out are read, x is written; a history is read and written
    copied = measure_copy(moved)
    benchmark.extra_info |= {
        "gbs": round(moved / seconds / 1e9, 1),
        "copy_gbs": round(moved / copied / 1e9, 1),
        "share": round(copied / seconds, 3),
    }


def measure_copy(moved: int) -> float:
    """Return the median seconds of a copy on one thread that reads and writes ``moved`` bytes together."""
    source = torch.ones(moved // 8)
    into, before = torch.ones_like(source), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return statistics.median(mean_seconds(lambda: into.copy_(source)) for _ in range(30))
    finally:
        torch.set_num_threads(before)
